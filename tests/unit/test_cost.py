"""The cost models learn what workers measured, say when they guess, and refuse nonsense."""

from __future__ import annotations

import math
import random

import pytest

from core.cost import CostPrior, WorkerCost
from core.fit import LinearFit
from core.messages import PassSample, TransferSample
from halfmoon.types import NodeId

PRIOR = CostPrior(prefill=(0.01, 1e-3, 1e-7), decode=(0.02, 1e-3, 1e-6), transfer=(1e-3, 1e-9))


def prefill_pass(new: int, context: int, seconds: float, batch: int = 0, kv_tokens: int = 0) -> PassSample:
    return PassSample(new_tokens=new, context_tokens=context, batch=batch, kv_tokens=kv_tokens, seconds=seconds)


def decode_pass(batch: int, kv_tokens: int, seconds: float) -> PassSample:
    return PassSample(new_tokens=0, context_tokens=0, batch=batch, kv_tokens=kv_tokens, seconds=seconds)


def true_prefill_s(new: int, context: int) -> float:
    return 0.03 + 2e-4 * new + 5e-8 * (new * context + new * new / 2)


def taught(noise: float = 0.0) -> WorkerCost:
    rng = random.Random(1)
    cost = WorkerCost(PRIOR, tokens_per_pass_max=512)
    for _ in range(200):
        new, context, batch, kv = rng.randint(1, 512), rng.randint(0, 4000), rng.randint(1, 32), rng.randint(10, 30_000)
        blur = 1.0 + noise * rng.uniform(-1, 1)
        cost.observe_pass(prefill_pass(new, context, blur * true_prefill_s(new, context)))
        cost.observe_pass(decode_pass(batch, kv, blur * (0.015 + 4e-4 * batch + 2e-7 * kv)))
    return cost


def test_before_any_sample_the_prior_answers_and_says_so() -> None:
    cost = WorkerCost(PRIOR, tokens_per_pass_max=512)
    assert cost.prefill_s(100, 0) == (pytest.approx(0.01 + 0.1 + 1e-7 * 5000), False)
    assert cost.decode_step_s(4, 1000) == (pytest.approx(0.02 + 0.004 + 0.001), False)
    assert cost.transfer_s(1_000_000) == (pytest.approx(0.002), False)


def test_nothing_to_do_costs_nothing_for_certain() -> None:
    cost = WorkerCost(PRIOR, tokens_per_pass_max=512)
    assert cost.prefill_s(0, 100) == cost.decode_step_s(0, 0) == cost.transfer_s(0) == (0.0, True)


def test_exact_measurements_are_learned_exactly() -> None:
    cost = taught()
    assert cost.prefill_s(300, 2000) == (pytest.approx(true_prefill_s(300, 2000), rel=1e-3), True)
    assert cost.decode_step_s(10, 9000) == (pytest.approx(0.015 + 0.004 + 0.0018, rel=1e-3), True)
    assert cost.residuals()["prefill"].error < 1e-3


def test_noisy_measurements_are_learned_nearly_and_the_residual_tells_the_noise() -> None:
    cost = taught(noise=0.2)
    assert cost.prefill_s(300, 2000).seconds == pytest.approx(true_prefill_s(300, 2000), rel=0.1)
    assert 0.03 < cost.residuals()["decode"].error < 0.2


def test_a_long_prompt_pays_the_constant_once_per_pass() -> None:
    cost = taught()
    whole, parts = cost.prefill_s(1536, 0), [cost.prefill_s(512, done) for done in (0, 512, 1024)]
    assert whole.seconds == pytest.approx(sum(p.seconds for p in parts))


def test_outside_the_fitted_range_it_says_so() -> None:
    cost = taught()
    assert cost.prefill_s(400, 4000).in_range
    assert not cost.prefill_s(400, 40_000).in_range
    assert not cost.decode_step_s(64, 9000).in_range
    assert not cost.transfer_s(1000).in_range


def test_a_change_of_speed_is_followed() -> None:
    cost = taught()
    for _ in range(100):
        cost.observe_pass(decode_pass(8, 8000, 0.1))
        cost.observe_pass(decode_pass(16, 20_000, 0.12))
    assert cost.decode_step_s(8, 8000).seconds == pytest.approx(0.1, rel=0.05)


def test_samples_that_all_look_alike_do_not_spoil_what_was_learned() -> None:
    cost = taught()
    for _ in range(5000):
        cost.observe_pass(decode_pass(1, 500, 0.015 + 4e-4 + 1e-4))
    assert cost.decode_step_s(1, 500).seconds == pytest.approx(0.0155, rel=0.01)
    assert 0.0 < cost.decode_step_s(30, 20_000).seconds < 0.1


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0, 0.0])
def test_what_is_no_duration_is_refused_and_counted(seconds: float) -> None:
    cost = WorkerCost(PRIOR, tokens_per_pass_max=512)
    cost.observe_pass(prefill_pass(10, 0, seconds))
    cost.observe_pass(decode_pass(1, 10, seconds))
    cost.observe_pass(decode_pass(0, 0, 0.1))
    cost.observe_transfer(TransferSample(source=NodeId("p"), link="shm", num_bytes=10, seconds=seconds))
    cost.observe_transfer(TransferSample(source=NodeId("p"), link="shm", num_bytes=-1, seconds=0.1))
    assert [r.refused for r in cost.residuals().values()] == [1, 2, 2]
    assert cost.prefill_s(100, 0).seconds == pytest.approx(0.1105)


def test_predictions_are_never_negative() -> None:
    fit = LinearFit((0.01, 1e-3))
    for x, seconds in ((1.0, 1.0), (100.0, 0.01), (1000.0, 0.001)) * 20:
        fit.observe((1.0, x), seconds)
    assert all(c >= 0.0 for c in fit.coefficients)
    assert fit.predict((1.0, 1e6)) >= 0.0


def test_a_mixed_pass_counts_for_prefill_less_its_decode_part() -> None:
    cost = taught()
    before = cost.prefill_s(300, 2000).seconds
    for _ in range(50):
        cost.observe_pass(prefill_pass(300, 2000, before + 8 * 4e-4 + 8000 * 2e-7, batch=8, kv_tokens=8000))
    assert cost.prefill_s(300, 2000).seconds == pytest.approx(before, rel=0.01)


def test_a_slow_sender_is_known_as_such() -> None:
    cost = WorkerCost(PRIOR, tokens_per_pass_max=512)
    for mib in range(1, 40):
        for source, bandwidth in (("near", 4e9), ("far", 1e8)):
            num_bytes = mib << 20
            cost.observe_transfer(
                TransferSample(source=NodeId(source), link="l", num_bytes=num_bytes, seconds=num_bytes / bandwidth)
            )
    assert cost.transfer_s(20 << 20, "near") == (pytest.approx((20 << 20) / 4e9, rel=0.05), True)
    assert cost.transfer_s(20 << 20, "far") == (pytest.approx((20 << 20) / 1e8, rel=0.05), True)


def test_what_was_learned_is_the_prior_of_a_newcomer() -> None:
    newcomer = WorkerCost(taught().learned(), tokens_per_pass_max=512)
    estimate = newcomer.prefill_s(300, 2000)
    assert estimate == (pytest.approx(true_prefill_s(300, 2000), rel=1e-3), False)


def test_what_is_handed_on_for_ever_stays_a_prior() -> None:
    prior = PRIOR
    for _ in range(200):
        cost = WorkerCost(prior, tokens_per_pass_max=512)
        for _ in range(20):
            cost.observe_pass(decode_pass(1, 1, 0.02))
            cost.observe_pass(decode_pass(9, 900, 0.01))  # more is quicker: slopes of zero
        prior = cost.learned()
    assert 0.01 <= WorkerCost(prior, tokens_per_pass_max=512).decode_step_s(9, 900).seconds <= 0.02


# ---- what a cluster really sends: many tiny passes, one huge prompt in chunks, noise, hiccups ----


def fake_s(new: int, context: int) -> float:
    return 1e-3 + 5e-6 * new + 1e-9 * (new * context + new * new / 2)


def prompt_passes(cost: WorkerCost, tokens: int, rng: random.Random, factor: float = 1.0) -> None:
    """A prompt's chunks, each as fast as `fake_s`, give or take."""
    for start in range(0, tokens, 512):
        new = min(512, tokens - start)
        seconds = factor * fake_s(new, start) * rng.lognormvariate(0.0, 0.3)
        cost.observe_pass(prefill_pass(new, start, seconds))


def prompt_s(tokens: int) -> float:
    return sum(fake_s(min(512, tokens - start), start) for start in range(0, tokens, 512))


@pytest.mark.parametrize("seed", range(5))
def test_sixty_tiny_prompts_and_a_huge_one_leave_every_prediction_near_the_truth(seed: int) -> None:
    rng, cost = random.Random(seed), WorkerCost(CostPrior(), tokens_per_pass_max=512)
    prompt_passes(cost, 5, rng, factor=100.0)  # a cold start
    for _ in range(60):
        prompt_passes(cost, 2, rng)
    prompt_passes(cost, 40_000, rng)
    for tokens in (2, 5, 20, 100, 1000, 5000, 40_000):
        assert cost.prefill_s(tokens, 0).seconds == pytest.approx(prompt_s(tokens), rel=0.75), tokens
    for _ in range(2000):
        prompt_passes(cost, 2, rng)
    for tokens in (2, 5, 20, 100, 1000, 5000, 40_000):
        assert cost.prefill_s(tokens, 0).seconds == pytest.approx(prompt_s(tokens), rel=0.75), tokens


def test_one_pass_a_hundred_times_too_slow_changes_nothing() -> None:
    cost = taught()
    before = cost.prefill_s(300, 2000)
    cost.observe_pass(prefill_pass(300, 2000, 100 * before.seconds))
    assert cost.prefill_s(300, 2000) == (pytest.approx(before.seconds, rel=0.01), True)


def test_what_contradicts_the_predictions_puts_them_out_of_range() -> None:
    cost = taught()
    known, steps = cost.prefill_s(300, 2000), []
    for _ in range(7):
        cost.observe_pass(prefill_pass(300, 2000, 10 * known.seconds))
        steps.append(cost.prefill_s(300, 2000).in_range)
    assert (steps[0], steps[6]) == (True, False)


def test_twice_as_slow_is_followed_within_a_hundred_samples() -> None:
    cost = taught()
    for _ in range(100):
        cost.observe_pass(prefill_pass(300, 2000, 2 * true_prefill_s(300, 2000)))
    assert cost.prefill_s(300, 2000).seconds == pytest.approx(2 * true_prefill_s(300, 2000), rel=0.1)


# ---- everything becomes slower or faster at once ----


def slowed(cost: WorkerCost, factor: float, samples: int, seed: int) -> None:
    """Passes of all sizes, a tenth of noise, all `factor` times as slow as `taught` has shown."""
    rng = random.Random(seed)
    for _ in range(samples):
        new, context, batch, kv = rng.randint(1, 512), rng.randint(0, 4000), rng.randint(1, 32), rng.randint(10, 30_000)
        blur = factor * (1.0 + 0.1 * rng.uniform(-1, 1))
        cost.observe_pass(prefill_pass(new, context, blur * true_prefill_s(new, context)))
        cost.observe_pass(decode_pass(batch, kv, blur * true_decode_s(batch, kv)))


def true_decode_s(batch: int, kv: int) -> float:
    return 0.015 + 4e-4 * batch + 2e-7 * kv


def known_share(cost: WorkerCost, factor: float) -> float:
    """Of random questions: those answered within a fifth of the truth, and said to be in range."""
    rng, good = random.Random(99), 0
    for _ in range(100):
        new, context, batch, kv = rng.randint(8, 512), rng.randint(0, 4000), rng.randint(1, 32), rng.randint(99, 30_000)
        prefill, decode = cost.prefill_s(new, context), cost.decode_step_s(batch, kv)
        good += prefill.in_range and abs(prefill.seconds / (factor * true_prefill_s(new, context)) - 1.0) < 0.2
        good += decode.in_range and abs(decode.seconds / (factor * true_decode_s(batch, kv)) - 1.0) < 0.2
    return good / 200


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("factor", [10.0, 3.0, 1 / 3, 0.1])
def test_another_level_is_known_within_a_hundred_samples_and_so_is_the_way_back(factor: float, seed: int) -> None:
    cost = taught(noise=0.1)
    assert known_share(cost, 1.0) > 0.9
    slowed(cost, factor, 10, seed)
    assert known_share(cost, factor) < 0.1  # ten samples are no proof
    slowed(cost, factor, 90, seed + 1)
    assert known_share(cost, factor) > 0.8
    slowed(cost, 1.0, 100, seed + 2)
    assert known_share(cost, 1.0) > 0.8
    assert [residual.levels for residual in cost.residuals().values()] == [2, 2, 0]


@pytest.mark.parametrize("seed", range(3))
def test_noise_and_hiccups_are_no_other_level(seed: int) -> None:
    rng, cost = random.Random(seed), taught()
    for _ in range(3000):
        new, context = rng.randint(1, 512), rng.randint(0, 4000)
        hiccup = 30.0 if rng.random() < 0.02 else 1.0
        seconds = hiccup * true_prefill_s(new, context) * rng.lognormvariate(0.0, 0.3)
        cost.observe_pass(prefill_pass(new, context, seconds))
    assert cost.residuals()["prefill"].levels == 0
    assert cost.prefill_s(300, 2000).seconds == pytest.approx(true_prefill_s(300, 2000), rel=0.25)


def test_what_moved_with_the_level_is_not_trusted_before_it_is_measured_again() -> None:
    cost = taught()
    for factor, passes in ((1, 12), (10, 12)):  # only short prompts, of two kinds, become slow
        for i in range(passes):
            new = 20 if i % 2 else 40
            cost.observe_pass(prefill_pass(new, 100, factor * true_prefill_s(new, 100)))
    assert cost.residuals()["prefill"].levels == 1
    assert cost.prefill_s(20, 100) == (pytest.approx(10 * true_prefill_s(20, 100), rel=0.05), True)
    assert not cost.prefill_s(500, 3000).in_range
    for _ in range(20):
        cost.observe_pass(prefill_pass(500, 3000, true_prefill_s(500, 3000)))
    assert cost.prefill_s(500, 3000) == (pytest.approx(true_prefill_s(500, 3000), rel=0.1), True)


def test_parts_of_several_prompts_in_a_pass_attend_each_to_their_own() -> None:
    rng, cost = random.Random(1), WorkerCost(PRIOR, tokens_per_pass_max=512)
    for _ in range(300):
        parts = [(rng.randint(1, 100), rng.randint(0, 4000)) for _ in range(rng.randint(1, 5))]
        new, context = sum(n for n, _ in parts), sum(c for _, c in parts)
        pairs = sum(n * (2 * c + n) // 2 for n, c in parts)
        seconds = 0.03 + 2e-4 * new + 5e-8 * pairs
        cost.observe_pass(
            PassSample(new_tokens=new, context_tokens=context, batch=0, kv_tokens=0, seconds=seconds, pairs=pairs)
        )
    assert cost.prefill_s(80, 2000) == (pytest.approx(true_prefill_s(80, 2000), rel=0.01), True)


def test_a_mixed_pass_that_is_nearly_all_decode_says_nothing_about_prefill() -> None:
    cost = taught()
    before = cost.prefill_s(4, 100).seconds
    cost.observe_pass(prefill_pass(4, 100, 0.017, batch=32, kv_tokens=30_000))
    assert cost.residuals()["prefill"].refused == 1
    assert cost.prefill_s(4, 100).seconds == before
