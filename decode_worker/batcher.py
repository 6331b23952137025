"""Pure: the decode worker's batcher: which sequences take part in the next step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from decode_worker.attempt import DecodeAttempt


def next_batch(
    sequences: Iterable[DecodeAttempt], *, sequences_max: int, grow: Callable[[DecodeAttempt], bool]
) -> list[DecodeAttempt]:
    """At most `sequences_max` runnable ones, most urgent first.

    Args:
        sequences: most urgent first; what they are is asked one by one, because growing one may preempt a later one.
        grow: makes a slot for the next position of one that has none; False: this sequence sits out the step.
    """
    batch: list[DecodeAttempt] = []
    for attempt in sequences:
        if len(batch) == sequences_max:
            break
        if attempt.runnable and (not attempt.sequence.needs_slot or grow(attempt)):
            batch.append(attempt)
    return batch
