"""Shell: the one way a Halfmoon process lives: uvloop, signals, essential tasks, an exit code that tells the truth.

    run(main)    SIGTERM, SIGINT     `stop` is set: main drains and returns          exit 0
                 a second SIGINT     at once                                         exit 130
                 SIGUSR1             stacks of all threads and tasks, and every registered dump, to stderr
                 an essential task ends before `stop`                                exit 1, said in the log
                 a typed refusal to start (ConfigError, Conflict, ...)               exit 2, one line, no traceback
                 draining takes longer than `drain_s_max`                            exit 3, with a dump

The task borders of the project stand here; this is the only place where `except Exception` is right.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, NoReturn

import uvloop

from halfmoon.errors import CheckpointError, ConfigError, Conflict, NotFound, Unavailable

log = logging.getLogger("service.run")

EXIT_OK, EXIT_FAULT, EXIT_REFUSED, EXIT_DRAIN_TIMEOUT, EXIT_HARD = 0, 1, 2, 3, 130
DRAIN_S_MAX = 60.0  # a supervisor's patience; longer drains say so by argument
EXIT_S_MAX = 10.0  # from main's end to the process's: a thread that is stuck in a device must not keep it
REFUSALS = (ConfigError, Conflict, CheckpointError, NotFound, Unavailable)  # the operator's to mend, not a bug
DUMP_FRAMES_MAX = 20
DUMP_TASKS_MAX = 500  # a dump must end, and be readable, in a process with 100,000 waiting requests


class Stop:
    """The end of a process's life, and the tasks that it cannot live without. One owner: `run`."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._event = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._dumps: list[tuple[str, Callable[[], str]]] = []
        self.reason = ""

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def request(self, reason: str) -> None:
        """Ask for a drain. The first reason counts."""
        if not self.requested:
            self.reason = reason
            log.info("stopping: %s", reason)
            self._event.set()

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the request, at most `timeout_s`; True when it has come."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        return self.requested

    def spawn_essential(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Run `work` for as long as main runs; if it raises, or returns before the stop, the process ends (exit 1)."""
        return self._keep(self._group.create_task(self._essential(work, name), name=name))

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Run `work` for as long as main runs; if it raises, that is logged and nothing else happens."""
        return self._keep(self._group.create_task(_spared(work, name), name=name))

    def add_dump(self, title: str, text: Callable[[], str]) -> None:
        """Let `text()` be part of what SIGUSR1 prints: inboxes, pins, grants."""
        self._dumps.append((title, text))

    def dump(self) -> str:
        """Stacks of the loop's tasks and what `add_dump` registered."""
        parts = [_task_stacks()]
        for title, text in self._dumps:
            try:
                parts.append(f"--- {title}\n{text()}\n")
            except Exception:  # a broken dump must not end the process that it describes
                parts.append(f"--- {title}: the dump itself failed\n{traceback.format_exc()}")
        return "".join(parts)

    async def _essential(self, work: Coroutine[Any, Any, None], name: str) -> None:
        await work
        if not self.requested:
            raise EssentialTaskEnded(f"essential task {name!r} returned before the process was asked to stop")

    def _keep(self, task: asyncio.Task[None]) -> asyncio.Task[None]:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _cancel_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()


class EssentialTaskEnded(RuntimeError):
    """A task without which the process is useless has returned: a bug."""


def run(main: Callable[[Stop], Awaitable[None]], *, drain_s_max: float = DRAIN_S_MAX) -> NoReturn:
    """Run `main` to its end and exit the process. `main` returns after `stop`, having drained.

    Its `finally` clauses always run, but for a second SIGINT and an overlong drain.
    """
    sys.exit(uvloop.run(_supervised(main, drain_s_max)))


async def _supervised(main: Callable[[Stop], Awaitable[None]], drain_s_max: float) -> int:
    try:
        async with asyncio.TaskGroup() as group:
            stop = Stop(group)
            _install_signals(stop, drain_s_max)
            group.create_task(_main(main, stop), name="main")
    except Exception as error:
        return _exit_within(EXIT_S_MAX, _log_fatal(error))
    return _exit_within(EXIT_S_MAX, EXIT_OK)


async def _main(main: Callable[[Stop], Awaitable[None]], stop: Stop) -> None:
    try:
        await main(stop)
    finally:
        stop._event.set()
        stop._cancel_tasks()


async def _spared(work: Coroutine[Any, Any, None], name: str) -> None:
    try:
        await work
    except Exception:
        log.exception("task %r died; the process goes on without it", name)


def _install_signals(stop: Stop, drain_s_max: float) -> None:
    loop = asyncio.get_running_loop()

    def on_stop(number: signal.Signals) -> None:
        if stop.requested and number is signal.SIGINT:
            _exit_now(EXIT_HARD, "second SIGINT")
        if not stop.requested:
            loop.call_later(drain_s_max, _drain_timeout, stop, drain_s_max)
            stop.request(number.name)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_stop, number)
    loop.add_signal_handler(signal.SIGUSR1, lambda: print(stop.dump(), file=sys.stderr, flush=True))
    # Written by the C handler, so that a wedged loop can be seen too; then the loop's handler runs.
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True, chain=True)


def _drain_timeout(stop: Stop, drain_s_max: float) -> None:
    print(stop.dump(), file=sys.stderr, flush=True)
    _exit_now(EXIT_DRAIN_TIMEOUT, f"draining took longer than {drain_s_max:g} s")


def _exit_within(seconds: float, code: int) -> int:
    """Return `code`; if the interpreter has not ended by then (it joins every thread), exit with it all the same."""
    guard = threading.Timer(seconds, os._exit, (code,))
    guard.daemon = True
    guard.start()
    return code


def _exit_now(code: int, why: str) -> NoReturn:
    log.critical("exiting at once: %s", why)
    logging.shutdown()
    os._exit(code)


def _log_fatal(error: BaseException) -> int:
    leaves = list(_leaves(error))
    refused = all(isinstance(leaf, REFUSALS) for leaf in leaves)
    for leaf in leaves:
        log.critical("%s: %s", type(leaf).__name__, leaf, exc_info=None if refused else leaf)
    return EXIT_REFUSED if refused else EXIT_FAULT


def _leaves(error: BaseException) -> Iterable[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _task_stacks() -> str:
    tasks = sorted(asyncio.all_tasks(), key=lambda task: task.get_name())
    lines = [f"--- {len(tasks)} tasks"]
    for task in tasks[:DUMP_TASKS_MAX]:
        lines += [task.get_name(), *_frames(task)]
    return "\n".join(lines) + "\n"


def _frames(task: asyncio.Task[Any]) -> list[str]:
    """What the task awaits, outermost first (asyncio's own print_stack stops at the first await)."""
    lines: list[str] = []
    waiting: Any = task.get_coro()
    while waiting is not None and len(lines) < DUMP_FRAMES_MAX:
        frame = getattr(waiting, "cr_frame", None) or getattr(waiting, "ag_frame", None)
        if frame is not None:
            code = frame.f_code
            lines.append(f"    {code.co_qualname}  {code.co_filename}:{frame.f_lineno}")
        waiting = getattr(waiting, "cr_await", None) or getattr(waiting, "ag_await", None)
    return lines
