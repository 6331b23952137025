"""Shell: how far a command has come: a bar on a terminal, elsewhere a plain line every ten seconds; both on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cli.tables import make_console

LINE_EVERY_S = 10.0
"""Often enough to see that it lives, seldom enough for a log file."""

Show = Callable[[float, str], None]
"""Told how much is done, as a share, and of what."""


@contextmanager
def progress(console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> Iterator[Show]:
    """A bar goes away when it is done; lines stay. Nothing is said of what is done within ten seconds.

    Args:
        console: where; None: stderr.
    """
    where = console or make_console(stderr=True)
    if where.is_terminal:
        with _bar(where) as bar:
            task = bar.add_task("", total=1.0)
            yield lambda share, what: bar.update(task, completed=share, description=what)
    else:
        yield _lines(where, clock)


def _bar(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True)


def _lines(console: Console, clock: Callable[[], float]) -> Show:
    began_s = clock()
    next_s = began_s + LINE_EVERY_S

    def show(share: float, what: str) -> None:
        nonlocal next_s
        now_s = clock()
        if now_s >= next_s:
            next_s = now_s + LINE_EVERY_S
            console.print(f"{what}: {share:.0%} after {now_s - began_s:.0f} s", soft_wrap=True, markup=False)

    return show
