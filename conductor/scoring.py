"""Pure: what each worker would cost a request, in seconds, term by term. Filters and scores; changes nothing.

A bid is what picking needs, made for every worker. A score says beside it how sure each prediction is, which is asked
only of the candidates that a decision record keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import NamedTuple

from conductor.config import ConductorConfig
from conductor.effects import Slo
from conductor.prefix_index import SlowBlocks
from conductor.view import Worker
from core.cost import NOTHING, Estimate
from halfmoon.types import BlockHash, NodeId

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
    """Predicted time to first token on one worker: `ttft_s` = queue + fetch + read + prefill + mixing (seconds).

    `mixing_s`: decode steps that share this prefill's passes on a coupled worker. `read_s`: moving its own hits into
    DEVICE from slower tiers; a sender's reads are part of `fetch_s`. `in_range`: whether every term was inside what
    the cost models have seen. `young`: capped by slow start. `capped`: it may not take in more copies of prefixes for
    now, and would be quicker if it might.
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
    read_s: float = 0.0
    capped: bool = False


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
    sending_bytes: float


class PrefillBid(NamedTuple):
    """Seconds as in PrefillScore. `uncapped_s`: TTFT if the cap on copies did not hold; infinite where it does not."""

    worker: Worker
    ttft_s: float
    queue_s: float
    fetch_s: float
    read_s: float
    prefill_s: float
    mixing_s: float
    hit_blocks: int
    sender: Sender | None
    young: bool
    uncapped_s: float


class DecodeBid(NamedTuple):
    """As in DecodeScore."""

    worker: Worker
    load: float
    tbt_s: float
    stall_s: float
    tbt_load: float
    room_load: float
    hit_blocks: int
    young: bool


def senders(alive: Sequence[Worker], matched: Mapping[NodeId, int], most: int, now_s: float) -> list[Sender]:
    """The holders worth asking, at most so many: each next one has a shorter prefix and less to send than all before.

    A candidate that is among them needs only those before it, for no other holds more than it does.
    """
    if not matched or most == 0:
        return []
    by_length: dict[int, list[Worker]] = {}
    for worker in alive:
        blocks = matched.get(worker.node_id)
        if blocks is not None:
            by_length.setdefault(blocks, []).append(worker)
    worth: list[Sender] = []
    for blocks in sorted(by_length, reverse=True):
        sending, _, worker = min([(w.sending_bytes(now_s), w.node_id, w) for w in by_length[blocks]])
        if not worth or sending < worth[-1].sending_bytes:
            worth.append(Sender(worker, blocks, sending))
        if sending == 0.0 or len(worth) == most:
            break
    return worth


@dataclass(frozen=True, kw_only=True)
class Pricing:
    """What all workers' bids for one attempt have in common.

    Args:
        holders: of prefixes worth fetching, the longest first.
        slow: where cached blocks lie that are not in DEVICE.
        fetches: the policy's rule.
    """

    query: Query
    holders: Sequence[Sender]
    slow: SlowBlocks | None
    fetches: FetchRule
    config: ConductorConfig
    now_s: float

    def prefill(self, worker: Worker, own_blocks: int) -> PrefillBid:
        """Algorithm 1's body for one worker: fetch the longer remote prefix or compute it, whichever the rule says.

        The transfer is priced with everything that the sender has promised already in front of it.
        """
        query, cost, now_s = self.query, worker.cost, self.now_s
        prefill_seconds = cost.prefill_seconds
        context = own_blocks * query.block_size
        prefill_s = prefill_seconds(query.num_tokens - context, context)
        fetch_s, chosen, refused_s = 0.0, None, inf
        for sender in self.holders:
            if sender.blocks <= own_blocks:
                break
            context = sender.blocks * query.block_size
            rest_s = prefill_seconds(query.num_tokens - context, context)
            num_bytes = (sender.blocks - own_blocks) * query.block_bytes + sender.sending_bytes
            moved_s = cost.transfer_seconds(num_bytes, sender.worker.node_id)
            if self.slow is not None:
                moved_s += self._read_s(sender.worker, own_blocks, sender.blocks)
            if self.fetches(own_blocks, sender.blocks, moved_s + rest_s, fetch_s + prefill_s):
                if worker.may_copy(sender.blocks - own_blocks, now_s, self.config):
                    fetch_s, prefill_s, chosen = moved_s, rest_s, sender
                else:
                    refused_s = min(refused_s, moved_s + rest_s)
        queue_s = worker.queue_s(now_s)
        read_s = self._read_s(worker, 0, own_blocks) if self.slow is not None and own_blocks else 0.0
        mixing_s = 0.0
        if worker.coupled:
            mixing_s = _mixing(query, worker, own_blocks if chosen is None else chosen.blocks).seconds
        ttft_s = queue_s + fetch_s + read_s + prefill_s + mixing_s
        return PrefillBid(
            worker,
            ttft_s,
            queue_s,
            fetch_s,
            read_s,
            prefill_s,
            mixing_s,
            own_blocks,
            chosen,
            worker.young(now_s, self.config),
            inf if refused_s >= fetch_s + prefill_s else queue_s + refused_s + read_s + mixing_s,
        )

    def _read_s(self, holder: Worker, first: int, end: int) -> float:
        assert self.slow is not None
        lying = self.slow.of(holder.node_id, first, end)
        return sum([holder.cost.read_s(count * self.query.block_bytes, tier) for tier, count in lying])

    def decode(self, worker: Worker, own_blocks: int) -> DecodeBid:
        """The state of this worker once everything booked and this request have joined its batch."""
        query, batch = self.query, worker.batch + 1
        tbt_s = worker.cost.decode_seconds(batch, worker.kv_tokens + query.num_tokens)
        stall_s = 0.0
        if worker.coupled:
            stall_s = _stall(worker, self.now_s).seconds
            tbt_s += stall_s
        limit_s = query.slo.tbt_s or self.config.slo.tbt_s
        tbt_load = tbt_s / limit_s if limit_s else 0.0  # without a limit room alone says who is less loaded
        claimed = 0 if worker.claim is None else worker.claim.blocks
        room_load = (worker.decode_blocks + claimed + query.blocks_expected) / worker.num_blocks
        if batch / worker.sequences_max > room_load:
            room_load = batch / worker.sequences_max
        load = max(room_load, tbt_load)
        young = worker.young(self.now_s, self.config)
        return DecodeBid(worker, load, tbt_s, stall_s, tbt_load, room_load, own_blocks, young)

    def handover_s(self, prefill: PrefillBid, sending_bytes: float, decode: DecodeBid) -> float:
        """What the decode worker's pull takes beyond the first token: the transfer term that joins the two halves.

        Its own bytes can move while later ones are computed, but what the prompt's last pass computes cannot: of a
        prompt of one pass that is all. The `sending_bytes` promised to others go before it from now on.
        """
        query, source, cost = self.query, prefill.worker.node_id, decode.worker.cost
        blocks = query.blocks_prefill - decode.hit_blocks
        num_bytes = blocks * query.block_bytes
        alone_s = cost.transfer_seconds(num_bytes, source)
        behind_s = cost.transfer_seconds(num_bytes + sending_bytes, source) if sending_bytes else alone_s
        last_s = cost.transfer_seconds(min(blocks, _last_pass_blocks(query, prefill)) * query.block_bytes, source)
        return max(last_s, alone_s - prefill.prefill_s, behind_s - prefill.ttft_s)

    def pull_s(self, prefill: PrefillBid, decode: DecodeBid) -> float:
        """What that pull takes alone, its blocks being there already."""
        if prefill.worker is decode.worker:
            return 0.0
        num_bytes = (self.query.blocks_prefill - decode.hit_blocks) * self.query.block_bytes
        return decode.worker.cost.transfer_seconds(num_bytes, prefill.worker.node_id)

    # ---- how sure a bid is ----

    def prefill_score(self, bid: PrefillBid) -> PrefillScore:
        query, worker, sender = self.query, bid.worker, bid.sender
        cached = bid.hit_blocks if sender is None else sender.blocks
        context = cached * query.block_size
        in_range = worker.cost.prefill_known(query.num_tokens - context, context)
        if sender is not None and in_range:
            num_bytes = (sender.blocks - bid.hit_blocks) * query.block_bytes + sender.sending_bytes
            in_range = worker.cost.transfer_known(num_bytes, sender.worker.node_id)
        if worker.coupled and in_range:
            in_range = _mixing(query, worker, cached).in_range
        return PrefillScore(
            worker.node_id,
            bid.ttft_s,
            bid.queue_s,
            bid.fetch_s,
            bid.prefill_s,
            bid.mixing_s,
            bid.hit_blocks,
            cached - bid.hit_blocks,
            None if sender is None else sender.worker.node_id,
            in_range,
            bid.young,
            bid.read_s,
            bid.uncapped_s < inf,
        )

    def decode_score(self, bid: DecodeBid) -> DecodeScore:
        worker = bid.worker
        in_range = worker.cost.decode_known(worker.batch + 1, worker.kv_tokens + self.query.num_tokens)
        if worker.coupled and in_range:
            in_range = _stall(worker, self.now_s).in_range
        return DecodeScore(
            worker.node_id,
            bid.load,
            bid.tbt_s,
            bid.stall_s,
            bid.tbt_load,
            bid.room_load,
            bid.hit_blocks,
            in_range,
            bid.young,
        )


def fits_prefill(query: Query, worker: Worker) -> bool:
    return worker.prefills and query.blocks_prefill <= worker.num_blocks


def fits_decode(query: Query, worker: Worker) -> bool:
    return worker.decodes and query.blocks_max <= worker.num_blocks


def _last_pass_blocks(query: Query, prefill: PrefillBid) -> int:
    """Blocks that its last pass fills or begins, if no other prompt shares its passes."""
    cached = (prefill.hit_blocks if prefill.sender is None else prefill.sender.blocks) * query.block_size
    most = max(1, prefill.worker.info.tokens_per_pass_max)
    new_tokens = (query.num_tokens - cached - 1) % most + 1
    return query.blocks_prefill - (query.num_tokens - new_tokens) // query.block_size


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
