"""Shell: a whole cluster on this host: Valkey, a conductor and workers, supervised; nothing outlives it."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster.plan import ClusterConfig, conductor_spec, worker_specs
from cluster.process import Progress, SupervisedProcess
from halfmoon.errors import Conflict, Failed
from service.valkey import EmbeddedValkey

WORKER_GRACE_S = 10.0  # after the conductor has drained, workers have nothing left to end
CONDUCTOR_GRACE_S = 5.0  # beyond its own drain


class LocalCluster:
    """Owns the directory (by a lock), the registry, and every process of one local cluster.

    async with LocalCluster(config, on_progress) as cluster: ready here; stopped, in order, at the end.
    """

    def __init__(self, config: ClusterConfig, on_progress: Callable[[Progress], None]) -> None:
        self.config = config
        self.directory = Path(config.directory).expanduser()
        self._on_progress = on_progress
        self._valkey: EmbeddedValkey | None = None
        self._runs: list[asyncio.Task[None]] = []
        self.workers: list[SupervisedProcess] = []
        self.conductor: SupervisedProcess | None = None
        self.addresses: dict[str, str] = {}
        """Of the APIs, once ready: "inference" and "admin"."""
        self._lock = _locked(self.directory)

    async def __aenter__(self) -> Self:
        """Start everything and wait until a canary request has made the round trip.

        Raises:
            Conflict: another cluster owns the directory, or a port is taken.
            Failed: a process does not start, or the cluster is not ready within `start_s_max`.
        """
        self._lock.__enter__()
        try:
            await self._start()
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
    def failures(self) -> list[Failed]:
        return [p.failure for p in self._processes() if p.failure is not None]

    async def _start(self) -> None:
        registry = self.config.redis or await self._start_valkey()
        specs = worker_specs(self.config, str(self.directory), registry, sorted(os.sched_getaffinity(0)))
        self.workers = [SupervisedProcess(spec, self.directory, self._on_progress) for spec in specs]
        self.conductor = SupervisedProcess(conductor_spec(self.config, registry), self.directory, self._on_progress)
        self._runs = [asyncio.create_task(p.run(), name=p.spec.name) for p in self._processes()]
        await self._until_ready()

    async def _start_valkey(self) -> str:
        self._valkey = EmbeddedValkey(self.directory)
        return await self._valkey.start()

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
            logs = "\n".join(f"--- {p.spec.name}\n{p.log_tail()}" for p in self._processes() if p.spec.name in slow)
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
            if self._valkey is not None:
                await self._valkey.stop()
            self._lock.__exit__(None, None, None)

    def _processes(self) -> list[SupervisedProcess]:
        return [*self.workers, *([self.conductor] if self.conductor is not None else [])]


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
