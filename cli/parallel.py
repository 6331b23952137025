"""Shell: many simulations on all cores, in processes that do one after another: one that crashes ends no other."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Generic, TypeVar

from halfmoon.errors import Failed, HalfmoonError

Job = TypeVar("Job")
Result = TypeVar("Result")

Progress = Callable[[float], None]
"""Told how much of the work is done, 0 to 1."""

Work = Callable[[Job, Progress], Result]
"""Importable by name: it runs in another process."""


@dataclass(frozen=True)
class Crash:
    """A job that ended without a result: what its process said, or how it died."""

    why: str


@dataclass
class _Worker(Generic[Job, Result]):
    """A process that does one job after another; `index`: of the one that it is doing, None: it waits for one."""

    process: SpawnProcess
    pipe: Connection
    index: int | None = None


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def run_all(
    work: Work[Job, Result],
    jobs: Sequence[Job],
    num_processes: int,
    on_progress: Callable[[int, float], None] = lambda index, share: None,
) -> list[Result | Crash]:
    """Results in the jobs' order; a job whose process raises, exits or is killed is a Crash, and the others go on.

    on_progress: called with a job's index and its share done; 1.0 exactly once, when it has ended.
    """
    results: dict[int, Result | Crash] = {}
    waiting = list(range(len(jobs)))[::-1]
    workers: list[_Worker[Job, Result]] = []
    try:
        while waiting or any(worker.index is not None for worker in workers):
            idle = [worker for worker in workers if worker.index is None]
            while waiting and (idle or len(workers) < num_processes):
                if not idle:
                    idle.append(_started(work))
                    workers.append(idle[-1])
                worker = idle.pop()
                worker.index = waiting.pop()
                with suppress(BrokenPipeError):  # it died while it waited: its pipe says so next
                    worker.pipe.send(jobs[worker.index])
            wait([worker.pipe for worker in workers if worker.index is not None])
            for worker in [w for w in workers if w.index is not None and w.pipe.poll()]:
                _listen(worker, results, on_progress)
            workers = [worker for worker in workers if not worker.pipe.closed]
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()
    return [results[index] for index in range(len(jobs))]


def _started(work: Work[Job, Result]) -> _Worker[Job, Result]:
    context = multiprocessing.get_context("spawn")  # a fork would inherit threads of gRPC and numpy
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, work), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _listen(
    worker: _Worker[Job, Result], results: dict[int, Result | Crash], on_progress: Callable[[int, float], None]
) -> None:
    """Take one message; the pipe is closed if it was the process's last."""
    assert worker.index is not None, "a worker that has nothing to do has nothing to say"
    try:
        kind, value = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        worker.pipe.close()
        kind, value = "crash", f"its process ended with exit code {worker.process.exitcode}"
    if kind == "progress":
        on_progress(worker.index, min(value, 0.999))
        return
    results[worker.index] = Crash(value) if kind == "crash" else value
    on_progress(worker.index, 1.0)
    worker.index = None


def _child(pipe: Connection, work: Work[Job, Result]) -> None:
    """Our own errors are told in words; any other ends the process with its traceback on stderr."""
    with suppress(BrokenPipeError, EOFError):  # the parent is gone, and so are we
        while True:
            job = pipe.recv()
            try:
                result = work(job, lambda share: pipe.send(("progress", share)))
            except HalfmoonError as error:
                pipe.send(("crash", f"{type(error).__name__}: {error}"))
            else:
                pipe.send(("result", result))


def require_all(results: Sequence[Result | Crash], named: Sequence[tuple[str, str]]) -> None:
    """Raises Failed if one of `results` is a crash; `named`: each job's label and the command that repeats it alone."""
    lost = [(label, again, r.why) for r, (label, again) in zip(results, named, strict=True) if isinstance(r, Crash)]
    if lost:
        said = "\n".join(f"{label}: {why}\n  reproduce: {again}" for label, again, why in lost)
        raise Failed(f"{len(lost)} of {len(results)} simulations did not finish\n{said}")
