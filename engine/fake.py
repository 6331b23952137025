"""Pure: an engine without a model: tokens and KV bytes follow from content, so wrong or stale blocks show by value.

Each position p of a sequence has a running digest d_p = H(d_{p-1}, token_p). Its KV record is 32 bytes in the block
layout of a model with one layer, one KV head and head_dim 16:

    K  16 bytes  d_p
    V  16 bytes  p as u32, token_p as u32 (little-endian), then PAD

`forward` reads every record of the context that a slice names, as attention would, checks it against its position and
against the digest before it, and derives the next token from the last digest. So a swapped, stale, damaged or missing
block either raises or changes the tokens, which `fake_tokens` foretells without any pool.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from engine.protocol import KvLayout, ModelInfo, Pool, Sampled, Slice
from halfmoon.blocks import Fingerprint
from halfmoon.errors import IntegrityError
from halfmoon.types import SamplingParams

VOCAB_SIZE = 512
EOS_TOKEN_ID = 256  # the bytes are 0 to 255
CONTEXT_TOKENS_MAX = 131_072
RECORD = 16  # bytes of K, and of V, for one token
PAD = b"halfmoon"
LETTERS = b"etaoinshrdlucmfwypvbgkjqxz    eeaaiioo.,"  # what is sampled: text that looks like text
CHECKED_BLOCKS_MAX = 16_384  # about 15 MiB of remembered blocks: a long context is not hashed again at each step

_V = struct.Struct(f"<II{len(PAD)}s")
_NOISE = struct.Struct("<QQ")


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a pass would cost, in seconds; all zero: nothing.

    Args:
        pass_s: each pass, whatever is in it.
        prefill_token_s: each new token of a prefill slice.
        context_token_s: each earlier token that a prefill slice attends to.
        decode_sequence_s: each decode slice (one token that has a past).
        kv_token_s: each token of KV that a decode slice reads.
    """

    pass_s: float = 0.0
    prefill_token_s: float = 0.0
    context_token_s: float = 0.0
    decode_sequence_s: float = 0.0
    kv_token_s: float = 0.0

    def slice_s(self, part: Slice) -> float:
        """The share of one slice, in seconds."""
        if len(part.token_ids) == 1 and part.start > 0:
            return self.decode_sequence_s + self.kv_token_s * part.end
        return self.prefill_token_s * len(part.token_ids) + self.context_token_s * part.start


class FakeEngine:
    """An `engine.protocol.Engine` of hashes. Sampling parameters other than the seed change nothing.

    Args:
        block_size: tokens.
        vocab_size: ids below it are accepted; more than EOS_TOKEN_ID.
        context_tokens_max: the longest sequence.
        eos_every: one sampled token in so many is EOS_TOKEN_ID, on average; 0: none is.
        speed: for `pass_seconds`; the engine itself never sleeps.
    """

    def __init__(
        self,
        *,
        block_size: int = 16,
        vocab_size: int = VOCAB_SIZE,
        context_tokens_max: int = CONTEXT_TOKENS_MAX,
        eos_every: int = 0,
        speed: Speed | None = None,
    ) -> None:
        assert block_size > 0
        assert vocab_size > EOS_TOKEN_ID
        self.model = _model(block_size, vocab_size, context_tokens_max)
        self.speed = speed or Speed()
        self._block_size = block_size
        self._eos_every = eos_every
        self._pool: memoryview | None = None
        self._num_slots = 0

    def bind(self, pool: Pool, num_slots: int) -> None:
        """Use `pool` (a writable memoryview of num_slots * block_bytes) as the KV pool. Borrows it until `close`."""
        assert isinstance(pool, memoryview), "the fake engine computes on host memory"
        flat = pool.cast("B")
        assert flat.nbytes >= num_slots * self.model.layout.block_bytes, "the pool is too small"
        assert not flat.readonly
        self._pool = flat
        self._num_slots = num_slots

    def forward(self, slices: Sequence[Slice]) -> list[Sampled | None]:
        """One pass: all contexts are read before anything is written, as one layer of attention would see them.

        Raises:
            IntegrityError: a context that is not what one sequence wrote, naming slot and position. Nothing has been
                written then.
        """
        digests = [self._read_context(part) for part in slices]
        return [self._compute(part, digest) for part, digest in zip(slices, digests, strict=True)]

    def pass_seconds(self, slices: Sequence[Slice]) -> float:
        """What `forward(slices)` would take by the speed table, in seconds."""
        return self.speed.pass_s + sum(self.speed.slice_s(part) for part in slices)

    def close(self) -> None:
        """Give the pool back. Idempotent."""
        self._pool = None

    # ---- reading ----

    def _read_context(self, part: Slice) -> bytes:
        """The digest at position start - 1, after checking every record before it."""
        self._check_slice(part)
        digest = _root()
        for first in range(0, part.start, self._block_size):
            slot = part.slots[first // self._block_size]
            keys, values = self._records(slot, min(self._block_size, part.start - first))
            fault = _fault(digest, first, keys, values)
            if fault is not None:
                raise IntegrityError(f"slot {slot} at {fault}")
            digest = keys[-RECORD:]
        return digest

    def _records(self, slot: int, num_tokens: int) -> tuple[bytes, bytes]:
        """The first records of a block: keys and values, [num_tokens * RECORD] bytes each."""
        assert self._pool is not None, "no pool is bound"
        half = self._block_size * RECORD
        start = slot * 2 * half
        size = num_tokens * RECORD
        return bytes(self._pool[start : start + size]), bytes(self._pool[start + half : start + half + size])

    def _check_slice(self, part: Slice) -> None:
        assert part.token_ids, "an empty slice"
        assert part.end <= len(part.slots) * self._block_size, "the block table is too short"
        assert part.end <= self.model.context_tokens_max, "beyond the context"
        assert all(0 <= slot < self._num_slots for slot in part.slots), f"slots {part.slots} of {self._num_slots}"
        assert all(0 <= token < self.model.vocab_size for token in part.token_ids), "a token outside the vocabulary"

    # ---- writing ----

    def _compute(self, part: Slice, digest: bytes) -> Sampled | None:
        for position, token_id in enumerate(part.token_ids, part.start):
            digest = _next_digest(digest, token_id)
            self._write(part.slots[position // self._block_size], position, token_id, digest)
        return None if part.sampling is None else _sample(digest, part.end, part.sampling, self._eos_every)

    def _write(self, slot: int, position: int, token_id: int, digest: bytes) -> None:
        assert self._pool is not None, "no pool is bound"
        half = self._block_size * RECORD
        at = slot * 2 * half + position % self._block_size * RECORD
        self._pool[at : at + RECORD] = digest
        self._pool[at + half : at + half + RECORD] = _V.pack(position, token_id, PAD)


def fake_tokens(prompt: Sequence[int], n: int, sampling: SamplingParams, *, eos_every: int = 0) -> list[int]:
    """The n tokens that follow `prompt` on any correct cluster of fake engines: the oracle, without a pool.

    Stops and `max_tokens` are not applied: those are the cluster's.
    """
    digest = _root()
    for token_id in prompt:
        digest = _next_digest(digest, token_id)
    tokens: list[int] = []
    for position in range(len(prompt), len(prompt) + n):
        tokens.append(_token(digest, position, sampling, eos_every))
        digest = _next_digest(digest, tokens[-1])
    return tokens


def _model(block_size: int, vocab_size: int, context_tokens_max: int) -> ModelInfo:
    return ModelInfo(
        name="fake",
        fingerprint=Fingerprint(
            weights="fake-1",
            num_layers=1,
            num_kv_heads=1,
            head_dim=RECORD,
            rope="none",
            compute_dtype="bytes",
            block_size=block_size,
        ),
        layout=KvLayout(num_layers=1, num_kv_heads=1, head_dim=RECORD, block_size=block_size, element_bytes=1),
        vocab_size=vocab_size,
        context_tokens_max=context_tokens_max,
    )


def _hash(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"".join(parts), digest_size=RECORD).digest()


@lru_cache(maxsize=1)
def _root() -> bytes:
    """The digest before position 0."""
    return _hash(b"halfmoon-fake-1")


def _next_digest(digest: bytes, token_id: int) -> bytes:
    return _hash(digest, token_id.to_bytes(4, "little"))


@lru_cache(maxsize=CHECKED_BLOCKS_MAX)
def _fault(digest: bytes, first: int, keys: bytes, values: bytes) -> str | None:
    """What is wrong with the records of positions `first` onwards, given the digest before them; None: nothing."""
    for i in range(len(keys) // RECORD):
        at = slice(i * RECORD, (i + 1) * RECORD)
        position, token_id, pad = _V.unpack(values[at])
        if position != first + i:
            return f"position {first + i}: the record is of position {position}"
        digest = _next_digest(digest, token_id)
        if keys[at] != digest or pad != PAD:
            return f"position {first + i}: the record is not of this sequence, or damaged"
    return None


def _sample(digest: bytes, position: int, sampling: SamplingParams, eos_every: int) -> Sampled:
    """The token at `position`. Its log probability is invented: ln 1/2, the alternatives' 1/4, 1/8, …"""
    token_id = _token(digest, position, sampling, eos_every)
    if sampling.logprobs is None:
        return Sampled(token_id=token_id)
    others = [letter for letter in sorted(set(LETTERS)) if letter != token_id]
    top = [(other, -(i + 1) * math.log(2.0)) for i, other in enumerate([token_id, *others])]
    return Sampled(token_id=token_id, logprob=top[0][1], top=tuple(top[: sampling.logprobs]))


def _token(digest: bytes, position: int, sampling: SamplingParams, eos_every: int) -> int:
    """A function of (digest of everything before, position), and of the seed unless greedy."""
    noise = _hash(digest, _NOISE.pack(0 if sampling.greedy else sampling.seed + 1, position))
    if eos_every and int.from_bytes(noise[8:], "little") % eos_every == 0:
        return EOS_TOKEN_ID
    return LETTERS[int.from_bytes(noise[:8], "little") % len(LETTERS)]
