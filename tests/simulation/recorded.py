"""Recorded runs of a simulated cluster in which one cost is believed to be ten times what it is."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from conductor.admission import Admission, Case, Verdict
from conductor.admission_config import AdmissionConfig, Mode, Reserve
from conductor.admission_policies import Baseline, Early, Forecast, Predictive
from conductor.config import ConductorConfig, Fit
from conductor.desk import Layout
from conductor.effects import Effect, RequestSpec, Slo
from conductor.machine import ConductorMachine
from conductor.taped import TapedMachine
from conductor.view import Worker
from halfmoon.blocks import Fingerprint
from report.records import Run
from simulator.config import SimConfig
from simulator.policies import Misbooked
from simulator.presets import load_hardware
from simulator.run import simulate
from workload.trace import Trace, TraceRequest

OVER = 10.0
OVERBOOKED = partial(Misbooked, factor=OVER)
GROUPS = 24
ALL_PROBES: dict[str, Any] = {"probe_s": 0.0, "probe_one_in": 1}
"""Whoever finds an idle worker is let in: a wrong cost refuses only so many that enough are served to judge it by."""

BASELINE = AdmissionConfig(
    baseline=Mode.ENFORCE, early=Mode.OFF, forecast=Mode.OFF, reserve=Reserve.WITH, defer=False, **ALL_PROBES
)
EARLY = AdmissionConfig(
    baseline=Mode.OFF, early=Mode.ENFORCE, forecast=Mode.OFF, reserve=Reserve.AFTER, defer=False, **ALL_PROBES
)


class Letting(Admission):
    """Lets those in that come without limits, wherever room may be short."""

    def __init__(self, config: AdmissionConfig) -> None:
        known = (("baseline", Baseline()), ("early", Early()), ("predictive", Predictive()), ("forecast", Forecast()))
        super().__init__([(policy, getattr(config, name)) for name, policy in known], config)

    def judge(self, case: Case) -> tuple[Verdict, ...]:
        verdicts = super().judge(case)
        return tuple(replace(v, accept=True) for v in verdicts) if case.slo == Slo() else verdicts


class Lenient(TapedMachine):
    """Takes on the requests of `take`, whatever its policies say: they come without limits."""

    take: frozenset[str] = frozenset()

    def on_request(self, spec: RequestSpec, now_s: float) -> list[Effect]:
        return super().on_request(replace(spec, slo=Slo()) if spec.request_id in self.take else spec, now_s)


def trace(count: int, rate: float, seed: int = 1) -> Trace:
    """Prompts of 2,000 to 9,000 tokens that share prefixes in groups, and come at random."""
    rng = random.Random(seed)
    at_s, requests, fresh = 0.0, [], 1_000_000
    lengths = [rng.randint(3, 10) for _ in range(GROUPS)]
    for _ in range(count):
        at_s += rng.expovariate(rate)
        group = min(GROUPS - 1, int(rng.expovariate(0.2)))
        shared = [1000 * (group + 1) + i for i in range(lengths[group])]
        own = list(range(fresh, fresh := fresh + rng.randint(1, 7)))
        ids = (*shared, *own)
        tokens = 512 * len(ids) - rng.randrange(512)
        requests.append(TraceRequest(at_s=at_s, input_tokens=tokens, output_tokens=rng.randint(40, 120), block_ids=ids))
    return Trace(source="groups", block_tokens=512, requests=tuple(requests))


def recorded(
    wrong: str,
    *,
    count: int = 400,
    rate: float = 6.0,
    take: frozenset[str] = frozenset(),
    admission: AdmissionConfig = BASELINE,
    decode_blocks: int = 0,
    **settings: Any,
) -> tuple[list[str], Run]:
    """The lines of a recorded run, and what really happened.

    Args:
        wrong: the cost that is over-estimated: prefill, transfer, decode, queue; empty: none.
        take: requests that are taken on whatever admission says.
        decode_blocks: of a decode worker's pool; 0: the preset's.
    """
    lines: list[str] = []

    def write(line: str) -> bool:
        lines.append(line + "\n")
        return True

    def make(
        config: SimConfig, fingerprint: Fingerprint, factors: Mapping[str, float], rng: random.Random
    ) -> ConductorMachine:
        hardware = config.hardware
        slo = Slo(ttft_s=config.slo_ttft_s, tbt_s=config.slo_tbt_s)
        prior = hardware.prior({wrong: OVER} if wrong in ("prefill", "transfer", "decode") else {})
        machine = Lenient(
            write=write,
            version="0.1.0",
            config=replace(config.conductor, slo=slo, prior=prior, admission=admission),
            layout=Layout(block_size=hardware.block_tokens, block_bytes=hardware.block_bytes),
            conductor_id="simulated",
            fingerprint=fingerprint,
            admission=Letting(admission),
            make_worker=OVERBOOKED if wrong == "queue" else Worker,
        )
        machine.take = take
        return machine

    given: dict[str, Any] = {
        "prefill": 4,
        "decode": 3,
        "slo_ttft_s": 3.0,
        "slo_tbt_s": 0.1,
        "jitter_s": 0.0,
        **settings,
    }
    hardware = load_hardware("a800-llama-70b")
    config = SimConfig(
        hardware=replace(hardware, decode_blocks=decode_blocks or hardware.decode_blocks),
        belief_bias=0.0,
        conductor=ConductorConfig(fit=Fit.FROZEN, records_max=100_000),
        **given,
    )
    return lines, simulate(trace(count, rate), config, conductor=make)
