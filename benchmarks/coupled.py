"""Shell: prefill and decode on nodes of their own against both on every node: what rate keeps both limits, simulated.

    python -m benchmarks.coupled [--workloads chat,answers] [--seeds 3]

*Sustained rate*: the highest rate of arrivals at which 90 % of all requests finish within both limits: first token in
30 s (*answers*: 3 s), TBT, the mean of the worst tenth of gaps (FAST'25), within 0.1, 0.2 or 0.3 s. By bisection over
the trace's speed in steps of 8 %. Nothing is refused, so a run does not depend on the TBT limit, and one serves all
three. The same number of nodes of the paper's kind (simulator/hardware/a800-llama-70b.yaml) each time: every ratio of
prefill to decode nodes, and coupled ones at several chunk sizes. The best of each kind is searched with more seeds.

*chat*: the first requests of Mooncake's conversation trace. *answers*: short questions, long answers, made up here.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from random import Random

import click
from rich import box
from rich.table import Table

from benchmarks.capacity import bisected
from benchmarks.record import save
from benchmarks.simulations import console, run_cases
from halfmoon.errors import ConfigError
from report.records import RequestRow
from report.statistics import percentile
from simulator.config import SimConfig
from simulator.presets import load_hardware
from simulator.run import simulate
from workload.files import CONVERSATION, read_trace
from workload.synthetic import Profile, Spread, generate
from workload.trace import Trace
from workload.transforms import TICK_S, head

HARDWARE = "a800-llama-70b"
LIMITS_S = (0.1, 0.2, 0.3)
PREFILL_CHUNK = 2048
"""Of a prefill node's pass: its blocks can be pulled when it ends, so that its last one is what a second token waits
for. The preset's 8,192 are 2.6 GB, 0.2 s of the link."""
GOAL = 0.9
STEP = 1.08
NEAR = 2
"""Steps either side of what the first seed sustains in which the others are searched."""
PROBES = 8
"""Runs of one search, about: for the progress bar."""
ANSWERS = Profile(
    name="answers",
    rate_per_s=28.0,
    system_prompts=20,
    zipf=1.0,
    system_blocks=1,
    turns_mean=1.0,
    first=Spread(median=300, sigma=0.8),
    question=Spread(median=100, sigma=1.0),
    output=Spread(median=700, sigma=0.6, most=2_000),
    think_s=Spread(median=60, sigma=1.0),
)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests, and what serves them.

    Args:
        slo_ttft_s: a run of a minute or two hides overload from a limit that is not much shorter.
        ratios: prefill and decode nodes.
        speeds: exponents of STEP to search in.
    """

    requests: int
    slo_ttft_s: float
    nodes: int
    ratios: tuple[tuple[int, int], ...]
    chunks: tuple[int, ...]
    speeds: tuple[int, int]


WORKLOADS = {
    "chat": Workload(
        requests=1_000,
        slo_ttft_s=30.0,
        nodes=8,
        ratios=((4, 4), (5, 3), (6, 2), (7, 1)),
        chunks=(256, 512, 1024, 2048),
        speeds=(-8, 7),
    ),
    "answers": Workload(
        requests=1_800, slo_ttft_s=3.0, nodes=4, ratios=((1, 3), (2, 2)), chunks=(512, 2048), speeds=(-4, 4)
    ),
}


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """A cluster. `chunk`: tokens of one pass of whoever computes prompts. `link`: times the preset's speed.

    Weights are read behind a mixed pass's prompts (`hides`: Hardware.mixed_hides_weights), in favour of coupled nodes:
    a prefill pass of the preset does not pay for them either.
    """

    prefill: int = 0
    decode: int = 0
    coupled: int = 0
    chunk: int = PREFILL_CHUNK
    hides: bool = True
    link: float = 1.0

    def __str__(self) -> str:
        if self.coupled:
            return f"{self.coupled}C, chunks of {self.chunk:,}" + ("" if self.hides else ", weights besides")
        chunk = "" if self.chunk == PREFILL_CHUNK else f", passes of {self.chunk:,}"
        return f"{self.prefill}P+{self.decode}D{chunk}" + ("" if self.link == 1.0 else f", links x{self.link:g}")

    @property
    def usual(self) -> bool:
        """None of the assumptions is varied."""
        return self.hides and self.link == 1.0 and (self.coupled > 0 or self.chunk == PREFILL_CHUNK)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One search: for `limits`, the loosest first, between two speeds (exponents of STEP), beginning at a third."""

    workload: str
    nodes: Nodes
    seed: int = 1
    limits: tuple[float, ...] = LIMITS_S[::-1]
    low: int
    high: int
    first: int = 0

    def __str__(self) -> str:
        return f"{self.workload}, {self.nodes}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One run. `shares`: of all requests within both limits, by TBT limit. Bytes: between nodes."""

    speed: int
    shares: dict[float, float]
    ttft_p90_s: float
    tbt_p90_s: float
    finished: int
    gigabytes: float


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Of one search. `best`: by TBT limit, the highest speed at which the goal was met; low - 1: at none."""

    best: dict[float, int]
    rate_per_s: float  # of the trace at speed 1
    probes: tuple[Probe, ...]

    def at(self, speed: int) -> Probe:
        return next(probe for probe in self.probes if probe.speed == speed)


def trace_of(workload: str) -> Trace:
    requests = WORKLOADS[workload].requests
    if workload == "chat":
        return head(read_trace(CONVERSATION), requests)
    return generate(ANSWERS, requests, Random("answers"))


def config_of(case: Case, speed: int) -> SimConfig:
    """Chunks of several prompts share a coupled node's pass; at most half of its tokens are steps."""
    nodes, preset = case.nodes, load_hardware(HARDWARE)
    hardware = preset.scaled(link=nodes.link).with_chunk(nodes.chunk, coupled=nodes.coupled > 0)
    return SimConfig(
        hardware=replace(hardware, mixed_hides_weights=nodes.coupled > 0 and nodes.hides),
        prefill=nodes.prefill,
        decode=nodes.decode,
        coupled=nodes.coupled,
        admission="none",
        shadows=False,
        seed=case.seed,
        speedup=STEP**speed,
        jitter_s=TICK_S if case.workload == "chat" else 0.0,
        slo_ttft_s=WORKLOADS[case.workload].slo_ttft_s,
        slo_tbt_s=LIMITS_S[0],
    )


def run_case(case: Case, progress: Callable[[float], None]) -> Seen:
    trace, probes = trace_of(case.workload), dict[int, Probe]()

    def meets(limit_s: float, speed: int) -> bool:
        if speed not in probes:
            probes[speed] = _probe(trace, config_of(case, speed), speed)
            progress(min(0.99, len(probes) / PROBES))
        return probes[speed].shares[limit_s] >= GOAL

    best: dict[float, int] = {}
    high = case.high
    for limit_s in case.limits:  # what a tighter limit allows, a looser one does too
        first = min(case.first, high)
        best[limit_s] = bisected(partial(meets, limit_s), low=case.low, high=high, first=first)
        high = max(case.low, best[limit_s])
    arrivals = [request.at_s for request in trace.requests]
    rate_per_s = (len(arrivals) - 1) / (arrivals[-1] - arrivals[0])
    return Seen(best=best, rate_per_s=rate_per_s, probes=tuple(probes[k] for k in sorted(probes)))


def _probe(trace: Trace, config: SimConfig, speed: int) -> Probe:
    run = simulate(trace, config)
    rows = run.requests
    return Probe(
        speed=speed,
        shares={limit_s: effective_share(rows, limit_s) for limit_s in LIMITS_S},
        ttft_p90_s=percentile([row.ttft_s for row in rows if row.ttft_s is not None], 0.9),
        tbt_p90_s=percentile([row.tbt_worst_s for row in rows if row.tbt_worst_s is not None], 0.9),
        finished=sum(row.outcome.value == "finished" for row in rows),
        gigabytes=run.counters["bytes_pulled"] / 1e9,
    )


def effective_share(rows: Sequence[RequestRow], tbt_s: float) -> float:
    """As `effective` everywhere, by another TBT limit than the run's own."""
    return statistics.fmean(replace(row, slo_tbt_s=tbt_s).effective for row in rows)


def searches(name: str) -> list[Case]:
    """Every cluster with the first seed; then, for chat, what the assumptions are worth."""
    workload = WORKLOADS[name]
    clusters = [Nodes(prefill=p, decode=d) for p, d in workload.ratios]
    clusters += [Nodes(coupled=workload.nodes, chunk=chunk) for chunk in workload.chunks]
    if name == "chat":
        clusters += [Nodes(prefill=p, decode=d, link=8.0) for p, d in workload.ratios[-2:]]
        clusters += [Nodes(prefill=6, decode=2, chunk=8192)]
        clusters += [Nodes(coupled=workload.nodes, chunk=chunk, hides=False) for chunk in (256, 512)]
    low, high = workload.speeds
    return [Case(workload=name, nodes=nodes, low=low, high=high) for nodes in clusters]


def best_of(found: dict[Case, Seen], name: str, coupled: bool, limit_s: float) -> Case:
    """Of one kind with the usual assumptions; among equals, the larger share at that speed."""
    like = [c for c in found if c.workload == name and c.nodes.usual and bool(c.nodes.coupled) == coupled]

    def order(case: Case) -> tuple[int, float]:
        best = found[case].best[limit_s]
        return best, found[case].at(max(best, case.low)).shares[limit_s]

    return max(like, key=order)


def again(found: dict[Case, Seen], name: str, seeds: int) -> list[Case]:
    """The best of each kind at each limit, with the other seeds, near what the first one gave."""
    limits: dict[Case, list[float]] = {}
    for limit_s in LIMITS_S[::-1]:
        for coupled in (False, True):
            case = best_of(found, name, coupled, limit_s)
            if found[case].best[limit_s] >= case.low:
                limits.setdefault(case, []).append(limit_s)
    cases: list[Case] = []
    for case, wanted in limits.items():
        best = [found[case].best[limit_s] for limit_s in wanted]
        near = replace(case, limits=tuple(wanted), low=min(best) - NEAR, high=max(best) + NEAR, first=best[0])
        cases += [replace(near, seed=seed) for seed in range(2, seeds + 1)]
    return cases


def show(name: str, found: dict[Case, Seen], more: dict[Case, Seen]) -> None:
    workload, rate_per_s = WORKLOADS[name], next(s.rate_per_s for c, s in found.items() if c.workload == name)
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{name}, {workload.requests:,} requests: requests/s of which {GOAL:.0%} keep both limits",
    )
    table.add_column("nodes")
    for limit_s in LIMITS_S:
        table.add_column(f"TBT {1000 * limit_s:.0f} ms", justify="right")
    for column in (f"at {rate_per_s:.1f}/s: % kept", "TTFT p90 s", "TBT p90 ms"):
        table.add_column(column, justify="right")
    for case, seen in found.items():
        if case.workload == name:
            at_1 = seen.at(0)
            shares = " / ".join(f"{100 * at_1.shares[limit_s]:.0f}" for limit_s in LIMITS_S)
            shown = [_rate(case, seen, limit_s) for limit_s in LIMITS_S]
            table.add_row(str(case.nodes), *shown, shares, f"{at_1.ttft_p90_s:.1f}", f"{1000 * at_1.tbt_p90_s:.0f}")
    console.print(table)
    table = Table(box=box.SIMPLE_HEAD, title=f"{name}: the best of each kind, over the seeds")
    for column in ("TBT limit", "disaggregated", "requests/s", "coupled", "requests/s", "change"):
        table.add_column(column, justify="right")
    for limit_s in LIMITS_S:
        kinds = [best_of(found, name, coupled, limit_s) for coupled in (False, True)]
        rates = [_rates(case, found, more, limit_s) for case in kinds]
        change = f"{100 * (statistics.fmean(rates[0]) / statistics.fmean(rates[1]) - 1):+.0f} %" if all(rates) else ""
        cells = [cell for case, values in zip(kinds, rates, strict=True) for cell in (str(case.nodes), _spread(values))]
        table.add_row(f"{1000 * limit_s:.0f} ms", *cells, change)
    console.print(table)


def _rate(case: Case, seen: Seen, limit_s: float) -> str:
    best = seen.best[limit_s]
    if best < case.low:
        return f"< {seen.rate_per_s * STEP**case.low:.2f}"
    return f"{'>= ' if best == case.high else ''}{seen.rate_per_s * STEP**best:.2f}"


def _rates(case: Case, found: dict[Case, Seen], more: dict[Case, Seen], limit_s: float) -> list[float]:
    """Of every seed there is; none where the first one met the goal nowhere."""
    if found[case].best[limit_s] < case.low:
        return []
    runs = [(case, found[case])]
    runs += [
        (c, s) for c, s in more.items()
        if (c.workload, c.nodes) == (case.workload, case.nodes) and limit_s in c.limits
    ]  # fmt: skip
    return [s.rate_per_s * STEP ** s.best[limit_s] for _, s in runs]


def _spread(rates: list[float]) -> str:
    return f"{statistics.fmean(rates):.2f}, {min(rates):.2f}-{max(rates):.2f}" if rates else "none"


@click.command()
@click.option("--workloads", default=",".join(WORKLOADS), show_default=True)
@click.option("--seeds", default=3, show_default=True, help="Of the best of each kind; all else is seed 1.")
def main(workloads: str, seeds: int) -> None:
    """The rates that disaggregated and coupled clusters of equal size sustain."""
    names = workloads.split(",")
    for name in names:
        if name not in WORKLOADS:
            raise ConfigError(key="workloads", value=name, expected=f"some of {', '.join(WORKLOADS)}")
    found = run_cases(run_case, [case for name in names for case in searches(name)], str)
    more = run_cases(run_case, [case for name in names for case in again(found, name, seeds)], str)
    for name in names:
        show(name, found, more)
    rows = [asdict(case) | asdict(seen) for case, seen in (found | more).items()]
    console.print(f"raw: {save('coupled', {'command': sys.argv[1:], 'hardware': HARDWARE, 'runs': rows})}")


if __name__ == "__main__":
    main()
