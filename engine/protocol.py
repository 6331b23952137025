"""Pure: what a worker asks of an engine: one `forward` over flattened variable-length slices of sequences.

The same call serves prefill chunks and decode steps; a decode step is a slice of one token. The engine owns no
bookkeeping: slots come in, KV goes to those slots of the bound pool, sampled tokens come out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from halfmoon.blocks import Fingerprint
from halfmoon.types import SamplingParams


@dataclass(frozen=True, kw_only=True)
class KvLayout:
    """The geometry of one block: kv-head, layer, K/V, token, dim, contiguous, outermost first."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    element_bytes: int

    @property
    def block_bytes(self) -> int:
        return self.num_kv_heads * self.num_layers * 2 * self.block_size * self.head_dim * self.element_bytes

    @property
    def token_bytes(self) -> int:
        return self.block_bytes // self.block_size


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    name: str
    fingerprint: Fingerprint
    layout: KvLayout
    vocab_size: int
    context_tokens_max: int


class Slice(NamedTuple):
    """One sequence's part of a pass: compute positions [start, start + len(token_ids)).

    Args:
        token_ids: the new tokens.
        start: tokens of this sequence whose KV is in the pool already.
        slots: the sequence's block table; `slots[i]` holds positions [i * block_size, (i + 1) * block_size).
            Covers at least start + len(token_ids) positions.
        sampling: not None: sample the token that follows the last new one.
        logprobs: with sampling, as SamplingParams says.
    """

    token_ids: Sequence[int]
    start: int
    slots: Sequence[int]
    sampling: SamplingParams | None = None

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """`logprob` and `top` (token id, log probability) are of the unmodified distribution (temperature 1)."""

    token_id: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class TensorPool(Protocol):
    """A torch.Tensor, as far as its owner and the engine must agree: uint8 [num_slots, block_bytes], contiguous."""

    @property
    def shape(self) -> Sequence[int]: ...

    def data_ptr(self) -> int: ...

    def is_contiguous(self) -> bool: ...


Pool = memoryview | TensorPool
"""The bytes of a KV pool: host memory, or a torch tensor on the engine's device (no torch is imported here)."""


class Engine(Protocol):
    """Computes on one device, from one thread at a time."""

    model: ModelInfo

    def bind(self, pool: Pool, num_slots: int) -> None:
        """Use `pool` as the KV pool, in place, whatever it holds. Borrows it until `close`.

        Args:
            pool: on a CPU host a writable memoryview of num_slots * block_bytes; for an engine on a GPU a torch tensor,
                uint8 [num_slots, block_bytes], on that GPU. TorchEngine on the CPU takes either.
        """
        ...

    def forward(self, slices: Sequence[Slice]) -> list[Sampled | None]:
        """Run one pass; write the new tokens' KV into the pool; one result per slice, None where not sampled.

        On return nothing of the pass is under way any more: other threads may read and write the pool.

        The sampled token's noise is a function of (seed, position of the sampled token) only. A sequence's result
        does not depend on the other slices or on how it was cut into slices (batch invariance, DESIGN 5.7).

        Raises:
            IntegrityError: the fake engine, when a block does not hold what its sequence says.
        """
        ...

    def close(self) -> None:
        """Release the device and the pool. Idempotent."""
        ...


class TextStream(Protocol):
    """Token ids of one reply in, its text out as soon as it is whole characters."""

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; "" while a character is incomplete, or for a special token."""
        ...

    def finish(self) -> str:
        """What an incomplete last character leaves: replacement characters, or "". The stream is over."""
        ...


class Tokenizer(Protocol):
    """What the front end asks of a tokenizer (engine.tokenizer.Tokenizer, engine.fake_tokenizer.FakeTokenizer).

    `eos_token_ids` end a reply; `vocab_size` counts added tokens; `generation_defaults` are the checkpoint's own
    temperature, top_p and top_k, where it sets them.
    """

    eos_token_ids: tuple[int, ...]
    vocab_size: int
    generation_defaults: dict[str, float]

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def render_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Raises: InvalidRequest: no template, or messages that it refuses."""
        ...

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        """An incremental decoder for what follows `context`, whose text is not repeated."""
        ...
