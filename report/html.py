"""Pure: HTML pages of figures, tables and what draws them; they need no network.

A page holds the plotting library (5 MB), or shares one file of it, beside or above itself, with other pages.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby

from plotly.offline import get_plotlyjs

from report import figures
from report.curves import Sketch
from report.figures import OVERLAID_MAX, Figure
from report.lines import Line, decimal, headline, lines, signed
from report.notices import left_out_of, notices
from report.page import SCRIPT, STYLE
from report.seeds import over_seeds

LIBRARY = "plotly.min.js"
"""The file that pages may share; `library()` is what it holds."""


def library() -> str:
    """The plotting library's source, in UTF-8."""
    return str(get_plotlyjs())


class Page:
    """Sections of HTML in order, and the plots to be drawn into them.

    Args:
        shared: where the library's file is, from the page; empty: the page holds it.
    """

    def __init__(self, title: str, shared: str = "") -> None:
        self._title = title
        self._shared = shared
        self._parts: list[str] = []
        self._plots: list[Figure] = []

    def add(self, html: str) -> None:
        """`html` is trusted: whatever came from outside has been escaped."""
        self._parts.append(html)

    def section(self, title: str, about: str, *plots: tuple[str, Figure | None, str]) -> None:
        """A heading, a sentence, and plots beside each other: (caption, plot, what its absence means)."""
        cells = "".join(self._plot(*plot) for plot in plots)
        about = f"<p class='about'>{escape(about)}</p>" if about else ""
        self.add(f"<section><h2>{escape(title)}</h2>{about}<div class='plots n{len(plots)}'>{cells}</div></section>")

    def _plot(self, caption: str, plot: Figure | None, absent: str) -> str:
        head = f"<h3>{escape(caption)}</h3>" if caption else ""
        if plot is None:
            return f"<figure>{head}<p class='empty'>{escape(absent)}</p></figure>"
        self._plots.append(plot)
        height = int(plot["layout"]["height"])
        return f"<figure>{head}<div id='plot{len(self._plots) - 1}' style='height:{height}px'></div></figure>"

    def html(self) -> str:
        plots = json.dumps(self._plots, allow_nan=False).replace("<", "\\u003c")
        drawn_by = f"<script src='{escape(self._shared)}'>" if self._shared else f"<script>{library()}"
        return (
            "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
            "<meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<meta name='color-scheme' content='light dark'><title>{escape(self._title)}</title>"
            f"<style>{STYLE}</style></head>\n<body><main>\n" + "\n".join(self._parts) + "\n"
            "<noscript><p class='empty'>The plots need JavaScript; the tables do not.</p></noscript></main>\n"
            f"{drawn_by}</script>\n"
            f"<script id='plots' type='application/json'>{plots}</script>\n<script>{SCRIPT}</script></body></html>\n"
        )


def run_page(sketch: Sketch, shared: str = "") -> str:
    """The page of one run. `shared`: see `Page`."""
    page = Page(sketch.title, shared)
    page.add(_header(sketch.title, _about(sketch)) + _notices(notices(sketch.settings)))
    page.add(_what(sketch) + _command(sketch.command))
    page.add(_cards(sketch))
    page.section(
        "Latency",
        "Every request that got a first token, however it ended. A request’s time between tokens is judged by the mean "
        "of the worst tenth of its gaps.",
        ("Time to first token", figures.ttft([sketch]), "No request got a first token."),
        ("Time between tokens", figures.tbt([sketch]), "No request got a second token."),
    )
    page.section(
        "Both pools over time",
        f"Load as the admission policies define it, {_resolution(sketch)}. Where the two curves swing against each "
        "other, work was let in for a pool that would be full by the time it got there.",
        ("Load", figures.loads(sketch), "No samples were taken."),
        ("KV in the decode pool", figures.kv_loads([sketch]), "No samples were taken."),
    )
    page.section(
        "Rejections and cache",
        "",
        ("Rejections by stage and reason", figures.rejections(sketch), "No request was rejected."),
        ("Where prompt tokens were found", figures.hits([sketch]), "Prefill ran for no request."),
    )
    page.section(
        "Who was accepted",
        "Accepted: rejected at no stage. Under overload, a policy that favours short prompts shows here.",
        ("By prompt length", figures.acceptance(sketch), "There were no requests."),
    )
    page.section(
        "Predictions",
        "Right of zero: predicted higher than it was. The outermost hundredth on either side is not shown.",
        ("Time to first token", figures.errors([sketch], "ttft"), "No prediction met its outcome."),
        ("Decode step, against the median gap", figures.errors([sketch], "step"), "No prediction met its outcome."),
    )
    page.add(f"<div class='grid'>{_residuals(sketch.residuals)}{_counters(sketch.counters)}</div>")
    page.add(f"<section><h2>All figures</h2>{_figures_grid(sketch)}</section>")
    return page.html()


def comparison_page(title: str, sketches: Sequence[Sketch], command: str = "", shared: str = "") -> str:
    """The page of several runs, of which at most `OVERLAID_MAX`, those of highest goodput, share a plot's axes.

    `shared`: see `Page`.
    """
    assert sketches, "nothing to compare"
    best = sorted(sketches, key=lambda s: -(s.statistics.effective_per_s or 0.0))[:OVERLAID_MAX]
    drawn = [sketch for sketch in sketches if sketch in best]
    left_out = len(sketches) - len(drawn)
    note = f"The {len(drawn)} runs of highest goodput; the tables have all {len(sketches)}." if left_out else ""
    page = Page(title, shared)
    differing = figures.differing(sketches)
    same = {name: value for name, value in sketches[0].settings.items() if name not in differing}
    page.add(_header(title, f"{len(sketches)} runs, different in: {', '.join(differing) or 'nothing'}"))
    page.add(_notices(left_out_of(sketch.settings for sketch in sketches)))
    page.add(_settings("What they share", same) + _command(command))
    if list(differing) == ["seed"]:
        page.add(_over_seeds(sketches))
    page.section(
        "Goodput",
        "Requests that finished within both limits, and what their neighbours cost.",
        ("Effective requests per second", figures.goodput_of(sketches), ""),
        ("Prefill seconds", figures.prefill_of(sketches), "Prefill ran for no request."),
        ("Rejections by stage", figures.rejections_of(sketches), "No request was rejected in any run."),
        ("Where prompt tokens were found", figures.hits(sketches), "Prefill ran for no request."),
    )
    page.section(
        "Latency",
        note,
        ("Time to first token", figures.ttft(drawn), "No request got a first token."),
        ("Time between tokens", figures.tbt(drawn), "No request got a second token."),
    )
    page.section("KV in the decode pool over time", note, ("", figures.kv_loads(drawn), "No samples were taken."))
    page.section(
        "Acceptance and prediction",
        note,
        ("Accepted, by prompt length", figures.acceptances(drawn), "There were no requests."),
        ("TTFT prediction", figures.errors(drawn, "ttft"), "No prediction met its outcome."),
    )
    page.add(f"<section><h2>All figures</h2>{_figures_table(sketches)}</section>")
    return page.html()


def _header(title: str, about: str) -> str:
    return (
        f"<header><p class='brand'>◐ Halfmoon</p><h1>{escape(title)}</h1><p class='about'>{escape(about)}</p></header>"
    )


def _about(sketch: Sketch) -> str:
    return (
        f"{sketch.statistics.requests:,} requests in {decimal(sketch.duration_s, 0)} s of the run’s own time; the run "
        f"itself took {decimal(sketch.wall_s, 1)} s."
    )


def _resolution(sketch: Sketch) -> str:
    step_s = sketch.loads.step_s
    return f"the mean over {step_s:g} s a point" if step_s > 1 else "sampled every second"


def _cards(sketch: Sketch) -> str:
    cards = "".join(
        f"<div class='card'><p class='name'>{escape(name)}</p><p class='value'>{escape(value)}</p>"
        f"<p class='behind'>{escape(behind)}</p></div>"
        for name, value, behind in headline(sketch)
    )
    return f"<div class='cards'>{cards}</div>"


def _figures_table(sketches: Sequence[Sketch]) -> str:
    """A row per figure, a column per run, under the groups' headings."""
    head = "".join(f"<th>{escape(s.label if len(sketches) > 1 else '')}</th>" for s in sketches)
    rows = zip(*(lines(sketch) for sketch in sketches), strict=True)
    body = "".join(
        _group(group, list(found), len(sketches)) for group, found in groupby(rows, lambda row: row[0].group)
    )
    return f"<div class='wide'><table class='figures'><thead><tr><th></th>{head}</tr></thead>{body}</table></div>"


def _figures_grid(sketch: Sketch) -> str:
    """One small table per group, beside each other."""
    groups = groupby(lines(sketch), lambda line: line.group)
    tables = (
        f"<div><table class='figures'>{_group(group, [[line] for line in found], 1)}</table></div>"
        for group, found in groups
    )
    return f"<div class='grid'>{''.join(tables)}</div>"


def _group(name: str, rows: Sequence[Sequence[Line]], runs: int) -> str:
    return f"<tbody><tr><th colspan='{runs + 1}' class='group'>{escape(name)}</th></tr>{''.join(_rows(rows))}</tbody>"


def _rows(rows: Sequence[Sequence[Line]]) -> Iterator[str]:
    for row in rows:
        first = row[0]
        named = first.name + (f", {first.unit}" if first.unit else "")
        cells = "".join(f"<td>{escape(line.text)}</td>" for line in row)
        yield f"<tr><th>{escape(named)}</th>{cells}</tr>"


def _notices(sentences: Sequence[str]) -> str:
    return "".join(f"<p class='about notice'>{escape(sentence)}</p>" for sentence in sentences)


def _over_seeds(sketches: Sequence[Sketch]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("", "seeds", "mean", "std", "lowest", "highest"))
    rows = "".join(
        f"<tr><th>{escape(f'{figure.name}, {figure.unit}')}</th><td>{figure.count}</td>"
        + "".join(f"<td>{decimal(v, figure.places)}</td>" for v in (figure.mean, figure.std, figure.low, figure.high))
        + "</tr>"
        for figure in over_seeds(sketches)
    )
    return (
        f"<section><h2>Over {len(sketches)} seeds</h2><table class='figures'><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></section>"
    )


def _residuals(residuals: Mapping[str, tuple[float, float]]) -> str:
    if not residuals:
        return ""
    rows = "".join(
        f"<tr><th>{escape(term)}</th><td>{signed(bias * 100, 1)}</td><td>{decimal(error * 100, 1)}</td></tr>"
        for term, (bias, error) in residuals.items()
    )
    return (
        "<section><h2>Cost terms</h2><p class='about'>How far the conductor’s beliefs were off, relative to what was "
        "measured.</p><table class='figures'><thead><tr><th></th><th>bias, %</th><th>error, %</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></section>"
    )


def _counters(counters: Mapping[str, int]) -> str:
    if not counters:
        return ""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{number:,}</td></tr>" for name, number in counters.items())
    return f"<section><h2>Counters</h2><table class='figures'><tbody>{rows}</tbody></table></section>"


def _what(sketch: Sketch) -> str:
    digest = f"<code>{escape(sketch.digest)}</code>" if sketch.digest else "none: this run was not simulated"
    log = f"<p class='settings'><span><b>digest of the decision log</b> {digest}</span></p>"
    return _settings("What was run", sketch.settings) + log


def _settings(title: str, settings: Mapping[str, object]) -> str:
    pairs = "".join(f"<span><b>{escape(str(name))}</b> {escape(_value(v))}</span>" for name, v in settings.items())
    return f"<h3>{escape(title)}</h3><p class='settings'>{pairs}</p>"


def _command(command: str) -> str:
    return f"<h3>Run it again</h3><pre>{escape(command)}</pre>" if command else ""


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(v)}" for name, v in value.items()) or "none"
    if isinstance(value, list | tuple):
        return "; ".join(_value(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
