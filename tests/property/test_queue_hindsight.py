"""What was ahead in a prefill queue, told afterwards from its stays, against the ledger that was asked at the time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conductor.blame import ahead
from conductor.hindsight import free_at
from conductor.past import Past, Stay
from conductor.view import Worker
from core.cost import CostPrior, WorkerCost
from halfmoon.types import AttemptId, RequestId
from tests.conductor_kit import info

ACTS = st.lists(
    st.tuples(st.sampled_from(["book", "release first", "release last", "ask"]), st.floats(0.01, 2.0)), max_size=40
)


class Asked:
    """As much of a Past as the question needs."""

    def __init__(self, at_s: float) -> None:
        self.at_s = at_s
        self.request_id = "asked"


@given(acts=ACTS)
def test_the_ledger_is_told_again_exactly(acts: list[tuple[str, float]]) -> None:
    worker = Worker(info("p0"), WorkerCost(CostPrior(), tokens_per_pass_max=512), 0.0)
    now_s, booked, done, answers = 0.0, {}, {}, []
    for act, seconds in acts:
        now_s += seconds
        live = [name for name in booked if name not in done]
        if act == "book":
            name = f"r{len(booked)}"
            booked[name] = (now_s, 3.0 * seconds)
            worker.book_prefill(AttemptId(RequestId(name), 1), 3.0 * seconds, now_s)
        elif act == "ask":
            answers.append((now_s, worker.queue_s(now_s), live))
        elif live:
            name = live[0 if act == "release first" else -1]
            done[name] = now_s
            worker.release_prefill(AttemptId(RequestId(name), 1), now_s)
    end_s = now_s + 1.0
    stays = [Stay(name, at_s, at_s, done.get(name, end_s), seconds) for name, (at_s, seconds) in booked.items()]
    for at_s, queue_s, live in answers:
        past: Past = Asked(at_s)  # type: ignore[assignment]
        booked_s, took_s = ahead(stays, past)
        assert booked_s == pytest.approx(queue_s, abs=1e-9)
        assert took_s == pytest.approx(max((done.get(name, end_s) for name in live), default=at_s) - at_s)


def stay(name: str, begun_s: float, ready_s: float, done_s: float) -> Stay:
    return Stay(name, begun_s, ready_s, done_s, 1.0)


@pytest.mark.parametrize(
    ("stays", "ready_s", "begins_s"),
    [
        ([], 5.0, 5.0),
        ([stay("a", 1.0, 1.0, 4.0)], 5.0, 5.0),
        ([stay("a", 1.0, 1.0, 7.0)], 5.0, 7.0),
        ([stay("a", 1.0, 1.0, 7.0), stay("b", 2.0, 2.0, 9.0)], 5.0, 9.0),
        ([stay("a", 1.0, 6.0, 8.0)], 5.0, 5.0),  # its prefix is on its way: it is overtaken
        ([stay("a", 1.0, 6.0, 8.0)], 6.5, 8.0),  # but not by one that waits as long itself
        ([stay("a", 1.0, 1.0, 7.0), stay("b", 2.0, 6.0, 9.0)], 5.0, 9.0),
        ([stay("me", 5.0, 5.0, 9.0), stay("later", 5.1, 5.1, 12.0)], 5.0, 5.0),
    ],
)
def test_a_prompt_waits_for_those_before_it_that_can_be_computed(
    stays: list[Stay], ready_s: float, begins_s: float
) -> None:
    assert free_at(stays, 5.0, ready_s, "me") == begins_s
