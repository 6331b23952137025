"""Pure: what a worker machine measures between two load reports."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from core.messages import LoadReport, PassSample
from engine.protocol import Slice
from halfmoon.types import Tier
from kv_store.tiers import KvCache

SAMPLES_MAX = 1024
"""Kept between two reports; older ones are dropped. A pass takes a millisecond or more, a report is due each second."""


class Samples:
    """Passes since the last report: all that prefilled, and of steps that only decoded the last of each batch size.

    Steps of a batch come by the dozen between two reports and are all alike; to learn them all costs the conductor
    more than everything else that it does.
    """

    def __init__(self) -> None:
        self._passes: deque[PassSample] = deque(maxlen=SAMPLES_MAX)
        self._steps: dict[int, tuple[int, float]] = {}  # by batch size: KV tokens, seconds

    def add_pass(self, *, prefill: Iterable[Slice], decode: Iterable[Slice], seconds: float) -> None:
        chunks, steps = tuple(prefill), tuple(decode)
        if not chunks:
            self.add_step(batch=len(steps), kv_tokens=sum(s.end for s in steps), seconds=seconds)
            return
        self._passes.append(
            PassSample(
                new_tokens=sum(len(s.token_ids) for s in chunks),
                context_tokens=sum(s.start for s in chunks),
                batch=len(steps),
                kv_tokens=sum(s.end for s in steps),
                seconds=seconds,
                pairs=sum(len(s.token_ids) * (s.start + s.end) // 2 for s in chunks),
            )
        )

    def add_step(self, *, batch: int, kv_tokens: int, seconds: float) -> None:
        """A pass that only decoded."""
        self._steps[batch] = (kv_tokens, seconds)

    def take(self) -> tuple[PassSample, ...]:
        steps = [
            PassSample(new_tokens=0, context_tokens=0, batch=batch, kv_tokens=kv_tokens, seconds=seconds)
            for batch, (kv_tokens, seconds) in self._steps.items()
        ]
        taken = (*self._passes, *steps)
        self._passes.clear()
        self._steps.clear()
        return taken


def load_report(
    cache: KvCache,
    samples: Samples,
    *,
    queued_attempts: int,
    queued_tokens: int = 0,
    running_sequences: int = 0,
    kv_tokens: int = 0,
    draining: bool,
) -> LoadReport:
    """With what the cache says of its tiers, and the samples, which are taken. (The block store measures transfers.)"""
    free = cache.free(Tier.DEVICE)
    return LoadReport(
        queued_attempts=queued_attempts,
        queued_tokens=queued_tokens,
        running_sequences=running_sequences,
        kv_tokens=kv_tokens,
        draining=draining,
        passes=samples.take(),
        free_device_blocks=free,
        evictable_device_blocks=cache.available(Tier.DEVICE) - free,
        free_dram_blocks=cache.free(Tier.DRAM),
    )
