"""Shell: what eviction policies are worth: hit rates of one global pool over a trace, and Belady's bound.

Every id of the trace counts as a block, the partial last one too. A request's blocks are looked up, held while its
missing ones take slots that the policy gives up, and let go last to first, as a worker's ledger does, and chain tails
are evicted first. The "_plain" policies are the textbook's: each block by itself, nothing held, no chains. "leased"
learns as it goes; "leased_fitted" has leases fitted to the first half of the trace alone, for each pool size; "belady"
knows the future. Every policy is judged on the second half beside the whole. A hit is a block that is there, a prefix
hit one with no missing block before it.

    python -m benchmarks.cache_policies [--trace conversation_trace.jsonl] [--processes 2]
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

from benchmarks.record import save
from halfmoon.errors import NotFound, TraceError
from halfmoon.types import BlockHash
from kv_store.eviction import EvictionPolicy
from kv_store.eviction_belady import Belady
from kv_store.eviction_leases import Leased
from kv_store.eviction_policies import POLICIES, make_policy
from kv_store.leases import fit_leases
from workload.files import CONVERSATION, read_trace
from workload.trace import Trace

SIZES = (1_000, 5_859, 10_000, 30_000, 50_000, 100_000, 0)
"""Blocks of the pool; 5,859 is one node of FAST'25's experiments, 0 is room for all."""

NAMES = ("lru_plain", *POLICIES, "leased_fitted", "belady", "belady_plain")
PLAIN = "_plain"


@dataclass(frozen=True, kw_only=True)
class Row:
    """Hits over blocks: of the whole trace, and of its second half."""

    policy: str
    num_slots: int
    hit_rate: float
    prefix_hit_rate: float
    second_half_prefix_hit_rate: float
    seconds: float


class Pool:
    """One pool of slots that serves one request after another."""

    def __init__(self, num_slots: int, policy: EvictionPolicy) -> None:
        self.slots: dict[BlockHash, int] = {}
        self._policy = policy
        self._free = list(range(num_slots - 1, -1, -1))
        self._content: dict[int, tuple[BlockHash, BlockHash | None]] = {}  # name and parent by slot
        self._children: Counter[BlockHash] = Counter()
        self._held: set[BlockHash] = set()

    def serve(self, names: Sequence[BlockHash], now_s: float) -> list[bool]:
        """Look up, make room, store, let go. Returns which blocks were there."""
        present = [name in self.slots for name in names]
        for name, is_here in zip(names, present, strict=True):
            if is_here:
                self._policy.withdraw(self.slots[name])
        self._held.update(names)
        self._make_room(len(names) - sum(present))
        for index, name in enumerate(names):
            if name not in self.slots and self._free:
                self._store(name, names[index - 1] if index else None, index, now_s)
        self._held.clear()
        for name in reversed(names):
            if name in self.slots:
                self._policy.on_used(self.slots[name], now_s)
                self._offer(name)
        return present

    def _make_room(self, num_slots: int) -> None:
        """As many free slots, or as many as there are: what a request larger than the pool lacks is not stored."""
        while len(self._free) < num_slots and (victim := self._policy.victim()) is not None:
            self._policy.withdraw(victim)
            name, parent = self._content.pop(victim)
            del self.slots[name]
            self._free.append(victim)
            if parent is not None:
                self._children[parent] -= 1
                if parent in self.slots and parent not in self._held:
                    self._offer(parent)

    def _store(self, name: BlockHash, parent: BlockHash | None, index: int, now_s: float) -> None:
        slot = self.slots[name] = self._free.pop()
        self._content[slot] = (name, parent)
        if parent is not None:
            self._children[parent] += 1
        self._policy.on_stored(slot, name, index, now_s)

    def _offer(self, name: BlockHash) -> None:
        self._policy.offer(self.slots[name], is_tail=self._children[name] == 0)


def measure(trace: Trace, name: str, num_slots: int) -> Row:
    """One policy at one size; 0 slots: as many as there are blocks. Belady's clock counts requests, so no ties."""
    began = time.process_time()
    prompts = [tuple(block_name(i) for i in request.block_ids) for request in trace.requests]
    slots = num_slots or len({block for prompt in prompts for block in prompt})
    kind = name.removesuffix(PLAIN)
    pool = Pool(slots, _policy(kind, slots, trace, prompts))
    clock = [float(n) if kind == "belady" else request.at_s for n, request in enumerate(trace.requests)]
    serve = _serve_each if name.endswith(PLAIN) else Pool.serve
    found = [serve(pool, prompt, now) for prompt, now in zip(prompts, clock, strict=True)]
    half = len(prompts) // 2
    blocks, later_blocks = sum(map(len, prompts)), sum(map(len, prompts[half:]))
    return Row(
        policy=name,
        num_slots=num_slots,
        hit_rate=sum(map(sum, found)) / blocks,
        prefix_hit_rate=sum(map(_prefix, found)) / blocks,
        second_half_prefix_hit_rate=sum(map(_prefix, found[half:])) / later_blocks,
        seconds=time.process_time() - began,
    )


def _serve_each(pool: Pool, names: Sequence[BlockHash], now_s: float) -> list[bool]:
    """As the textbook has it: one lookup of the whole, then block after block."""
    present = [name in pool.slots for name in names]
    for name in names:
        pool.serve((name,), now_s)
    return present


def _prefix(present: list[bool]) -> int:
    return present.index(False) if False in present else len(present)


def _policy(name: str, num_slots: int, trace: Trace, prompts: Sequence[Sequence[BlockHash]]) -> EvictionPolicy:
    if name == "belady":
        uses: defaultdict[BlockHash, list[float]] = defaultdict(list)
        for number, prompt in enumerate(prompts):
            for block in prompt:
                uses[block].append(float(number))
        return Belady(uses)
    if name == "leased_fitted":
        first_half = trace.requests[: len(trace.requests) // 2]
        return Leased(num_slots, fit_leases(((r.at_s, r.block_ids) for r in first_half), num_slots))
    return make_policy(name, num_slots)


def block_name(number: int) -> BlockHash:
    """A trace's id as a block's name."""
    return BlockHash(number.to_bytes(16, "little"))


def table(rows: Sequence[Row], field: str) -> str:
    """Markdown: policies down, sizes across."""
    cells = {(row.policy, row.num_slots): getattr(row, field) for row in rows}
    sizes = sorted({row.num_slots for row in rows}, key=lambda size: size or float("inf"))
    lines = [f"| policy | {' | '.join(f'{size:,}' if size else 'unlimited' for size in sizes)} |"]
    lines.append("|---" * (len(sizes) + 1) + "|")
    for policy in dict.fromkeys(row.policy for row in rows):
        lines.append(f"| {policy} | {' | '.join(f'{cells[policy, size]:.3f}' for size in sizes)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trace", default=CONVERSATION)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    try:
        trace = read_trace(options.trace)
    except (NotFound, TraceError) as error:
        parser.error(str(error))
    cases = [(name, size) for name in NAMES for size in SIZES]
    with ProcessPoolExecutor(options.processes) as pool:
        rows = list(pool.map(measure, [trace] * len(cases), *zip(*cases, strict=True)))
    print(f"{trace.source}: {len(trace.requests):,} requests\n\nblock hits / all blocks, whole trace\n")
    print(table(rows, "hit_rate"))
    print("\nprefix hits / all blocks, second half\n")
    print(table(rows, "second_half_prefix_hit_rate"))
    half = trace.requests[: len(trace.requests) // 2]
    leases = fit_leases(((r.at_s, r.block_ids) for r in half), SIZES[1])
    print(f"\nleases for {SIZES[1]:,} blocks, seconds by (uses, place): {json.dumps(lease_table(leases.seconds))}")
    path = save(
        "cache-policies",
        {
            "trace": trace.source,
            "requests": len(trace.requests),
            "rows": [asdict(row) for row in rows],
            "leases": lease_table(leases.seconds),
        },
    )
    print(f"raw results: {path}")


def lease_table(seconds: dict[tuple[int, int], float]) -> dict[str, list[float]]:
    """Uses -> seconds by place in the chain."""
    return {
        str(uses): [seconds.get((uses, place), 0.0) for place in range(1 + max(place for _, place in seconds))]
        for uses in sorted({uses for uses, _ in seconds})
    }


if __name__ == "__main__":
    main()
