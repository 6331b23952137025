"""Shell: the conductor's ways to place on a real trace, in simulation: mean TTFT, and what it hangs on.

    python -m benchmarks.placement [--seeds 3] [--speedup 1.0] [--policies …] [--no-sensitivity] [--requests 1500]
        [--only-links 0.25]

The conversation trace on 8 prefill and 8 decode nodes of the paper's kind (simulator/hardware/a800-llama-70b.yaml),
nothing refused, every policy of the product; then local-prefix and Algorithm 1 again with the compute and the links
slower and faster than that. What the conductor believes of costs begins 20 % off and is corrected by measurements, as
everywhere. Published for comparison: FAST'25, Figure 5 (16 nodes) and the preprint's Figure 8 (8P+8D).
"""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import click
from rich import box
from rich.table import Table

from benchmarks.record import save
from benchmarks.simulations import console, run_cases
from conductor.config import PlacementName
from halfmoon.errors import ConfigError
from halfmoon.types import Outcome
from simulator.config import SimConfig
from simulator.presets import load_hardware
from simulator.run import simulate
from workload.files import CONVERSATION, read_trace
from workload.transforms import TICK_S

POLICIES = ("random", "round_robin", "least_loaded", "local_prefix", "mooncake", "algorithm1")
PAIR = ("local_prefix", "algorithm1")
COMPUTE = (0.7, 1.0, 1.4)  # MFU 0.35, 0.5, 0.7
LINKS = (0.25, 1.0, 4.0)  # 3.1, 12.5, 50 GB/s
HARDWARE = "a800-llama-70b"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run. `compute`, `link`: multiples of the preset's speed. `requests`: the trace's first ones; 0: all."""

    placement: str
    seed: int
    speedup: float
    compute: float = 1.0
    link: float = 1.0
    requests: int = 0


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Of one run, over the requests that finished: TTFT, and prompt tokens found, here or on another node, as shares.

    Args:
        fetching: requests that a prefix was fetched for, as a share.
        prefill_s: seconds of prefill passes.
        attempts: of the requests that took most.
        not_finished: requests by reason.
    """

    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    hit_share: float
    remote_share: float
    fetching: float
    prefill_s: float
    finished: int
    attempts: int
    not_finished: dict[str, int]

    @property
    def finished_share(self) -> float:
        return self.finished / (self.finished + sum(self.not_finished.values()))


def run_case(case: Case, progress: Callable[[float], None]) -> Seen:
    preset = load_hardware(HARDWARE)
    hardware = replace(
        preset,
        prefill_token_s=preset.prefill_token_s / case.compute,
        prefill_pair_s=preset.prefill_pair_s / case.compute,
        link_bytes_per_s=preset.link_bytes_per_s * case.link,
    )
    config = SimConfig(
        hardware=hardware,
        placement=case.placement,
        admission="none",
        shadows=False,
        seed=case.seed,
        speedup=case.speedup,
        jitter_s=TICK_S,
        slo_ttft_s=None,
        slo_tbt_s=None,
        deadline_s=7200.0,
    )
    trace = read_trace(CONVERSATION)
    trace = replace(trace, requests=trace.requests[: case.requests or None])
    run = simulate(trace, config, on_progress=lambda ended: progress(ended / len(trace.requests)))
    done = [row for row in run.requests if row.outcome is Outcome.FINISHED]
    ttfts = sorted(row.ttft_s for row in done if row.ttft_s is not None)
    prompt = sum(row.input_tokens for row in done)
    remote = sum(row.hit_tokens_remote for row in done)
    local = sum(row.hit_tokens_device + row.hit_tokens_dram for row in done)
    return Seen(
        ttft_mean_s=statistics.fmean(ttfts),
        ttft_p50_s=ttfts[len(ttfts) // 2],
        ttft_p99_s=ttfts[int(0.99 * len(ttfts))],
        hit_share=(local + remote) / prompt,
        remote_share=remote / prompt,
        fetching=sum(row.hit_tokens_remote > 0 for row in done) / len(done),
        prefill_s=sum(row.prefill_s for row in done),
        finished=len(done),
        attempts=max(row.attempts for row in run.requests),
        not_finished=dict(
            Counter(row.reason or row.outcome.value for row in run.requests if row.outcome is not Outcome.FINISHED)
        ),
    )


def cases(policies: Sequence[str], seeds: int, speedup: float, requests: int, sensitivity: bool) -> list[Case]:
    numbers = range(1, seeds + 1)
    every = [
        Case(placement=name, seed=seed, speedup=speedup, requests=requests) for name in policies for seed in numbers
    ]
    varied = [(compute, 1.0) for compute in COMPUTE if compute != 1.0] + [(1.0, link) for link in LINKS if link != 1.0]
    return every + [
        case
        for compute, link in (varied if sensitivity else ())
        for case in pair(numbers[: max(1, seeds // 2)], speedup, requests, compute, link)
    ]


def pair(seeds: Sequence[int], speedup: float, requests: int, compute: float, link: float) -> list[Case]:
    """Both policies of one row of the other hardware."""
    return [
        Case(placement=name, seed=seed, speedup=speedup, compute=compute, link=link, requests=requests)
        for name in PAIR
        for seed in seeds
    ]


def mean(found: dict[Case, Seen], figure: Callable[[Seen], float], **wanted: object) -> float:
    """Over the seeds of the cases that are like that."""
    like = [s for c, s in found.items() if all(getattr(c, name) == value for name, value in wanted.items())]
    return statistics.fmean(map(figure, like))


COLUMNS: tuple[tuple[str, Callable[[Seen], float], str], ...] = (
    ("done %", lambda s: 100 * s.finished_share, ".1f"),
    ("mean", lambda s: s.ttft_mean_s, ".2f"),
    ("p50", lambda s: s.ttft_p50_s, ".2f"),
    ("p99", lambda s: s.ttft_p99_s, ".2f"),
    ("found %", lambda s: 100 * s.hit_share, ".1f"),
    ("fetched %", lambda s: 100 * s.remote_share, ".1f"),
    ("by %", lambda s: 100 * s.fetching, ".1f"),
    ("prefill s", lambda s: s.prefill_s, ",.0f"),
)
"""Done: requests that finished, the only ones that the other figures are of. Found: prompt tokens here or on another
node; fetched: from there; by: so many of the requests."""


def show(found: dict[Case, Seen], speedup: float) -> None:
    table = Table(
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        title=f"{CONVERSATION}, 8P+8D, {speedup:g}x: time to first token, seconds",
    )
    for name in ("placement", *(column for column, _, _ in COLUMNS), "seeds", "vs local"):
        table.add_column(name, justify="left" if name == "placement" else "right")
    plain = {"compute": 1.0, "link": 1.0}
    for name in (name for name in POLICIES if any(case.placement == name for case in found)):
        cells = [format(mean(found, of, placement=name, **plain), spec) for _, of, spec in COLUMNS]
        own = [s.ttft_mean_s for c, s in found.items() if (c.placement, c.compute, c.link) == (name, 1.0, 1.0)]
        cells += [f"{min(own):.2f}-{max(own):.2f}", against(found, name, **plain)]
        table.add_row(name, *cells)
    console.print(table)
    varied = {c.seed for c in found if (c.compute, c.link) != (1.0, 1.0)}
    if varied:
        show_hardware({case: seen for case, seen in found.items() if case.seed in varied})


def against(found: dict[Case, Seen], name: str, **hardware: float) -> str:
    """Its mean TTFT against local prefix's; none where some requests did not finish: it would compare survivors."""
    names = (name, "local_prefix")
    own, base = (mean(found, lambda s: s.ttft_mean_s, placement=n, **hardware) for n in names)
    whole = all(mean(found, lambda s: s.finished_share, placement=n, **hardware) == 1.0 for n in names)
    return f"{100 * (own / base - 1):+.1f} %" if whole else "-"


def show_hardware(found: dict[Case, Seen]) -> None:
    """Every row by the same seeds. Attempts: of the requests that took most."""
    table = Table(box=box.SIMPLE_HEAD, title="local_prefix and algorithm1 on other hardware: mean TTFT, seconds")
    columns = [column for name in ("local", "alg. 1") for column in (name, "finished %", "attempts")]
    for name in ("MFU", "link GB/s", *columns, "against local"):
        table.add_column(name, justify="right")
    preset = load_hardware(HARDWARE)
    for compute, link in sorted({(c.compute, c.link) for c in found}):
        hardware = {"compute": compute, "link": link}
        cells = [
            f"{mean(found, of, placement=name, **hardware):{spec}}"
            for name in PAIR
            for of, spec in (
                (lambda s: s.ttft_mean_s, ".2f"),
                (lambda s: 100 * s.finished_share, ".1f"),
                (lambda s: s.attempts, ".0f"),
            )
        ]
        table.add_row(
            f"{0.5 * compute:.2f}",
            f"{link * preset.link_bytes_per_s / 1e9:.1f}",
            *cells,
            against(found, "algorithm1", **hardware),
        )
    console.print(table)


@click.command()
@click.option("--seeds", default=3, show_default=True, help="Of the main table; the other hardware takes half of them.")
@click.option("--speedup", default=1.0, show_default=True, help="The trace's clock runs this much faster.")
@click.option("--policies", default=",".join(POLICIES), show_default=True)
@click.option("--sensitivity/--no-sensitivity", default=True, show_default=True, help="Other hardware as well.")
@click.option("--requests", default=0, help="Of the trace, only so many; 0: all.")
@click.option(
    "--only-links", type=float, help="Nothing but local-prefix and Algorithm 1 on links so many times as fast."
)
def main(seeds: int, speedup: float, policies: str, sensitivity: bool, requests: int, only_links: float | None) -> None:
    """What placement is worth in time to first token."""
    assert set(POLICIES) == {name.value for name in PlacementName}, "every policy of the product is compared"
    named = policies.split(",")
    wrong = [name for name in named if name not in POLICIES] or [name for name in PAIR if name not in named]
    if wrong:
        expected = f"some of {', '.join(POLICIES)}, {' and '.join(PAIR)} among them"
        raise ConfigError(key="policies", value=policies, expected=expected)
    todo = cases(named, seeds, speedup, requests, sensitivity)
    if only_links is not None:
        todo = pair(range(1, seeds + 1), speedup, requests, 1.0, only_links)
    found = run_cases(run_case, todo, lambda case: f"{case.placement}, seed {case.seed}")
    if only_links is None:
        show(found, speedup)
    else:
        show_hardware(found)
    rows = [vars(case) | vars(seen) for case, seen in found.items()]
    console.print(f"raw: {save('placement', {'command': sys.argv[1:], 'hardware': HARDWARE, 'runs': rows})}")


if __name__ == "__main__":
    main()
