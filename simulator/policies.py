"""Pure: a conductor's machine from the names of its policies. The one place where a run's settings become a machine."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from conductor.admission_config import Mode
from conductor.admission_policies import ALL_NAMES, admission_named
from conductor.config import PlacementName
from conductor.desk import Layout
from conductor.effects import Slo
from conductor.machine import ConductorMachine
from conductor.taped import TapedMachine, Write
from conductor.view import Worker
from core.cost import WorkerCost
from core.messages import NodeInfo
from halfmoon.blocks import Fingerprint
from halfmoon.errors import ConfigError
from simulator.config import SimConfig

Make = TypeVar("Make")

PLACEMENTS = {name.value: name for name in PlacementName}
"""By name."""

ADMISSIONS = {name: name for name in ALL_NAMES}


class Misbooked(Worker):
    """A worker whose queue is read as so many times what is booked: a fault of the machine, that no cost explains."""

    def __init__(self, info: NodeInfo, cost: WorkerCost, now_s: float, *, factor: float) -> None:
        super().__init__(info, cost, now_s)
        self._factor = factor

    def queue_s(self, now_s: float) -> float:
        return self._factor * super().queue_s(now_s)


def make_conductor(
    config: SimConfig,
    fingerprint: Fingerprint,
    factors: Mapping[str, float],
    rng: random.Random,
    *,
    write: Write | None = None,
    version: str = "",
) -> ConductorMachine:
    """A conductor that knows nothing but its prior.

    Args:
        factors: of the prior, by term, and of the queue's books.
        rng: seeds its placement policy.
        write: where the lines of its recording go; None: there is none. version: of the program, for its header.

    Raises:
        ConfigError: an unknown policy.
    """
    hardware, others = config.hardware, Mode.SHADOW if config.shadows else Mode.OFF
    settings = replace(
        config.conductor,
        slo=Slo(ttft_s=config.slo_ttft_s, tbt_s=config.slo_tbt_s),
        prior=hardware.prior(factors),
        admission=admission_named(
            _named("admission", config.admission, ADMISSIONS), config.conductor.admission, others
        ),
        placement=_named("placement", config.placement, PLACEMENTS),
        placement_seed=rng.getrandbits(32),
    )
    queue = factors.get("queue", 1.0)
    common: dict[str, Any] = {
        "config": settings,
        "layout": Layout(block_size=hardware.block_tokens, block_bytes=hardware.block_bytes),
        "conductor_id": "simulated",
        "fingerprint": fingerprint,
        "make_worker": Worker if queue == 1.0 else partial(Misbooked, factor=queue),
    }
    return ConductorMachine(**common) if write is None else TapedMachine(**common, write=write, version=version)


def _named(key: str, name: str, known: Mapping[str, Make]) -> Make:
    if name not in known:
        raise ConfigError(key=f"simulation.{key}", value=name, expected=f"one of {', '.join(sorted(known))}")
    return known[name]
