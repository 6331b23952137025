"""Shell: admission under overload on a real trace, in simulation: what is refused, what is wasted, what is served.

    python -m benchmarks.overload [--case decode-bound] [--seeds 10] [--speedups 1,2,3]
                                  [--policies baseline,early,early+defer,predictive,forecast] [--requests N]
    python -m benchmarks.overload --find-balanced [--seeds 2]

*Decode-bound*: 8 prefill and 2 decode nodes of the paper's kind, room for 400,000 tokens of KV a decode node, output
lengths three times the trace's, arrivals jittered over their ticks, limits of 30 s to the first token and 0.1 s between
tokens (a request's mean over its worst tenth of gaps). The preprint's Table 3 does not publish its decode limits; these
are ours. *Balanced*: the same with the smallest decode pool at which `baseline` wastes 5 to 10 % of its prefill seconds
on requests that it then rejects, at twice the speed; `--find-balanced` shows what it wastes on pools of different size.
(What it wastes on late and slow ones no decode pool takes away: at that speed 8 prefill nodes are too few.) Costs are
believed 20 % off at first, and learned. Figures are means over the seeds, with their standard deviation.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import click
from rich import box
from rich.table import Table

from benchmarks.record import save
from benchmarks.simulations import console, run_cases
from conductor.admission_policies import NAMES
from halfmoon.errors import ConfigError
from halfmoon.types import Outcome
from report.false_rejections import false_rejections
from report.records import Run
from report.statistics import statistics as figures_of
from simulator.config import SimConfig
from simulator.presets import load_hardware
from simulator.run import simulate
from workload.files import CONVERSATION, read_trace
from workload.trace import Trace
from workload.transforms import TICK_S

HARDWARE = "a800-llama-70b"
POLICIES = ("baseline", "early", "early+defer", "predictive", "forecast")
OUTPUT_FACTOR = 3.0


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Decode nodes, and room for tokens of KV on each."""

    nodes: int
    tokens: int

    def __str__(self) -> str:
        return f"8P+{self.nodes}D, {self.tokens:,} tokens a decode node"


POOLS = {"decode-bound": Pool(nodes=2, tokens=400_000), "balanced": Pool(nodes=6, tokens=400_000)}
TRIED = tuple(Pool(nodes=nodes, tokens=400_000) for nodes in (4, 5, 6, 7, 8))
WASTED_SOUGHT = 0.05, 0.10


@dataclass(frozen=True, kw_only=True)
class Case:
    """`requests`: of the trace's first ones; 0: all."""

    pool: Pool
    policy: str
    speedup: float
    seed: int
    requests: int


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Of one run: `report.statistics` says what each is.

    Args:
        rejected_s: prefill seconds of requests that were rejected after all, a part of `wasted_s`.
        accepted: by quintile of prompt length, shortest first.
    """

    rejected_arrival: int
    rejected_prefill: int
    rejected_decode: int
    effective: int
    effective_per_s: float
    ttft_p50_s: float
    served_mtokens: float
    prefill_s: float
    wasted_s: float
    rejected_s: float
    swing_ktokens: float
    filled_s: float
    filled_swing_ktokens: float
    correlation: float
    false_rejections: int
    reckoned_right: float
    accepted: tuple[float, ...]
    effective_by_length: tuple[float, ...]


def config_of(case: Case) -> SimConfig:
    return SimConfig(
        hardware=load_hardware(HARDWARE).with_decode_room(case.pool.tokens),
        prefill=8,
        decode=case.pool.nodes,
        admission=case.policy,
        shadows=False,
        seed=case.seed,
        speedup=case.speedup,
        jitter_s=TICK_S,
        output_factor=OUTPUT_FACTOR,
    )


def run_case(case: Case, progress: Callable[[float], None]) -> Seen:
    config, trace = config_of(case), read_trace(CONVERSATION)
    trace = replace(trace, requests=trace.requests[: case.requests or None])
    run = simulate(trace, config, on_progress=lambda n: progress(n / len(trace.requests)))
    return seen(run, trace, config.hardware.block_tokens)


def seen(run: Run, trace: Trace, block_tokens: int) -> Seen:
    found = figures_of(run)
    outputs = {f"r{i}": max(1, round(r.output_tokens * OUTPUT_FACTOR)) for i, r in enumerate(trace.requests)}
    false = false_rejections(run, outputs, block_tokens)
    stages = {s: sum(r.count for r in found.rejections if r.stage == s) for s in ("arrival", "prefill", "decode")}
    swing = found.oscillation
    assert swing is not None, "a run of minutes has samples"
    assert false is not None, "somebody was served"
    assert found.ttft is not None
    return Seen(
        rejected_arrival=stages["arrival"],
        rejected_prefill=stages["prefill"],
        rejected_decode=stages["decode"],
        effective=found.effective,
        effective_per_s=found.effective_per_s or 0.0,
        ttft_p50_s=found.ttft.p50,
        served_mtokens=found.served_kv_tokens / 1e6,
        prefill_s=found.prefill_s,
        wasted_s=found.wasted_prefill_s,
        rejected_s=sum(row.prefill_s for row in run.requests if row.outcome is Outcome.REJECTED),
        swing_ktokens=swing.kv_tokens_std / 1e3,
        filled_s=swing.filled_s,
        filled_swing_ktokens=swing.filled_std / 1e3,
        correlation=swing.correlation or 0.0,
        false_rejections=false.false_rejections,
        reckoned_right=false.right / max(1, false.checked),
        accepted=tuple(q.accepted for q in found.quintiles),
        effective_by_length=tuple(q.effective for q in found.quintiles),
    )


Column = tuple[str, Callable[[Seen], float], str]
REFUSED: tuple[Column, ...] = (
    ("rejected on arrival", lambda s: s.rejected_arrival, ",.0f"),
    ("during prefill", lambda s: s.rejected_prefill, ",.0f"),
    ("after prefill", lambda s: s.rejected_decode, ",.0f"),
    ("false rejections", lambda s: s.false_rejections, ",.0f"),
    ("reckoned right, %", lambda s: 100 * s.reckoned_right, ".0f"),
    ("prefill s", lambda s: s.prefill_s, ",.0f"),
    ("wasted s", lambda s: s.wasted_s, ",.0f"),
    ("of rejected ones", lambda s: s.rejected_s, ",.0f"),
)
SERVED: tuple[Column, ...] = (
    ("within limits", lambda s: s.effective, ",.0f"),
    ("a second", lambda s: s.effective_per_s, ".2f"),
    ("TTFT p50, s", lambda s: s.ttft_p50_s, ".2f"),
    ("served Mtokens", lambda s: s.served_mtokens, ".2f"),
    ("oscillation, ktokens", lambda s: s.swing_ktokens, ".1f"),
    ("filled after s", lambda s: s.filled_s, ".0f"),
    ("oscillation once filled", lambda s: s.filled_swing_ktokens, ".1f"),
    ("correlation", lambda s: s.correlation, "+.2f"),
)
FIFTHS = ("shortest", "2nd", "3rd", "4th", "longest")


def _by_length(of: Callable[[Seen], tuple[float, ...]]) -> tuple[Column, ...]:
    return tuple((name, lambda s, i=i: 100 * of(s)[i], ".1f") for i, name in enumerate(FIFTHS))


TABLES = (
    ("refused and wasted", REFUSED),
    ("served, and how the decode pool swings", SERVED),
    ("accepted, % by fifth of prompt length", _by_length(lambda s: s.accepted)),
    ("within both limits, % by fifth of prompt length", _by_length(lambda s: s.effective_by_length)),
)


def show(name: str, found: dict[Case, Seen]) -> None:
    for speedup in dict.fromkeys(case.speedup for case in found):
        for title, columns in TABLES:
            table = Table(box=box.SIMPLE_HEAD, title=f"{name}, {speedup:g}x: {title}")
            table.add_column("policy")
            for column, _, _ in columns:
                table.add_column(column, justify="right")
            for policy in dict.fromkeys(case.policy for case in found):
                runs = [s for c, s in found.items() if (c.policy, c.speedup) == (policy, speedup)]
                table.add_row(policy, *(_mean(list(map(of, runs)), spec) for _, of, spec in columns))
            console.print(table)


GOALS = ("wasted, of baseline's", "served, of early's", "oscillation, of early's", "once filled", *FIFTHS)


def show_goals(name: str, found: dict[Case, Seen]) -> None:
    """`forecast` against what is asked of it, by the means; the fifths: points of acceptance, less `baseline`'s."""
    table = Table(box=box.SIMPLE_HEAD, title=f"{name}: forecast against the goals (0.1, 1, 0.5, 0.5, and 0 or more)")
    for column in ("speed", *GOALS):
        table.add_column(column, justify="right")
    for speedup in dict.fromkeys(case.speedup for case in found):
        ours, baseline, early = (
            [s for c, s in found.items() if (c.policy, c.speedup) == (policy, speedup)]
            for policy in ("forecast", "baseline", "early")
        )
        if ours and baseline and early:
            table.add_row(
                f"{speedup:g}x",
                f"{_ratio(ours, baseline, lambda s: s.wasted_s):.3f}",
                f"{_ratio(ours, early, lambda s: s.served_mtokens):.3f}",
                f"{_ratio(ours, early, lambda s: s.swing_ktokens):.2f}",
                f"{_ratio(ours, early, lambda s: s.filled_swing_ktokens):.2f}",
                *(
                    f"{statistics.fmean(map(of, ours)) - statistics.fmean(map(of, baseline)):+.1f}"
                    for _, of, _ in _by_length(lambda s: s.accepted)
                ),
            )
    if table.row_count:
        console.print(table)


def _ratio(ours: Sequence[Seen], others: Sequence[Seen], of: Callable[[Seen], float]) -> float:
    return statistics.fmean(map(of, ours)) / (statistics.fmean(map(of, others)) or math.inf)


def _mean(values: list[float], spec: str) -> str:
    """With the standard deviation over the seeds, where there are several."""
    mean = format(statistics.fmean(values), spec)
    return f"{mean} ± {format(statistics.stdev(values), spec.lstrip('+'))}" if len(values) > 1 else mean


def show_pools(found: dict[Case, Seen]) -> None:
    """Which pool is *balanced*."""
    table = Table(box=box.SIMPLE_HEAD, title="what baseline wastes at 2x, by decode pool")
    for name in ("pool", "rejected", "prefill s", "wasted s", "of rejected ones", "these, %"):
        table.add_column(name, justify="left" if name == "pool" else "right")
    low, high = WASTED_SOUGHT
    for pool in dict.fromkeys(case.pool for case in found):
        runs = [s for case, s in found.items() if case.pool == pool]
        shares = [s.rejected_s / s.prefill_s for s in runs]
        table.add_row(
            f"{pool}{' (sought)' if low <= statistics.fmean(shares) <= high else ''}",
            _mean([float(s.rejected_arrival + s.rejected_prefill + s.rejected_decode) for s in runs], ",.0f"),
            _mean([s.prefill_s for s in runs], ",.0f"),
            _mean([s.wasted_s for s in runs], ",.0f"),
            _mean([s.rejected_s for s in runs], ",.0f"),
            _mean([100 * share for share in shares], ".1f"),
        )
    console.print(table)


@click.command()
@click.option("--case", "name", type=click.Choice(list(POOLS)), default="decode-bound", show_default=True)
@click.option("--seeds", default=10, show_default=True)
@click.option("--speedups", default="1,2,3", show_default=True)
@click.option("--policies", default=",".join(POLICIES), show_default=True)
@click.option("--requests", default=0, help="Of the trace, only so many; 0: all.")
@click.option("--find-balanced", is_flag=True, help="What baseline wastes at 2x on pools of different size.")
def main(name: str, seeds: int, speedups: str, policies: str, requests: int, find_balanced: bool) -> None:
    """What the admission policies refuse, waste and serve where decode room is short."""
    named = policies.split(",")
    unknown = sorted(set(named) - set(NAMES))
    if unknown:
        raise ConfigError(key="policies", value=unknown[0], expected=f"one of {', '.join(NAMES)}")
    tried = [(pool, 2.0, "baseline") for pool in TRIED]
    asked = [(POOLS[name], float(speedup), policy) for speedup in speedups.split(",") for policy in named]
    todo = [
        Case(pool=pool, policy=policy, speedup=speedup, seed=seed, requests=requests)
        for pool, speedup, policy in (tried if find_balanced else asked)
        for seed in range(1, seeds + 1)
    ]
    found = run_cases(run_case, todo, lambda c: f"{c.policy}, {c.speedup:g}x, {c.pool.nodes}D, seed {c.seed}")
    if find_balanced:
        show_pools(found)
    else:
        show(f"{name} ({POOLS[name]})", found)
        show_goals(name, found)
    rows = [asdict(case) | asdict(result) for case, result in found.items()]
    kept = save(f"overload-{'pools' if find_balanced else name}", {"command": sys.argv[1:], "runs": rows})
    console.print(f"raw: {kept}")


if __name__ == "__main__":
    main()
