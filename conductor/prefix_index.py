"""Pure: which workers hold which blocks: the longest cached prefix of a prompt on every worker, in one walk.

Sized for 1e6 blocks on 100 workers. A block maps to one integer with three bits per worker: whether it holds the block,
and whether its fastest copy is in DRAM, or on SSD. So a walk along a prompt is one dictionary look-up and one AND per
block for all workers and tiers together; runs of blocks with the same holders (the common case) cost only the look-up.
Each worker's own copies lie in a dictionary of their own, which gives its tiers,
its count, and its removal in time proportional to what it held.

An entry may be stale: a worker that has lost a block computes it. So nothing here is ever a user's error.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import NamedTuple

from core.messages import BlockCopy, KvEvents
from halfmoon.types import BlockHash, NodeId, Tier

BLOCKS_PER_NODE_MAX = 4_000_000
"""Copies kept per worker, against a peer that announces without end; beyond it the node's mode is degraded."""

BITS = 3
"""Per worker: of a block that it holds the lowest is set; one of the others too, if no copy is in DEVICE."""

SLOW_BITS = {Tier.DRAM: 0b010, Tier.SSD: 0b100}
MANY = 12
"""Workers from which on they are named all at once, instead of bit by bit."""

ALL_SLOW = 0b110
HELD_BITS = {0: 0, 1 << Tier.DEVICE: 0b001, 1 << Tier.DRAM: 0b011, 1 << Tier.SSD: 0b101}
"""By the fastest tier, as the lowest bit of a worker's `copies`."""


class IndexMode(enum.StrEnum):
    """EXACT: as of the last event. REBUILDING: a snapshot is asked for. DEGRADED: it did not come, or was too big."""

    EXACT = "exact"
    REBUILDING = "rebuilding"
    DEGRADED = "degraded"


@dataclass
class _Node:
    shift: int
    last_event_id: int | None = None
    mode: IndexMode = IndexMode.REBUILDING
    copies: dict[BlockHash, int] = field(default_factory=dict)  # block -> bits of tiers


class Run(NamedTuple):
    """Blocks [first, end) of a prompt that the same workers hold in the same tiers (three bits each)."""

    first: int
    end: int
    holders: int


class SlowBlocks:
    """The blocks of one prompt that some workers hold, but not in DEVICE: reading them there costs something."""

    def __init__(self, runs: Sequence[Run], shifts: Mapping[NodeId, int]) -> None:
        self._runs = runs
        self._shifts = shifts
        self._anywhere = 0
        for run in runs:
            self._anywhere |= run.holders
        self._known: dict[tuple[NodeId, int, int], tuple[tuple[Tier, int], ...]] = {}

    def of(self, node_id: NodeId, first: int, end: int) -> tuple[tuple[Tier, int], ...]:
        """How many of a worker's blocks [first, end) lie in each slower tier; tiers without any are left out."""
        shift = self._shifts[node_id]
        if not self._anywhere >> shift & ALL_SLOW:
            return ()
        key = (node_id, first, end)  # a sender is asked about the same blocks for most of the receivers
        found = self._known.get(key)
        if found is None:
            counts = ((tier, self._count(bits << shift, first, end)) for tier, bits in SLOW_BITS.items())
            found = self._known[key] = tuple([(tier, count) for tier, count in counts if count])
        return found

    def _count(self, mask: int, first: int, end: int) -> int:
        inside = [(max(first, run.first), min(end, run.end)) for run in self._runs if run.holders & mask]
        return sum([max(0, last - begin) for begin, last in inside])


class Walk(NamedTuple):
    """lengths: for each worker that holds the first block: how many blocks of the prefix it holds without a hole.

    slow: where those lie that are not in DEVICE; None: all are. Valid until the index changes.
    """

    lengths: dict[NodeId, int]
    slow: SlowBlocks | None


class PrefixIndex:
    """The announced blocks of every worker. One owner: the conductor's machine."""

    def __init__(self) -> None:
        self._nodes: dict[NodeId, _Node] = {}
        self._holders: dict[BlockHash, int] = {}
        self._shifts: dict[NodeId, int] = {}
        self._slow_mask = 0
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
        shift = self._shifts[node_id] = BITS * free
        self._nodes[node_id] = _Node(shift=shift)
        self._slow_mask |= ALL_SLOW << shift

    def remove(self, node_id: NodeId) -> None:
        """Forget a node and all its copies, in time proportional to them. Unknown nodes are ignored."""
        node = self._nodes.pop(node_id, None)
        if node is not None:
            self._clear(node)
            self._by_position[node.shift // BITS] = None
            del self._shifts[node_id]

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

    def restore(
        self, node_id: NodeId, mode: IndexMode, last_event_id: int | None, copies: Mapping[BlockHash, int]
    ) -> None:
        """Begin to index a node with what was known of it once; `copies` as that method gives them."""
        self.join(node_id)
        node = self._nodes[node_id]
        node.mode, node.last_event_id = mode, last_event_id
        node.copies.update(copies)
        for block, bits in node.copies.items():
            self._move(block, node.shift, 0, bits)

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
        """The walk's lengths alone."""
        return self.walk(hashes).lengths

    def walk(self, hashes: Sequence[BlockHash]) -> Walk:
        """The longest cached prefix on every worker, and where its slower parts lie."""
        lengths: dict[NodeId, int] = {}
        if not hashes or (previous := self._holders.get(hashes[0], 0)) == 0:
            return Walk(lengths, None)
        runs: list[Run] = []
        alive, first, holders_of, slow = previous & ~self._slow_mask, 0, self._holders.get, self._slow_mask
        for index, block in enumerate(hashes):
            holders = holders_of(block, 0)
            if holders == previous:
                continue
            if previous & slow:
                runs.append(Run(first, index, previous))
            previous, first = holders, index
            ended = alive & ~holders
            if ended:
                self._note(lengths, ended, index)
                alive &= holders
                if not alive:
                    break
        else:
            self._note(lengths, alive, len(hashes))
            if previous & slow:
                runs.append(Run(first, len(hashes), previous))
        return Walk(lengths, SlowBlocks(runs, self._shifts) if runs else None)

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

    def _note(self, lengths: dict[NodeId, int], bits: int, length: int) -> None:
        owners = self._by_position
        if bits.bit_count() >= MANY:
            digits = format(bits, "b")[::-BITS]  # the lowest first, one for each worker
            lengths.update({owner: length for owner in compress(owners, map("1".__eq__, digits)) if owner is not None})
            return
        while bits:
            lowest = bits & -bits
            node_id = owners[lowest.bit_length() // BITS]
            assert node_id is not None, "a bit without an owner"
            lengths[node_id] = length
            bits ^= lowest

    def _store(self, node: _Node, copies: Iterable[BlockCopy]) -> None:
        own = node.copies
        for copy in copies:
            block = copy.block_hash
            before = own.get(block, 0)
            if before == 0 and len(own) >= BLOCKS_PER_NODE_MAX:
                node.mode = IndexMode.DEGRADED
                return
            after = own[block] = before | 1 << copy.tier
            if before & -before != after & -after:
                self._move(block, node.shift, before, after)

    def _drop(self, node: _Node, copies: Iterable[BlockCopy]) -> None:
        own = node.copies
        for copy in copies:
            block = copy.block_hash
            before = own.get(block, 0)
            after = before & ~(1 << copy.tier)
            if after:
                own[block] = after
            elif before:
                del own[block]
            if before & -before != after & -after:
                self._move(block, node.shift, before, after)

    def _clear(self, node: _Node) -> None:
        for block, bits in node.copies.items():
            self._move(block, node.shift, bits, 0)
        node.copies.clear()

    def _move(self, block: BlockHash, shift: int, before: int, after: int) -> None:
        """A worker's copies of a block (`1 << tier` each) were `before` and are `after`: its three bits change."""
        change = HELD_BITS[before & -before] ^ HELD_BITS[after & -after]
        left = self._holders.get(block, 0) ^ change << shift
        if left:
            self._holders[block] = left
        else:
            del self._holders[block]

    def check_invariants(self) -> None:
        """Assert that the two maps say the same. For tests and idle times: looks at everything."""
        expected: dict[BlockHash, int] = {}
        for node in self._nodes.values():
            for block, bits in node.copies.items():
                expected[block] = expected.get(block, 0) | HELD_BITS[bits & -bits] << node.shift
        assert expected == self._holders, "holders and copies disagree"
