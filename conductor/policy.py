"""Pure: placement: filter, score in seconds, pick. Mooncake's Algorithm 1 with the fetch decided by seconds.

Selecting has no side effect; `conductor.machine` books what was picked. A policy says two things: when a remote prefix
is fetched, and which of the scored options is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from conductor.config import ConductorConfig
from conductor.prefix_index import PrefixIndex
from conductor.scoring import (
    DecodeScore,
    Option,
    PrefillScore,
    Query,
    fits_decode,
    fits_prefill,
    score_decode,
    score_prefill,
    senders,
)
from conductor.view import ClusterView, Worker
from core.cost import Estimate
from halfmoon.types import NodeId

LOAD_STEP = 0.05
"""Decode loads within one step count as equal; then the worker that has to pull the fewest blocks wins."""


class PlacementPolicy(Protocol):
    """What differs between ways to place. Deterministic: randomness comes as a seeded random.Random of its own."""

    @property
    def name(self) -> str: ...

    def fetches(self, own_blocks: int, remote_blocks: int, fetched_s: float, recomputed_s: float) -> bool:
        """Whether `remote_blocks` of prefix are fetched (so that TTFT is `fetched_s` plus the queue) or recomputed."""
        ...

    def pick_decode(self, scores: Sequence[DecodeScore]) -> DecodeScore:
        """The decode worker for a prefill elsewhere; `scores` is never empty."""
        ...

    def pick(self, options: Sequence[Option]) -> Option:
        """The placement; `options` is never empty."""
        ...


class LeastTtft:
    """Algorithm 1: the least predicted TTFT among the options whose decode side keeps its SLO and has room.

    Coupled workers compete with every prefill worker (paired with the least loaded decode worker). Ties go to the
    lower load, then to the node's name.
    """

    name = "least_ttft"

    def fetches(self, own_blocks: int, remote_blocks: int, fetched_s: float, recomputed_s: float) -> bool:
        return fetched_s < recomputed_s

    def pick_decode(self, scores: Sequence[DecodeScore]) -> DecodeScore:
        return min(scores, key=_decode_order)

    def pick(self, options: Sequence[Option]) -> Option:
        return min(options, key=_option_order)


def _decode_order(score: DecodeScore) -> tuple[bool, bool, int, int, float, NodeId]:
    step = int(score.load / LOAD_STEP)
    return (score.load > 1.0, score.young, step, -score.hit_blocks, score.load, score.node_id)


def _option_order(option: Option) -> tuple[bool, bool, float, float, NodeId]:
    prefill, decode = option
    return (decode.load > 1.0, prefill.young or decode.young, prefill.ttft_s, decode.load, prefill.node_id)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What was picked, and every candidate's scores."""

    option: Option
    prefill_scores: tuple[PrefillScore, ...]
    decode_scores: tuple[DecodeScore, ...]

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
    candidates = [w for w in ready if w.node_id not in query.excluded]
    matched = index.match(query.hashes)
    decode = [
        score_decode(query, w, matched.get(w.node_id, 0), config, now_s) for w in candidates if fits_decode(query, w)
    ]
    prefill = _prefill_scores(query, ready, candidates, matched, policy, config, now_s)
    options = _options(prefill, decode, {w.node_id: w for w in candidates}, policy)
    if not options:
        return None
    return Placement(option=policy.pick(options), prefill_scores=tuple(prefill), decode_scores=tuple(decode))


def place_decode(
    query: Query, view: ClusterView, index: PrefixIndex, policy: PlacementPolicy, config: ConductorConfig, now_s: float
) -> DecodeScore | None:
    """Another decode worker for an attempt whose prefill goes on; None: all that could hold it are excluded."""
    matched = index.match(query.hashes)
    scores = [
        score_decode(query, w, matched.get(w.node_id, 0), config, now_s)
        for w in view.ready(now_s)
        if not w.coupled and w.node_id not in query.excluded and fits_decode(query, w)
    ]
    return policy.pick_decode(scores) if scores else None


def _prefill_scores(
    query: Query,
    ready: Sequence[Worker],
    candidates: Sequence[Worker],
    matched: Mapping[NodeId, int],
    policy: PlacementPolicy,
    config: ConductorConfig,
    now_s: float,
) -> list[PrefillScore]:
    holders = senders(ready, matched)
    return [
        score_prefill(query, w, matched.get(w.node_id, 0), holders, policy.fetches, config, now_s)
        for w in candidates
        if fits_prefill(query, w)
    ]


def _options(
    prefill: Sequence[PrefillScore],
    decode: Sequence[DecodeScore],
    workers: Mapping[NodeId, Worker],
    policy: PlacementPolicy,
) -> list[Option]:
    by_node = {score.node_id: score for score in decode}
    apart = [score for score in decode if not workers[score.node_id].coupled]
    partner = policy.pick_decode(apart) if apart else None
    options: list[Option] = []
    for score in prefill:
        other = by_node.get(score.node_id) if workers[score.node_id].coupled else partner
        if other is not None:
            options.append(Option(score, other))
    return options
