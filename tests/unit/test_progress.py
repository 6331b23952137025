"""How far a command has come: lines where there is no terminal, seldom enough to be read."""

from __future__ import annotations

import io

from rich.console import Console

from cli.progress import progress


def test_without_a_terminal_a_line_comes_every_ten_seconds() -> None:
    now_s = 100.0
    said = io.StringIO()
    with progress(Console(file=said, width=40), clock=lambda: now_s) as show:
        for second in range(35):
            now_s = 100.0 + second
            show(second / 100, "simulating [early], 1 of 6 done")
    assert said.getvalue().splitlines() == [
        f"simulating [early], 1 of 6 done: {second} % after {second} s".replace(" %", "%") for second in (10, 20, 30)
    ]


def test_on_a_terminal_a_bar_goes_away() -> None:
    said = io.StringIO()
    with progress(Console(file=said, width=80, force_terminal=True, color_system=None)) as show:
        show(0.5, "simulating")
    assert "simulating" in said.getvalue()
    assert not said.getvalue().replace("\x1b[2K", "").split("\x1b[1A")[-1].strip()
