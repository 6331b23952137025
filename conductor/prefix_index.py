"""Pure: which workers hold which blocks: the longest cached prefix of a prompt on every worker, in one walk.

Sized for 1e6 blocks on 100 workers. A block maps to one integer with a bit per worker, so that a walk along a prompt
is one dictionary look-up and one AND per block for all workers together; runs of blocks with the same holders (the
common case) cost only the look-up. Each worker's own copies lie in a dictionary of their own, which gives its tiers,
its count, and its removal in time proportional to what it held.

An entry may be stale: a worker that has lost a block computes it. So nothing here is ever a user's error.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from core.messages import BlockCopy, KvEvents
from halfmoon.types import BlockHash, NodeId, Tier

BLOCKS_PER_NODE_MAX = 4_000_000
"""Copies kept per worker, against a peer that announces without end; beyond it the node's mode is degraded."""

SLOW_TIERS = (Tier.DRAM, Tier.SSD)
DEVICE_BIT = 1 << Tier.DEVICE


class IndexMode(enum.StrEnum):
    """EXACT: as of the last event. REBUILDING: a snapshot is asked for. DEGRADED: it did not come, or was too big."""

    EXACT = "exact"
    REBUILDING = "rebuilding"
    DEGRADED = "degraded"


@dataclass
class _Node:
    bit: int
    last_event_id: int | None = None
    mode: IndexMode = IndexMode.REBUILDING
    copies: dict[BlockHash, int] = field(default_factory=dict)  # block -> bits of tiers


class Run(NamedTuple):
    """Blocks [first, end) of a prompt: the workers in `nodes` (a bit each) hold them no faster than in `tier`."""

    first: int
    end: int
    nodes: int
    tier: Tier


class SlowBlocks:
    """The blocks of one prompt that some workers hold, but not in DEVICE: reading them there costs something."""

    def __init__(self, runs: list[Run], bits: Mapping[NodeId, int]) -> None:
        self._runs = runs
        self._bits = bits

    def of(self, node_id: NodeId, first: int, end: int) -> list[tuple[Tier, int]]:
        """How many of a worker's blocks [first, end) lie in each slower tier; tiers without any are left out."""
        bit, counts = self._bits[node_id], dict.fromkeys(SLOW_TIERS, 0)
        for run in self._runs:
            if run.nodes & bit:
                counts[run.tier] += max(0, min(end, run.end) - max(first, run.first))
        return [(tier, count) for tier, count in counts.items() if count]


class PrefixIndex:
    """The announced blocks of every worker. One owner: the conductor's machine."""

    def __init__(self) -> None:
        self._nodes: dict[NodeId, _Node] = {}
        self._holders: dict[BlockHash, int] = {}
        self._slow: dict[Tier, dict[BlockHash, int]] = {tier: {} for tier in SLOW_TIERS}  # whose fastest copy is there
        self._bits: dict[NodeId, int] = {}
        self._by_position: list[NodeId | None] = []
        self.events_dropped = 0

    # ---- workers ----

    def join(self, node_id: NodeId) -> None:
        """Begin to index a node; forgets what it had announced before."""
        self.remove(node_id)
        free = next((i for i, owner in enumerate(self._by_position) if owner is None), len(self._by_position))
        if free == len(self._by_position):
            self._by_position.append(None)
        self._by_position[free] = node_id
        self._nodes[node_id] = _Node(bit=1 << free)
        self._bits[node_id] = 1 << free

    def remove(self, node_id: NodeId) -> None:
        """Forget a node and all its copies, in time proportional to them. Unknown nodes are ignored."""
        node = self._nodes.pop(node_id, None)
        if node is not None:
            self._clear(node)
            self._by_position[node.bit.bit_length() - 1] = None
            del self._bits[node_id]

    def on_snapshot(self, node_id: NodeId, last_event_id: int, copies: Iterable[BlockCopy]) -> None:
        """Replace everything known of a node by what it says it holds as of `last_event_id`."""
        node = self._nodes[node_id]
        self._clear(node)
        node.last_event_id = last_event_id
        node.mode = IndexMode.EXACT
        self._store(node, copies)

    def on_events(self, node_id: NodeId, events: KvEvents) -> bool:
        """Apply one message of changes. True: ids were missed, so a snapshot is to be asked for.

        After a gap the events still apply: fresh entries are worth more than none.
        """
        node = self._nodes[node_id]
        last = node.last_event_id
        if last is not None and events.event_id <= last:
            self.events_dropped += 1
            return False
        gap = node.mode is IndexMode.EXACT and last is not None and events.event_id != last + 1
        if gap:
            node.mode = IndexMode.REBUILDING
        node.last_event_id = events.event_id
        self._drop(node, events.removed)
        self._store(node, events.stored)
        return gap

    def mark_degraded(self, node_id: NodeId) -> None:
        self._nodes[node_id].mode = IndexMode.DEGRADED

    # ---- questions ----

    def mode(self, node_id: NodeId) -> IndexMode:
        return self._nodes[node_id].mode

    def num_blocks(self, node_id: NodeId) -> int:
        """Distinct blocks that this node is believed to hold, in whatever tier."""
        return len(self._nodes[node_id].copies)

    def __len__(self) -> int:
        return len(self._holders)

    def match(self, hashes: Sequence[BlockHash]) -> dict[NodeId, int]:
        """For each worker that holds the first block: how many blocks of the prefix it holds without a hole."""
        matched: dict[NodeId, int] = {}
        if not hashes or (alive := self._holders.get(hashes[0], 0)) == 0:
            return matched
        holders_of = self._holders.get
        previous = alive
        for index, block in enumerate(hashes):
            holders = holders_of(block, 0)
            if holders == previous:
                continue
            previous = holders
            ended = alive & ~holders
            if ended:
                self._note(matched, ended, index)
                alive &= holders
                if not alive:
                    return matched
        self._note(matched, alive, len(hashes))
        return matched

    def slow_blocks(self, hashes: Sequence[BlockHash]) -> SlowBlocks | None:
        """Where copies of these blocks are not in DEVICE. None: nowhere. Valid until the index changes."""
        runs: list[Run] = []
        for tier, slow in self._slow.items():
            if not slow:
                continue
            first, nodes = 0, 0
            for index, found in enumerate(map(slow.get, hashes)):
                if (found or 0) != nodes:
                    if nodes:
                        runs.append(Run(first, index, nodes, tier))
                    first, nodes = index, found or 0
            if nodes:
                runs.append(Run(first, len(hashes), nodes, tier))
        return SlowBlocks(runs, self._bits) if runs else None

    def copies(self, node_id: NodeId) -> Mapping[BlockHash, int]:
        """A worker's blocks, each with bit `1 << tier` for every tier that holds it. Read only."""
        return self._nodes[node_id].copies

    def last_event_id(self, node_id: NodeId) -> int | None:
        return self._nodes[node_id].last_event_id

    def nodes(self) -> list[NodeId]:
        return list(self._nodes)

    def tiers(self, node_id: NodeId, hashes: Sequence[BlockHash]) -> dict[Tier, int]:
        """How many of `hashes` lie at a node, each counted in its fastest tier."""
        copies = self._nodes[node_id].copies
        counts: dict[Tier, int] = {}
        for bits in filter(None, map(copies.get, hashes)):
            tier = Tier((bits & -bits).bit_length() - 1)
            counts[tier] = counts.get(tier, 0) + 1
        return counts

    # ---- keeping the two maps together ----

    def _note(self, matched: dict[NodeId, int], bits: int, length: int) -> None:
        while bits:
            lowest = bits & -bits
            node_id = self._by_position[lowest.bit_length() - 1]
            assert node_id is not None, "a bit without an owner"
            matched[node_id] = length
            bits ^= lowest

    def _store(self, node: _Node, copies: Iterable[BlockCopy]) -> None:
        own, holders, bit = node.copies, self._holders, node.bit
        for copy in copies:
            block = copy.block_hash
            bits = own.get(block, 0)
            if bits == 0:
                if len(own) >= BLOCKS_PER_NODE_MAX:
                    node.mode = IndexMode.DEGRADED
                    return
                holders[block] = holders.get(block, 0) | bit
            now = own[block] = bits | 1 << copy.tier
            if now & -now != bits & -bits:
                self._move(block, bit, bits & -bits, now & -now)

    def _drop(self, node: _Node, copies: Iterable[BlockCopy]) -> None:
        own = node.copies
        for copy in copies:
            block = copy.block_hash
            before = own.get(block, 0)
            bits = before & ~(1 << copy.tier)
            if bits:
                own[block] = bits
            elif own.pop(block, None) is not None:
                _unset(self._holders, block, node.bit)
            if bits & -bits != before & -before:
                self._move(block, node.bit, before & -before, bits & -bits)

    def _move(self, block: BlockHash, bit: int, before: int, after: int) -> None:
        """A worker's fastest copy of a block is in another tier now (as `1 << tier`; 0: it has none)."""
        for tier, slow in self._slow.items():
            if before == 1 << tier:
                _unset(slow, block, bit)
            elif after == 1 << tier:
                slow[block] = slow.get(block, 0) | bit

    def _clear(self, node: _Node) -> None:
        for block, bits in node.copies.items():
            _unset(self._holders, block, node.bit)
            if not bits & DEVICE_BIT:
                self._move(block, node.bit, bits & -bits, 0)
        node.copies.clear()

    def check_invariants(self) -> None:
        """Assert that the two maps say the same. For tests and idle times: looks at everything."""
        expected: dict[BlockHash, int] = {}
        slow: dict[Tier, dict[BlockHash, int]] = {tier: {} for tier in SLOW_TIERS}
        for node in self._nodes.values():
            for block, bits in node.copies.items():
                expected[block] = expected.get(block, 0) | node.bit
                tier = Tier((bits & -bits).bit_length() - 1)
                if tier in slow:
                    slow[tier][block] = slow[tier].get(block, 0) | node.bit
        assert expected == self._holders, "holders and copies disagree"
        assert slow == self._slow, "slow copies and copies disagree"


def _unset(holders: dict[BlockHash, int], block: BlockHash, bit: int) -> None:
    left = holders[block] & ~bit
    if left:
        holders[block] = left
    else:
        del holders[block]
