"""Shell: one supervised process: started, watched, restarted under a new epoch when it dies, ended within a bound."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from cluster.plan import ProcessSpec
from halfmoon.errors import ConfigError, Failed, HalfmoonError
from service.child import dies_with_parent
from service.run import EXIT_REFUSED
from service.settings import environment_of_child

RESTART_DELAY_S = 0.2
RESTART_DELAY_S_MAX = 5.0
HEALTHY_S = 30.0  # a process that lived this long starts again without delay
FAILED_STARTS_MAX = 3  # in a row, without having been ready: then it is a configuration fault, not a crash
CANARIES_FAILED_MAX = 3  # in a row, for one reason, before the first success: the cluster as it is set up cannot serve
LOG_TAIL_LINES = 30
CRITICAL = re.compile(r'level=critical .*?msg=("(?:[^"\\]|\\.)*"|[^"\s]\S*)')  # service.logs.LineFormatter's lines


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a process says of its start: state is "starting", "loading", "warming", "ready" or "exited".

    The conductor also says "waiting", with the reason, and "failing", with a count of canaries and their reason.
    """

    name: str
    state: str
    detail: str = ""


class SupervisedProcess:
    """Owns one child process and its log file; its child dies with this process, however this one dies."""

    def __init__(self, spec: ProcessSpec, directory: Path, on_progress: Callable[[Progress], None]) -> None:
        self.spec = spec
        self.restarts = 0
        self.ready = asyncio.Event()
        self.ready_detail = ""
        self.failure: HalfmoonError | None = None
        self.ended = asyncio.Event()
        self._on_progress = on_progress
        self._config_path = directory / f"{spec.name}.yaml"
        self._log_path = directory / f"{spec.name}.log"
        self._log_start = 0  # where the present child's lines begin: the file holds earlier runs too
        self._child: asyncio.subprocess.Process | None = None
        self._was_ready = False  # ever: what fails after that is mended by a restart, not told to whoever starts it
        self._stopping = asyncio.Event()

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child is not None and self._child.returncode is None else None

    async def run(self) -> None:
        """Keep one child alive until `stop`, or until it failed to start `FAILED_STARTS_MAX` times in a row."""
        loop = asyncio.get_running_loop()
        delay_s, failed_starts = RESTART_DELAY_S, 0
        try:
            while not self._stopping.is_set():
                started_s = loop.time()
                code = await self._run_once()
                if self._stopping.is_set():
                    return
                failed_starts = 0 if self.ready.is_set() else failed_starts + 1
                self.ready.clear()
                self._on_progress(Progress(name=self.spec.name, state="exited", detail=describe_exit(code)))
                if self.failure is not None:
                    return
                if failed_starts >= FAILED_STARTS_MAX or (failed_starts and code == EXIT_REFUSED):
                    self.failure = Failed(self.why())
                    return
                delay_s = (
                    RESTART_DELAY_S if loop.time() - started_s > HEALTHY_S else min(delay_s * 2, RESTART_DELAY_S_MAX)
                )
                await _set_within(self._stopping, delay_s)
                self.restarts += 1
        finally:
            self.ended.set()

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL after `grace_s`. Returns when the child is gone."""
        self._stopping.set()
        child = self._child
        if child is None or child.returncode is not None:
            return
        child.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(child.wait(), grace_s)
        except TimeoutError:
            child.kill()
            await child.wait()

    def kill(self) -> None:
        """End the child now; what it ran is lost."""
        self._stopping.set()
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)

    def why(self) -> str:
        """Why the present child did not start, for a person: its last critical message, or its last lines."""
        lines = self._log_lines()
        fatal = [found[1] for line in lines if (found := CRITICAL.search(line))]
        if not fatal:
            return f"{self.spec.name} did not start; the end of {self._log_path}:\n{''.join(lines) or '(no log)'}"
        message = json.loads(fatal[-1]) if fatal[-1].startswith('"') else fatal[-1]
        return f"{self.spec.name}: {message}\nlog: {self._log_path}"

    def _log_lines(self) -> list[str]:
        """The last lines of the present child."""
        if not self._log_path.exists():
            return []
        with self._log_path.open("rb") as log:
            log.seek(self._log_start)
            return [line.decode(errors="replace") for line in deque(log, maxlen=LOG_TAIL_LINES)]

    async def _run_once(self) -> int:
        self._on_progress(Progress(name=self.spec.name, state="starting"))
        try:
            child = await self._spawn()
        except OSError as error:
            self.failure = directory_error(self._log_path.parent, error)
            return EXIT_REFUSED
        if self._stopping.is_set():  # asked for while the child was being made
            child.kill()
        assert child.stdout is not None
        async for line in child.stdout:
            self._on_line(line.decode(errors="replace").strip())
        return await child.wait()

    async def _spawn(self) -> asyncio.subprocess.Process:
        self._config_path.write_text(yaml.safe_dump(self.spec.settings, sort_keys=False))
        with self._log_path.open("ab") as log:
            self._log_start = log.tell()
            command = [sys.executable, "-m", self.spec.module, "--config", str(self._config_path)]
            self._child = await asyncio.create_subprocess_exec(
                *dies_with_parent(command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=environment_of_child(),
                start_new_session=True,
            )
        return self._child

    def _on_line(self, line: str) -> None:
        state, _, detail = line.partition(" ")
        if state == "ready":
            self.ready_detail = detail
            self._was_ready = True
            self.ready.set()
        elif state == "failing" and not self._was_ready:
            self._on_failing(*detail.split(" ", 1))
        self._on_progress(Progress(name=self.spec.name, state=state, detail=detail))

    def _on_failing(self, times: str, why: str) -> None:
        """Give up on a start that fails again and again in the same way."""
        if int(times) >= CANARIES_FAILED_MAX and self.failure is None:
            self.failure = Failed(f"not ready: {times} canary requests in a row failed: {why}\nlog: {self._log_path}")
            if self.pid is not None:
                os.kill(self.pid, signal.SIGTERM)


def directory_error(directory: Path, error: OSError) -> ConfigError:
    """What the operator has to mend: no such place, no right to it, no room in it."""
    return ConfigError(
        key="directory", value=str(directory), expected=f"a directory to write to ({error.strerror or error})"
    )


def describe_exit(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


async def _set_within(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)
