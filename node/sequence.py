"""Pure: one attempt's tokens, block names and block table, under one account: `num_computed_tokens`.

Chunked prefill, prefix hits, pulled blocks, resumption and decoding are one case: the first `num_computed_tokens`
positions have their KV in the table, and the next slice starts there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from core.messages import AttemptStats, PrefillCommand, ReserveCommand, Token, TokenLogprob
from engine.protocol import Sampled, Slice
from halfmoon.blocks import BlockChain
from halfmoon.types import BlockHash, FinishReason
from kv_store.values import Want

Namer = Callable[[PrefillCommand | ReserveCommand], BlockChain]
"""Names the blocks of a command's tokens; the chain is the caller's, to be extended."""


def namer(root: BlockHash, block_size: int) -> Namer:
    """The one that computes every name. A simulator, which knows them already, has another."""

    def name(command: PrefillCommand | ReserveCommand) -> BlockChain:
        chain = BlockChain(root, block_size, salt=command.cache_salt, public_tokens=command.public_tokens)
        chain.extend(command.token_ids)
        return chain

    return name


class SequenceState:
    """The growing token sequence of one attempt on this node.

    Args:
        chain: names `command.token_ids`; owned from now on.

    Attributes:
        num_tokens: known tokens: the given ones, and the output since.
        num_computed_tokens: positions whose KV lies in `slots` (right, though perhaps not committed yet).
        slots: DEVICE slots, one per block, in order; changed only while the attempt is in no pass.
    """

    def __init__(self, command: PrefillCommand | ReserveCommand, chain: BlockChain, block_size: int) -> None:
        assert len(command.token_ids) >= max(1, command.num_prompt_tokens), "the front end refuses empty prompts"
        self.attempt_id = command.attempt_id
        self.sampling = command.sampling
        self.num_prompt_tokens = command.num_prompt_tokens
        self.num_given_tokens = self.num_tokens = len(command.token_ids)
        self.block_size = block_size
        self.num_computed_tokens = 0
        self.slots: tuple[int, ...] = ()  # every pass carries it: not to be copied for each
        self._given = command.token_ids
        self._output: list[int] = []
        self._chain = chain
        self._num_named = self.num_tokens  # tokens that the chain has

    @property
    def names(self) -> list[BlockHash]:
        """Names of all blocks whose tokens are known; borrowed, not to be modified."""
        if self._num_named < self.num_tokens:  # a name is asked for once in a block, a token comes in every step
            self._chain.extend(self._output[self._num_named - self.num_given_tokens :])
            self._num_named = self.num_tokens
        return self._chain.hashes

    @property
    def num_output_tokens(self) -> int:
        """Output tokens of the whole request so far, over all its attempts."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_left(self) -> int:
        """Known tokens whose KV is still to be computed."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def num_full_given(self) -> int:
        """Full blocks of the given tokens."""
        return self.num_given_tokens // self.block_size

    @property
    def tail_tokens(self) -> int:
        """Given tokens in the partial last block; 0: there is none."""
        return self.num_given_tokens % self.block_size

    @property
    def reusable_blocks(self) -> int:
        """Prefix blocks that may be found instead of made: never the last one, whose last token is sampled after."""
        return (self.num_given_tokens - 1) // self.block_size

    @property
    def needs_slot(self) -> bool:
        """The next position to compute has no slot yet."""
        return self.num_computed_tokens >= len(self.slots) * self.block_size

    def blocks(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    @property
    def blocks_max(self) -> int:
        """Blocks of the longest output allowed. The last token's KV is never needed."""
        return self.blocks(max(self.num_given_tokens, self.num_prompt_tokens + self.sampling.max_tokens - 1))

    @property
    def blocks_joining(self) -> int:
        """Blocks to hold for decoding: the given tokens and the one after them, unless that one ends the output."""
        return min(self.blocks(self.num_given_tokens + 1), self.blocks_max)

    def want(self, index: int) -> Want:
        """What to ask a peer for, to fill the block `index` of the given tokens: by name, or the partial tail."""
        full = index < self.num_full_given
        name, num_tokens = (self.names[index], self.block_size) if full else (None, self.tail_tokens)
        return Want(index, name, num_tokens, self.slots[index])

    def next_slice(self, num_tokens: int) -> Slice:
        """The next `num_tokens` positions, sampled after if they are the last known ones."""
        start = self.num_computed_tokens
        end = start + num_tokens
        assert start < end <= self.num_tokens
        assert end <= len(self.slots) * self.block_size, "a position without a slot"
        return Slice(self._between(start, end), start, self.slots, self.sampling if end == self.num_tokens else None)

    def _between(self, start: int, end: int) -> tuple[int, ...]:
        """The tokens [start, end)."""
        given = self.num_given_tokens
        if start >= given:
            return tuple(self._output[start - given : end - given])
        return self._given[start:end] + tuple(self._output[: max(0, end - given)])

    def advance(self, num_tokens: int) -> range:
        """Book `num_tokens` more computed positions; return the indices of the blocks that they filled."""
        first = self.num_computed_tokens // self.block_size
        self.num_computed_tokens += num_tokens
        assert self.num_computed_tokens <= self.num_tokens
        return range(first, self.num_computed_tokens // self.block_size)

    def append(self, token_id: int) -> FinishReason | None:
        """Append an output token; say whether, and why, it is the last one."""
        self._output.append(token_id)
        self.num_tokens += 1
        if token_id in self.sampling.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_output_tokens >= self.sampling.max_tokens else None

    @property
    def num_plain_steps(self) -> int:
        """How many further tokens neither fill a block nor reach the longest output allowed."""
        size = self.block_size
        return min(size - 1 - self.num_computed_tokens % size, self.sampling.max_tokens - 1 - self.num_output_tokens)

    def run(self, token_ids: Sequence[int]) -> None:
        """As `advance(1)` and `append` for each of these tokens, which are at most `num_plain_steps`."""
        assert len(token_ids) <= self.num_plain_steps
        self.num_computed_tokens += len(token_ids)
        self.num_tokens += len(token_ids)
        self._output.extend(token_ids)


def token_of(
    sequence: SequenceState, sampled: Sampled, finish_reason: FinishReason | None, stats: AttemptStats | None
) -> Token:
    """The sequence's last token, which has just been appended from `sampled`."""
    top = tuple([TokenLogprob(token_id=t, logprob=p) for t, p in sampled.top]) if sampled.top else ()
    index = sequence.num_output_tokens - 1
    return Token(sequence.attempt_id, index, sampled.token_id, sampled.logprob, top, finish_reason, stats)
