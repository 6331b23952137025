"""Pure: which rejected requests would have kept their limits, had they been taken on, by the run's own record.

Each rejected request is put into the recorded run alone; the others are not delayed by it. It is taken on at some
moment while it waited, between its arrival and its rejection (every WAIT_S is tried). It is computed on some prefill
worker, behind those that had come by then, for as long as the run's prompts took (a + b * tokens + c * tokens^2, fitted
to all of them, tokens not found in a cache). One that was computed before it was rejected took what it took. Then it
decodes for its whole true output, at the run's median gap between tokens, if one decode worker had as many blocks free
throughout, once a second, as it comes to need.

What a cache would have spared it, and what it would have shared with running sequences, is left out, so that too few
are found rather than too many; after the last sample, which is the last arrival's, all room is taken for free, which
finds too many among the last. `Found.right` says how sure it is: the same is reckoned of each request that was
accepted, with the blocks that it held given back, and compared with what it got.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from halfmoon.types import Outcome
from report.records import RequestRow, Run

WAIT_S = 1.0

BETWEEN_S = 0.01
"""A worker that is free for less goes from one prompt to the next."""

Blocks = np.ndarray
"""int, one for each sample of the run: free on one decode worker, or needed there."""


class Pass(NamedTuple):
    """A prompt's computation on one prefill worker, as seen from its end."""

    begin_s: float
    end_s: float
    arrived_s: float
    request_id: str


@dataclass(frozen=True, kw_only=True)
class Found:
    """Of `rejected` requests, `false_rejections` would have kept their limits.

    checked, right: accepted requests reckoned likewise; how many of them come out as they did.
    """

    rejected: int
    false_rejections: int
    checked: int
    right: int


def false_rejections(run: Run, outputs: Mapping[str, int], block_tokens: int) -> Found | None:
    """None: no request was computed or no blocks were sampled, so nothing is known of the run's speed or room.

    Args:
        outputs: the true output length of every request, by id, also of those that never began.
    """
    rows = run.requests
    done = [r for r in rows if r.prefill_s > 0.0 and r.ttft_s is not None]
    gaps = [r.tbt_p50_s for r in rows if r.tbt_p50_s is not None]
    if not done or not gaps or not run.samples or not run.samples[0].decode_free_blocks:
        return None
    world = _World(run, outputs, block_tokens, done, float(np.median(gaps)))
    judged = [r for r in rows if r.outcome is Outcome.REJECTED]
    taken = [r for r in rows if r.outcome is Outcome.FINISHED]
    return Found(
        rejected=len(judged),
        false_rejections=sum(world.keeps(row) for row in judged),
        checked=len(taken),
        right=sum(world.keeps(row) == row.effective for row in taken),
    )


class _World:
    """Queues and blocks as they were."""

    def __init__(
        self, run: Run, outputs: Mapping[str, int], block_tokens: int, done: Sequence[RequestRow], gap_s: float
    ) -> None:
        self._outputs, self._block_tokens, self._gap_s = outputs, block_tokens, gap_s
        self._cost = _fitted(done)
        self._queues: defaultdict[str, list[Pass]] = defaultdict(list)
        for r in done:
            assert r.ttft_s is not None
            end_s = r.arrived_s + r.ttft_s
            self._queues[r.prefill_node].append(Pass(end_s - r.prefill_s, end_s, r.arrived_s, r.request_id))
        for queue in self._queues.values():
            queue.sort()
        self._times = np.array([sample.at_s for sample in run.samples])
        self._free = np.array([sample.decode_free_blocks for sample in run.samples]).T

    def keeps(self, row: RequestRow) -> bool:
        """Whether it would have kept both of its limits; of one that was accepted: with its own blocks given back."""
        if row.slo_tbt_s is not None and self._gap_s > row.slo_tbt_s:
            return False
        limit_s = math.inf if row.slo_ttft_s is None else row.slo_ttft_s
        return any(ttft_s <= limit_s and self._fits(row, row.arrived_s + ttft_s) for ttft_s in self._ttfts(row))

    def _ttfts(self, row: RequestRow) -> Iterator[float]:
        """What it would have had, by the moment at which it would have been taken on."""
        if row.ttft_s is not None:
            yield row.ttft_s
            return
        seconds = float(self._cost @ _terms(np.array([row.input_tokens]))[0])
        waited_s = (row.ended_s or row.arrived_s) - row.arrived_s
        for at_s in row.arrived_s + np.arange(0.0, waited_s + 1e-9, WAIT_S):
            yield min(_begin_s(queue, float(at_s)) for queue in self._queues.values()) + seconds - row.arrived_s

    def _fits(self, row: RequestRow, joins_s: float) -> bool:
        """Whether one decode worker had the blocks, from then until its last token."""
        output = self._outputs[row.request_id]
        first, end = np.searchsorted(self._times, (joins_s, joins_s + output * self._gap_s))
        free = self._free[:, first:end]
        if row.outcome is Outcome.FINISHED and row.ttft_s is not None and row.ended_s is not None:
            own = self._needs(row.input_tokens, self._times[first:end] - joins_s)
            own[self._times[first:end] > row.ended_s] = 0
            free = free + own
        needs = self._needs(row.input_tokens, self._times[first:end] - joins_s)
        return bool((free >= needs).all(axis=1).any())

    def _needs(self, tokens: int, ages_s: np.ndarray) -> Blocks:
        """Its blocks at each age, and the spare one that a decode worker keeps for each sequence."""
        held = tokens + (ages_s / self._gap_s).astype(np.int64)
        blocks: Blocks = -(-(held + 1) // self._block_tokens) + 1
        return blocks


def _begin_s(queue: Sequence[Pass], at_s: float) -> float:
    """When this worker would begin with one taken on then: those that came before go first, nobody is interrupted."""
    begin_s = at_s
    for one in queue[bisect_right(queue, begin_s, key=_end_s) :]:
        if one.begin_s > begin_s + (BETWEEN_S if one.arrived_s <= at_s else -BETWEEN_S):
            break
        begin_s = one.end_s
    return begin_s


def _computed(row: RequestRow) -> int:
    return row.input_tokens - row.hit_tokens_device - row.hit_tokens_dram - row.hit_tokens_remote


def _terms(tokens: np.ndarray) -> np.ndarray:
    return np.stack([np.ones(len(tokens)), tokens, tokens.astype(float) ** 2], axis=1)


def _fitted(done: Sequence[RequestRow]) -> np.ndarray:
    """Seconds of a prompt by its tokens to compute, each prompt's error weighed by how long it took."""
    tokens, seconds = np.array([_computed(r) for r in done]), np.array([r.prefill_s for r in done])
    cost: np.ndarray = np.linalg.lstsq(_terms(tokens) / seconds[:, None], np.ones(len(done)), rcond=None)[0]
    return cost


def _end_s(one: Pass) -> float:
    return one.end_s
