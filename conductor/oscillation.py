"""Pure: how much the two pools swing: the deviation of the decode pool's load, and whether the pools swing in turn.

Mooncake's paper (arXiv 2407.00079, Figure 9) shows the loads of both pools in anti-phase when requests are taken on by
the load of the moment. Here: over the last `WINDOW_S`, sampled every `SAMPLE_S`, the standard deviation of the decode
pool's KV tokens over its room, and the correlation of the two pools' loads (-1: in anti-phase).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from conductor.view import Worker

SAMPLE_S = 1.0
WINDOW_S = 300.0
"""Several lifetimes of a request: a swing has the period of one or two."""


class PoolLoads(NamedTuple):
    """prefill: mean queue in seconds over the default TTFT limit; decode: KV tokens of running sequences over room."""

    prefill: float
    decode: float


class Oscillation(NamedTuple):
    """`correlation` is None where one of the loads has not changed at all."""

    samples: int
    now: PoolLoads
    decode_deviation: float
    correlation: float | None


def pool_loads(workers: Iterable[Worker], block_size: int, ttft_s: float, now_s: float) -> PoolLoads:
    """Of the pools as they are now; a coupled worker is part of both, and an empty pool has no load."""
    queue_s = prefills = tokens = room = 0.0
    for worker in workers:
        if worker.prefills:
            queue_s += worker.queue_s(now_s)
            prefills += 1
        if worker.decodes:
            tokens += worker.load.kv_tokens
            room += worker.num_blocks * block_size
    return PoolLoads(queue_s / prefills / ttft_s if prefills else 0.0, tokens / room if room else 0.0)


class Swing:
    """The samples of the last window."""

    def __init__(self) -> None:
        self._samples: deque[PoolLoads] = deque(maxlen=round(WINDOW_S / SAMPLE_S))
        self._next_s = float("-inf")

    def due(self, now_s: float) -> bool:
        return now_s >= self._next_s

    def see(self, loads: PoolLoads, now_s: float) -> None:
        self._next_s = now_s + SAMPLE_S
        self._samples.append(loads)

    def read(self) -> Oscillation:
        samples = list(self._samples)
        count = len(samples)
        if not count:
            return Oscillation(0, PoolLoads(0.0, 0.0), 0.0, None)
        mean_p, mean_d = (sum(loads[i] for loads in samples) / count for i in (0, 1))
        var_p = sum((loads.prefill - mean_p) ** 2 for loads in samples) / count
        var_d = sum((loads.decode - mean_d) ** 2 for loads in samples) / count
        both = sum((loads.prefill - mean_p) * (loads.decode - mean_d) for loads in samples) / count
        flat = math.sqrt(var_p) < 1e-9 or math.sqrt(var_d) < 1e-9
        correlation = None if flat else max(-1.0, min(1.0, both / math.sqrt(var_p * var_d)))
        return Oscillation(count, samples[-1], math.sqrt(var_d), correlation)
