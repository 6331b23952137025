"""Pure: transfer messages and greetings <-> KvMessage of kv.proto.

Written out by hand: a pull of 8,192 blocks is one message, and the worker's loop converts it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from halfmoon.blocks import Fingerprint
from halfmoon.errors import InvalidRequest
from halfmoon.types import AttemptId, BlockHash, Epoch, NodeId, RequestId, Tier, TransferId
from halfmoon.v1 import kv_pb2
from kv_store.transfer_values import (
    Abort,
    Aborted,
    Ack,
    Go,
    Grant,
    Granted,
    Message,
    Missing,
    Ping,
    Pong,
    Pull,
    SourceDone,
    Wanted,
)
from service.codec import decode, encode

PROTOCOL = 1


@dataclass(frozen=True, kw_only=True)
class Hello:
    """A sink introduces itself, and says which incarnation of the source it expects."""

    protocol: int
    node_id: NodeId
    epoch: Epoch
    source_epoch: Epoch
    fingerprint: Fingerprint
    block_bytes: int


@dataclass(frozen=True, kw_only=True)
class ArenaAddress:
    """How a peer finds one tier's memory. pid 0: it cannot be mapped (device memory)."""

    tier: Tier
    num_slots: int
    block_bytes: int
    device: str
    pid: int = 0
    fd: int = -1
    nonce: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Welcome:
    protocol: int
    node_id: NodeId
    epoch: Epoch
    fingerprint: Fingerprint
    block_bytes: int
    arenas: tuple[ArenaAddress, ...]


@dataclass(frozen=True, kw_only=True)
class Refusal:
    reason: str


@dataclass(frozen=True, kw_only=True)
class Begin:
    """The sink's choice: the name of the link for each of the source's tiers."""

    links: tuple[tuple[Tier, str], ...]


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """One entry of the key-value store that a pair's process group meets in."""

    key: str
    value: bytes


Envelope = Hello | Welcome | Refusal | Begin | Rendezvous | Message
_M = kv_pb2.KvMessage


def to_wire(value: Envelope) -> kv_pb2.KvMessage:
    message: kv_pb2.KvMessage = _ENCODERS[type(value)](value)
    return message


def from_wire(message: kv_pb2.KvMessage) -> Envelope:
    """Raises InvalidRequest: the message has no kind, or a field has no such value."""
    kind = message.WhichOneof("kind")
    if kind is None:
        raise InvalidRequest(field="KvMessage.kind", value=None, limit=f"one of {', '.join(_DECODERS)}")
    try:
        value: Envelope = _DECODERS[kind](getattr(message, kind))
    except ValueError as error:
        raise InvalidRequest(field=f"KvMessage.{kind}", value=str(error), limit="values of kv.proto") from error
    return value


# ---- value -> message ----------------------------------------------------------------------------------------------


def _tier(tier: Tier) -> Any:
    return tier.value


def _hello(v: Hello) -> Any:
    return _M(
        hello=_M.Hello(
            protocol=v.protocol,
            node_id=v.node_id,
            epoch=v.epoch,
            source_epoch=v.source_epoch,
            fingerprint=encode(v.fingerprint),
            block_bytes=v.block_bytes,
        )
    )


def _welcome(v: Welcome) -> Any:
    arenas = [
        _M.Arena(
            tier=_tier(a.tier),
            num_slots=a.num_slots,
            block_bytes=a.block_bytes,
            device=a.device,
            pid=a.pid,
            fd=a.fd,
            nonce=a.nonce,
        )
        for a in v.arenas
    ]
    return _M(
        welcome=_M.Welcome(
            protocol=v.protocol,
            node_id=v.node_id,
            epoch=v.epoch,
            fingerprint=encode(v.fingerprint),
            block_bytes=v.block_bytes,
            arenas=arenas,
        )
    )


def _begin(v: Begin) -> Any:
    return _M(begin=_M.Begin(links=[_M.TierLink(tier=_tier(tier), link=link) for tier, link in v.links]))


def _pull(v: Pull) -> Any:
    wants = [_M.Wanted(index=w.index, block_hash=w.block_hash or b"", num_tokens=w.num_tokens) for w in v.wants]
    return _M(
        pull=_M.Pull(
            transfer_id=v.transfer_id,
            attempt_id=encode(v.attempt_id),
            wants=wants,
            wait=v.wait,
            verify=v.verify,
            deadline_s=v.deadline_s,
        )
    )


def _granted(v: Granted) -> Any:
    grants = [
        _M.Grant(
            index=g.index,
            tier=_tier(g.tier),
            slot=g.slot,
            stamp=g.stamp,
            checksum=g.checksum,
            num_bytes=g.num_bytes,
        )
        for g in v.grants
    ]
    return _M(granted=_M.Granted(transfer_id=v.transfer_id, grants=grants))


_ENCODERS: dict[type, Callable[[Any], Any]] = {
    Hello: _hello,
    Welcome: _welcome,
    Refusal: lambda v: _M(refusal=_M.Refusal(reason=v.reason)),
    Begin: _begin,
    Rendezvous: lambda v: _M(rendezvous=_M.Rendezvous(key=v.key, value=v.value)),
    Pull: _pull,
    Go: lambda v: _M(go=_M.Go(transfer_id=v.transfer_id, batch=v.batch, group=v.group, indices=v.indices)),
    Ack: lambda v: _M(ack=_M.Ack(transfer_id=v.transfer_id, indices=v.indices)),
    Granted: _granted,
    Missing: lambda v: _M(missing=_M.Missing(transfer_id=v.transfer_id, indices=v.indices)),
    SourceDone: lambda v: _M(source_done=_M.SourceDone(transfer_id=v.transfer_id)),
    Abort: lambda v: _M(abort=_M.Abort(transfer_id=v.transfer_id, reason=v.reason)),
    Aborted: lambda v: _M(aborted=_M.Aborted(transfer_id=v.transfer_id)),
    Ping: lambda v: _M(ping=_M.Ping()),
    Pong: lambda v: _M(pong=_M.Pong()),
}


# ---- message -> value ----------------------------------------------------------------------------------------------


def _read_hello(m: Any) -> Hello:
    return Hello(
        protocol=m.protocol,
        node_id=NodeId(m.node_id),
        epoch=Epoch(m.epoch),
        source_epoch=Epoch(m.source_epoch),
        fingerprint=decode(m.fingerprint),
        block_bytes=m.block_bytes,
    )


def _read_welcome(m: Any) -> Welcome:
    arenas = tuple(
        ArenaAddress(
            tier=Tier(a.tier),
            num_slots=a.num_slots,
            block_bytes=a.block_bytes,
            device=a.device,
            pid=a.pid,
            fd=a.fd,
            nonce=a.nonce,
        )
        for a in m.arenas
    )
    return Welcome(
        protocol=m.protocol,
        node_id=NodeId(m.node_id),
        epoch=Epoch(m.epoch),
        fingerprint=decode(m.fingerprint),
        block_bytes=m.block_bytes,
        arenas=arenas,
    )


def _read_pull(m: Any) -> Pull:
    wants = tuple(
        Wanted(index=w.index, block_hash=BlockHash(w.block_hash) if w.block_hash else None, num_tokens=w.num_tokens)
        for w in m.wants
    )
    return Pull(
        transfer_id=TransferId(m.transfer_id),
        attempt_id=AttemptId(RequestId(m.attempt_id.request_id), m.attempt_id.number),
        wants=wants,
        wait=m.wait,
        verify=m.verify,
        deadline_s=m.deadline_s,
    )


def _read_granted(m: Any) -> Granted:
    grants = tuple(
        Grant(
            index=g.index,
            tier=Tier(g.tier),
            slot=g.slot,
            stamp=g.stamp,
            checksum=g.checksum if g.HasField("checksum") else None,
            num_bytes=g.num_bytes,
        )
        for g in m.grants
    )
    return Granted(transfer_id=TransferId(m.transfer_id), grants=grants)


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "hello": _read_hello,
    "welcome": _read_welcome,
    "refusal": lambda m: Refusal(reason=m.reason),
    "begin": lambda m: Begin(links=tuple((Tier(link.tier), link.link) for link in m.links)),
    "rendezvous": lambda m: Rendezvous(key=m.key, value=m.value),
    "pull": _read_pull,
    "go": lambda m: Go(transfer_id=TransferId(m.transfer_id), batch=m.batch, group=m.group, indices=tuple(m.indices)),
    "ack": lambda m: Ack(transfer_id=TransferId(m.transfer_id), indices=tuple(m.indices)),
    "granted": _read_granted,
    "missing": lambda m: Missing(transfer_id=TransferId(m.transfer_id), indices=tuple(m.indices)),
    "source_done": lambda m: SourceDone(transfer_id=TransferId(m.transfer_id)),
    "abort": lambda m: Abort(transfer_id=TransferId(m.transfer_id), reason=m.reason),
    "aborted": lambda m: Aborted(transfer_id=TransferId(m.transfer_id)),
    "ping": lambda m: Ping(),
    "pong": lambda m: Pong(),
}
