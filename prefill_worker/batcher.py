"""Pure: the prefill worker's batcher: which tokens of which prompts run next."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from halfmoon.types import AttemptId


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The next `num_tokens` tokens of one prompt, to be computed in one pass."""

    attempt_id: AttemptId
    num_tokens: int


def next_chunks(prompts: Iterable[tuple[AttemptId, int]], *, tokens_max: int, sequences_max: int) -> list[Chunk]:
    """Fill one pass with at most `tokens_max` tokens of at most `sequences_max` prompts.

    Args:
        prompts: (attempt, tokens left to compute), most urgent first. Each takes what it can before the next one
            gets anything, so the most urgent prompt always goes on, and ends as early as it can.
    """
    chunks: list[Chunk] = []
    for attempt_id, num_left in prompts:
        if tokens_max <= 0 or len(chunks) == sequences_max:
            break
        num_tokens = min(num_left, tokens_max)
        chunks.append(Chunk(attempt_id=attempt_id, num_tokens=num_tokens))
        tokens_max -= num_tokens
    return chunks
