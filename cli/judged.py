"""Shell: a run judged anew, as tables that a person reads at 80 columns."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import fill

from rich import box
from rich.table import Table
from rich.text import Text

from cli.tables import counted
from conductor.blame import Blame
from conductor.counterfactual import Counterfactual, Judged
from conductor.hindsight import CHECKED_MIN, RIGHT_SHARE, Sureness

WIDTH = 80

FACTOR_WRONG = 2.0
"""A term off by less is not called wrong: batching, waiting for links and messages come to as much."""

KEY = fill(
    "Bias: (actual - predicted) / actual, of the sums; error: the same of absolute differences. Net factor: too high "
    "or too low, this many times, once the right inputs are put in.",
    WIDTH,
)


def judged(result: Counterfactual) -> Iterator[Table | Text]:
    """Verdicts by policy, how sure their truth is, errors by term, and the term to blame."""
    yield _policies(result)
    yield Text(_sureness(result))
    yield _terms(result.blame)
    yield Text(f"{KEY}\n{_worst(result.blame)}")


def _policies(result: Counterfactual) -> Table:
    table = _table(f"verdicts on {counted(result.judged, 'request')}, by what happened or would have")
    for name in ("policy", "mode"):
        table.add_column(name, no_wrap=True)
    for name in ("accepted", "wrongly", "open", "rejected", "wrongly", "open"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in result.policies:
        table.add_row(one.policy, one.mode, *_cells(one, doubtful=bool(result.sureness.blurred)))
    return table


def _cells(one: Judged, *, doubtful: bool) -> tuple[str, ...]:
    """`doubtful`: what is reckoned of the rejected is not to be trusted, and marked."""
    false_rejections = _share(one.false_rejections, one.rejected - one.open_rejections)
    return (
        str(one.accepted),
        _share(one.false_acceptances, one.accepted - one.open_acceptances),
        str(one.open_acceptances),
        str(one.rejected),
        f"{false_rejections} ?" if doubtful and one.rejected else false_rejections,
        str(one.open_rejections),
    )


def _share(count: int, total: int) -> str:
    return f"{count} ({100 * count / total:.0f} %)" if total else str(count)


def _sureness(result: Counterfactual) -> str:
    sure = result.sureness
    said = [
        "Wrongly accepted: missed a limit. Wrongly rejected: would have kept both, had it alone been taken on, as "
        "reckoned from the recorded run: its queue, batches, decode room and measured costs. Not modelled: links that "
        "are shared, preemption, faults. Open: too close to a limit, no decode room at once, or the client left."
    ]
    limited = f"{sure.right} of {counted(sure.checked, 'request')} served that had a limit"
    without = sure.served - sure.checked
    limited += f" ({without} more had none, and say nothing)" if without else ""
    if not sure.enough:
        said.append(
            f"How sure: not at all. Reckoned in the same way, {limited} come out as they did; "
            f"{100 * RIGHT_SHARE:.0f} % of at least {CHECKED_MIN} must. All rejections are left open."
        )
    else:
        said.append(
            f"How sure: reckoned in the same way, {limited} come out as they did "
            f"({100 * sure.right / sure.checked:.0f} %); 90 % of all TTFT within "
            f"{sure.ttft_margin_s * 1e3:,.0f} ms, of all TBT within {sure.tbt_margin_s * 1e3:,.1f} ms."
        )
    if sure.blurred:
        said.append(_warning(sure))
    if result.unjudged:
        said.append(f"{counted(result.unjudged, 'request')} ended before admission was asked (no place, no worker).")
    return "\n".join(fill(one, WIDTH) for one in said) + "\n"


def _warning(sure: Sureness) -> str:
    limits = {"TTFT": sure.ttft_limit_s, "TBT": sure.tbt_limit_s}
    words = [f"{name} ({(limits[name] or 0.0) * 1e3:,.1f} ms at the median)" for name in sure.blurred]
    return (
        f'Not to be trusted, marked "?": what is said of rejections. The reckoning is off by more than the limit on '
        f"{' and '.join(words)}, so it cannot tell who would have kept it."
    )


def _terms(blame: Blame) -> Table:
    table = _table("predictions of the requests that were served, by term")
    table.add_column("term", no_wrap=True)
    for name in ("samples", "predicted ms", "actual ms", "bias", "error", "net factor"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in blame.terms:
        factor = "-" if one.factor is None else f"{one.factor:.2f}"
        table.add_row(
            f"{one.term} *" if one.term == blame.worst else one.term,
            str(one.samples),
            f"{one.predicted_s * 1e3:,.1f}",
            f"{one.actual_s * 1e3:,.1f}",
            f"{one.bias:+.2f}",
            f"{one.error:.2f}",
            factor,
        )
    return table


def _worst(blame: Blame) -> str:
    if not blame.worst:
        return "No term can be blamed: too few requests were served."
    factor = next(one.factor for one in blame.terms if one.term == blame.worst)
    assert factor is not None
    if factor < FACTOR_WRONG:
        return f"No term is to blame: net of what it inherits, the worst, {blame.worst}, is off by {factor:.2f} times."
    return f"To blame: {blame.worst}, off by {factor:.1f} times, net of what it inherits from the others."


def _table(title: str) -> Table:
    return Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", padding=(0, 1, 0, 0))
