"""A mini cluster in one process under the simulator's clock: the real machines, caches, transfer protocol, fake engine.

The nodes are the simulator's own. What differs: every delay is drawn from a seeded generator, passes really run on
bytes, and bytes move at the end of their delay. Invariants are checked after every event.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import xxhash

from core.messages import Command, NodeInfo, Token, WorkerEvent
from coupled_worker.machine import CoupledConfig, CoupledMachine
from decode_worker.machine import DecodeConfig, DecodeMachine
from engine.fake import FakeEngine
from engine.protocol import Sampled
from halfmoon.blocks import root_hash
from halfmoon.types import Epoch, NodeId, Role, Tier
from kv_store import transfer_values as tv
from kv_store.tiers import KvCache
from kv_store.transfer import TransferMachine
from kv_store.values import Move
from node.effects import Pass
from prefill_worker.machine import PrefillConfig, PrefillMachine
from simulator.audit import Audit
from simulator.exchange import Peers
from simulator.node import TICK_S, Machine, Node, Parts
from simulator.world import World as Clock

SIZE = 4


class Bytes:
    """The arenas of one node (simulator.exchange.Matter)."""

    def __init__(self, engine: FakeEngine, device: int, dram: int) -> None:
        self.block_bytes = engine.model.layout.block_bytes
        self.arenas = {
            Tier.DEVICE: bytearray(b"\xee" * (device * self.block_bytes)),
            Tier.DRAM: bytearray(b"\xdd" * (dram * self.block_bytes)),
        }
        engine.bind(memoryview(self.arenas[Tier.DEVICE]), device)

    def block(self, tier: Tier, slot: int) -> memoryview:
        return memoryview(self.arenas[tier])[slot * self.block_bytes : (slot + 1) * self.block_bytes]

    def move(self, move: Move) -> None:
        target, source = move.target, move.source
        self.block(target.tier, target.slot)[:] = self.block(source.tier, source.slot)

    def copy(self, source: Bytes, piece: tv.Piece, tier: Tier) -> None:
        self.block(Tier.DEVICE, piece.target)[:] = source.block(tier, piece.slot)

    def checksum(self, tier: Tier, slot: int) -> int:
        return xxhash.xxh3_64_intdigest(self.block(tier, slot))


class Engine:
    """A fake engine whose passes take random times, and read and write the pool at their beginning or at their end."""

    def __init__(self, engine: FakeEngine, rng: random.Random) -> None:
        self.engine = engine
        self.rng = rng
        self.early: list[Sampled | None] | None = None

    def begin(self, work: Pass) -> float:
        seconds = self.rng.uniform(0.002, 0.02)
        self.early = self.engine.forward(work.slices) if self.rng.random() < 0.5 else None
        return seconds

    def results(self, work: Pass) -> list[Sampled | None]:
        return self.engine.forward(work.slices) if self.early is None else self.early


class Chance:
    """Random delays (simulator.exchange.Physics)."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def message_s(self) -> float:
        return self.rng.uniform(0.0001, 0.01)

    def move_s(self) -> float:
        return self.rng.uniform(0.001, 0.02)

    def hash_s(self) -> float:
        return self.rng.uniform(0.0, 0.002)

    def copied_at_s(self, source: NodeId, target: NodeId, num_bytes: int, now_s: float) -> float:
        return now_s + self.rng.uniform(0.001, 0.02)


class World(Clock):
    """The clock, the nodes, the streams between them.

    Attributes:
        on_event, on_token: what the driver of the cluster listens with: (node, event), (node, token).
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        self.chance = Chance(self.rng)
        self.peers = Peers()
        self.audit = Audit()
        self.on_event: Callable[[Node, WorkerEvent], None] = lambda node, event: None
        self.on_token: Callable[[Node, Token], None] = lambda node, token: None
        self._ticking = False

    @property
    def nodes(self) -> dict[NodeId, Node]:
        return self.peers.nodes

    def add(self, name: str, role: Role, **settings: Any) -> Node:
        """Start a node that this world listens to; under a name that was used before: its next incarnation."""
        if not self._ticking:
            self._ticking = True
            self.after(TICK_S, self._tick)
        return Node(self, self.peers, self.chance, self, self.parts(name, role, **settings))

    def tell(self, node: Node, command: Command) -> None:
        """After a random latency, in the order of the stream."""
        node.commands.send(partial(node.command, command))

    def parts(
        self,
        name: str,
        role: Role,
        *,
        device: int = 32,
        dram: int = 16,
        prefill: PrefillConfig | None = None,
        decode: DecodeConfig | None = None,
    ) -> Parts:
        engine = FakeEngine(block_size=SIZE)
        cache = KvCache(num_device_slots=device, num_dram_slots=dram, block_size=SIZE)
        info = NodeInfo(
            node_id=NodeId(name),
            epoch=Epoch(f"{name}@{self.now_s}"),
            role=role,
            address=name,
            fingerprint=engine.model.fingerprint,
            num_device_blocks=device,
            num_dram_blocks=dram,
            block_bytes=engine.model.layout.block_bytes,
            tokens_per_pass_max=16,
            sequences_max=64,
        )
        prefill = prefill or PrefillConfig(tokens_per_pass_max=16)
        return Parts(
            info=info,
            machine=_machine(info, cache, prefill, decode or DecodeConfig()),
            cache=cache,
            engine=Engine(engine, self.rng),
            transfers=TransferMachine(block_bytes=info.block_bytes, pins=cache),
            matter=Bytes(engine, device, dram),
            audit=self.audit,
        )

    def run(self, done: Callable[[], bool], limit_s: float = 120.0) -> None:  # type: ignore[override]
        """Until `done()`; fails the test if that takes more than `limit_s` of virtual time."""
        super().run(done, limit_s, lambda: "; ".join(map(str, self.nodes.values())))

    @property
    def at_rest(self) -> bool:
        return all(node.at_rest for node in self.nodes.values() if node.alive)

    # ---- simulator.node.Conductor ----

    def on_tokens(self, node: Node, tokens: Sequence[Token]) -> None:
        for token in tokens:
            self.on_token(node, token)

    def on_steps(self, node: Node, work: Pass, ids: Sequence[Sequence[int]], due_s: Sequence[float]) -> None:
        raise AssertionError("single steps only")

    def on_odd(self, tokens: Sequence[Token]) -> None:
        pass

    def calm(self, work: Pass) -> bool:
        return False

    def _tick(self) -> None:
        for node in self.nodes.values():
            node.tick()
        self.after(TICK_S, self._tick)


def _machine(info: NodeInfo, cache: KvCache, prefill: PrefillConfig, decode: DecodeConfig) -> Machine:
    common: dict[str, Any] = {
        "node_id": info.node_id,
        "cache": cache,
        "root": root_hash(info.fingerprint),
        "block_size": SIZE,
    }
    if info.role is Role.PREFILL:
        return PrefillMachine(**common, config=prefill)
    if info.role is Role.DECODE:
        return DecodeMachine(**common, config=decode)
    return CoupledMachine(**common, config=CoupledConfig(prefill=prefill, decode=decode))
