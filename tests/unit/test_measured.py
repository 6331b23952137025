"""What a real cluster costs, from its samples; and the prompts that a trace's block ids stand for."""

from __future__ import annotations

from random import Random

import pytest

from benchmarks.calibration import Costs, preset
from benchmarks.measured import Samples, fit, fitted
from benchmarks.real_run import prompt_of
from core.cost import CostPrior
from core.messages import PassSample, TransferSample
from halfmoon.types import NodeId
from simulator.presets import hardware_of
from workload.trace import TraceRequest


def test_the_costs_that_samples_were_made_of_are_found_again() -> None:
    rng = Random(1)
    prefill = []
    for _ in range(200):
        new, context = rng.randint(16, 512), 16 * rng.randint(0, 60)
        pairs = new * context + new * new // 2
        seconds = 0.02 + 1e-3 * new + 2e-7 * pairs
        prefill.append(
            PassSample(new_tokens=new, context_tokens=context, batch=0, kv_tokens=0, seconds=seconds, pairs=pairs)
        )
    steps = [
        PassSample(new_tokens=0, context_tokens=0, batch=b, kv_tokens=kv, seconds=0.015 + 2e-3 * b + 3e-6 * kv)
        for b, kv in ((b, b * rng.randint(50, 900)) for b in range(1, 20))
    ]
    pulls = [
        TransferSample(source=NodeId("p"), link="shm", num_bytes=n, seconds=1e-3 + 5e-10 * n)
        for n in range(100_000, 2_000_000, 100_000)
    ]
    found = fitted(Samples(prefill=tuple(prefill), steps=tuple(steps), pulls=tuple(pulls)), CostPrior())
    for one, truth in zip(found, ((0.02, 1e-3, 2e-7), (0.015, 2e-3, 3e-6), (1e-3, 5e-10)), strict=True):
        assert one.coefficients == pytest.approx(truth, rel=0.01)
        assert one.spread < 1e-3
    assert [one.samples for one in found] == [200, 19, 19]


def test_noise_is_told_and_no_coefficient_is_negative() -> None:
    rng = Random(2)
    measured = [((1.0, float(n)), (0.05 - 1e-5 * n) * rng.lognormvariate(0.0, 0.1)) for n in range(1, 1000)]
    found = fit(measured, (0.01, 1e-3))
    assert found.coefficients[1] == 0.0
    assert found.spread == pytest.approx(0.1, abs=0.03)
    with pytest.raises(ValueError, match="nothing"):
        fit([], (1.0,))


def test_a_preset_says_the_median_of_what_was_measured() -> None:
    """The simulator's noise has median 1, so its mean pass is a little longer."""
    prefill = [((1.0, 100.0, 0.0), Random(i).lognormvariate(0.0, 0.3)) for i in range(2000)]
    steps, pulls = [((1.0, 1.0, 100.0), 0.02)] * 9, [((1.0, 1e6), 0.001)] * 9
    prior = CostPrior()
    costs = Costs(
        prefill=fit(prefill, prior.prefill),
        step=fit(steps, prior.decode),
        pull=fit(pulls, prior.transfer),
        message_s=0.001,
    )
    hardware = hardware_of(preset(costs), "measured")
    assert costs.prefill.spread == pytest.approx(0.3, abs=0.02)
    assert hardware.prefill_pass_s + 100 * hardware.prefill_token_s == pytest.approx(1.0, rel=0.03)
    assert hardware.link_s + 1e6 / hardware.link_bytes_per_s == pytest.approx(0.001, rel=0.01)


def test_prompts_are_alike_exactly_as_far_as_their_block_ids() -> None:
    one = prompt_of(TraceRequest(at_s=0.0, input_tokens=40, output_tokens=1, block_ids=(1, 2, 3)), 16, (0, 251))
    other = prompt_of(TraceRequest(at_s=0.0, input_tokens=48, output_tokens=1, block_ids=(1, 2, 4)), 16, (0, 251))
    assert (len(one), len(other)) == (40, 48)
    assert one[:32] == other[:32]
    assert one[32:40] != other[32:40]
    assert set(one) <= set(range(251))
