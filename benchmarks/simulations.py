"""Shell: what the benchmarks by simulation share: many cases on all cores, with their progress shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

from cli.parallel import Crash, Work, cores, run_all

Case = TypeVar("Case")
Seen = TypeVar("Seen")
console = Console(width=110)


def run_cases(work: Work[Case, Seen], todo: Sequence[Case], label: Callable[[Case], str]) -> dict[Case, Seen]:
    """`work` of every case. Raises SystemExit, naming them, where some crashed."""
    with Progress(console=console) as bar:
        tasks = [bar.add_task(label(case), total=1.0, visible=False) for case in todo]
        overall = bar.add_task(f"{len(todo)} simulations", total=len(todo))

        def on_progress(index: int, share: float) -> None:
            bar.update(tasks[index], completed=share, visible=share < 1.0)
            bar.advance(overall, 1.0 if share == 1.0 else 0.0)

        results = run_all(work, todo, cores(), on_progress)
    lost = [f"{case}: {result.why}" for case, result in zip(todo, results, strict=True) if isinstance(result, Crash)]
    if lost:
        raise SystemExit("\n".join(lost))
    return {case: result for case, result in zip(todo, results, strict=True) if not isinstance(result, Crash)}
