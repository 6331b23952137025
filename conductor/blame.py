"""Pure: how wrong each term of the predictions was, and which one is to blame, net of what it inherited.

A wrong prefill cost makes queues look long: each prompt ahead is booked with it. So the queue is judged with the
seconds that those ahead really took, less those that passed while its own prefix was fetched, put in the place of those
that they were booked with; prefill at the tokens that were really computed; a transfer, be it of a cached prefix or to
the decode worker, at the blocks that were really waited for; decoding by the gaps between tokens after the second.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from conductor.past import Past, Recorded, Stay

MATERIAL_SHARE = 0.01
"""Of the seconds that a limit is about: what is less cannot have mattered, and is not blamed for its ratio."""

SAMPLES_MIN = 5
"""Fewer say nothing about a term."""

TERMS = ("queue", "prefill", "transfer", "decode")


@dataclass(frozen=True, kw_only=True)
class TermError:
    """One term over the run. Relative to what it came to.

    Args:
        predicted_s, actual_s: means.
        bias: (actual - predicted) / actual, of the sums; above 0: predictions were too low.
        error: |actual - predicted| / actual, of the sums.
        factor: how many times too high or too low, net of inherited inputs: 1 is right. None: too few samples.
    """

    term: str
    samples: int
    predicted_s: float
    actual_s: float
    bias: float
    error: float
    factor: float | None


@dataclass(frozen=True, kw_only=True)
class Blame:
    """`worst`: the term with the largest factor; empty: there was nothing to judge by."""

    terms: tuple[TermError, ...]
    worst: str


def blame(run: Recorded) -> Blame:
    """Judge every term of the requests that were served."""
    served = [past for past in run.pasts if past.taken and past.terms["prefill_s"][1] is not None]
    floor_s = MATERIAL_SHARE * sum(past.terms["ttft_s"][1] or 0.0 for past in served)
    gaps_s = MATERIAL_SHARE * sum(past.terms["tbt_s"][1] or 0.0 for past in served)
    errors = tuple(
        error
        for term in TERMS
        if (error := _error(term, run, served, gaps_s if term == "decode" else floor_s)) is not None
    )
    judged = [error for error in errors if error.factor is not None]
    worst = max(judged, key=lambda e: (e.factor or 0.0, e.term), default=None)
    return Blame(terms=errors, worst="" if worst is None else worst.term)


def _error(term: str, run: Recorded, served: Sequence[Past], floor_s: float) -> TermError | None:
    pairs = [pair for past in served for pair in _pairs(term, run, past)]
    gross, net = [pair.gross for pair in pairs], [pair.net for pair in pairs]
    if not gross:
        return None
    predicted_s, actual_s = sum(p for p, _ in gross), sum(a for _, a in gross)
    wrong_s = sum(abs(a - p) for p, a in gross)
    scale_s = actual_s or 1.0
    high_s, low_s = sum(max(pair) for pair in net), sum(min(pair) for pair in net)
    factor = (high_s + floor_s) / (low_s + floor_s) if floor_s > 0.0 and len(pairs) >= SAMPLES_MIN else None
    return TermError(
        term=term,
        samples=len(gross),
        predicted_s=predicted_s / len(gross),
        actual_s=actual_s / len(gross),
        bias=(actual_s - predicted_s) / scale_s,
        error=wrong_s / scale_s,
        factor=factor,
    )


class _Pair(NamedTuple):
    """(predicted, actual) seconds as they were, and net of inherited inputs."""

    gross: tuple[float, float]
    net: tuple[float, float]


def _pairs(term: str, run: Recorded, past: Past) -> list[_Pair]:
    """Of one request, where predicted and actual are known and the term was there at all."""
    size, terms = run.header.block_size, past.terms
    match term:
        case "queue":
            booked_s, took_s = ahead(run.stays.get(past.prefill.node_id, ()), past)
            left_s = max(0.0, took_s - (terms["fetch_s"][1] or 0.0))  # the rest passed while its prefix was fetched
            return _paired(terms["queue_s"], lambda predicted: max(0.0, predicted + left_s - booked_s))
        case "prefill":
            new = past.num_tokens - size * (past.prefill.hit_blocks + past.prefill.fetch_blocks)
            share = (past.computed_tokens or 0) / max(1, new)
            return _paired(terms["prefill_s"], lambda predicted: predicted * share)
        case "transfer":
            fetched = past.prefill.fetch_blocks and past.fetched_blocks
            fetch_share = past.fetched_blocks / max(1, past.prefill.fetch_blocks)
            fetches = _paired(terms["fetch_s"], lambda predicted: predicted * fetch_share) if fetched else []
            blocks = -(-past.num_tokens // size) - past.decode.hit_blocks
            late_s = past.pull_s * past.pulled_late_blocks / max(1, blocks)
            return fetches + (_paired(terms["handover_s"], lambda _: late_s) if past.pulled_late_blocks else [])
        case _:
            return _paired(terms["tbt_s"], lambda predicted: predicted)


def _paired(term: tuple[float | None, float | None], net: Callable[[float], float]) -> list[_Pair]:
    predicted, actual = term
    if predicted is None or actual is None:
        return []
    return [_Pair((predicted, actual), (net(predicted), actual))]


def ahead(stays: Sequence[Stay], past: Past) -> tuple[float, float]:
    """Seconds of those in the queue when this one came: as its ledger booked them (conductor.view.Worker.queue_s),
    and as it turned out, until the last of them had its first token."""
    at_s = past.at_s
    count = bisect_right(stays, at_s, key=lambda stay: stay.begun_s)
    here = [s for s in stays[:count] if s.done_s > at_s and s.request_id != past.request_id]
    if not here:
        return 0.0, 0.0
    head = here[0]
    since_s = max([head.begun_s, *(s.done_s for s in stays[:count] if head.begun_s <= s.done_s <= at_s)])
    booked_s = sum(s.booked_s for s in here) - min(head.booked_s, at_s - since_s)
    return max(0.0, booked_s), max(s.done_s for s in here) - at_s
