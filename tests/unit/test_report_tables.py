"""Tables keep every number in 80 columns, and say which run it was."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from report.curves import sketch
from report.lines import NONE, headline, limits_text, lines
from report.tables import comparison_tables, ranking_table, run_tables
from tests.report_runs import row, run, seeded_run


def shown(*parts: Any, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(*parts, sep="\n")
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 130])
def test_the_tables_of_a_run_hold_its_figures(width: int) -> None:
    found = sketch(seeded_run(requests=600))
    figures = found.statistics
    text = shown(*run_tables(found), width=width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert figures.ttft is not None
    assert figures.tbt_max is not None
    assert figures.oscillation is not None
    for cell in (
        f"{figures.served_kv_tokens:,}", f"{figures.wasted_prefill_s:,.1f}", f"{figures.ttft.p99:.2f}",
        f"{figures.tbt_max.max * 1e3:.1f}", f"{figures.oscillation.kv_tokens_std:,.0f}", "decode_room",
        f"{figures.quintiles[4].input_tokens_max:,}", f"digest: {found.digest}", "evictions", "+18.0",
    ):  # fmt: skip
        assert cell in text, cell
    assert "…" not in text


def test_what_has_no_basis_is_a_dash() -> None:
    text = shown(*run_tables(sketch(run())))
    assert "no request was rejected" in text
    assert NONE in text
    assert "digest: none, this run was not simulated" in text


def test_policies_stand_side_by_side() -> None:
    sketches = [sketch(seeded_run(n), label=f"policy p{n}") for n in range(1, 4)]
    tables = list(comparison_tables(sketches, 80))
    assert len(tables) == 1
    text = shown(*tables)
    assert "p1" in text.splitlines()[1] or "p1" in text.splitlines()[2]
    line = next(line for line in text.splitlines() if "served KV" in line)
    assert line.split()[-3:] == [f"{s.statistics.served_kv_tokens:,}" for s in sketches]
    assert max(len(line) for line in text.splitlines()) <= 80


def test_more_runs_than_fit_go_into_further_tables() -> None:
    sketches = [sketch(seeded_run(n, 50), label=f"p{n}") for n in range(1, 6)]
    assert len(list(comparison_tables(sketches, 80))) == 2
    assert len(list(comparison_tables(sketches, 130))) == 1
    assert len(list(comparison_tables(sketches, 10))) == 5


def test_the_ranking_begins_with_the_highest_goodput() -> None:
    few = sketch(run(row(ttft_s=1.0)), label="few")
    many = sketch(run(row("a", ttft_s=1.0), row("b", ttft_s=1.0)), label="many")
    text = shown(ranking_table([few, many]))
    assert text.index("many") < text.index("few")
    assert max(len(line) for line in text.splitlines()) <= 80


def test_every_run_has_the_same_lines() -> None:
    names = [[(line.group, line.name, line.unit) for line in lines(sketch(made))] for made in (run(), seeded_run())]
    assert names[0] == names[1]


def test_the_headline_names_limits() -> None:
    assert {name: behind for name, _, behind in headline(sketch(seeded_run()))}["TTFT p90"] == "limit 30 s"
    assert limits_text((), "s", 1.0) == "no limit"
    assert limits_text((0.1, 0.2), "ms", 1e3) == "limits 100 and 200 ms"
    assert limits_text((1.0, 2.0, 30.0), "s", 1.0) == "limits 1 to 30 s"
