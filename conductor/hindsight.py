"""Pure: what a rejected request would have got, had it alone been taken on in the recorded world.

The world is what was recorded: who was in which queue, from when, and until when; how large the decode batches were;
and costs fitted to everything that workers measured in the whole run, whatever the conductor believed. One request more
is put into it where its verdict was about; those behind it are not delayed by it. The same is reckoned for the requests
that were served, whose truth is known: how often it is right about them, and how far off, says how sure it is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from conductor.past import Past, Recorded, Stay

MARGIN_SHARE = 0.9
"""Of the served requests are estimated within the margin: a limit nearer than that is too close to call."""


class Served(NamedTuple):
    """What a request gets, in seconds, as its client sees it. `tbt_s`: the mean of its worst tenth of gaps."""

    ttft_s: float
    tbt_s: float


class Truth(NamedTuple):
    """`met`: within its limits; None: nobody can say. `seen`: it happened; else it was reckoned."""

    met: bool | None
    seen: bool


@dataclass(frozen=True, kw_only=True)
class Sureness:
    """Of the served requests: `right` of `checked` verdicts are the truth's; 90 % are within the margins (seconds)."""

    checked: int
    right: int
    ttft_margin_s: float
    tbt_margin_s: float


class Hindsight:
    """Reckons for one run. Built by looking at those that were served."""

    def __init__(self, run: Recorded) -> None:
        self._run = run
        served = [past for past in run.pasts if past.taken and past.met is not None]
        ttfts = [(self._raw(past).ttft_s, past.terms["ttft_s"][1]) for past in served]
        tbts = [(self._raw(past).tbt_s, past.terms["tbt_worst_s"][1]) for past in served]
        self._late_s = _median([actual - raw for raw, actual in ttfts if actual is not None], 0.0)
        self._rough = _median([actual / raw for raw, actual in tbts if actual is not None and raw > 0.0], 1.0)
        self.sureness = self._check(served)

    def truth(self, past: Past) -> Truth:
        """What happened; where nothing did, what is reckoned, if that is clear enough."""
        if past.taken:
            return Truth(past.met, True)
        served, limits, sure = self.served(past), past.limits, self.sureness
        sides = (
            _side(served.ttft_s, limits.ttft_s, sure.ttft_margin_s),
            _side(served.tbt_s, limits.tbt_s, sure.tbt_margin_s),
        )
        if False in sides:
            return Truth(False, False)
        return Truth(None if None in sides else True, False)

    def served(self, past: Past) -> Served:
        raw = self._raw(past)
        return Served(raw.ttft_s + self._late_s, raw.tbt_s * self._rough)

    def _raw(self, past: Past) -> Served:
        """From the recorded queue, batch and costs; the overheads that no model knows are added by `served`."""
        run, score = self._run, past.prefill
        cost, block_size = run.costs[score.node_id], run.header.block_size
        context = block_size * (score.hit_blocks + score.fetch_blocks)
        prefill_s = cost.prefill_s(past.num_tokens - context, context).seconds
        fetch_bytes = score.fetch_blocks * run.header.block_bytes
        fetch_s = cost.transfer_s(fetch_bytes, score.source or "").seconds
        begin_s = free_at(run.stays.get(score.node_id, ()), past.at_s, past.at_s + fetch_s, past.request_id)
        ttft_s = past.before_s + begin_s - past.at_s + prefill_s
        load = run.load_at(past.decode.node_id, past.at_s + ttft_s)
        beside = 0 if past.taken else 1  # the report counts those that were there
        batch, kv_tokens = load.sequences + beside, load.kv_tokens + beside * past.num_tokens
        step = run.costs[past.decode.node_id].decode_step_s(max(1, batch), kv_tokens)
        return Served(ttft_s, step.seconds)

    def _check(self, served: Sequence[Past]) -> Sureness:
        right, ttft_off, tbt_off = 0, [], []
        for past in served:
            got, limits = self.served(past), past.limits
            met = _side(got.ttft_s, limits.ttft_s, 0.0) and _side(got.tbt_s, limits.tbt_s, 0.0)
            right += bool(met) == past.met
            ttft_s, tbt_s = past.terms["ttft_s"][1], past.terms["tbt_worst_s"][1]
            ttft_off += [abs(got.ttft_s - ttft_s)] if ttft_s is not None else []
            tbt_off += [abs(got.tbt_s - tbt_s)] if tbt_s is not None else []
        return Sureness(
            checked=len(served), right=right, ttft_margin_s=_quantile(ttft_off), tbt_margin_s=_quantile(tbt_off)
        )


def free_at(stays: Sequence[Stay], at_s: float, ready_s: float, request_id: str) -> float:
    """When a prompt that came at `at_s`, with its prefix there at `ready_s`, would begin to be computed.

    Those that came before it go first, unless they are still waiting for a prefix of theirs when the worker is free.
    """
    before = [s for s in stays[: bisect_right(stays, at_s, key=_begun_s)] if s.request_id != request_id]
    begin_s = ready_s
    while True:
        first = [stay.done_s for stay in before if stay.ready_s <= begin_s < stay.done_s]
        if not first:
            return begin_s
        begin_s = max(first)


def _begun_s(stay: Stay) -> float:
    return stay.begun_s


def _side(value: float, limit: float | None, margin: float) -> bool | None:
    """Below the limit, above it, or too close to call."""
    if limit is None or value + margin <= limit:
        return True
    return False if value - margin > limit else None


def _median(values: Sequence[float], default: float) -> float:
    return median(values) if values else default


def _quantile(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(MARGIN_SHARE * len(ordered)))] if ordered else 0.0
