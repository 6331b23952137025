"""Pure: a conductor's machine from the names of its policies. The one place where a run's settings become a machine."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace

from conductor.admission import Admission, AdmissionPolicy, Baseline, Mode
from conductor.desk import Layout
from conductor.effects import Slo
from conductor.machine import ConductorMachine
from conductor.policy import LeastTtft, PlacementPolicy
from halfmoon.blocks import Fingerprint
from halfmoon.errors import ConfigError
from simulator.config import SimConfig

PLACEMENTS: Mapping[str, Callable[[random.Random], PlacementPolicy]] = {"least_ttft": lambda rng: LeastTtft()}
"""By name; each may draw from the generator that it is given."""

ADMISSIONS: Mapping[str, Callable[[], AdmissionPolicy]] = {"baseline": Baseline}
"""By name. "none" is no policy: everything is taken on."""


def make_conductor(
    config: SimConfig, fingerprint: Fingerprint, factors: Mapping[str, float], rng: random.Random
) -> ConductorMachine:
    """A conductor that knows nothing but its prior.

    Args:
        factors: of the prior, by term.
        rng: of its placement policy.

    Raises:
        ConfigError: an unknown policy.
    """
    hardware = config.hardware
    placement = _named("placement", config.placement, PLACEMENTS)
    policies = []
    if config.admission != "none":
        policies.append((_named("admission", config.admission, {**ADMISSIONS, "none": Baseline})(), Mode.ENFORCE))
    settings = replace(
        config.conductor,
        slo=Slo(ttft_s=config.slo_ttft_s, tbt_s=config.slo_tbt_s),
        prior=hardware.prior(factors),
    )
    return ConductorMachine(
        config=settings,
        layout=Layout(block_size=hardware.block_tokens, block_bytes=hardware.block_bytes),
        conductor_id="simulated",
        fingerprint=fingerprint,
        policy=placement(rng),
        admission=Admission(policies),
    )


def _named(key: str, name: str, known: Mapping[str, Callable[..., object]]) -> Callable[..., object]:
    if name not in known:
        raise ConfigError(key=f"simulation.{key}", value=name, expected=f"one of {', '.join(sorted(known))}")
    return known[name]
