"""Every message of the pull protocol survives its wire form; what has no meaning is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash

from halfmoon.blocks import Fingerprint
from halfmoon.errors import InvalidRequest
from halfmoon.types import AttemptId, BlockHash, Epoch, NodeId, RequestId, Tier, TransferId
from halfmoon.v1 import kv_pb2
from kv_store.checksum import SLICE_BYTES, checksum, copy_and_checksum
from kv_store.transfer_values import (
    Abort,
    Aborted,
    Ack,
    Go,
    Grant,
    Granted,
    Missing,
    Ping,
    Pong,
    Pull,
    SourceDone,
    Wanted,
)
from kv_store.wire import ArenaAddress, Begin, Envelope, Hello, Refusal, Rendezvous, Welcome, from_wire, to_wire

T = TransferId("t")
F = Fingerprint(weights="w", num_layers=2, num_kv_heads=1, head_dim=8, rope="r")
ARENA = ArenaAddress(tier=Tier.DRAM, num_slots=3, block_bytes=64, device="cpu", pid=7, fd=5, nonce=b"n" * 16)

MESSAGES: list[Envelope] = [
    Hello(protocol=1, node_id=NodeId("d"), epoch=Epoch("e"), source_epoch=Epoch("s"), fingerprint=F, block_bytes=64),
    Welcome(protocol=1, node_id=NodeId("p"), epoch=Epoch("e"), fingerprint=F, block_bytes=64, arenas=(ARENA,)),
    Refusal(reason="no"),
    Begin(links=((Tier.DEVICE, "shm"), (Tier.DRAM, "torch"))),
    Rendezvous(key="1/0/0", value=b"\x00\xff"),
    Pull(
        transfer_id=T,
        attempt_id=AttemptId(RequestId("r"), 2),
        wants=(
            Wanted(index=0, block_hash=BlockHash(b"h" * 16), num_tokens=16),
            Wanted(index=1, block_hash=None, num_tokens=3),
        ),
        wait=True,
        verify=True,
        deadline_s=1.5,
    ),
    Go(transfer_id=T, batch=1, group=2, indices=(3, 4)),
    Ack(transfer_id=T, indices=(0,)),
    Granted(
        transfer_id=T,
        grants=(
            Grant(index=0, tier=Tier.DEVICE, slot=9, stamp=2**60, checksum=2**64 - 1, num_bytes=64),
            Grant(index=1, tier=Tier.DRAM, slot=0, stamp=1, checksum=None, num_bytes=64),
            Grant(index=2, tier=Tier.DRAM, slot=0, stamp=1, checksum=0, num_bytes=64),
        ),
    ),
    Missing(transfer_id=T, indices=(1,)),
    SourceDone(transfer_id=T),
    Abort(transfer_id=T, reason="why"),
    Aborted(transfer_id=T),
    Ping(),
    Pong(),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_survives(message: Envelope) -> None:
    data = to_wire(message).SerializeToString()
    assert from_wire(kv_pb2.KvMessage.FromString(data)) == message


def test_nothing_and_unknown_values_are_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match=r"KvMessage\.kind"):
        from_wire(kv_pb2.KvMessage())
    grant = kv_pb2.KvMessage.Grant(index=0, slot=0, stamp=1)
    with pytest.raises(InvalidRequest, match=r"KvMessage\.granted"):
        from_wire(kv_pb2.KvMessage(granted=kv_pb2.KvMessage.Granted(transfer_id="t", grants=[grant])))


@pytest.mark.parametrize("num_bytes", [1, 368_640, SLICE_BYTES, SLICE_BYTES + 1, 3 * SLICE_BYTES - 7])
def test_a_copy_and_its_checksum_are_those_of_the_source(num_bytes: int) -> None:
    source = np.random.default_rng(num_bytes).integers(0, 256, num_bytes, dtype=np.uint8)
    target = np.zeros_like(source)
    assert copy_and_checksum(target, source) == checksum(source) == xxhash.xxh3_64_intdigest(source.tobytes())
    assert (target == source).all()
