"""Transforms, arrival processes and the synthetic generator against exact values or published figures."""

from __future__ import annotations

import statistics as st
from itertools import islice, pairwise
from random import Random

import pytest

from halfmoon.errors import InvalidRequest
from workload.arrivals import arrival_times
from workload.statistics import statistics
from workload.synthetic import generate, profile
from workload.trace import Trace, TraceRequest
from workload.transforms import assign_priorities, head, jitter, scale_outputs, shrink, speedup, window


def request(at_s: float, output_tokens: int = 10) -> TraceRequest:
    return TraceRequest(at_s=at_s, input_tokens=100, output_tokens=output_tokens, block_ids=(1,))


def trace(*requests: TraceRequest) -> Trace:
    return Trace(source="t", block_tokens=512, requests=requests)


def times(of: Trace) -> list[float]:
    return [r.at_s for r in of.requests]


# ---- transforms ----


def test_twice_as_fast_takes_half_as_long() -> None:
    fast = speedup(trace(request(0.0), request(3.0), request(9.0)), 2)
    assert times(fast) == [0.0, 1.5, 4.5]
    assert fast.source == "t, x2"


def test_jitter_fills_the_ticks_evenly_and_keeps_their_order() -> None:
    ticks = [TraceRequest(at_s=3.0 * (i // 1000), input_tokens=1 + i, output_tokens=1) for i in range(3000)]
    spread = jitter(trace(*ticks), Random(1))
    assert [r.input_tokens for r in spread.requests] == list(range(1, 3001))
    assert times(spread) == sorted(times(spread))
    for tick in range(3):
        inside = [r.at_s - 3.0 * tick for r in spread.requests[1000 * tick : 1000 * (tick + 1)]]
        assert all(0 <= offset < 3 for offset in inside)
        assert st.mean(inside) == pytest.approx(1.5, abs=0.1)
        assert st.pstdev(inside) == pytest.approx(3 / 12**0.5, abs=0.1)
    assert jitter(trace(*ticks), Random(1)) == spread
    assert jitter(trace(*ticks), Random(2)) != spread


def test_shrunk_prompts_share_what_they_shared() -> None:
    whole = generate(profile("conversation"), 200, Random(3))
    small = shrink(whole, 32)
    assert small.block_tokens == 16
    assert [r.block_ids for r in small.requests] == [r.block_ids for r in whole.requests]
    for before, after in zip(whole.requests, small.requests, strict=True):
        assert after.input_tokens == -(-before.input_tokens // 32)
        assert -(-after.input_tokens // 16) == len(after.block_ids)
        assert (after.at_s, after.output_tokens) == (before.at_s, before.output_tokens)
    for factor in (0, 3):
        with pytest.raises(InvalidRequest, match="shrink"):
            shrink(whole, factor)


def test_parts_of_a_trace() -> None:
    whole = trace(*(request(float(at_s)) for at_s in range(10)))
    assert times(head(whole, 3)) == [0.0, 1.0, 2.0]
    assert times(head(whole, 30)) == times(whole)
    assert times(window(whole, 4, 6)) == [0.0, 1.0]


def test_longer_answers() -> None:
    scaled = scale_outputs(trace(request(0.0, 1), request(0.0, 7)), 0.3)
    assert [r.output_tokens for r in scaled.requests] == [1, 2]


def test_priorities_in_the_shares_asked_for() -> None:
    drawn = assign_priorities(trace(*(request(0.0) for _ in range(4000))), Random(1), {0: 3.0, 1: 1.0})
    assert sum(r.priority for r in drawn.requests) == pytest.approx(1000, abs=80)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_factors_that_make_no_sense(bad: float) -> None:
    one = trace(request(0.0))
    for transform in (speedup, scale_outputs):
        with pytest.raises(InvalidRequest):
            transform(one, bad)
    with pytest.raises(InvalidRequest, match="tick_s"):
        jitter(one, Random(1), bad)
    with pytest.raises(InvalidRequest, match="shares"):
        assign_priorities(one, Random(1), {0: bad})
    with pytest.raises(InvalidRequest, match="rate_per_s"):
        arrival_times("poisson", bad, Random(1))


def test_parts_that_are_empty() -> None:
    with pytest.raises(InvalidRequest, match="num_requests"):
        head(trace(request(0.0)), 0)
    with pytest.raises(InvalidRequest, match="start_s"):
        window(trace(request(0.0)), 1.0, 2.0)
    with pytest.raises(InvalidRequest, match="end_s"):
        window(trace(request(0.0)), 2.0, 2.0)


# ---- arrivals ----


@pytest.mark.parametrize(("process", "variation"), [("uniform", 0.0), ("poisson", 1.0), ("bursty", 2.0)])
def test_arrivals_have_their_rate_and_their_variation(process: str, variation: float) -> None:
    arrived = list(islice(arrival_times(process, 4.0, Random(3)), 20_000))
    gaps = [b - a for a, b in pairwise(arrived)]
    assert st.mean(gaps) == pytest.approx(0.25, rel=0.05)
    assert st.pstdev(gaps) / st.mean(gaps) == pytest.approx(variation, abs=0.06)


def test_an_unknown_process_and_an_unknown_profile() -> None:
    with pytest.raises(InvalidRequest, match="poisson, uniform, bursty"):
        arrival_times("weekly", 1.0, Random(1))
    with pytest.raises(InvalidRequest, match="conversation, toolagent, synthetic"):
        profile("chat")
    with pytest.raises(InvalidRequest, match="num_requests"):
        generate(profile("conversation"), 0, Random(1))


# ---- the generator against FAST'25, Table 2 ----


@pytest.mark.parametrize(
    ("name", "num_requests", "input_tokens", "output_tokens", "hit_rate"),
    [
        ("conversation", 12_031, 12_035, 343, 0.40),
        ("toolagent", 23_608, 8_596, 182, 0.59),
        ("synthetic", 3_993, 15_325, 149, 0.66),
    ],
)
def test_made_up_traces_have_the_published_statistics(
    name: str, num_requests: int, input_tokens: int, output_tokens: int, hit_rate: float
) -> None:
    """Lengths within 8 %, hits within 0.03: about three times what seeds differ by."""
    found = statistics(generate(profile(name), num_requests, Random(1)))
    assert found.num_requests == num_requests
    assert found.input_tokens_mean == pytest.approx(input_tokens, rel=0.08)
    assert found.output_tokens_mean == pytest.approx(output_tokens, rel=0.08)
    assert found.hit_rate == pytest.approx(hit_rate, abs=0.03)


def test_sessions_grow_and_share_exactly_their_full_blocks() -> None:
    made = generate(profile("conversation"), 2000, Random(5))
    last_use: dict[int, TraceRequest] = {}
    continued = 0
    for r in made.requests:
        assert len(r.block_ids) == -(-r.input_tokens // 512)
        hits = [name for name in r.block_ids if name in last_use]
        assert list(r.block_ids[: len(hits)]) == hits, "a hit after a miss: blocks are named by their whole prefix"
        if len(hits) > 4:  # more than the longest system prompt
            before = last_use[hits[-1]]
            assert r.input_tokens > before.input_tokens + before.output_tokens
            assert len(hits) == before.input_tokens // 512
            continued += 1
        last_use |= dict.fromkeys(r.block_ids, r)
    assert continued > 200


def test_the_same_seed_makes_the_same_trace() -> None:
    assert generate(profile("toolagent"), 50, Random(9)) == generate(profile("toolagent"), 50, Random(9))
    assert generate(profile("toolagent"), 50, Random(9)) != generate(profile("toolagent"), 50, Random(8))
