"""The prefix index against a dumb twin: a set of (block, tier) per worker."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from conductor.prefix_index import PrefixIndex
from core.messages import BlockCopy, KvEvents
from halfmoon.types import BlockHash, NodeId, Tier

NODES = [NodeId(f"n{i}") for i in range(4)]
BLOCKS = [BlockHash(bytes([i]) * 16) for i in range(6)]
COPIES = st.lists(
    st.builds(BlockCopy, block_hash=st.sampled_from(BLOCKS), tier=st.sampled_from(list(Tier))), max_size=6
)


class IndexAgainstTwin(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.twin: dict[NodeId, set[BlockCopy]] = {}
        self.last: dict[NodeId, int] = {}

    @rule(node=st.sampled_from(NODES), copies=COPIES)
    def join(self, node: NodeId, copies: list[BlockCopy]) -> None:
        self.index.join(node)
        self.index.on_snapshot(node, 0, copies)
        self.twin[node], self.last[node] = set(copies), 0

    @rule(node=st.sampled_from(NODES))
    def remove(self, node: NodeId) -> None:
        self.index.remove(node)
        self.twin.pop(node, None)

    @precondition(lambda self: self.twin)
    @rule(data=st.data(), stored=COPIES, removed=COPIES, gap=st.integers(0, 1))
    def events(self, data: st.DataObject, stored: list[BlockCopy], removed: list[BlockCopy], gap: int) -> None:
        node = data.draw(st.sampled_from(sorted(self.twin)))
        self.last[node] += 1 + gap
        self.index.on_events(node, KvEvents(event_id=self.last[node], stored=tuple(stored), removed=tuple(removed)))
        self.twin[node] = (self.twin[node] - set(removed)) | set(stored)

    @rule(prompt=st.lists(st.sampled_from(BLOCKS), unique=True))
    def match(self, prompt: list[BlockHash]) -> None:
        expected = {}
        for node, held in self.twin.items():
            names = {c.block_hash for c in held}
            length = next((i for i, block in enumerate(prompt) if block not in names), len(prompt))
            if length:
                expected[node] = length
        lengths, slow = self.index.walk(prompt)
        assert lengths == expected
        for node, length in lengths.items():
            fastest = [min(c.tier for c in self.twin[node] if c.block_hash == block) for block in prompt[:length]]
            for first, end in ((0, length), (1, length), (0, length - 1)):
                found = dict(slow.of(node, first, end)) if slow is not None else {}
                lying = fastest[first:end]
                assert found == {tier: lying.count(tier) for tier in (Tier.DRAM, Tier.SSD) if tier in lying}

    @invariant()
    def books_agree(self) -> None:
        self.index.check_invariants()
        for node, held in self.twin.items():
            assert self.index.num_blocks(node) == len({c.block_hash for c in held})


IndexAgainstTwin.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestIndexAgainstTwin = IndexAgainstTwin.TestCase
