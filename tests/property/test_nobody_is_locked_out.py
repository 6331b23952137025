"""Whatever a few small passes have looked like, a worker as fast as the others gets its share of long prompts."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from conductor.view import Worker
from core.cost import CostPrior, RoleCost, WorkerCost
from core.messages import PassSample
from halfmoon.types import AttemptId, RequestId
from tests.conductor_kit import info

PASS_MAX = 512
PROMPT_TOKENS = 3450
REQUESTS = 24
"""Of three workers each has had one by then, whatever they are believed to take at first."""

SMALL = st.tuples(
    st.integers(0, 2),  # worker
    st.integers(1, 120),  # new tokens
    st.integers(0, 60),  # context
    st.sampled_from([0.5, 0.8, 1.0, 1.0, 1.25, 2.0, 50.0]),  # times the true seconds
)
TRUTHS = st.sampled_from([(1e-3, 6e-5, 1e-10), (0.02, 2e-4, 1e-8), (0.03, 1e-5, 1e-9), (1e-3, 1e-3, 1e-7)])


def pass_s(truth: tuple[float, float, float], new: int, context: int) -> float:
    return truth[0] + truth[1] * new + truth[2] * (new * context + new * new / 2)


def taught(worker: Worker, new: int, context: int, seconds: float) -> None:
    worker.cost.observe_pass(PassSample(new_tokens=new, context_tokens=context, batch=0, kv_tokens=0, seconds=seconds))


class Pool:
    """Workers that compute long prompts one after the other, all equally fast, chosen by the least predicted TTFT."""

    def __init__(self, size: int, truth: tuple[float, float, float]) -> None:
        role = RoleCost(CostPrior(), tokens_per_pass_max=PASS_MAX)
        costs = [WorkerCost(CostPrior(), tokens_per_pass_max=PASS_MAX, role=role) for _ in range(size)]
        self.workers = [Worker(info(f"p{i}"), cost, 0.0) for i, cost in enumerate(costs)]
        self.truth = truth
        self.served = [0] * size
        self.chunks = [(start, min(PASS_MAX, PROMPT_TOKENS - start)) for start in range(0, PROMPT_TOKENS, PASS_MAX)]
        self.prompt_s = sum(pass_s(truth, new, start) for start, new in self.chunks)
        self.running: list[list[tuple[float, AttemptId]]] = [[] for _ in range(size)]

    def arrive(self, number: int, now_s: float) -> None:
        self.end_what_is_over(now_s)
        guesses = [worker.cost.prefill_seconds(PROMPT_TOKENS, 0) for worker in self.workers]
        waits = [worker.queue_s(now_s) + guess for worker, guess in zip(self.workers, guesses, strict=True)]
        assert all(math.isfinite(wait_s) for wait_s in waits)
        chosen = waits.index(min(waits))
        attempt_id = AttemptId(RequestId(f"r{number}"), 1)
        self.workers[chosen].book_prefill(attempt_id, guesses[chosen], now_s)
        begins_s = max([now_s, *(ends_s for ends_s, _ in self.running[chosen])])
        self.running[chosen].append((begins_s + self.prompt_s, attempt_id))
        self.served[chosen] += 1

    def end_what_is_over(self, now_s: float) -> None:
        for worker, running in zip(self.workers, self.running, strict=True):
            while running and running[0][0] <= now_s:
                ended_s, attempt_id = running.pop(0)
                worker.release_prefill(attempt_id, ended_s)
                for start, new in self.chunks:
                    taught(worker, new, start, pass_s(self.truth, new, start))


@given(st.lists(SMALL, max_size=20), TRUTHS)
@settings(max_examples=100, deadline=None)
def test_every_idle_worker_gets_a_long_prompt_soon(history: list[tuple], truth: tuple[float, float, float]) -> None:
    pool = Pool(3, truth)
    for worker, new, context, factor in history:
        taught(pool.workers[worker], new, context, factor * pass_s(truth, new, context))
    for number in range(REQUESTS):
        pool.arrive(number, number * pool.prompt_s / 3)
    assert min(pool.served) > 0, pool.served


def test_two_small_passes_of_a_new_cluster_do_not_lock_a_worker_out() -> None:
    """As it was seen: 17 tokens in 1.6 ms and 97 in 70 ms, on a busy machine, made 74 s of 3,450 tokens."""
    pool = Pool(2, (1e-3, 6e-5, 1e-10))
    taught(pool.workers[0], 17, 0, 0.0016)
    taught(pool.workers[0], 97, 0, 0.07)
    taught(pool.workers[0], 1, 97, 0.0623)
    taught(pool.workers[1], 17, 0, 0.0017)
    assert pool.workers[0].cost.prefill_seconds(PROMPT_TOKENS, 0) < 10.0
    for number in range(54):
        pool.arrive(number, number * pool.prompt_s / 2)
    assert min(pool.served) >= 20, pool.served
    assert pool.workers[0].cost.prefill_seconds(PROMPT_TOKENS, 0) < 2 * pool.prompt_s
