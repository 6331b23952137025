"""Pure: the plots of a report, as plotly's own specifications (`data`, `layout`): what to draw, not in which colours
of text and ground: those follow the reader's light or dark setting in the page.

A plot that has nothing to show is None; the page then says what that means.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, log10
from typing import Any

from report.curves import Cumulative, Sketch, rejected_by_stage
from report.lines import STAGES

Figure = dict[str, Any]
"""{"data": [...], "layout": {...}}."""

PREFILL, DECODE, GOOD, BAD, OTHER, QUIET = "#3b86c8", "#dd7f1c", "#2f9e73", "#d0455b", "#8d6cc0", "#8a929c"
SERIES = (PREFILL, DECODE, GOOD, BAD, OTHER, "#a8841a", "#2fa3a8", "#c2649a")
"""Told apart on white and on near-black, and by most colour-blind readers in this order."""

OVERLAID_MAX = len(SERIES)
"""Curves in one plot: more could not be told apart."""

STAGE_COLOURS = {"arrival": GOOD, "prefill": PREFILL, "decode": BAD}
"""Rejected early costs nothing, after prefill it costs a prefill."""

LOG_FROM = 50.0
"""Ratio of largest to smallest value from which on an axis is logarithmic."""

HIT_TIERS = (("device", "on the worker’s device"), ("dram", "in its DRAM"), ("remote", "on another node"))


LEGEND_ROW = 20
"""Pixels of a row of the legend; in the narrowest plots two names share one."""


def figure(data: list[dict[str, Any]], *, x: str, y: str, height: int = 320, **layout: Any) -> Figure:
    """A plot with titled axes; its legend, if it has one, stands above it and is given room by the plot itself."""
    axes = {"automargin": True, "zeroline": False}
    named = {"x": layout.pop("xaxis", {}), "y": layout.pop("yaxis", {})}
    rows = (len(data) + 1) // 2 if len(data) > 1 else 0
    return {
        "data": data,
        "layout": {
            "height": height + LEGEND_ROW * rows,
            "margin": {"l": 56, "r": 24, "t": 28, "b": 48},
            "xaxis": {"title": {"text": x, "standoff": 8}, **axes, **named["x"]},
            "yaxis": {"title": {"text": y, "standoff": 8}, **axes, **named["y"]},
            "legend": {"orientation": "h", "x": 0, "y": 1.08, "xanchor": "left", "yanchor": "bottom",
                       "traceorder": "normal"},
            "showlegend": len(data) > 1,
            "hovermode": "closest",
            **layout,
        },
    }  # fmt: skip


def distribution(
    curves: Sequence[tuple[str, Cumulative]], limits: Sequence[float], *, x: str, scale: float
) -> Figure | None:
    """Cumulative curves of (name, values in seconds), with the limits as dashed lines; `scale` leads to the axis' unit.

    One curve that is alone gets no legend. None if no curve has a value.
    """
    drawn = [(name, curve) for name, curve in curves if curve.values]
    if not drawn:
        return None
    data = [
        _line(name, [v * scale for v in curve.values], [s * 100 for s in curve.shares], SERIES[i % len(SERIES)])
        for i, (name, curve) in enumerate(drawn)
    ]
    smallest = min(curve.values[len(curve.values) // 100] for _, curve in drawn)
    largest = max([max(curve.values[-1] for _, curve in drawn), *limits])
    log = smallest > 0 and largest / smallest > LOG_FROM
    unit = x.rsplit(" ", 1)[-1]
    marks = [_limit_line(limit * scale, f"limit {limit * scale:g} {unit}", log) for limit in limits[:3]]
    return figure(
        data, x=x, y="requests at or below, %",
        xaxis=_log_axis(smallest * scale, largest * scale) if log else {"rangemode": "tozero"},
        yaxis={"range": [0, 103]},
        shapes=[shape for shape, _ in marks], annotations=[note for _, note in marks],
    )  # fmt: skip


def ttft(sketches: Sequence[Sketch]) -> Figure | None:
    limits = sorted({limit for sketch in sketches for limit in sketch.slo_ttft_s})
    return distribution([(s.label, s.ttft) for s in sketches], limits, x="time to first token, s", scale=1.0)


def tbt(sketches: Sequence[Sketch]) -> Figure | None:
    limits = sorted({limit for sketch in sketches for limit in sketch.slo_tbt_s})
    axis = "mean of a request’s worst tenth of gaps, ms"
    return distribution([(s.label, s.tbt_worst) for s in sketches], limits, x=axis, scale=1e3)


def loads(sketch: Sketch) -> Figure | None:
    """Both pools' loads over time, and the limit."""
    found = sketch.loads
    if not found.at_s:
        return None
    data = [
        _line("prefill pool", found.at_s, found.prefill_load, PREFILL),
        _line("decode pool", found.at_s, found.decode_load, DECODE),
    ]
    ends = [found.at_s[0], found.at_s[-1]]
    data.append(_line("limit", ends, [1, 1], BAD) | {"line": _dashed(BAD), "hoverinfo": "skip"})
    axis = {"rangemode": "tozero"}
    return figure(
        data, x="time since the run’s beginning, s", y="load (1 is the limit)", yaxis=axis, hovermode="x unified"
    )


def kv_loads(sketches: Sequence[Sketch]) -> Figure | None:
    """KV of running sequences in the decode pool: what swings."""
    drawn = [sketch for sketch in sketches if sketch.loads.at_s]
    if not drawn:
        return None
    colours = (DECODE,) if len(drawn) == 1 else SERIES
    data = [
        _line(s.label, s.loads.at_s, s.loads.decode_kv_tokens, colours[i % len(colours)]) for i, s in enumerate(drawn)
    ]
    return figure(
        data, x="time since the run’s beginning, s", y="KV in the decode pool, tokens", yaxis={"rangemode": "tozero"}
    )


def rejections(sketch: Sketch) -> Figure | None:
    """A bar per stage and reason, the most frequent on top, coloured by stage."""
    found = sketch.statistics.rejections
    if not found:
        return None
    names = [f"{STAGES.get(entry.stage, entry.stage)}: {entry.reason}" for entry in found]
    bars = {
        "type": "bar", "orientation": "h", "y": names, "x": [entry.count for entry in found], "width": 0.6,
        "text": [f"{entry.count:,}" for entry in found], "textposition": "outside", "cliponaxis": False,
        "marker": {"color": [STAGE_COLOURS.get(entry.stage, QUIET) for entry in found]},
        "hovertemplate": "%{y}: %{x:,}<extra></extra>",
    }  # fmt: skip
    height = 96 + 36 * len(found)
    axis = {"autorange": "reversed", "ticksuffix": "  ", "showgrid": False, "title": {"text": ""}}
    return figure([bars], x="requests", y="", height=height, yaxis=axis, xaxis={"rangemode": "tozero"})


def hits(sketches: Sequence[Sketch]) -> Figure | None:
    """One bar a run: where its prompt tokens were found; the rest was computed."""
    drawn = [(sketch, sketch.statistics.hits) for sketch in sketches if sketch.statistics.hits is not None]
    if not drawn:
        return None
    names = [sketch.label if len(drawn) > 1 else "prompt tokens" for sketch, _ in drawn]
    parts = [(words, [getattr(found, tier) for _, found in drawn]) for tier, words in HIT_TIERS]
    parts.append(("computed", [1 - found.total for _, found in drawn if found is not None]))
    return stacked(names, parts, (GOOD, PREFILL, DECODE, QUIET), x="prompt tokens, %", percent=True)


def stacked(
    names: Sequence[str],
    parts: Sequence[tuple[str, Sequence[float]]],
    colours: Sequence[str],
    *,
    x: str,
    percent: bool = False,
) -> Figure:
    """Horizontal bars, one a name, of successive parts; shares are shown as percentages of a whole."""
    scale = 100 if percent else 1
    unit = "%" if percent else ""
    data = [
        {
            "type": "bar", "orientation": "h", "name": part, "y": list(names), "x": [v * scale for v in values],
            "width": 0.6, "marker": {"color": colour}, "insidetextanchor": "middle", "textangle": 0,
            "text": [f"{v * scale:.1f} %" if percent else f"{v:,g}" for v in values], "textposition": "inside",
            "hovertemplate": "%{y}<br>" + part + ": %{x:,.1f} " + unit + "<extra></extra>",
            "textfont": {"color": "#ffffff"},
        }
        for (part, values), colour in zip(parts, colours, strict=False)
    ]  # fmt: skip
    axis = {"autorange": "reversed", "ticksuffix": "  ", "showgrid": False, "title": {"text": ""}}
    return figure(
        data, x=x, y="", height=124 + 32 * len(names), barmode="stack", yaxis=axis,
        uniformtext={"minsize": 10, "mode": "hide"},
        xaxis={"range": [0, 100]} if percent else {"rangemode": "tozero"},
    )  # fmt: skip


def errors(sketches: Sequence[Sketch], which: str) -> Figure | None:
    """Cumulative curves of predicted minus actual; `which` is "ttft" (s) or "step" (ms).

    The axis leaves out the outermost 1 % on either side: a few requests of a crash would flatten all others.
    """
    scale, unit, what = (1.0, "s", "TTFT") if which == "ttft" else (1e3, "ms", "decode step")
    curves = [(sketch.label, getattr(sketch, f"{which}_error")) for sketch in sketches]
    data = [
        _line(name, [v * scale for v in curve.values], [s * 100 for s in curve.shares], SERIES[i % len(SERIES)])
        for i, (name, curve) in enumerate(curves)
        if curve.values
    ]
    if not data:
        return None
    shape, note = _limit_line(0.0, "as predicted", log=False)
    shape["line"] = _dashed(QUIET)
    note["font"] = {"color": QUIET}
    inner = [_inner(curve) for _, curve in curves if curve.values]
    low, high = min(0.0, *(low for low, _ in inner)) * scale, max(0.0, *(high for _, high in inner)) * scale
    margin = 0.05 * (high - low) or 1.0
    return figure(
        data, x=f"{what} predicted − actual, {unit}", y="requests at or below, %", yaxis={"range": [0, 103]},
        xaxis={"range": [low - margin, high + margin]}, shapes=[shape], annotations=[note],
    )  # fmt: skip


def acceptance(sketch: Sketch) -> Figure | None:
    """For each fifth of prompts by length: the share accepted, and the share finished within both limits."""
    fifths = sketch.statistics.quintiles
    if not fifths:
        return None
    names = [f"{_short(f.input_tokens_min)}–{_short(f.input_tokens_max)}" for f in fifths]
    parts = (
        ("accepted", [f.accepted for f in fifths], PREFILL),
        ("within both limits", [f.effective for f in fifths], GOOD),
    )
    data = [
        {
            "type": "bar", "name": name, "x": names, "y": [v * 100 for v in values], "marker": {"color": colour},
            "text": [f"{v * 100:.0f}" for v in values], "textposition": "outside", "cliponaxis": False,
            "hovertemplate": "%{x} tokens<br>" + name + ": %{y:.1f} %<extra></extra>",
        }
        for name, values, colour in parts
    ]  # fmt: skip
    return figure(
        data, x="prompt tokens (fifths of all requests)", y="requests, %", barmode="group", bargap=0.3,
        yaxis={"range": [0, 110], "tickvals": [0, 25, 50, 75, 100]}, xaxis={"type": "category"},
    )  # fmt: skip


def acceptances(sketches: Sequence[Sketch]) -> Figure | None:
    """A line a run over the fifths; runs of the same trace have the same fifths."""
    drawn = [sketch for sketch in sketches if sketch.statistics.quintiles]
    if not drawn:
        return None
    words = ("shortest", "second", "third", "fourth", "longest")
    data = [
        _line(s.label, words[: len(s.statistics.quintiles)], [f.accepted * 100 for f in s.statistics.quintiles], colour)
        | {"mode": "lines+markers", "marker": {"size": 7}}
        for s, colour in zip(drawn, SERIES, strict=False)
    ]
    return figure(
        data, x="fifth of requests by prompt length", y="accepted, %", yaxis={"range": [0, 105]},
        xaxis={"type": "category"},
    )  # fmt: skip


def rejections_of(sketches: Sequence[Sketch]) -> Figure | None:
    """One bar a run, its parts by stage."""
    if not any(sketch.statistics.rejected for sketch in sketches):
        return None
    by_run = [rejected_by_stage(sketch.statistics) for sketch in sketches]
    stages = list(dict.fromkeys(stage for counts in by_run for stage in counts))
    parts = [(f"rejected {STAGES.get(s, s)}", [float(counts.get(s, 0)) for counts in by_run]) for s in stages]
    colours = [STAGE_COLOURS.get(stage, QUIET) for stage in stages]
    return stacked([s.label for s in sketches], parts, colours, x="requests")


def prefill_of(sketches: Sequence[Sketch]) -> Figure | None:
    """One bar a run: prefill seconds that served requests within their limits, and those that did not."""
    if not any(sketch.statistics.prefill_s for sketch in sketches):
        return None
    figures = [sketch.statistics for sketch in sketches]
    useful = [round(f.prefill_s - f.wasted_prefill_s) for f in figures]
    parts = (("useful", useful), ("wasted", [round(f.wasted_prefill_s) for f in figures]))
    return stacked([s.label for s in sketches], parts, (GOOD, BAD), x="seconds of prefill workers")


def goodput_of(sketches: Sequence[Sketch]) -> Figure:
    """Goodput over the number that was swept, a line for each combination of the rest; else, a bar a run."""
    axis = swept_number(sketches)
    groups = {} if axis is None else _by_the_rest(sketches, axis)
    if axis is None or len(groups) > OVERLAID_MAX:
        values = [round(sketch.statistics.effective_per_s or 0.0, 3) for sketch in sketches]
        return stacked([s.label for s in sketches], [("goodput", values)], (GOOD,), x="effective requests/s")
    data = [
        _line(name, [s.settings[axis] for s in group], [s.statistics.effective_per_s for s in group], colour)
        | {"mode": "lines+markers", "marker": {"size": 7}}
        for (name, group), colour in zip(groups.items(), SERIES, strict=False)
    ]
    return figure(data, x=axis, y="effective requests/s", yaxis={"rangemode": "tozero"})


def _by_the_rest(sketches: Sequence[Sketch], axis: str) -> dict[str, list[Sketch]]:
    """Runs that differ in `axis` alone, in its order, under the words for what they share."""
    groups: dict[str, list[Sketch]] = {}
    for sketch in sorted(sketches, key=lambda s: float(str(s.settings[axis]))):
        rest = ", ".join(f"{k} {sketch.settings.get(k)}" for k in differing(sketches) if k != axis)
        groups.setdefault(rest or "all", []).append(sketch)
    return groups


def differing(sketches: Sequence[Sketch]) -> list[str]:
    """Names of the settings that are not the same in all runs, in the order of the first run's."""
    names = list(dict.fromkeys(name for sketch in sketches for name in sketch.settings))
    return [name for name in names if len({repr(sketch.settings.get(name)) for sketch in sketches}) > 1]


def swept_number(sketches: Sequence[Sketch]) -> str | None:
    """The setting with the most different values, at least 3, among those that are numbers in every run."""
    numbers = {
        name: len({sketch.settings[name] for sketch in sketches})
        for name in differing(sketches)
        if all(type(sketch.settings.get(name)) in (int, float) for sketch in sketches)
    }
    best = max(numbers, key=lambda name: numbers[name], default=None)
    return best if best is not None and numbers[best] >= 3 else None


def _line(name: str, x: Sequence[Any], y: Sequence[Any], colour: str) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "lines", "name": name, "x": list(x), "y": list(y),
        "line": {"color": colour, "width": 2},
    }  # fmt: skip


def _inner(curve: Cumulative) -> tuple[float, float]:
    """Its 1st and 99th percentiles."""
    first = next(v for v, share in zip(curve.values, curve.shares, strict=True) if share >= 0.01)
    last = next(v for v, share in zip(curve.values, curve.shares, strict=True) if share >= 0.99)
    return first, last


def _limit_line(at: float, text: str, log: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """A dashed vertical line and its label beside the axis' top; an annotation on a log axis is placed by exponent."""
    place = log10(at) if log else at
    shape = {"type": "line", "x0": at, "x1": at, "yref": "paper", "y0": 0, "y1": 1, "line": _dashed(BAD)}
    note = {
        "x": place, "yref": "paper", "y": 1.0, "yanchor": "bottom", "xanchor": "center", "text": text,
        "showarrow": False, "font": {"color": BAD},
    }  # fmt: skip
    return shape, note


def _log_axis(smallest: float, largest: float) -> dict[str, Any]:
    """Ticks at 1, 2, 5 of each decade, or at 1 alone where there are many decades: written out, never as powers."""
    first, last = floor(log10(smallest)), ceil(log10(largest))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [step * 10.0**decade for decade in range(first, last + 1) for step in steps]
    shown = [tick for tick in ticks if smallest <= tick <= largest * 1.05]
    return {"type": "log", "tickmode": "array", "tickvals": shown, "ticktext": [f"{tick:,.6g}" for tick in shown]}


def _dashed(colour: str) -> dict[str, Any]:
    return {"color": colour, "width": 1.5, "dash": "dash"}


def _short(tokens: int) -> str:
    return str(tokens) if tokens < 1000 else f"{tokens / 1000:.1f}k"
