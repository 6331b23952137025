"""Pure: how much the two pools swing: the deviation of the decode pool's load, and whether the pools swing in turn.

Mooncake's paper (arXiv 2407.00079, Figure 9) shows the loads of both pools in anti-phase when requests are taken on by
the load of the moment. Here: over the last `WINDOW_S`, sampled every `SAMPLE_S`, the standard deviation of the decode
pool's load, and the correlation of the two pools' loads (-1: in anti-phase).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from conductor.effects import Slo
from conductor.view import Worker
from report.pearson import correlation

SAMPLE_S = 1.0
WINDOW_S = 300.0
"""Several lifetimes of a request: a swing has the period of one or two."""


class PoolLoads(NamedTuple):
    """As `pool_loads` defines them; 1 is the limit."""

    prefill: float
    decode: float


class Oscillation(NamedTuple):
    """`correlation` is None where one of the loads has not changed at all."""

    samples: int
    now: PoolLoads
    decode_deviation: float
    correlation: float | None


def pool_loads(workers: Iterable[Worker], slo: Slo, now_s: float) -> PoolLoads:
    """Of the pools as they are now: what admission looks at, without a request to judge.

    Prefill: the mean queue over the TTFT limit. Decode: the mean over its workers of the larger of the predicted step
    over the TBT limit, and the booked blocks over the pool. A limit that there is not is none of the load; a coupled
    worker is part of both pools, and an empty pool has no load. Asking changes no decision.
    """
    queues: list[float] = []
    loads: list[float] = []
    for worker in workers:
        if worker.prefills:
            queues.append(worker.queue_s(now_s) / slo.ttft_s if slo.ttft_s else 0.0)
        if worker.decodes:
            step_s = worker.cost.decode_seconds_watched(worker.batch, worker.kv_tokens)
            loads.append(max(step_s / slo.tbt_s if slo.tbt_s else 0.0, worker.decode_blocks / worker.num_blocks))
    return PoolLoads(_mean(queues), _mean(loads))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


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
        prefill, decode = [loads.prefill for loads in samples], [loads.decode for loads in samples]
        mean = _mean(decode)
        deviation = math.sqrt(_mean([(load - mean) ** 2 for load in decode]))
        return Oscillation(count, samples[-1], deviation, correlation(prefill, decode))
