"""Pure: a conductor's machine from the names of its policies. The one place where a run's settings become a machine."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from conductor.admission import Admission, AdmissionPolicy, Baseline, Mode
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

ADMISSIONS: Mapping[str, Callable[[], AdmissionPolicy]] = {"baseline": Baseline}
"""By name."""

NO_ADMISSION = "none"
"""Everything is taken on."""


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
    policies: list[tuple[AdmissionPolicy, Mode]] = []
    if config.admission != NO_ADMISSION:
        policies.append((_named("admission", config.admission, ADMISSIONS)(), Mode.ENFORCE))
    settings = replace(
        config.conductor,
        slo=Slo(ttft_s=config.slo_ttft_s, tbt_s=config.slo_tbt_s),
        prior=hardware.prior(factors),
        placement=_named("placement", config.placement, PLACEMENTS),
        placement_seed=rng.getrandbits(32),
    )
    return ConductorMachine(
        config=settings,
        layout=Layout(block_size=hardware.block_tokens, block_bytes=hardware.block_bytes),
        conductor_id="simulated",
        fingerprint=fingerprint,
        admission=Admission(policies),
    )


def _named(key: str, name: str, known: Mapping[str, Make]) -> Make:
    if name not in known:
        names = ", ".join(sorted([*known, NO_ADMISSION] if key == "admission" else known))
        raise ConfigError(key=f"simulation.{key}", value=name, expected=f"one of {names}")
    return known[name]
