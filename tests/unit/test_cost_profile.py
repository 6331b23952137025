"""What workers cost is kept in a file: what one conductor has learned, the next one believes from the start."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from conductor.config import ConductorConfig
from conductor.cost_profile import with_profile, write_profile
from conductor.frontend_metrics import Costs
from core.cost import CostPrior
from core.messages import PassSample
from halfmoon.errors import ConfigError
from tests.conductor_kit import Play, prompt, spec


def taught() -> Play:
    """p0 takes 5 ms a pass and 2 ms a token."""
    play = Play("p0 d0")
    passes = [
        PassSample(new_tokens=n, context_tokens=0, batch=0, kv_tokens=0, seconds=0.005 + 0.002 * n)
        for n in (1, 2, 5, 10, 40, 100, 200, 300, 400, 512)
    ]
    play.load("p0", passes=(*passes, PassSample(new_tokens=1, context_tokens=0, batch=0, kv_tokens=0, seconds=-1.0)))
    return play


def test_the_next_conductor_knows_what_the_last_one_learned(tmp_path: Path) -> None:
    path = tmp_path / "costs.yaml"
    assert with_profile(ConductorConfig(), path) == ConductorConfig()
    write_profile(path, taught().machine.learned_costs())
    config = with_profile(ConductorConfig(), path)
    assert list(config.priors) == ["prefill"]  # nothing was measured of decode workers
    play = Play("p0 d0", priors=config.priors)
    play.request(spec("r", tokens=prompt(101)))
    record = play.machine.explain(spec("r").request_id)
    assert record is not None
    assert record.choices[0].ttft_s == pytest.approx(0.005 + 0.002 * 101, rel=0.01)
    assert not record.choices[0].in_range  # it was another worker's


def test_what_stands_in_the_config_overrules_the_file(tmp_path: Path) -> None:
    path = tmp_path / "costs.yaml"
    write_profile(path, {"prefill": CostPrior(), "decode": CostPrior()})
    own = CostPrior(decode=(1.0, 1.0, 1.0))
    config = with_profile(ConductorConfig(priors={"decode": own}), path)
    assert config.priors == {"prefill": CostPrior(), "decode": own}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("prefill: {prefill: [0.01, -1.0, 1.0e-7]}", "profile.prefill.prefill"),
        ("prefill: {speed: 3}", "profile.prefill.speed"),
        ("trainer: {}", "priors.trainer"),
        ("[1, 2]", "--config"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_by_key(tmp_path: Path, text: str, key: str) -> None:
    path = tmp_path / "costs.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refusal:
        with_profile(ConductorConfig(), path)
    assert refusal.value.key.endswith(key)


def test_residuals_are_on_the_metrics_page() -> None:
    registry = CollectorRegistry()
    registry.register(Costs(taught().machine.residuals))
    page = generate_latest(registry).decode()
    assert 'halfmoon_cost_samples_total{model="prefill",node="p0"} 10.0' in page
    assert 'halfmoon_cost_samples_refused_total{model="prefill",node="p0"} 1.0' in page
    assert 'halfmoon_cost_level_changes_total{model="decode",node="d0"} 0.0' in page
    begins = 'halfmoon_cost_error_ratio{model="prefill",node="p0"}'
    error = next(line for line in page.splitlines() if line.startswith(begins))
    assert 0.0 < float(error.split()[-1]) < 1.0
