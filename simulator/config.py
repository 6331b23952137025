"""Pure: the settings of one simulated run, checked when built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from conductor.config import ConductorConfig
from halfmoon.errors import ConfigError
from kv_store.eviction_policies import POLICIES
from simulator.faults import Faults
from simulator.hardware_values import Hardware

NODES_MAX = 1024
"""As the conductor's."""

EVICTIONS = tuple(POLICIES)
"""Those that a node may be told to use."""

TERMS = ("prefill", "decode", "transfer", "read")
"""Of the cost model, each with a belief of its own."""

BELIEFS = (*TERMS, "queue")
"""What can be believed wrongly: the costs, and the books of a prefill worker's queue."""


@dataclass(frozen=True, kw_only=True)
class SimConfig:
    """One run. Durations in seconds.

    Args:
        hardware: of every node.
        prefill, decode, coupled: how many nodes of each role.
        seed: of everything random: jitter, noise, beliefs, faults, policies that draw.
        speedup: the trace's clock runs this much faster.
        jitter_s: arrivals are moved by up to this much of the trace's own time, later only. Mooncake's traces tick
            every 3 s: 3 spreads them evenly.
        output_factor: output lengths are multiplied by it.
        output_tokens_max: what every request asks for at most; 0: the longest output of the trace, at least 2,048.
            It is all that the conductor knows of an output's length: where one ends is a stop token of the engine's.
        outputs_told: each request asks for its own output's length instead, so that the conductor knows it.
        slo_ttft_s, slo_tbt_s: of every request.
        deadline_s: of every request.
        noise: standard deviation of the logarithm of true pass times.
        step_noise: of a decode worker's steps, where it is another; None: it is not.
        belief_bias: each cost term's prior is this share above or below the truth, by a draw of the seed.
        belief_factors: by term (one of TERMS): instead of that draw. And queue: the seconds that are booked on a
            prefill worker are read as so many times what they are.
        learn: False: the conductor is told of no measurement, so that its beliefs stay.
        macro: steps that change nothing are taken many at once.
        check: invariants after every event.
        placement, admission: names of policies, as simulator.policies knows them; the defaults are the product's.
        shadows: the other admission policies judge too, and are not obeyed; decisions are the same without them.
        eviction: which cached blocks leave first, on every node: one of EVICTIONS.
        conductor: the machine's own settings; its SLOs and prior are set from this.
        report_interval_s: between load reports; a node's own default is 0.25.
        faults: what goes wrong.

    Raises:
        ConfigError: naming the setting, its value and what was expected.
    """

    hardware: Hardware
    prefill: int = 8
    decode: int = 8
    coupled: int = 0
    seed: int = 1
    speedup: float = 1.0
    jitter_s: float = 3.0
    output_factor: float = 1.0
    output_tokens_max: int = 0
    outputs_told: bool = False
    slo_ttft_s: float | None = 30.0
    slo_tbt_s: float | None = 0.1
    deadline_s: float = 600.0
    noise: float = 0.05
    step_noise: float | None = None
    belief_bias: float = 0.2
    belief_factors: Mapping[str, float] = field(default_factory=dict)
    learn: bool = True
    macro: bool = True
    check: bool = False
    placement: str = "algorithm1"
    admission: str = "forecast"
    shadows: bool = True
    eviction: str = "lru"
    conductor: ConductorConfig = field(default_factory=ConductorConfig)
    report_interval_s: float = 0.5
    faults: Faults = field(default_factory=Faults)

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, float) and not math.isfinite(value):
                self._refuse(spec.name, "a finite number")
        for name in ("prefill", "decode", "coupled", "output_tokens_max", "jitter_s", "noise", "seed"):
            self._require(getattr(self, name) >= 0, name, "0 or more")
        for name in ("speedup", "output_factor", "deadline_s"):
            self._require(getattr(self, name) > 0, name, "above 0")
        self._require(self.step_noise is None or self.step_noise >= 0, "step_noise", "0 or more, or none")
        for name in ("slo_ttft_s", "slo_tbt_s"):
            value = getattr(self, name)
            self._require(value is None or value > 0, name, "seconds above 0, or none")
        self._require(0.01 <= self.report_interval_s <= 1.0, "report_interval_s", "seconds in [0.01, 1]")
        self._require(0.0 <= self.belief_bias < 1.0, "belief_bias", "a share in [0, 1)")
        self._require(self.prefill + self.decode + self.coupled <= NODES_MAX, "prefill", f"at most {NODES_MAX} nodes")
        paired = self.prefill > 0 and self.decode > 0
        self._require(
            paired or self.coupled > 0, "decode", "at least one prefill and one decode node, or a coupled one"
        )
        for term, factor in self.belief_factors.items():
            known = term in BELIEFS and factor > 0
            self._require(known, "belief_factors", f"factors above 0 of {', '.join(BELIEFS)}")
        self._require(self.eviction in EVICTIONS, "eviction", f"one of {', '.join(EVICTIONS)}")
        if self.faults.slow_tier and not self._tiered:
            expected = "0 where no node has a DRAM tier: nothing would slow down (a800-llama-70b-dram has one)"
            raise ConfigError(key="faults.slow_tier", value=self.faults.slow_tier, expected=expected)

    @property
    def _tiered(self) -> bool:
        """Some node has a DRAM tier."""
        hardware = self.hardware
        prefills, decodes = self.prefill + self.coupled, self.decode
        return bool((prefills and hardware.prefill_dram_blocks) or (decodes and hardware.decode_dram_blocks))

    def _require(self, ok: bool, name: str, expected: str) -> None:
        if not ok:
            self._refuse(name, expected)

    def _refuse(self, name: str, expected: str) -> None:
        raise ConfigError(key=f"simulation.{name}", value=getattr(self, name), expected=expected)
