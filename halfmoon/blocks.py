"""Pure: block names. A name is the exact content: H(parent name, token ids), chained from a root.

The names are seed-free and versioned: BLAKE2b with a 16-byte digest over `parent || little-endian u32 tokens`,
the root being H(hash version, fingerprint). A tenant's salt enters the first block that is not wholly inside a
public prefix, and so, by the chain, every block after it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields

from halfmoon.types import BlockHash

HASH_VERSION = 1
HASH_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """The logical identity of a model's KV. Two nodes that agree on it may exchange blocks.

    Layout (tensor-parallel degree, rank) and encoding are attributes of a copy and are not part of it.
    """

    weights: str  # content digest of the checkpoint
    num_layers: int
    num_kv_heads: int
    head_dim: int
    rope: str  # canonical text of the RoPE regime
    adapter: str = ""
    compute_dtype: str = "bfloat16"
    block_size: int = 16

    def canonical(self) -> bytes:
        """`name=value` lines in field order, UTF-8: what the root is hashed from."""
        return "\n".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self)).encode()

    def differences(self, other: Fingerprint) -> list[str]:
        """One readable line per field in which the two differ; empty when blocks may be exchanged."""
        return [
            f"{f.name}: {getattr(self, f.name)!r} here, {getattr(other, f.name)!r} there"
            for f in fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        ]


def root_hash(fingerprint: Fingerprint) -> BlockHash:
    """The parent of every first block of this model."""
    return _digest(b"halfmoon-root-%d\n" % HASH_VERSION, fingerprint.canonical())


def block_hash(parent: BlockHash, token_ids: Sequence[int], salt: bytes = b"") -> BlockHash:
    """The name of the block that holds `token_ids` (a full block) after `parent`.

    Raises:
        struct.error: if an id is not a u32.
    """
    return packed_block_hash(parent, struct.pack(f"<{len(token_ids)}I", *token_ids), salt)


def packed_block_hash(parent: BlockHash, packed: bytes, salt: bytes = b"") -> BlockHash:
    """As `block_hash`, of ids that are little-endian u32 already."""
    return _digest(parent, packed, salt)


class BlockChain:
    """The names of a growing token sequence's full blocks.

    Owns a copy of nothing but the names and the tail; `extend` is O(new tokens), whatever the tail.
    """

    def __init__(self, root: BlockHash, block_size: int, *, salt: bytes = b"", public_tokens: int = 0) -> None:
        assert block_size > 0
        assert public_tokens >= 0
        self._block_size = block_size
        self._salt = salt
        self._salt_index = public_tokens // block_size  # first block not wholly public
        self._parent = root
        self._tail: list[int] = []
        self.hashes: list[BlockHash] = []

    @property
    def num_tokens(self) -> int:
        return len(self.hashes) * self._block_size + len(self._tail)

    def extend(self, token_ids: Sequence[int]) -> list[BlockHash]:
        """Append tokens; return the names of the blocks they completed. Modifies self."""
        size, tail = self._block_size, self._tail
        first_new = len(self.hashes)
        tail.extend(token_ids)
        for start in range(0, len(tail) - size + 1, size):
            salt = self._salt if len(self.hashes) == self._salt_index else b""
            self._parent = block_hash(self._parent, tail[start : start + size], salt)
            self.hashes.append(self._parent)
        del tail[: (len(self.hashes) - first_new) * size]
        return self.hashes[first_new:]

    def begin_with(self, hashes: Sequence[BlockHash], tail: Sequence[int]) -> None:
        """As `extend` with tokens whose full blocks were named before: `hashes`, and `tail` after them. Trusted.

        Only for an empty chain of the same root and salt. Modifies self.
        """
        assert self.num_tokens == 0, "the chain has begun"
        assert len(tail) < self._block_size
        self.hashes.extend(hashes)
        self._tail.extend(tail)
        self._parent = self.hashes[-1] if self.hashes else self._parent


def _digest(*parts: bytes) -> BlockHash:
    return BlockHash(hashlib.blake2b(b"".join(parts), digest_size=HASH_BYTES).digest())
