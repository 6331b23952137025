"""Shell: many simulations on all cores, each in a process of its own: a crash names its combination and nothing else ends."""

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
class _Running(Generic[Job, Result]):
    index: int
    process: SpawnProcess
    pipe: Connection


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
    context = multiprocessing.get_context("spawn")  # a fork would inherit threads of gRPC and numpy
    results: list[Result | Crash | None] = [None] * len(jobs)
    running: list[_Running[Job, Result]] = []
    waiting = list(enumerate(jobs))[::-1]
    try:
        while waiting or running:
            while waiting and len(running) < num_processes:
                index, job = waiting.pop()
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(theirs, work, job), daemon=True)
                process.start()
                theirs.close()
                running.append(_Running(index, process, ours))
            wait([r.pipe for r in running])
            for one in [r for r in running if r.pipe.poll()]:
                if _listen(one, results, on_progress):
                    running.remove(one)
    finally:
        for one in running:
            one.process.kill()
            one.process.join()
    return [Crash("never ran") if result is None else result for result in results]


def _listen(
    one: _Running[Job, Result], results: list[Result | Crash | None], on_progress: Callable[[int, float], None]
) -> bool:
    """Take one message; whether it was the last."""
    try:
        kind, value = one.pipe.recv()
    except EOFError:
        one.process.join()
        kind, value = "crash", f"its process ended with exit code {one.process.exitcode}"
    if kind == "progress":
        on_progress(one.index, min(value, 0.999))
        return False
    results[one.index] = Crash(value) if kind == "crash" else value
    one.pipe.close()
    one.process.join()
    on_progress(one.index, 1.0)
    return True


def _child(pipe: Connection, work: Work[Job, Result], job: Job) -> None:
    """Our own errors are told in words; any other ends the process with its traceback on stderr."""
    with suppress(BrokenPipeError):  # the parent is gone, and so are we
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
