"""Shell: admission under overload on a real trace, in simulation: what is refused, what is wasted, what is served.

    python -m benchmarks.overload [--seeds 10] [--speedups 1,2,3] [--policies baseline,early,predictive,forecast]

*Decode-bound*: 8 prefill and 2 decode nodes of the paper's kind, room for 400,000 tokens of KV a decode node, output
lengths three times the trace's, arrivals jittered over their ticks, limits of 30 s to the first token and 0.1 s between
tokens (a request's mean over its worst tenth of gaps). The preprint's Table 3 does not publish its decode limits; these
are ours. Costs are believed 20 % off at first, and learned. Figures are means over the seeds.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import click
from rich import box
from rich.table import Table

from benchmarks.record import save
from benchmarks.simulations import console, run_cases
from conductor.admission_policies import NAMES
from halfmoon.errors import ConfigError
from report.statistics import Statistics
from report.statistics import statistics as figures_of
from simulator.config import SimConfig
from simulator.presets import load_hardware
from simulator.run import simulate
from workload.files import CONVERSATION, read_trace
from workload.transforms import TICK_S

HARDWARE = "a800-llama-70b"
DECODE_TOKENS = 400_000
POLICIES = ("baseline", "early", "predictive", "forecast")


@dataclass(frozen=True, kw_only=True)
class Case:
    policy: str
    speedup: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Of one run: `report.statistics` says what each is. `accepted`: by quintile of prompt length, shortest first."""

    rejected_arrival: int
    rejected_decode: int
    rejected_other: int
    effective: int
    served_mtokens: float
    prefill_s: float
    wasted_s: float
    swing_ktokens: float
    correlation: float
    accepted: tuple[float, ...]
    effective_by_length: tuple[float, ...]


def run_case(case: Case, progress: Callable[[float], None]) -> Seen:
    hardware = load_hardware(HARDWARE)
    config = SimConfig(
        hardware=replace(hardware, decode_blocks=DECODE_TOKENS // hardware.block_tokens),
        prefill=8,
        decode=2,
        admission=case.policy,
        seed=case.seed,
        speedup=case.speedup,
        jitter_s=TICK_S,
        output_factor=3.0,
    )
    trace = read_trace(CONVERSATION)
    return seen(figures_of(simulate(trace, config, on_progress=lambda n: progress(n / len(trace.requests)))))


def seen(found: Statistics) -> Seen:
    stages = {stage: sum(r.count for r in found.rejections if r.stage == stage) for stage in ("arrival", "decode")}
    assert found.oscillation is not None, "a run of an hour has samples"
    return Seen(
        rejected_arrival=stages["arrival"],
        rejected_decode=stages["decode"],
        rejected_other=found.rejected - sum(stages.values()),
        effective=found.effective,
        served_mtokens=found.served_kv_tokens / 1e6,
        prefill_s=found.prefill_s,
        wasted_s=found.wasted_prefill_s,
        swing_ktokens=found.oscillation.kv_tokens_std / 1e3,
        correlation=found.oscillation.correlation or 0.0,
        accepted=tuple(q.accepted for q in found.quintiles),
        effective_by_length=tuple(q.effective for q in found.quintiles),
    )


COLUMNS: tuple[tuple[str, Callable[[Seen], float], str], ...] = (
    ("rejected on arrival", lambda s: s.rejected_arrival, ",.0f"),
    ("after prefill", lambda s: s.rejected_decode, ",.0f"),
    ("between", lambda s: s.rejected_other, ",.0f"),
    ("within limits", lambda s: s.effective, ",.0f"),
    ("served Mtokens", lambda s: s.served_mtokens, ".1f"),
    ("prefill s", lambda s: s.prefill_s, ",.0f"),
    ("wasted s", lambda s: s.wasted_s, ",.0f"),
    ("swing ktokens", lambda s: s.swing_ktokens, ".0f"),
    ("correlation", lambda s: s.correlation, "+.2f"),
)


def show(found: dict[Case, Seen]) -> None:
    for speedup in dict.fromkeys(case.speedup for case in found):
        table = Table(box=box.SIMPLE_HEAD, title=f"decode-bound, {speedup:g}x: {CONVERSATION} on 8P+2D")
        shares = Table(box=box.SIMPLE_HEAD, title="accepted (and within limits), % by fifth of prompt length")
        table.add_column("policy")
        shares.add_column("policy")
        for name, _, _ in COLUMNS:
            table.add_column(name, justify="right")
        for name in ("shortest", "2nd", "3rd", "4th", "longest"):
            shares.add_column(name, justify="right")
        for policy in dict.fromkeys(case.policy for case in found):
            runs = [s for c, s in found.items() if (c.policy, c.speedup) == (policy, speedup)]
            table.add_row(policy, *(format(statistics.fmean(map(of, runs)), spec) for _, of, spec in COLUMNS))
            fifths = zip(_means([s.accepted for s in runs]), _means([s.effective_by_length for s in runs]), strict=True)
            shares.add_row(policy, *(f"{100 * taken:.0f} ({100 * good:.0f})" for taken, good in fifths))
        console.print(table)
        console.print(shares)


def _means(rows: list[tuple[float, ...]]) -> list[float]:
    return [statistics.fmean(column) for column in zip(*rows, strict=True)]


@click.command()
@click.option("--seeds", default=10, show_default=True)
@click.option("--speedups", default="1,2,3", show_default=True)
@click.option("--policies", default=",".join(POLICIES), show_default=True)
def main(seeds: int, speedups: str, policies: str) -> None:
    """What the admission policies refuse, waste and serve where decode room is short."""
    named = policies.split(",")
    unknown = sorted(set(named) - set(NAMES))
    if unknown:
        raise ConfigError(key="policies", value=unknown[0], expected=f"one of {', '.join(NAMES)}")
    todo = [
        Case(policy=policy, speedup=float(speedup), seed=seed)
        for speedup in speedups.split(",")
        for seed in range(1, seeds + 1)
        for policy in named
    ]
    found = run_cases(run_case, todo, lambda case: f"{case.policy}, {case.speedup:g}x, seed {case.seed}")
    show(found)
    rows = [asdict(case) | asdict(result) for case, result in found.items()]
    console.print(f"raw: {save('overload', {'command': sys.argv[1:], 'hardware': HARDWARE, 'runs': rows})}")


if __name__ == "__main__":
    main()
