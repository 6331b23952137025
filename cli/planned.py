"""Pure: what a plan found, as the tables and sentences that a person reads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from cli.planning import Candidate, Change, Final, Verdict, best_per_shape, nearest, tied
from report.lines import decimal, percent


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What was simulated, and the finalists in order.

    Args:
        goal: per cent of all requests that must keep both limits.
    """

    verdicts: Mapping[Candidate, Verdict]
    ranking: Sequence[Final]
    seeds: int
    goal: float


def answer(found: Planned, changes: Sequence[Change]) -> Iterator[Table | Text]:
    """The best, what else there is, and what it depends on."""
    best = found.ranking[0].candidate
    yield from _candidates(found)
    yield _sensitivity(found, best, changes)
    yield Text.from_markup(f"Best: [bold]{best}[/bold]: {_words(found.ranking[0])}.")
    second = next((final for final in found.ranking if final.candidate.shape != best.shape), None)
    if second is not None:
        yield Text(f"Runner-up: {second.candidate}: {_words(second)}.")
    yield Text(_sureness(found))


def no_answer(found: Planned, twice: Candidate | None, alone: Candidate) -> Iterator[Table | Text]:
    """That none keeps the limits, what the nearest came to, and what more nodes would."""
    yield from _candidates(found)
    yield _nearest(found)
    best, goal = found.ranking[0], f"{found.goal:g} %"
    yield Text(
        f"No candidate keeps these limits: both for {goal} of all requests (--goal). The nearest, {best.candidate}, "
        f"does for {percent(best.capacity.mean)} %.", style="bold",
    )  # fmt: skip
    with_twice = None if twice is None else found.verdicts[twice]
    on_its_own = found.verdicts[alone]
    if with_twice is not None:
        yield Text(f"With twice its nodes: {_kept(with_twice)}.")
    yield Text(f"With a twentieth of the load, so that requests hardly meet: {_kept(on_its_own)}.")
    if with_twice is not None and with_twice.capacity * 100 >= found.goal:
        yield Text("So more nodes would do; how many are needed was not searched: try more --gpus.")
    elif on_its_own.capacity * 100 >= found.goal:
        yield Text("So more nodes would help; how many are needed was not searched, twice as many are not seen to do.")
    else:
        yield Text(
            f"So more nodes of this kind, so used, would hardly reach {goal}: too many requests miss the limits by "
            "themselves. Look for looser limits, shorter prompts, or faster nodes."
        )


def counted_runs(runs: Mapping[str, int]) -> str:
    """ "28 simulations (16 search, 8 other seeds, 4 sensitivity)"."""
    return f"{sum(runs.values())} simulations ({', '.join(f'{n} {what}' for what, n in runs.items() if n)})"


def _kept(said: Verdict) -> str:
    return (
        f"{percent(said.capacity)} % keep both, p90 of TTFT {decimal(said.ttft_p90_s, 2)} s, of TBT "
        f"{decimal(None if said.tbt_p90_s is None else said.tbt_p90_s * 1e3, 1)} ms"
    )


def _candidates(found: Planned) -> Iterator[Table]:
    table = _plain("The best chunk and policy of each shape", "shape", "chunk", "policy")
    for candidate in best_per_shape(found.verdicts):
        star = " *" if candidate == found.ranking[0].candidate else ""
        cells = _cells(found.verdicts[candidate])
        table.add_row(f"{candidate.shape}{star}", f"{candidate.chunk:,}", candidate.policy, *cells)
    yield table
    if found.seeds > 1:
        yield _finals(found)


def _nearest(found: Planned) -> Table:
    """Percentiles are of those that got a first token: a policy that rejects leaves few."""
    table = Table(box=box.SIMPLE_HEAD, title="The nearest, on the first seed", title_justify="left", padding=(0, 1))
    table.add_column("candidate", overflow="fold")
    for name in ("within %", "finished %", "TTFT p90 s", "TBT p90 ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for candidate in nearest(found.verdicts):
        said = found.verdicts[candidate]
        tbt_ms = None if said.tbt_p90_s is None else said.tbt_p90_s * 1e3
        cells = (percent(said.capacity), percent(said.served), decimal(said.ttft_p90_s, 2), decimal(tbt_ms, 1))
        table.add_row(str(candidate), *cells)
    return table


def _words(said: Final) -> str:
    """Means; and between what they lie, where there is a between."""
    goodput, capacity = said.goodput_per_s, said.capacity
    between = "" if capacity.low == capacity.high else f" ({percent(capacity.low)} to {percent(capacity.high)})"
    return f"{goodput.mean:.3f} effective requests/s, {percent(capacity.mean)} % of all within both limits{between}"


def _sureness(found: Planned) -> str:
    same = "; ".join(str(final.candidate) for final in tied(found.ranking))
    if found.seeds == 1:
        return f"One seed does not tell how sure that is.{f' As many on it: {same}.' if same else ''}"
    if same:
        return (
            f"Tied with the best, their ranges overlap: {same}. The best is the one of the highest mean; more "
            "--seeds, --requests or a higher --speedup may tell them apart."
        )
    return f"No other finalist's range reaches the best's over {found.seeds} seeds."


def _finals(found: Planned) -> Table:
    table = _plain(f"The finalists over {found.seeds} seeds: mean (lowest to highest)", "candidate", "")
    same = [final.candidate for final in tied(found.ranking)]
    for final in found.ranking:
        mark = "*" if final is found.ranking[0] else "tied" if final.candidate in same else ""
        goodput, capacity, strain = final.goodput_per_s, final.capacity, final.strain
        table.add_row(
            str(final.candidate),
            mark,
            f"{goodput.mean:.3f} ({goodput.low:.3f} to {goodput.high:.3f})",
            f"{percent(capacity.mean)} ({percent(capacity.low)} to {percent(capacity.high)})",
            f"{_strain(strain.mean)} ({_strain(strain.low)} to {_strain(strain.high)})",
        )
    return table


def _sensitivity(found: Planned, best: Candidate, changes: Sequence[Change]) -> Table:
    """How goodput changes with them, on the first seed."""
    table = _plain("Sensitivity of the best, on the first seed", "change", "")
    base = found.verdicts[best].goodput_per_s
    for what, why, candidate in changes:
        said = found.verdicts[candidate]
        change = f"{(said.goodput_per_s / base - 1) * 100:+.1f} %" if base else ""
        table.add_row(f"{why}: {what}", change, *_cells(said))
    return table


def _plain(title: str, *names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1))
    for first in names:
        table.add_column(first, overflow="fold", justify="right" if first == "chunk" else "left")
    for name in ("goodput/s", "within %", "p90 of limit %"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cells(said: Verdict) -> tuple[str, str, str]:
    return f"{said.goodput_per_s:.3f}", percent(said.capacity), f"{_strain(said.strain)}"


def _strain(value: float) -> str:
    return f"{value * 100:.0f}" if math.isfinite(value) else "-"
