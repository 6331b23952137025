"""Pure: placement: filter, score in seconds, pick. Mooncake's Algorithm 1 with the fetch decided by seconds.

Selecting has no side effect on the view; `conductor.machine` books what was picked. A policy says two things: which
workers a prompt may be computed by, and when a remote prefix is fetched. The rest is the same for all of them: the
least predicted TTFT among what the policy leaves, and the decode side by load (as in the paper's comparison, FAST'25
Fig. 5, where only the choice of the prefill worker differs).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol, TypeVar

from conductor.config import ConductorConfig, PlacementName
from conductor.prefix_index import PrefixIndex
from conductor.scoring import (
    DecodeBid,
    DecodeScore,
    Option,
    PrefillBid,
    PrefillScore,
    Pricing,
    Query,
    fits_decode,
    fits_prefill,
    senders,
)
from conductor.view import ClusterView, Worker
from core.cost import Estimate
from halfmoon.types import NodeId

LOAD_STEP = 0.05
"""Decode loads within one step count as equal; then the worker that has to pull the fewest blocks wins."""

TTFT_STEP = 0.02
"""First tokens that come so little later (relative to the best) count as equal; then the shorter hand-over wins. Costs
are not predicted more exactly than that."""

JOINED_MAX = 4
"""Of the best prefill workers, and of the best decode workers: so many are joined by their transfer terms."""

SENDERS_MAX = 2
"""Copies of a prefix that are priced per candidate: the longest, and a shorter one at a less busy worker."""

PrefillOrder = tuple[bool, bool, float, float, NodeId]
"""Overloaded, young, TTFT, the decode side's load, name: the least is the best."""


class PlacementPolicy(Protocol):
    """What differs between ways to place. Deterministic: the same questions in the same order get the same answers."""

    @property
    def name(self) -> str: ...

    @property
    def senders_max(self) -> int:
        """Remote copies of a prefix that are considered per candidate; 0: prefixes are never fetched."""
        ...

    def shortlist(self, workers: Sequence[Worker], now_s: float) -> Sequence[Worker]:
        """Those of `workers` (able to serve the attempt, never empty) that are priced: at least one."""
        ...

    def fetches(self, own_blocks: int, remote_blocks: int, fetched_s: float, recomputed_s: float) -> bool:
        """Whether `remote_blocks` of prefix are fetched (so that TTFT is `fetched_s` plus the queue) or recomputed."""
        ...


class LeastTtft:
    """`algorithm1`: the least predicted TTFT among the options whose decode side keeps its SLO and has room.

    A prefix is fetched where that is quicker than computing it. Coupled workers compete with every prefill worker
    (paired with the least loaded decode worker).
    """

    name = PlacementName.ALGORITHM1.value
    senders_max = SENDERS_MAX

    def shortlist(self, workers: Sequence[Worker], now_s: float) -> Sequence[Worker]:
        return workers

    def fetches(self, own_blocks: int, remote_blocks: int, fetched_s: float, recomputed_s: float) -> bool:
        return fetched_s < recomputed_s


class Mooncake(LeastTtft):
    """`mooncake`: the paper's rule: the longest copy is fetched if over `threshold` times as long as the own one."""

    name = PlacementName.MOONCAKE.value
    senders_max = 1

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def fetches(self, own_blocks: int, remote_blocks: int, fetched_s: float, recomputed_s: float) -> bool:
        ratio = remote_blocks / own_blocks if own_blocks else inf if remote_blocks else 1.0
        return ratio > self.threshold


class LocalPrefix(LeastTtft):
    """`local_prefix`: the least TTFT with what each worker has itself; nothing is fetched."""

    name = PlacementName.LOCAL_PREFIX.value
    senders_max = 0

    def fetches(self, own_blocks: int, remote_blocks: int, fetched_s: float, recomputed_s: float) -> bool:
        return False


class LeastLoaded(LocalPrefix):
    """`least_loaded`: the shortest queue in seconds, then the fewest attempts, whatever is cached where."""

    name = PlacementName.LEAST_LOADED.value

    def shortlist(self, workers: Sequence[Worker], now_s: float) -> Sequence[Worker]:
        return [min(workers, key=lambda w: (w.queue_s(now_s), w.attempts, w.node_id))]


class RoundRobin(LocalPrefix):
    """`round_robin`: the next name after the last one, in alphabetical order."""

    name = PlacementName.ROUND_ROBIN.value

    def __init__(self) -> None:
        self._last = ""

    def shortlist(self, workers: Sequence[Worker], now_s: float) -> Sequence[Worker]:
        chosen = min(workers, key=lambda w: (w.node_id <= self._last, w.node_id))
        self._last = chosen.node_id
        return [chosen]


class Random(LocalPrefix):
    """`random`: each worker with the same chance, by the digest of the seed and of how often it was asked."""

    name = PlacementName.RANDOM.value

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._asked = 0

    def shortlist(self, workers: Sequence[Worker], now_s: float) -> Sequence[Worker]:
        self._asked += 1
        digest = hashlib.blake2b(f"{self._seed}:{self._asked}".encode(), digest_size=8).digest()
        in_order = sorted(workers, key=_node_id)
        return [in_order[int.from_bytes(digest, "little") % len(in_order)]]


def placement_policy(config: ConductorConfig) -> PlacementPolicy:
    """A new instance of what `config.placement` names."""
    match config.placement:
        case PlacementName.MOONCAKE:
            return Mooncake(config.balancing_threshold)
        case PlacementName.LOCAL_PREFIX:
            return LocalPrefix()
        case PlacementName.LEAST_LOADED:
            return LeastLoaded()
        case PlacementName.ROUND_ROBIN:
            return RoundRobin()
        case PlacementName.RANDOM:
            return Random(config.placement_seed)
        case PlacementName.ALGORITHM1:
            return LeastTtft()


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What was picked, and the best candidates' scores, best first, the picked ones always among them.

    Args:
        prefill_candidates, decode_candidates: how many there were.
        handover_s: what the pull is predicted to take beyond the first token; 0 on a coupled worker.
        pull_s: what it would take alone.
        capped: a worker would have promised an earlier first token, had it been allowed one more copy of a prefix.
    """

    option: Option
    prefill_scores: tuple[PrefillScore, ...]
    decode_scores: tuple[DecodeScore, ...]
    prefill_candidates: int = 1
    decode_candidates: int = 1
    handover_s: float = 0.0
    pull_s: float = 0.0
    capped: bool = False

    @property
    def ttft(self) -> Estimate:
        return self.option.ttft

    @property
    def tbt(self) -> Estimate:
        return self.option.tbt


def place(
    query: Query, view: ClusterView, index: PrefixIndex, policy: PlacementPolicy, config: ConductorConfig, now_s: float
) -> Placement | None:
    """Pick where a request is served; None: no pair of ready workers that can hold it is left."""
    ready = view.ready(now_s)
    candidates = [w for w in ready if w.node_id not in query.excluded] if query.excluded else ready
    matched, slow = index.walk(query.hashes)
    holders = senders(ready, matched, policy.senders_max, now_s)
    pricing = Pricing(query=query, holders=holders, slow=slow, fetches=policy.fetches, config=config, now_s=now_s)
    own_blocks = matched.get
    decodes = [pricing.decode(w, own_blocks(w.node_id, 0)) for w in candidates if fits_decode(query, w)]
    decodes.sort(key=_decode_order)
    coupled = {bid.worker.node_id: bid for bid in decodes if bid.worker.coupled}
    partners = _partners([bid for bid in decodes if not bid.worker.coupled] if coupled else decodes)
    able = [w for w in candidates if fits_prefill(query, w) and (w.node_id in coupled if w.coupled else partners)]
    if not able:
        return None
    keep = config.record_candidates_max
    bids = [pricing.prefill(w, own_blocks(w.node_id, 0)) for w in policy.shortlist(able, now_s)]

    def order(bid: PrefillBid) -> PrefillOrder:
        return _prefill_order(bid, coupled[bid.worker.node_id] if bid.worker.coupled else partners[0])

    bids.sort(key=order)
    prefill, decode, handover_s = _joined([(order(bid), bid) for bid in bids[:JOINED_MAX]], coupled, partners, pricing)
    best = order(bids[0])
    prefill_scores = {bid.worker.node_id: pricing.prefill_score(bid) for bid in _best(bids, prefill, keep)}
    decode_scores = {bid.worker.node_id: pricing.decode_score(bid) for bid in _best(decodes, decode, keep)}
    return Placement(
        option=Option(prefill_scores[prefill.worker.node_id], decode_scores[decode.worker.node_id]),
        prefill_scores=tuple(prefill_scores.values()),
        decode_scores=tuple(decode_scores.values()),
        prefill_candidates=len(bids),
        decode_candidates=len(decodes),
        handover_s=handover_s,
        pull_s=pricing.pull_s(prefill, decode),
        capped=any((*order(bid)[:2], bid.uncapped_s) < best for bid in bids if bid.uncapped_s < inf),
    )


def place_decode(
    query: Query, view: ClusterView, index: PrefixIndex, policy: PlacementPolicy, config: ConductorConfig, now_s: float
) -> DecodeScore | None:
    """Another decode worker for an attempt whose prefill goes on; None: all that could hold it are excluded."""
    matched = index.match(query.hashes)
    pricing = Pricing(query=query, holders=(), slow=None, fetches=policy.fetches, config=config, now_s=now_s)
    bids = [
        pricing.decode(w, matched.get(w.node_id, 0))
        for w in view.ready(now_s)
        if not w.coupled and w.node_id not in query.excluded and fits_decode(query, w)
    ]
    return pricing.decode_score(min(bids, key=_decode_order)) if bids else None


def _joined(
    ranked: Sequence[tuple[PrefillOrder, PrefillBid]],
    coupled: Mapping[NodeId, DecodeBid],
    partners: Sequence[DecodeBid],
    pricing: Pricing,
) -> tuple[PrefillBid, DecodeBid, float]:
    """The pair with the shortest hand-over among the best few of both sides that are as good as the best."""
    first, best = ranked[0]
    pairs: list[tuple[float, int, int, PrefillBid, DecodeBid]] = []
    for rank, (order, bid) in enumerate(ranked):
        if order[:2] != first[:2] or bid.ttft_s > best.ttft_s * (1.0 + TTFT_STEP):
            continue
        if bid.worker.coupled:
            pairs.append((0.0, rank, 0, bid, coupled[bid.worker.node_id]))
        else:
            sending = bid.worker.sending_bytes(pricing.now_s)
            pairs += [(pricing.handover_s(bid, sending, d), rank, i, bid, d) for i, d in enumerate(partners)]
    handover_s, _, _, prefill, decode = min(pairs)
    return prefill, decode, handover_s


def _partners(decodes: Sequence[DecodeBid]) -> Sequence[DecodeBid]:
    """The best decode worker and those whose load counts as equal to its, best first. `decodes` is in order."""
    if not decodes:
        return ()
    best = _decode_order(decodes[0])[:3]
    return [bid for bid in decodes[:JOINED_MAX] if _decode_order(bid)[:3] == best]


def _decode_order(bid: DecodeBid) -> tuple[bool, bool, int, int, float, NodeId]:
    return (bid.load > 1.0, bid.young, int(bid.load / LOAD_STEP), -bid.hit_blocks, bid.load, bid.worker.node_id)


def _prefill_order(bid: PrefillBid, decode: DecodeBid) -> PrefillOrder:
    return (decode.load > 1.0, bid.young or decode.young, bid.ttft_s, decode.load, bid.worker.node_id)


Bid = TypeVar("Bid", PrefillBid, DecodeBid)


def _best(bids: Sequence[Bid], picked: Bid, keep: int) -> list[Bid]:
    """The first so many, and what was picked among them."""
    kept = list(bids[:keep])
    if not any(bid is picked for bid in kept):
        kept[-1] = picked
    return kept


def _node_id(worker: Worker) -> NodeId:
    return worker.node_id
