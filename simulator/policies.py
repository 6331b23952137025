"""Pure: a conductor's machine from the names of its policies. The one place where a run's settings become a machine."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from conductor.admission_policies import ALL_NAMES, admission_named
from conductor.config import PlacementName
from conductor.desk import Layout
from conductor.effects import Slo
from conductor.machine import ConductorMachine
from halfmoon.blocks import Fingerprint
from halfmoon.errors import ConfigError
from simulator.config import SimConfig

Make = TypeVar("Make")

PLACEMENTS = {name.value: name for name in PlacementName}
"""By name."""

ADMISSIONS = {name: name for name in ALL_NAMES}


def make_conductor(
    config: SimConfig, fingerprint: Fingerprint, factors: Mapping[str, float], rng: random.Random
) -> ConductorMachine:
    """A conductor that knows nothing but its prior.

    Args:
        factors: of the prior, by term.
        rng: seeds its placement policy.

    Raises:
        ConfigError: an unknown policy.
    """
    hardware = config.hardware
    settings = replace(
        config.conductor,
        slo=Slo(ttft_s=config.slo_ttft_s, tbt_s=config.slo_tbt_s),
        prior=hardware.prior(factors),
        admission=admission_named(_named("admission", config.admission, ADMISSIONS), config.conductor.admission),
        placement=_named("placement", config.placement, PLACEMENTS),
        placement_seed=rng.getrandbits(32),
    )
    return ConductorMachine(
        config=settings,
        layout=Layout(block_size=hardware.block_tokens, block_bytes=hardware.block_bytes),
        conductor_id="simulated",
        fingerprint=fingerprint,
    )


def _named(key: str, name: str, known: Mapping[str, Make]) -> Make:
    if name not in known:
        raise ConfigError(key=f"simulation.{key}", value=name, expected=f"one of {', '.join(sorted(known))}")
    return known[name]
