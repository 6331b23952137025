"""Pure: one run, or several side by side, as tables that a person reads in 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from report.curves import Sketch
from report.lines import Line, count, decimal, lines, of, percent, signed
from report.seeds import over_seeds
from report.statistics import Distribution, Statistics

NAME_WIDTH = 33
"""Columns of a comparison's first column: the longest name with its unit."""

RUN_WIDTH = 12
"""Columns of one run's figures: nine digits with their commas, or the head of a digest."""

REASONS_MAX = 12
"""Rejection reasons of one run's table; the rest is one line."""


def run_tables(sketch: Sketch) -> Iterator[Table | Text]:
    """One run: what came of the requests, latencies, errors, rejections, prompt lengths, the digest."""
    figures = sketch.statistics
    yield Text(sketch.title, style="bold")
    yield _outcomes(sketch)
    yield _latencies(sketch)
    if figures.ttft_error is not None or figures.step_error is not None:
        yield _errors(figures)
    yield _rejections(figures)
    if figures.quintiles:
        yield _quintiles(figures)
    if sketch.residuals:
        yield _residuals(sketch)
    if sketch.counters:
        yield _counters(sketch)
    yield digest_line(sketch)


def digest_line(sketch: Sketch) -> Text:
    """Of the decision log. Same seed, same digest: what one compares to see whether a run was repeated."""
    return Text(f"digest: {sketch.digest}" if sketch.digest else "digest: none, this run was not simulated")


def comparison_tables(sketches: Sequence[Sketch], width: int = 80) -> Iterator[Table]:
    """A row per figure, a column per run; as many runs in one table as `width` columns hold, at least one."""
    fit = max(1, (width - NAME_WIDTH - 3) // (RUN_WIDTH + 2))
    for start in range(0, len(sketches), fit):
        yield _side_by_side(sketches[start : start + fit])


def ranking_table(sketches: Sequence[Sketch]) -> Table:
    """A row per run, the highest goodput first; oscillation in thousands of tokens."""
    table = _table("")
    table.padding = (0, 0, 0, 1)
    table.add_column("run", overflow="fold")
    heads = (
        "within\nlimits %",
        "goodput\nreq/s",
        "rejected",
        "wasted\ns",
        "TTFT\np90 s",
        "TBT\np90 ms",
        "oscil.\nktok",
    )
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for sketch in sorted(sketches, key=lambda s: -(s.statistics.effective_per_s or 0.0)):
        figures = sketch.statistics
        swing = figures.oscillation
        table.add_row(
            sketch.label,
            percent(figures.capacity),
            decimal(figures.effective_per_s, 3),
            count(figures.rejected),
            decimal(figures.wasted_prefill_s, 0),
            of(figures.ttft, "p90", 1.0, 2),
            of(figures.tbt_worst, "p90", 1e3, 1),
            decimal(None if swing is None else swing.kv_tokens_std / 1e3, 1),
        )
    return table


def seeds_table(groups: Mapping[str, Sequence[Sketch]]) -> Table:
    """A row per group of runs that differ in their seed alone: the mean, and from the lowest to the highest."""
    table = _table("Over seeds: mean (lowest to highest)")
    table.padding = (0, 0, 0, 1)
    table.add_column("runs", overflow="fold")
    for head in ("seeds", "within\nlimits %", "goodput\nreq/s", "TTFT\np90 s", "TBT\np90 ms"):
        table.add_column(head, justify="right", no_wrap=head == "seeds")
    for label, group in groups.items():
        figures = [sketch.statistics for sketch in group]
        table.add_row(
            label or "all",
            count(len(group)),
            _over([f.capacity for f in figures], 100.0, 1),
            _over([f.effective_per_s for f in figures], 1.0, 3),
            _over([None if f.ttft is None else f.ttft.p90 for f in figures], 1.0, 2),
            _over([None if f.tbt_worst is None else f.tbt_worst.p90 for f in figures], 1e3, 1),
        )
    return table


def over_seeds_table(label: str, group: Sequence[Sketch]) -> Table:
    """The main figures of runs that differ in their seed alone."""
    table = _table(f"{label or group[0].title}: {len(group)} seeds")
    table.add_column("", overflow="fold")
    for head in ("seeds", "mean", "std", "lowest", "highest"):
        table.add_column(head, justify="right", no_wrap=True)
    for figure in over_seeds(group):
        cells = (decimal(value, figure.places) for value in (figure.mean, figure.std, figure.low, figure.high))
        table.add_row(f"{figure.name}, {figure.unit}", count(figure.count), *cells)
    return table


def _over(values: Sequence[float | None], scale: float, places: int) -> str:
    """ "85.3 (84.0 to 87.1)", of the values that there are."""
    known = [value * scale for value in values if value is not None]
    if not known:
        return decimal(None, places)
    mean, low, high = (decimal(v, places) for v in (sum(known) / len(known), min(known), max(known)))
    return f"{mean} ({low} to {high})"


def _side_by_side(sketches: Sequence[Sketch]) -> Table:
    table = _table("")
    table.add_column("", width=NAME_WIDTH)
    for sketch in sketches:
        table.add_column(sketch.label, justify="right", min_width=RUN_WIDTH, overflow="fold")
    group = ""
    for row in zip(*(lines(sketch) for sketch in sketches), strict=True):
        if row[0].group != group:
            group = row[0].group
            table.add_section()
            table.add_row(Text(group, style="bold"), *[""] * len(row))
        table.add_row(_named(row[0]), *(line.text for line in row))
    return table


def _named(line: Line) -> str:
    return f"  {line.name}" + (f", {line.unit}" if line.unit else "")


def _outcomes(sketch: Sketch) -> Table:
    """The headings that the other tables do not cover."""
    table = _table("")
    table.show_header = False
    table.add_column(overflow="fold")
    table.add_column(justify="right")
    table.add_column()
    shown = ("Requests", "Within both limits", "Prompt tokens found", "Pools", "Run")
    group = ""
    for line in lines(sketch):
        if line.group not in shown or line.name == "decision log":
            continue
        if line.group != group:
            group = line.group
            table.add_section()
            table.add_row(Text(group, style="bold"), "", "")
        table.add_row(f"  {line.name}", line.text, line.unit)
    return table


def _latencies(sketch: Sketch) -> Table:
    figures = sketch.statistics
    table = _table("Latency")
    table.add_column("", no_wrap=True)
    for name in ("count", "mean", "p50", "p90", "p99", "max", "limit"):
        table.add_column(name, justify="right", no_wrap=True)
    rows: tuple[tuple[str, Distribution | None, float, int, Sequence[float]], ...] = (
        ("TTFT, s", figures.ttft, 1.0, 2, sketch.slo_ttft_s),
        ("TBT ms, worst tenth", figures.tbt_worst, 1e3, 1, sketch.slo_tbt_s),
        ("TBT ms, median", figures.tbt_p50, 1e3, 1, ()),
        ("TBT ms, longest", figures.tbt_max, 1e3, 1, ()),
    )
    for name, found, scale, places, limits in rows:
        cells = [of(found, field, scale, places) for field in ("mean", "p50", "p90", "p99", "max")]
        limit = "" if not limits else f"{limits[0] * scale:g}" + ("" if len(limits) == 1 else "…")
        table.add_row(name, count(found.count if found else 0), *cells, limit)
    return table


def _errors(figures: Statistics) -> Table:
    table = _table("Prediction error (predicted − actual)")
    table.add_column("")
    for name in ("requests", "bias", "mean size", "p90 size", "% of actual"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, error, scale, places in (
        ("TTFT, s", figures.ttft_error, 1.0, 2),
        ("step ms, by median gap", figures.step_error, 1e3, 1),
    ):
        if error is not None:
            sizes = (of(error, field, scale, places) for field in ("mean_s", "p90_s"))
            bias = signed(error.bias_s * scale, places)
            table.add_row(name, count(error.count), bias, *sizes, percent(error.relative))
    return table


def _rejections(figures: Statistics) -> Table | Text:
    if not figures.rejections:
        return Text("Rejections: no request was rejected\n", style="italic")
    table = _table("Rejections")
    table.add_column("stage")
    table.add_column("reason", overflow="fold")
    for name in ("requests", "% of all"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in figures.rejections[:REASONS_MAX]:
        table.add_row(entry.stage, entry.reason, count(entry.count), percent(entry.count / figures.requests))
    rest = sum(entry.count for entry in figures.rejections[REASONS_MAX:])
    if rest:
        table.add_row("", "others", count(rest), percent(rest / figures.requests))
    return table


def _quintiles(figures: Statistics) -> Table:
    table = _table("By prompt length")
    for name in ("prompt tokens", "requests", "accepted %", "within limits %"):
        table.add_column(name, justify="right", no_wrap=True)
    for fifth in figures.quintiles:
        length = f"{fifth.input_tokens_min:,} to {fifth.input_tokens_max:,}"
        table.add_row(length, count(fifth.count), percent(fifth.accepted), percent(fifth.effective))
    return table


def _residuals(sketch: Sketch) -> Table:
    table = _table("Costs believed, %")
    table.add_column("term", overflow="fold")
    for name in ("bias", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for term, (bias, error) in sketch.residuals.items():
        table.add_row(term, signed(bias * 100, 1), decimal(error * 100, 1))
    return table


def _counters(sketch: Sketch) -> Table:
    table = _table("Counters")
    table.show_header = False
    table.add_column("", overflow="fold")
    table.add_column("", justify="right", no_wrap=True)
    for name, number in sketch.counters.items():
        table.add_row(name, count(number))
    return table


def _table(title: str) -> Table:
    return Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", padding=(0, 1))
