"""Shell: a whole cluster on this host: Valkey, a conductor and workers, supervised; nothing outlives it."""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster.plan import ClusterConfig, ProcessSpec, conductor_spec, socket_path, worker_specs
from cluster.preflight import preflight
from cluster.process import Progress, SupervisedProcess, directory_error
from halfmoon.errors import ConfigError, Conflict, Failed, HalfmoonError, Unavailable
from service.registry import Registry
from service.valkey import EmbeddedValkey

WORKER_GRACE_S = 10.0  # after the conductor has drained, workers have nothing left to end
CONDUCTOR_GRACE_S = 5.0  # beyond its own drain
REGISTRY_S_MAX = 10.0  # for a registry of the operator's own to answer; it may be starting too
REGISTRY_POLL_S = 0.5


class LocalCluster:
    """Owns the directory (by a lock), the registry, and every process of one local cluster.

    async with LocalCluster(config, on_progress) as cluster: ready here; stopped, in order, at the end.
    """

    def __init__(self, config: ClusterConfig, on_progress: Callable[[Progress], None]) -> None:
        self.config = config
        self.directory = _absolute(config.directory)
        self._on_progress = on_progress
        self.registry = None if config.redis else EmbeddedValkey(self.directory)
        self._watch: asyncio.Task[None] | None = None  # restarts the registry
        self._runs: list[asyncio.Task[None]] = []
        self.workers: list[SupervisedProcess] = []
        self.conductor: SupervisedProcess | None = None
        self.addresses: dict[str, str] = {}
        """Of the APIs, once ready: "inference" and "admin"."""
        self._lock = _locked(self.directory)

    async def __aenter__(self) -> Self:
        """Start everything and wait until a canary request has made the round trip.

        Raises:
            ConfigError: a directory that cannot be used; a setting that this host cannot fulfil.
            CheckpointError: the model cannot be served.
            Conflict: another cluster owns the directory, or a port is taken.
            Failed: a process does not start, or the cluster is not ready within `start_s_max`.
            Unavailable: the registry does not answer.
        """
        specs = self._specs()  # before anything is made: a path that is too long leaves nothing behind
        try:
            self._lock.__enter__()
        except OSError as error:
            raise directory_error(self.directory, error) from error
        try:
            await self._start(specs)
        except OSError as error:
            await self._stop()
            raise directory_error(self.directory, error) from error
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def wait(self) -> None:
        """Return when a process has given up for good (its failure says why)."""
        await asyncio.wait(self._runs, return_when=asyncio.FIRST_COMPLETED)

    @property
    def failures(self) -> list[HalfmoonError]:
        return [p.failure for p in self._processes() if p.failure is not None]

    def kill(self) -> None:
        """End every process now; a stop that is waiting for them returns."""
        if self._watch is not None:
            self._watch.cancel()
        for process in self._processes():
            process.kill()
        if self.registry is not None:
            self.registry.kill()

    def _specs(self) -> list[ProcessSpec]:
        """The workers', then the conductor's. Raises ConfigError: a directory whose path is too long."""
        registry = self.config.redis or f"unix://{socket_path(str(self.directory), 'valkey')}"
        workers = worker_specs(self.config, str(self.directory), registry, sorted(os.sched_getaffinity(0)))
        return [*workers, conductor_spec(self.config, registry)]

    async def _start(self, specs: list[ProcessSpec]) -> None:
        await asyncio.to_thread(preflight, self.config)
        if self.registry is None:
            await _answers(self.config.redis)
        else:
            await self.registry.start()
            self._watch = asyncio.create_task(self.registry.supervise(self._on_valkey), name="valkey")
        *self.workers, self.conductor = (SupervisedProcess(s, self.directory, self._on_progress) for s in specs)
        self._runs = [asyncio.create_task(p.run(), name=p.spec.name) for p in self._processes()]
        await self._until_ready()

    def _on_valkey(self, state: str, detail: str) -> None:
        self._on_progress(Progress(name="valkey", state=state, detail=detail))

    async def _until_ready(self) -> None:
        ready = [asyncio.create_task(p.ready.wait()) for p in self._processes()]
        failed = asyncio.create_task(self.wait())
        try:
            async with asyncio.timeout(self.config.start_s_max):
                pending: set[asyncio.Task[object]] = {*ready}
                while pending and not failed.done():
                    _, pending = await asyncio.wait({*pending, failed}, return_when=asyncio.FIRST_COMPLETED)
                    pending -= {failed}
        except TimeoutError:
            slow = [p.spec.name for p in self._processes() if not p.ready.is_set()]
            logs = "\n".join(p.why() for p in self._processes() if p.spec.name in slow)
            message = f"not ready after {self.config.start_s_max:g} s: {', '.join(slow)}\n{logs}"
            raise Failed(message) from None
        finally:
            for task in (*ready, failed):
                task.cancel()
        if self.failures:
            raise self.failures[0]
        self._keep_addresses()

    def _keep_addresses(self) -> None:
        """Where any port would do, the conductor keeps the one it got, over restarts too."""
        assert self.conductor is not None
        self.addresses = dict(word.split("=", 1) for word in self.conductor.ready_detail.split())
        server = self.conductor.spec.settings["server"]
        server["address"], server["admin_address"] = self.addresses["inference"], self.addresses["admin"]

    async def _stop(self) -> None:
        """The conductor first, so that running requests end; then the workers; the registry last."""
        try:
            if self.conductor is not None:
                await self.conductor.stop(self.config.drain_s + CONDUCTOR_GRACE_S)
            await asyncio.gather(*(worker.stop(WORKER_GRACE_S) for worker in self.workers))
            await asyncio.gather(*self._runs)
        finally:
            if self._watch is not None:
                self._watch.cancel()
                await asyncio.wait({self._watch})
            if self.registry is not None:
                await self.registry.stop()
            self._lock.__exit__(None, None, None)

    def _processes(self) -> list[SupervisedProcess]:
        return [*self.workers, *([self.conductor] if self.conductor is not None else [])]


def _absolute(directory: str) -> Path:
    """Sockets and children need the absolute path. Raises ConfigError where there is none."""
    if not directory:
        raise ConfigError(key="directory", value=directory, expected="a path")
    try:
        return Path(directory).expanduser().absolute()
    except RuntimeError as error:  # ~somebody
        raise ConfigError(key="directory", value=directory, expected=f"a path ({error})") from error


async def _answers(url: str) -> None:
    """Return once the registry at `url` answers.

    Raises:
        ConfigError: no URL. Unavailable: no answer within REGISTRY_S_MAX; says why.
    """
    registry = Registry(url)
    deadline_s = time.monotonic() + REGISTRY_S_MAX
    try:
        while True:
            try:
                await registry.nodes()
                return
            except Unavailable as error:
                if time.monotonic() > deadline_s:
                    raise Unavailable(f"{error}; tried for {REGISTRY_S_MAX:g} s") from error
            await asyncio.sleep(REGISTRY_POLL_S)
    finally:
        await registry.close()


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Raises Conflict where another cluster runs in this directory."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"another cluster runs in {directory}; give this one its own --directory") from None
        yield
