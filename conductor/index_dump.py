"""Pure: a prefix index as bytes and back: for a standby conductor, or to look into afterwards.

    b"HFMINDEX", version (u16), BLAKE2b-128 of all that follows, then for each node:
    name, mode (u16 length and UTF-8 each), last event id (i64; -1: none), number of blocks (u64),
    their hashes (16 bytes each), their tiers (one byte each: bit `1 << tier`)

All little-endian. A restored index is as good as on the day: a node's next event says whether any were missed.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

from conductor.prefix_index import BLOCKS_PER_NODE_MAX, IndexMode, PrefixIndex
from halfmoon.errors import InvalidRequest
from halfmoon.types import BlockHash, NodeId, Tier

MAGIC = b"HFMINDEX"
VERSION = 1
HASH_BYTES = 16
DIGEST_BYTES = 16
HEADER = struct.Struct(f"<{len(MAGIC)}sH{DIGEST_BYTES}s")
NODE = struct.Struct("<qQ")
TIER_BITS_MAX = sum(1 << tier for tier in Tier)


def dump(index: PrefixIndex) -> bytes:
    """All that the index knows, node by node in the order of their names."""
    body = b"".join(part for node_id in sorted(index.nodes()) for part in _node(index, node_id))
    return HEADER.pack(MAGIC, VERSION, _digest(body)) + body


def load(data: bytes) -> PrefixIndex:
    """The index that was dumped.

    Raises:
        InvalidRequest: something else, another version, or damaged: says what was expected, and where.
    """
    if len(data) < HEADER.size or not data.startswith(MAGIC):
        raise _damaged(0, f"a dump of a prefix index, which begins with {MAGIC!r}", data[: len(MAGIC)])
    _, version, digest = HEADER.unpack_from(data)
    if version != VERSION:
        raise _damaged(len(MAGIC), f"version {VERSION}", version)
    if _digest(data[HEADER.size :]) != digest:
        raise _damaged(HEADER.size, f"{len(data) - HEADER.size} bytes as they were written", "another digest")
    index, reader = PrefixIndex(), _Reader(data)
    while not reader.at_end:
        _restore(index, reader)
    return index


def _node(index: PrefixIndex, node_id: NodeId) -> Iterator[bytes]:
    copies, last = index.copies(node_id), index.last_event_id(node_id)
    for text in (node_id, index.mode(node_id).value):
        yield struct.pack("<H", len(text.encode())) + text.encode()
    yield NODE.pack(-1 if last is None else last, len(copies))
    yield b"".join(copies)
    yield bytes(copies.values())


def _restore(index: PrefixIndex, reader: _Reader) -> None:
    name, mode = reader.text(), reader.text()
    if name in index.nodes() or mode not in list(IndexMode):
        raise _damaged(reader.offset, "a node that was not there yet, in a known mode", (name, mode))
    last, count = NODE.unpack(reader.take(NODE.size))
    if count > BLOCKS_PER_NODE_MAX:
        raise _damaged(reader.offset, f"at most {BLOCKS_PER_NODE_MAX} blocks a node", count)
    hashes, tiers = reader.take(HASH_BYTES * count), reader.take(count)
    blocks = [BlockHash(hashes[i : i + HASH_BYTES]) for i in range(0, len(hashes), HASH_BYTES)]
    if not all(0 < bits <= TIER_BITS_MAX and not bits & 1 for bits in tiers):
        raise _damaged(reader.offset, "bits of tiers", max(tiers))
    index.restore(NodeId(name), IndexMode(mode), None if last < 0 else last, dict(zip(blocks, tiers, strict=True)))


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self.offset = HEADER.size

    @property
    def at_end(self) -> bool:
        return self.offset == len(self._data)

    def take(self, count: int) -> bytes:
        taken = self._data[self.offset : self.offset + count]
        if len(taken) < count:
            raise _damaged(self.offset, f"{count} more bytes", len(taken))
        self.offset += count
        return taken

    def text(self) -> str:
        (length,) = struct.unpack("<H", self.take(2))
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise _damaged(self.offset, "UTF-8", error.reason) from error


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest()


def _damaged(offset: int, expected: str, found: object) -> InvalidRequest:
    return InvalidRequest(field=f"index dump, byte {offset}", value=found, limit=expected)
