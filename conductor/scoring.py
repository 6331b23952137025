"""Pure: what each worker would cost a request, in seconds, term by term. Filters and scores; changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from conductor.config import ConductorConfig
from conductor.effects import Slo
from conductor.view import Worker
from core.cost import NOTHING, Estimate
from halfmoon.types import BlockHash, NodeId

SENDERS_MAX = 2
"""Copies of a prefix that are priced per candidate: the longest, and a shorter one at a less busy worker."""

FetchRule = Callable[[int, int, float, float], bool]
"""(own blocks, remote blocks, seconds if fetched, seconds if recomputed) -> fetch?"""


@dataclass(frozen=True, kw_only=True)
class Query:
    """One attempt, as placement sees it.

    Args:
        num_tokens: tokens whose KV is needed before the next one can be sampled.
        hashes: names of their full blocks, as far as known, fewer than would cover the last token.
        tokens_max: prompt and all the output that was asked for.
        output_tokens: how much of it is expected.
        excluded: workers that have refused this attempt already.
    """

    num_tokens: int
    hashes: Sequence[BlockHash]
    tokens_max: int
    output_tokens: int
    slo: Slo
    block_size: int
    block_bytes: int
    excluded: frozenset[NodeId] = frozenset()

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    @cached_property
    def blocks_prefill(self) -> int:
        return self.blocks(self.num_tokens)

    @cached_property
    def blocks_max(self) -> int:
        return self.blocks(self.tokens_max)

    @cached_property
    def blocks_expected(self) -> int:
        """Decode room that it will probably need."""
        return self.blocks(min(self.tokens_max, self.num_tokens + self.output_tokens))


class PrefillScore(NamedTuple):
    """Predicted time to first token on one worker: `ttft_s` = queue + fetch + prefill + mixing (seconds).

    `mixing_s`: decode steps that share this prefill's passes on a coupled worker. `in_range`: whether every term was
    inside what the cost models have seen. `young`: capped by slow start.
    """

    node_id: NodeId
    ttft_s: float
    queue_s: float
    fetch_s: float
    prefill_s: float
    mixing_s: float
    hit_blocks: int
    fetch_blocks: int
    source: NodeId | None
    in_range: bool
    young: bool


class DecodeScore(NamedTuple):
    """Predicted gap between tokens, and load: the largest of TBT over its SLO, KV blocks and sequences over room.

    `stall_s`: what a prefill pass of others adds to a gap on a coupled worker; it is part of `tbt_s`.
    """

    node_id: NodeId
    load: float
    tbt_s: float
    stall_s: float
    tbt_load: float
    room_load: float
    hit_blocks: int
    in_range: bool
    young: bool


class Option(NamedTuple):
    """A way to serve the attempt; on a coupled worker both scores name the same node."""

    prefill: PrefillScore
    decode: DecodeScore

    @property
    def coupled(self) -> bool:
        return self.prefill.node_id == self.decode.node_id

    @property
    def ttft(self) -> Estimate:
        return Estimate(self.prefill.ttft_s, self.prefill.in_range)

    @property
    def tbt(self) -> Estimate:
        return Estimate(self.decode.tbt_s, self.decode.in_range)


class Sender(NamedTuple):
    worker: Worker
    blocks: int


def senders(alive: Sequence[Worker], matched: Mapping[NodeId, int]) -> list[Sender]:
    """The holders worth asking: each next one has a shorter prefix and less to send than all before it.

    A candidate that is among them needs only those before it, for no other holds more than it does.
    """
    holders = [Sender(w, matched[w.node_id]) for w in alive if w.node_id in matched]
    holders.sort(key=lambda s: (-s.blocks, s.worker.sending_bytes, s.worker.node_id))
    worth: list[Sender] = []
    for sender in holders:
        if not worth or sender.worker.sending_bytes < worth[-1].worker.sending_bytes:
            worth.append(sender)
    return worth[:SENDERS_MAX]


def score_prefill(
    query: Query,
    worker: Worker,
    own_blocks: int,
    holders: Sequence[Sender],
    fetches: FetchRule,
    config: ConductorConfig,
    now_s: float,
) -> PrefillScore:
    """Algorithm 1's body for one worker: fetch the longer remote prefix or compute it, whichever the rule says.

    The transfer is priced with everything that the sender has promised already in front of it.
    """
    cost, context = worker.cost, own_blocks * query.block_size
    compute, fetch, source, fetch_blocks = cost.prefill_s(query.num_tokens - context, context), NOTHING, None, 0
    for sender in holders:
        if sender.blocks <= own_blocks:
            break
        num_bytes = (sender.blocks - own_blocks) * query.block_bytes + sender.worker.sending_bytes
        moved = cost.transfer_s(num_bytes, sender.worker.node_id)
        context = sender.blocks * query.block_size
        rest = cost.prefill_s(query.num_tokens - context, context)
        if fetches(own_blocks, sender.blocks, moved.seconds + rest.seconds, compute.seconds + fetch.seconds):
            compute, fetch, source, fetch_blocks = rest, moved, sender.worker.node_id, sender.blocks - own_blocks
    queue_s = worker.queue_s(now_s)
    mixing = _mixing(query, worker, own_blocks + fetch_blocks) if worker.coupled else NOTHING
    return PrefillScore(
        worker.node_id,
        queue_s + fetch.seconds + compute.seconds + mixing.seconds,
        queue_s,
        fetch.seconds,
        compute.seconds,
        mixing.seconds,
        own_blocks,
        fetch_blocks,
        source,
        fetch.in_range and compute.in_range and mixing.in_range,
        worker.young(now_s, config),
    )


def score_decode(query: Query, worker: Worker, own_blocks: int, config: ConductorConfig, now_s: float) -> DecodeScore:
    """The state of this worker once everything booked and this request have joined its batch."""
    batch = worker.batch + 1
    step = worker.cost.decode_step_s(batch, worker.kv_tokens + query.num_tokens)
    stall = _stall(worker, now_s) if worker.coupled else NOTHING
    tbt_s = step.seconds + stall.seconds
    tbt_load = tbt_s / (query.slo.tbt_s or config.slo.tbt_s or tbt_s or 1.0)
    blocks_load = (worker.decode_blocks + query.blocks_expected) / worker.num_blocks
    room_load = max(blocks_load, batch / worker.sequences_max)
    return DecodeScore(
        worker.node_id,
        max(tbt_load, room_load),
        tbt_s,
        stall.seconds,
        tbt_load,
        room_load,
        own_blocks,
        step.in_range and stall.in_range,
        worker.young(now_s, config),
    )


def fits_prefill(query: Query, worker: Worker) -> bool:
    return worker.prefills and query.blocks_prefill <= worker.num_blocks


def fits_decode(query: Query, worker: Worker) -> bool:
    return worker.decodes and query.blocks_max <= worker.num_blocks


def _mixing(query: Query, worker: Worker, cached_blocks: int) -> Estimate:
    if worker.batch == 0:
        return NOTHING
    new = query.num_tokens - cached_blocks * query.block_size
    passes = -(-new // max(1, worker.info.tokens_per_pass_max))
    step = worker.cost.decode_step_s(worker.batch, worker.kv_tokens)
    return Estimate(step.seconds * passes, step.in_range)


def _stall(worker: Worker, now_s: float) -> Estimate:
    waiting_s = worker.queue_s(now_s)
    if waiting_s == 0.0:
        return NOTHING
    one_pass = worker.cost.prefill_s(max(1, worker.info.tokens_per_pass_max), 0)
    return Estimate(min(waiting_s, one_pass.seconds), one_pass.in_range)
