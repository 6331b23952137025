"""Pure: what a rejected request would have got, had it alone been taken on in the recorded world.

The world is what was recorded: who was in which queue, from when, and until when; how large the decode batches were;
who held decode room; and costs fitted to everything that workers measured in the whole run, whatever the conductor
believed. One request more is put into it where its verdict was about, with an output of the served ones' mean length;
those behind it are not delayed by it. The same is reckoned for the requests that were served, whose truth is known: how
often it is right about them, and how far off, says how sure it is. Where it is right too seldom, it says nothing.

Not modelled: waiting for links that are shared, the hand-over's wait (only as the served ones' median), preemption and
faults. Who finds no decode room at once, or would outgrow it, is left open, unless it is late all the same.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from conductor.admission_config import Reserve
from conductor.admission_policies import admission_of
from conductor.effects import Slo
from conductor.past import Past, Recorded, Stay
from conductor.tenancy import Room, Tenancy, Tenants
from halfmoon.types import NodeId
from report.gaps import WORST_ONE_IN

MARGIN_SHARE = 0.9
"""Of the served requests are estimated within the margin: a limit nearer than that is too close to call."""


RIGHT_SHARE = 0.9
"""Of the served requests must come out as they did; else nothing is said of the rejected ones."""

CHECKED_MIN = 10
"""Fewer served requests are no check."""


class Served(NamedTuple):
    """What a request gets, in seconds. `ttft_s`: until its first token is there; that the front end may keep it longer
    breaks no limit on TTFT. `tbt_s`: the mean of its worst tenth of gaps, as its client sees them.

    `room`: it found decode room when it asked, for as long as it stayed.
    """

    ttft_s: float
    tbt_s: float
    room: bool


class Raw(NamedTuple):
    """As Served, without what no model knows; `tbt_s`: one plain decode step."""

    ttft_s: float
    tbt_s: float


class Truth(NamedTuple):
    """`met`: within its limits; None: nobody can say. `seen`: it happened; else it was reckoned."""

    met: bool | None
    seen: bool


@dataclass(frozen=True, kw_only=True)
class Sureness:
    """How well what was served is reckoned. Seconds.

    Args:
        served: requests whose truth is known.
        checked: those of them that had a limit: of the others every reckoning is right.
        right: of which the reckoned verdict is the truth's.
        ttft_margin_s, tbt_margin_s: 90 % of the served are reckoned within them.
        ttft_limit_s, tbt_limit_s: the medians of the limits that are judged by it: of the rejected requests, or, where
            none was, of all. None: nobody has one.
    """

    served: int
    checked: int
    right: int
    ttft_margin_s: float
    tbt_margin_s: float
    ttft_limit_s: float | None
    tbt_limit_s: float | None

    @property
    def enough(self) -> bool:
        """Whether what is reckoned is said at all."""
        return self.checked >= CHECKED_MIN and self.right >= RIGHT_SHARE * self.checked

    @property
    def blurred(self) -> tuple[str, ...]:
        """The limits, by name, that are smaller than what the reckoning is off by: it cannot tell whether they would
        have been kept."""
        pairs = (("TTFT", self.ttft_margin_s, self.ttft_limit_s), ("TBT", self.tbt_margin_s, self.tbt_limit_s))
        return tuple(name for name, margin_s, limit_s in pairs if limit_s is not None and margin_s > limit_s)


class Hindsight:
    """Reckons for one run. Built by looking at those that were served."""

    def __init__(self, run: Recorded) -> None:
        self._run = run
        self._reserve = admission_of(run.config.admission).reserve
        self._tenants: dict[str, Tenants] = {}
        served = [past for past in run.pasts if past.met is not None]
        outputs = [past.output_tokens for past in served if past.output_tokens]
        self._output_tokens = sum(outputs) / len(outputs) if outputs else 1.0
        ttfts = [(self._raw(past).ttft_s, _there_s(past)) for past in served]
        tbts = [(self._raw(past).tbt_s, past.terms["tbt_worst_s"][1]) for past in served]
        self._late_s = _median([actual - raw for raw, actual in ttfts if actual is not None], 0.0)
        self._rough = _median([actual / raw for raw, actual in tbts if actual is not None and raw > 0.0], 1.0)
        self.sureness = self._check(served)

    def truth(self, past: Past) -> Truth:
        """What happened; where nothing did, what is reckoned, if that is clear enough."""
        if not past.rejected:
            return Truth(past.met, True)
        sure = self.sureness
        if not sure.enough:
            return Truth(None, False)
        return Truth(_met(self.served(past), past, sure.ttft_margin_s, sure.tbt_margin_s), False)

    def served(self, past: Past) -> Served:
        """With the overheads that no model knows, as the served ones had them; and with the wait for decode room."""
        raw = self._raw(past)
        served = Served(raw.ttft_s + self._late_s, raw.tbt_s * self._rough, True)
        return self._roomed(past, served, raw.tbt_s)

    def _roomed(self, past: Past, served: Served, step_s: float) -> Served:
        """Room is asked for with the prompt, which then waits for it; or late, and then its second token does."""
        late = self._reserve in (Reserve.DURING, Reserve.AFTER)
        life_s = step_s * self._output_tokens
        asks_s = past.at_s - past.before_s + served.ttft_s if late else past.at_s
        stays_s = life_s if late else life_s + served.ttft_s
        tokens, names = round(self._output_tokens), self._run.names.get(past.request_id, ())
        one = Tenancy(past.request_id, asks_s, asks_s, asks_s + stays_s, past.num_tokens, tokens, names)
        wait_s, lasting = self._tenants_of(past.decode.node_id).find(one)
        if wait_s == 0.0:
            return served._replace(room=lasting)
        if not late:
            return Served(served.ttft_s + wait_s, served.tbt_s, False)
        worst = max(1, round(self._output_tokens / WORST_ONE_IN))
        shows_s = max(0.0, wait_s - self._held_s(past, served.ttft_s))
        return Served(served.ttft_s, served.tbt_s + shows_s / worst, False)

    def _held_s(self, past: Past, there_s: float) -> float:
        """How long its front end keeps the first token at most (`AdmissionConfig.hold_first_share`)."""
        ttft_s, tbt_s = past.limits.ttft_s, past.limits.tbt_s
        if ttft_s is None or tbt_s is None:
            return 0.0
        return max(0.0, self._run.config.admission.hold_first_share * ttft_s - there_s)

    def _tenants_of(self, node_id: NodeId) -> Tenants:
        if node_id not in self._tenants:
            run = self._run
            room = run.rooms.get(node_id, Room(0, 0))
            self._tenants[node_id] = Tenants(run.tenancies.get(node_id, ()), room, run.header.block_size)
        return self._tenants[node_id]

    def _raw(self, past: Past) -> Raw:
        """From the recorded queue, batch and costs."""
        run, score = self._run, past.prefill
        cost, block_size = run.costs[score.node_id], run.header.block_size
        context = block_size * (score.hit_blocks + score.fetch_blocks)
        prefill_s = cost.prefill_s(past.num_tokens - context, context).seconds
        fetch_bytes = score.fetch_blocks * run.header.block_bytes
        fetch_s = cost.transfer_s(fetch_bytes, score.source or "").seconds
        begin_s = free_at(run.stays.get(score.node_id, ()), past.at_s, past.at_s + fetch_s, past.request_id)
        ttft_s = past.before_s + begin_s - past.at_s + prefill_s
        load = run.load_at(past.decode.node_id, past.at_s + ttft_s)
        beside = 1 if past.rejected else 0  # the report counts those that were there
        batch, kv_tokens = load.sequences + beside, load.kv_tokens + beside * past.num_tokens
        step = run.costs[past.decode.node_id].decode_step_s(max(1, batch), kv_tokens)
        return Raw(ttft_s, step.seconds)

    def _check(self, served: Sequence[Past]) -> Sureness:
        verdicts, ttft_off, tbt_off = [], [], []
        for past in served:
            got = self.served(past)
            if past.limits != Slo():
                verdicts.append((_met(got, past, 0.0, 0.0), past.met))
            ttft_s, tbt_s = _there_s(past), past.terms["tbt_worst_s"][1]
            ttft_off += [abs(got.ttft_s - ttft_s)] if ttft_s is not None else []
            tbt_off += [abs(got.tbt_s - tbt_s)] if tbt_s is not None else []
        said = [met == was for met, was in verdicts if met is not None]
        judged = [past.limits for past in self._run.pasts if past.rejected] or [p.limits for p in self._run.pasts]
        return Sureness(
            served=len(served),
            checked=len(said),
            right=sum(said),
            ttft_margin_s=_quantile(ttft_off),
            tbt_margin_s=_quantile(tbt_off),
            ttft_limit_s=_median_of([slo.ttft_s for slo in judged]),
            tbt_limit_s=_median_of([slo.tbt_s for slo in judged]),
        )


def _there_s(past: Past) -> float | None:
    """When its first token was there, whether or not it was kept then."""
    shown_s, held_s = past.terms["ttft_s"][1], past.terms["held_s"][1]
    return None if shown_s is None else shown_s - (held_s or 0.0)


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


def _met(served: Served, past: Past, ttft_margin_s: float, tbt_margin_s: float) -> bool | None:
    """None: too close to a limit to call, or it depends on decode room that was not there at once."""
    sides = (
        _side(served.ttft_s, past.limits.ttft_s, ttft_margin_s),
        _side(served.tbt_s, past.limits.tbt_s, tbt_margin_s),
    )
    if False in sides:
        return False
    return True if served.room and None not in sides else None


def _side(value: float, limit: float | None, margin: float) -> bool | None:
    """Below the limit, above it, or too close to call."""
    if limit is None or value + margin <= limit:
        return True
    return False if value - margin > limit else None


def _median(values: Sequence[float], default: float) -> float:
    return median(values) if values else default


def _median_of(limits: Sequence[float | None]) -> float | None:
    known = [limit for limit in limits if limit is not None]
    return median(known) if known else None


def _quantile(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(MARGIN_SHARE * len(ordered)))] if ordered else 0.0
