"""Pure: a node's part in the pull protocol: the real transfer machine; modelled are streams, links and copies.

Played here is what kv_store/store.py does in a real process. A real link's flows share it, so that some of each moves
all the time; here copies take turns, and one that waits for its turn counts as moving: it is stuck only where no byte
passes at all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from core.messages import NodeInfo, TransferSample
from halfmoon.errors import IntegrityError, PeerLost, TransferError, TransferTimeout
from halfmoon.types import NodeId, Tier
from kv_store import transfer_values as tv
from kv_store.transfer import TransferMachine
from kv_store.values import Move
from node.effects import Effect, WorkerMachine
from simulator.wire import Stream, Weather
from simulator.world import World

HANGUP_S = 0.01
"""Until the other side of a stream notices that it has ended."""
LINK = tv.LinkTraits(name="simulated", two_sided=False)


class Physics(Protocol):
    """How long things take, but for computing."""

    def message_s(self) -> float:
        """One message between two processes."""
        ...

    def move_s(self) -> float:
        """One block between two tiers of a node; moves of a node do not wait for each other."""
        ...

    def copied_at_s(self, source: NodeId, target: NodeId, num_bytes: int, now_s: float) -> float:
        """When a copy over the link that is asked for now is done. Books it."""
        ...

    def hash_s(self) -> float:
        """The checksums of one request for them."""
        ...


class Matter(Protocol):
    """The bytes, where somebody wants to see them. Without it nothing is verified: see TransferMachine's `verify`."""

    def move(self, move: Move) -> None: ...

    def copy(self, source: Any, piece: tv.Piece, tier: Tier) -> None:
        """One block from the arenas of `source` (another node's Matter) into this node's DEVICE."""
        ...

    def checksum(self, tier: Tier, slot: int) -> int: ...


class Owner(Protocol):
    """The node, as its exchange needs it."""

    alive: bool
    exchange: Exchange

    @property
    def machine(self) -> WorkerMachine: ...

    def post(self, event: Callable[[float], list[Effect]]) -> None: ...

    def transfer(self, event: str, *args: Any) -> None: ...


class Peers:
    """Every node by name: its last incarnation."""

    def __init__(self, weather: Weather | None = None) -> None:
        self.nodes: dict[NodeId, Any] = {}
        self.weather = weather

    def parted(self, one: NodeId, other: NodeId) -> bool:
        """No byte passes between the two now."""
        return self.weather is not None and self.weather.parted(one, other)


class Exchange:
    """One node's transfers.

    Attributes:
        stamps: the headers of this node's slots.
        sessions: by this node's name of the stream: the peer, its name of it, and the way there.
        bytes_pulled: into this node.
    """

    def __init__(
        self, world: World, peers: Peers, physics: Physics, info: NodeInfo, machine: TransferMachine, owner: Owner
    ) -> None:
        self.matter: Matter | None = None
        self.stamps: dict[tuple[Tier, int], int] = {}
        self.sessions: dict[tv.SessionId, tuple[Exchange, tv.SessionId, Stream]] = {}
        self.bytes_pulled = 0
        self._world, self._peers, self._physics = world, peers, physics
        self._info, self._machine, self._owner = info, machine, owner
        self._samples: list[TransferSample] = []
        self._receiving: dict[int, tv.Receive] = {}  # by batch

    @property
    def node_id(self) -> NodeId:
        return self._info.node_id

    def tell(self, event: str, *args: Any) -> None:
        """Tell the transfer machine; perform what it wants before anything else happens."""
        for effect in getattr(self._machine, event)(*args, self._world.now_s):
            self._perform(effect)

    def close(self, reason: str) -> None:
        """End every stream."""
        for session in list(self.sessions):
            self.cut(session, reason)

    def take_samples(self) -> tuple[TransferSample, ...]:
        """Of the pulls that have ended since the last call."""
        samples = tuple(self._samples)
        self._samples.clear()
        return samples

    # ---- effects ----

    def _perform(self, effect: tv.Effect) -> None:
        machine, post = self._owner.machine, self._owner.post
        match effect:
            case tv.Tell():
                link = self.sessions.get(effect.session)
                if link is not None:
                    link[2].send(partial(link[0]._hear, link[1], effect.message))
            case tv.Stamp():
                self.stamps[effect.tier, effect.slot] = effect.stamp
            case tv.Receive():
                self._begin_receive(effect)
            case tv.Arrived():
                post(partial(machine.on_pull_arrived, effect.transfer_id, effect.indices))
            case tv.Ended():
                self._ended(effect)
            case tv.HandedOver():
                post(partial(machine.on_handed_over, effect.attempt_id))
            case tv.Withdrawn():
                post(partial(machine.on_withdrawn, effect.attempt_id))
            case tv.Hash():
                self._world.after(self._physics.hash_s(), partial(self._hash, effect))
            case tv.Dial():
                self._world.after(2 * self._physics.message_s(), partial(self._dial, effect))
            case tv.Hangup():
                self.cut(effect.session, effect.reason)
            case tv.Transmit():
                raise AssertionError("the link is one-sided")

    def _ended(self, effect: tv.Ended) -> None:
        ended = effect.ended
        if ended.num_bytes and effect.busy_s > 0.0:
            self.bytes_pulled += ended.num_bytes
            sample = TransferSample(
                source=effect.source, link=ended.link, num_bytes=ended.num_bytes, seconds=effect.busy_s
            )
            self._samples.append(sample)
        self._owner.post(partial(self._owner.machine.on_pull_ended, ended))

    # ---- streams ----

    def _dial(self, dial: tv.Dial) -> None:
        if not self._owner.alive:
            return
        owner = self._peers.nodes.get(dial.node_id)
        gone = owner is None or not owner.alive or owner.epoch != dial.epoch
        if owner is None or gone or self._peers.parted(self.node_id, dial.node_id):
            self._owner.transfer("on_lost", dial.session, PeerLost(f"{dial.node_id} is not there"))
            return
        peer: Exchange = owner.exchange
        theirs = peer._machine.next_session()
        self.sessions[dial.session] = (peer, theirs, self._stream_to(peer))
        peer.sessions[theirs] = (self, dial.session, peer._stream_to(self))
        peer._owner.transfer("on_accepted", theirs, self.node_id, self._info.epoch)
        if dial.session in self.sessions:
            self._owner.transfer("on_open", dial.session, {Tier.DEVICE: LINK, Tier.DRAM: LINK})

    def _stream_to(self, peer: Exchange) -> Stream:
        return Stream(self._world, (self.node_id, peer.node_id), self._physics.message_s, self._peers.weather)

    def _hear(self, session: tv.SessionId, message: tv.Message) -> None:
        if session in self.sessions:
            self._owner.transfer("on_message", session, message)

    def cut(self, session: tv.SessionId, reason: str) -> None:
        """End a stream; the other side notices a moment later."""
        link = self.sessions.pop(session, None)
        if link is not None:
            peer, theirs, _ = link
            peer.sessions.pop(theirs, None)
            self._interrupt(session)
            peer._interrupt(theirs)
            self._world.after(HANGUP_S, partial(peer._owner.transfer, "on_lost", theirs, PeerLost(reason)))

    # ---- copies ----

    def _begin_receive(self, receive: tv.Receive) -> None:
        link = self.sessions.get(receive.session)
        self._receiving[receive.batch.batch] = receive
        if link is None:
            self._world.after(0.0, partial(self._received, receive, None, PeerLost("the stream is gone")))
            return
        now_s, source = self._world.now_s, link[0]
        num_bytes = len(receive.batch.pieces) * self._info.block_bytes
        done_s = self._physics.copied_at_s(source.node_id, self.node_id, num_bytes, now_s)
        parted = self._peers.parted(self.node_id, source.node_id)
        limit_s = min(receive.timeout_s, receive.stall_s) if parted else receive.timeout_s
        late = TransferTimeout(f"{receive.batch.transfer_id}: {num_bytes} bytes in {limit_s:.3f} s")
        error = late if parted or done_s > now_s + limit_s else None
        due_s = done_s if error is None else now_s + limit_s
        self._world.at(due_s, partial(self._received, receive, source, error))

    def _interrupt(self, session: tv.SessionId) -> None:
        """The stream has ended: what is being received over it comes down soon."""
        for receive in self._receiving.values():
            if receive.session == session:
                lost = PeerLost("the stream is gone")
                self._world.after(HANGUP_S, partial(self._received, receive, None, lost))

    def _received(self, receive: tv.Receive, source: Exchange | None, error: TransferError | None) -> None:
        if self._receiving.pop(receive.batch.batch, None) is None:
            return  # it was interrupted
        if error is None:
            assert source is not None
            gone = receive.session not in self.sessions or not source._owner.alive
            error = PeerLost("the stream is gone") if gone else self._copy(source, receive.batch)
        self._owner.transfer("on_received", receive.batch.batch, error)

    def _copy(self, source: Exchange, batch: tv.Batch) -> IntegrityError | None:
        """As a one-sided link does: copy, then look at the headers, then at the checksums."""
        tier, matter, stamps = batch.tier, self.matter, source.stamps
        for piece in batch.pieces:
            if matter is not None:
                matter.copy(source.matter, piece, tier)
            if stamps.get((tier, piece.slot)) != piece.stamp:
                return IntegrityError(f"block {piece.index}: the header changed")
            if matter is not None and piece.checksum != matter.checksum(Tier.DEVICE, piece.target):
                return IntegrityError(f"block {piece.index}: the checksum is wrong")
        return None

    def _hash(self, effect: tv.Hash) -> None:
        assert self.matter is not None, "nothing is verified without bytes"
        checksums = {index: self.matter.checksum(tier, slot) for index, tier, slot in effect.items}
        self._owner.transfer("on_hashed", effect.session, effect.transfer_id, checksums)
