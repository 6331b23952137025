"""Shell: the simulator against a real cluster on this host's CPU, with the torch engine and the real model.

    python -m benchmarks.calibration [--requests 100] [--repeats 3] [--preset NAME]

Each round plays three workloads on fresh clusters (1P1D, one thread and one core a worker): one to measure costs by,
which the conductor records, and another one at each load. The costs are fitted to what the workers measured in the
first ones, both of them busy, and become a `measured` hardware preset; the others are simulated with it. So the host's
moods meet both alike. The client and the conductor share the two cores with the workers.
"""

from __future__ import annotations

import datetime
import statistics
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import click
import uvloop
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.measured import Fitted, Samples, fitted, joined, samples_of
from benchmarks.real_run import Asked, message_s, play, same_conductor
from benchmarks.record import machine, save
from cluster.local import LocalCluster
from cluster.plan import ClusterConfig
from conductor.config import ConductorConfig
from conductor.effects import Slo
from core.cost import CostPrior
from halfmoon.client import AsyncClient
from halfmoon.types import Outcome
from kv_store.transfer_values import TransferLimits
from report.records import RequestRow, Run
from report.statistics import distribution
from simulator.config import SimConfig
from simulator.hardware_values import Hardware
from simulator.presets import FOLDER, hardware_of
from simulator.run import simulate
from workload.synthetic import Spread, generate, profile
from workload.trace import Trace
from workload.transforms import scale_outputs, shrink, speedup

MODEL = "smollm2-135m-instruct"
KV_TOKEN_BYTES = 23_040
"""30 layers, K and V of 3 heads of 64, two bytes each."""
VOCABULARY = (1000, 40_000)
PROMPTS_SHRUNK = 32
OUTPUTS_SCALED = 0.1
LIMITS = Slo(ttft_s=2.0, tbt_s=0.25)
POOL_MIB = 1024
LOADS = {"light": 0.4, "near saturation": 0.9}
"""Of the requests a second that the prefill worker can take, cached prefixes left out."""
CALIBRATION_LOAD = 0.65
SEEDS = range(1, 6)
"""Of simulations, whose requests are counted together."""
PROMPT = 256
START_S = 8.0
"""Of a cluster, about."""
console = Console(width=120)

Figures = dict[str, float]


CONDUCTOR = ConductorConfig(slow_start_s=0.5, slo=LIMITS)
CHAT = replace(
    profile("conversation"),
    first=Spread(median=5_100, sigma=0.8),
    question=Spread(median=800, sigma=1.0),
    input_tokens_max=32_000,
)


def workload(num_requests: int, seed: int) -> Trace:
    """A chat, its prompts made 32 times as short and its answers 10 times, for a model and a host that are smaller."""
    return scale_outputs(shrink(generate(CHAT, num_requests, Random(seed)), PROMPTS_SHRUNK), OUTPUTS_SCALED)


@asynccontextmanager
async def cluster(record: str = "") -> AsyncIterator[AsyncClient]:
    """1P1D, warm, and no longer in its slow start."""
    conductor = replace(CONDUCTOR, record=record)
    with tempfile.TemporaryDirectory(prefix="hm-") as directory:
        config = ClusterConfig(
            port=0, admin_port=0, directory=directory, model=MODEL, conductor=conductor,
            device_mib=POOL_MIB, dram_mib=-1,
        )  # fmt: skip
        async with (
            LocalCluster(config, lambda progress: None) as running,
            AsyncClient(running.addresses["inference"]) as client,
        ):
            for seed in range(2):
                await lone(client, seed)
            yield client


async def lone(client: AsyncClient, seed: int) -> float:
    """Seconds of one prompt's prefill, nothing else running."""
    tokens = Random(f"lone {seed}").choices(range(*VOCABULARY), k=PROMPT)
    result = await client.complete(tokens, max_tokens=8, temperature=0.0, ignore_eos=True)
    return result.timings.server.prefill_s


def at_load(trace: Trace, load: float, prefill_s: float) -> Trace:
    """So fast that its prefill takes this share of the time. `prefill_s`: mean of a request."""
    rate = len(trace.requests) / trace.requests[-1].at_s
    return speedup(trace, load / prefill_s / rate)


# ---- the costs ----


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What was measured in the calibrating runs."""

    prefill: Fitted
    step: Fitted
    pull: Fitted
    message_s: float


@dataclass(frozen=True, kw_only=True)
class Played:
    """A real run: what came of its requests, what its workers measured, and the seconds of a message before it."""

    run: Run
    samples: Samples
    message_s: float


async def real(trace: Trace, limits: Slo) -> Played:
    with tempfile.TemporaryDirectory(prefix="hm-rec-") as folder:
        recording = Path(folder) / "run.jsonl"
        async with cluster(str(recording)) as client:
            message = await message_s(client, VOCABULARY)
            asked = Asked(slo_ttft_s=limits.ttft_s, slo_tbt_s=limits.tbt_s, vocabulary=VOCABULARY)
            run = await play(client, trace, asked, "real")
        return Played(run=run, samples=samples_of(recording), message_s=message)


async def first_guess(trace: Trace) -> float:
    """Seconds of prefill of a request, by the pace of lone prompts, blocks that came before left out.

    It only decides how fast requests are sent."""
    async with cluster() as client:
        token_s = statistics.median([await lone(client, seed) for seed in range(10, 17)]) / PROMPT
    computed, seen = 0, set[int]()
    for request in trace.requests:
        known = sum(name in seen for name in request.block_ids)
        computed += max(1, request.input_tokens - known * trace.block_tokens)
        seen.update(request.block_ids)
    return token_s * computed / len(trace.requests)


def costs_of(runs: Sequence[Played]) -> Costs:
    """Of all of them together."""
    prefill, step, pull = fitted(joined([one.samples for one in runs]), CostPrior())
    return Costs(prefill=prefill, step=step, pull=pull, message_s=statistics.median(one.message_s for one in runs))


def preset(costs: Costs) -> dict[str, Any]:
    """As a hardware file says it."""
    host = machine()
    limits, config = TransferLimits(), ClusterConfig(model=MODEL)
    blocks = (POOL_MIB << 20) // (config.block_size * KV_TOKEN_BYTES)
    today = datetime.datetime.now(tz=datetime.UTC).date()
    names = (
        ("prefill_pass_s", "prefill_token_s", "prefill_pair_s"),
        ("decode_step_s", "decode_sequence_s", "decode_token_s"),
    )
    measured = {
        name: rounded(value)
        for keys, found in zip(names, (costs.prefill, costs.step), strict=True)
        for name, value in zip(keys, found.median, strict=True)
    }
    link_s, byte_s = costs.pull.coefficients
    return {
        "source": f"benchmarks/calibration.py, {today}, {host['cpu']}, {host['cores']} cores, one thread a worker",
        "measured": measured,
        "kv_token_bytes": KV_TOKEN_BYTES,
        "link_s": rounded(link_s),
        "link_bytes_per_s": rounded(1.0 / byte_s),
        "move_s_per_byte": 0.0,
        "message_s": rounded(costs.message_s),
        "block_tokens": config.block_size,
        "prefill_blocks": blocks,
        "decode_blocks": blocks,
        "tokens_per_pass_max": config.tokens_per_pass_max,
        "prompts_per_pass_max": 64,
        "sequences_max": config.sequences_max,
        "batch_blocks": limits.batch_bytes_max // (config.block_size * KV_TOKEN_BYTES),
    }


def rounded(value: float) -> float:
    """Four digits: more were not measured."""
    return float(f"{value:.4g}")


def write_preset(path: Path, values: dict[str, Any], costs: Costs) -> None:
    fits = ", ".join(
        f"{name} {found.samples} samples, spread {found.spread:.2f}"
        for name, found in (("prefill", costs.prefill), ("steps", costs.step), ("pulls", costs.pull))
    )
    head = (
        f"# {MODEL}, bf16, one thread and one core a worker, fitted while both workers of a 1P1D were busy:\n"
        f"# {fits}. Load average {machine()['load_at_end']:.1f}.\n"
        "# One tier, so nothing moves. Written by benchmarks/calibration.py.\n"
    )
    path.write_text(head + yaml.safe_dump(values, sort_keys=False, width=120))


# ---- the simulated run ----


def simulated(trace: Trace, hardware: Hardware, costs: Costs, seed: int) -> Run:
    config = SimConfig(
        hardware=hardware,
        prefill=1,
        decode=1,
        seed=seed,
        jitter_s=0.0,
        outputs_told=True,
        slo_ttft_s=LIMITS.ttft_s,
        slo_tbt_s=LIMITS.tbt_s,
        noise=costs.prefill.spread,
        step_noise=costs.step.spread,
        conductor=CONDUCTOR,
        report_interval_s=0.25,
    )
    return simulate(trace, config, conductor=same_conductor(CONDUCTOR))


def figures_of(runs: Sequence[Run]) -> Figures:
    """Of all their requests together."""
    rows: list[RequestRow] = [row for run in runs for row in run.requests]
    found: Figures = {}
    for name, values, shares in (
        ("TTFT", [row.ttft_s for row in rows], ("p50", "p90", "p99")),
        ("gap", [row.tbt_p50_s for row in rows], ("p50", "p99")),
        ("TBT", [row.tbt_worst_s for row in rows], ("p50", "p99")),
    ):
        spread = distribution(values)
        assert spread is not None, "no request got that far"
        found |= {f"{name} {share} ms": getattr(spread, share) * 1e3 for share in shares}
    seconds = sum(run.duration_s for run in runs)
    found["goodput 1/s"] = sum(row.effective for row in rows) / seconds
    found["rejected %"] = 100 * sum(row.outcome is Outcome.REJECTED for row in rows) / len(rows)
    return found


# ---- the table ----


def show(load: str, reals: list[Figures], model: Figures, own: Figures) -> None:
    """`own`: median of each run simulated with its own costs: what is left is not the host's, but the model's error."""
    console.print(f"\n{load}: real, median of {len(reals)} runs, and simulated, {len(SEEDS)} seeds together")
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("", "real", "its runs", "simulated", "error", "by the runs' own costs", "error"):
        table.add_column(name, justify="left" if not name else "right")
    for (name, value), middle in zip(model.items(), middle_of(reals).values(), strict=True):
        seen = [figures[name] for figures in reals]
        table.add_row(
            name, number(middle), f"{number(min(seen))} to {number(max(seen))}", number(value),
            error(name, value, middle), number(own[name]), error(name, own[name], middle),
        )  # fmt: skip
    console.print(table)


def error(name: str, value: float, truth: float) -> str:
    return f"{value - truth:+.1f} points" if name.endswith("%") else f"{100 * (value / truth - 1):+.1f} %"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}" if value >= 10 else f"{value:.2f}"


def kept(run: Run) -> dict[str, Any]:
    """What a run leaves in the results: its requests' moments."""
    names = (
        "arrived_s",
        "input_tokens",
        "hit_tokens_device",
        "outcome",
        "ttft_s",
        "prefill_s",
        "tbt_p50_s",
        "tbt_worst_s",
    )
    rows = [[getattr(row, name) for name in names] for row in run.requests]
    return {"duration_s": run.duration_s, "columns": names, "requests": rows}


def keep_costs(costs: Costs, name: str) -> tuple[Hardware, dict[str, Any]]:
    """Shows them; writes the preset where it has a name."""
    values = preset(costs)
    console.print(yaml.safe_dump(values, sort_keys=False, width=120))
    console.print(f"spread of passes {costs.prefill.spread:.3f}, of steps {costs.step.spread:.3f}")
    if name:
        write_preset(FOLDER / f"{name}.yaml", values, costs)
        console.print(f"preset: {FOLDER / name}.yaml")
    return hardware_of(values, name or "measured"), values


def by_own_costs(trace: Trace, played: Played) -> Figures:
    costs = costs_of([played])
    hardware = hardware_of(preset(costs), "own")
    return figures_of([simulated(trace, hardware, costs, seed) for seed in SEEDS])


def middle_of(runs: Sequence[Figures]) -> Figures:
    """Medians."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def compare(load: str, trace: Trace, runs: Sequence[Played], hardware: Hardware, costs: Costs) -> dict[str, Any]:
    """Simulates one load, with the calibrated costs and with the runs' own; shows both. Returns what is kept of it."""
    models = [simulated(trace, hardware, costs, seed) for seed in SEEDS]
    figures = [figures_of([one.run]) for one in runs]
    own = middle_of([by_own_costs(trace, one) for one in runs])
    rate = len(trace.requests) / trace.requests[-1].at_s
    show(f"{load}, {rate:.2f} requests/s", figures, figures_of(models), own)
    return {
        "rate_per_s": rate, "real": figures, "simulated": figures_of(models), "simulated_by_own_costs": own,
        "runs": [kept(one.run) for one in runs],
        "simulated_runs": [kept(run) for run in models],
    }  # fmt: skip


@click.command()
@click.option("--requests", default=80, show_default=True, help="Of each run.")
@click.option("--repeats", default=3, show_default=True, help="Rounds.")
@click.option("--seed", default=1, show_default=True, help="Of the workloads.")
@click.option("--preset", "name", default="", help="Keep the costs as the simulator's preset of this name.")
def main(requests: int, repeats: int, seed: int, name: str) -> None:
    other, trace = workload(requests, seed + 1000), workload(requests, seed)
    prefill_s = uvloop.run(first_guess(trace))
    calibrating = at_load(other, CALIBRATION_LOAD, prefill_s)
    played = {load: at_load(trace, share, prefill_s) for load, share in LOADS.items()}
    measured: list[Played] = []
    reals: dict[str, list[Played]] = {load: [] for load in LOADS}
    for number in range(repeats):
        seconds = sum(one.requests[-1].at_s + START_S for one in (calibrating, *played.values()))
        console.print(f"round {number + 1} of {repeats}, about {seconds:.0f} s")
        measured.append(uvloop.run(real(calibrating, Slo())))
        for load, runs in reals.items():
            runs.append(uvloop.run(real(played[load], LIMITS)))
    costs = costs_of(measured)
    hardware, values = keep_costs(costs, name)
    loads = {load: compare(load, played[load], runs, hardware, costs) for load, runs in reals.items()}
    raw = {"preset": values, "costs": asdict(costs), "prefill_s": prefill_s, "loads": loads}
    console.print(f"raw: {save('calibration', raw)}")


if __name__ == "__main__":
    main()
