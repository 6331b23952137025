"""Shell: `halfmoon simulate`: a trace through the product's own machines under a virtual clock, and what came of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape

from cli.parallel import Crash, cores, require_all, run_all
from cli.progress import progress
from cli.scenario import FITS, Scenario, command, scenario, slug, sweep, swept, without_seed
from cli.simulating import (
    REPORT,
    Job,
    Tape,
    admissions,
    config_of,
    simulate_job,
    simulate_scenario,
    trace_of,
    write,
    write_text,
)
from cli.tables import make_console
from report.curves import Sketch
from report.html import LIBRARY, comparison_page, library
from report.notices import left_out_of, notices
from report.tables import comparison_tables, over_seeds_table, ranking_table, run_tables, seeds_table
from simulator.config import BELIEFS, EVICTIONS
from simulator.policies import PLACEMENTS
from simulator.presets import presets
from workload.files import find_trace

SIDE_BY_SIDE_MAX = 6
"""Runs of a sweep that are printed in full; more are printed as one line each, and in full in the report."""

WORKLOAD_OPTIONS: tuple[Callable[[click.decorators.FC], click.decorators.FC], ...] = (
    click.option("--trace", required=True, help="File, or the name of one in HALFMOON_TRACES or beside the checkout."),
    click.option("--format", help="mooncake, azure, burstgpt; auto tells by the first line.  [default: auto]"),
    click.option("--skip-bad", is_flag=True, default=None, help="Leave malformed lines out and count them."),
    click.option("--requests", type=int, help="Only the first so many."),
    click.option("--speedup", type=float, help="How much faster requests arrive.  [default: 1]"),
    click.option("--output-scale", type=float, help="Output lengths times this.  [default: 1]"),
    click.option("--jitter", "jitter_s", type=float, help="Spread arrivals over so many s; 0: off.  "
                 "[default: 3 where the trace has them in ticks of 3 s]"),
    click.option("--hardware", help=f"Preset ({', '.join(presets())}) or YAML file: what a node can do.  "
                 f"[default: {Scenario.hardware}]"),
    click.option("--link-scale", type=float, help="Links are so many times as fast as the preset's.  [default: 1]"),
    click.option("--mfu-scale", type=float, help="Prefill passes are: as if its MFU were so.  [default: 1]"),
    click.option("--hide-weights/--no-hide-weights", default=None, help="A coupled node's pass reads the weights "
                 "of its steps behind its prompts, or besides.  [default: the preset's]"),
    click.option("--seed", type=int, help="Same seed, same decisions.  [default: 1]"),
)  # fmt: skip

CLUSTER_OPTIONS: tuple[Callable[[click.decorators.FC], click.decorators.FC], ...] = (
    click.option("--prefill", type=int, help=f"Prefill nodes.  [default: {Scenario.prefill}]"),
    click.option("--decode", type=int, help=f"Decode nodes.  [default: {Scenario.decode}]"),
    click.option("--coupled", type=int, help="Nodes that do both.  [default: 0]"),
    click.option("--chunk", type=int, help="Tokens of one pass of prefill and coupled nodes; on coupled ones prompts "
                 "then share passes.  [default: the preset's]"),
    click.option("--decode-room", type=int, help="KV tokens of one decode node.  [default: the preset's]"),
    click.option("--policy", help=f"Of admission: {', '.join(admissions())}.  [default: {Scenario.policy}]"),
    click.option("--placement", help=f"{', '.join(sorted(PLACEMENTS))}.  [default: {Scenario.placement}]"),
    click.option("--eviction", help=f"Which cached blocks leave first: {', '.join(EVICTIONS)}.  "
                 f"[default: {Scenario.eviction}]"),
    click.option("--slo-ttft", "slo_ttft_s", type=float, help="Limit of every request's TTFT, s.  [default: 30]"),
    click.option("--slo-tbt", "slo_tbt_s", type=float, help="Limit of the mean of its worst tenth of gaps, s.  "
                 "[default: 0.1]"),
    click.option("--faults", help='What goes wrong, how often: "crash=2,partition=1,storm=3".'),
    click.option("--belief-bias", type=float, help="Each cost is believed this share too high or too low, by a draw of "
                 f"the seed.  [default: {Scenario.belief_bias:g}]"),
    click.option("--belief", help='Or: all costs are believed so many times the truth ("1.2"), or those named '
                 f'("prefill=10"), of {", ".join(BELIEFS)}.'),
    click.option("--learn/--no-learn", default=None, help="Whether the conductor is told what workers measure.  "
                 "[default: learn]"),
    click.option("--fit", help=f"{', '.join(FITS)}: beliefs are corrected by measurements, or trusted as they are.  "
                 f"[default: {Scenario.fit}]"),
    click.option("--check", is_flag=True, default=None, help="Verify every invariant after every event."),
    click.option("--exact", is_flag=True, default=None, help="Take every decode step by itself: slower, equal."),
)  # fmt: skip


def with_options(
    options: Sequence[Callable[[click.decorators.FC], click.decorators.FC]],
) -> Callable[[click.decorators.FC], click.decorators.FC]:
    def add(decorated: click.decorators.FC) -> click.decorators.FC:
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return add


@click.command()
@with_options(WORKLOAD_OPTIONS)
@with_options(CLUSTER_OPTIONS)
@click.option(
    "--sweep", "sweeps", multiple=True, help='"OPTION=VALUE,VALUE": run them all; repeated, every combination.'
)
@click.option(
    "--seeds", type=click.IntRange(1, 1000), help="As many runs, of --seed and those after it: how far they lie apart."
)
@click.option("--jobs", type=click.IntRange(1), help="Simulations at once, of several.  [default: all cores]")
@click.option(
    "--out", type=click.Path(file_okay=False), help="Folder for the files.  [default: runs/…, named after the run]"
)
@click.option(
    "--record", type=click.Path(dir_okay=False, path_type=Path), help="Record the conductor's inputs, for `replay`."
)
def simulate(
    sweeps: tuple[str, ...], seeds: int | None, jobs: int | None, out: str | None, record: Path | None, **given: object
) -> None:
    """Simulate a cluster on a trace; print what came of it; leave Parquet, JSON and an HTML report."""
    asked = scenario(given)
    sweeps = with_seeds(sweeps, asked.seed, seeds)
    combinations = sweep(asked, sweeps) if sweeps else [("", asked)]
    for _, one in combinations:
        config_of(one)  # refuses what nobody knows before anything runs
        find_trace(one.trace)
    if record is not None:
        _require_one_conductor(sweeps, asked)
    console = make_console()
    directory = Path(out) if out else Path("runs") / default_name(asked, sweeps)
    if sweeps:
        _simulate_many(combinations, directory, jobs or cores(), console, command(asked, sweeps))
    else:
        _simulate_one(asked, directory, console, record)


def with_seeds(sweeps: tuple[str, ...], first: int, seeds: int | None) -> tuple[str, ...]:
    """A sweep over so many seeds as well: the last axis, so that a group of equals runs together."""
    if seeds is None or seeds == 1:
        return sweeps
    if "seed" in swept(sweeps):
        raise click.UsageError("--seeds does not go with --sweep seed=…, which names them")
    return (*sweeps, f"seed={','.join(str(seed) for seed in range(first, first + seeds))}")


def _require_one_conductor(sweeps: Sequence[str], asked: Scenario) -> None:
    """A recording is of one conductor, from its beginning."""
    if sweeps:
        raise click.UsageError("--record goes with one run, not with --sweep or --seeds")
    if config_of(asked).faults.conductor:
        raise click.UsageError("--record is of one conductor: it does not go with the fault `conductor`")


def default_name(asked: Scenario, sweeps: Sequence[str]) -> str:
    """The same command goes to the same folder, another one to another: a hash of every option ends the name."""
    told = {"policy": asked.policy, "speedup": f"{asked.speedup:g}x", "seed": f"seed {asked.seed}"}
    words = [Path(asked.trace).stem, asked.nodes, *(word for name, word in told.items() if name not in swept(sweeps))]
    whole = hashlib.blake2b(command(asked, sweeps).encode(), digest_size=4).hexdigest()
    return f"{slug(0, ' '.join([*words, *sweeps]))[4:]}-{whole}"


def _simulate_one(asked: Scenario, directory: Path, console: Console, record: Path | None) -> None:
    trace = trace_of(asked)
    what = f"simulating {len(trace.requests):,} requests"
    tape = None if record is None else Tape(record)
    why = "the simulation failed"
    try:
        with progress() as show:
            found, run = simulate_scenario(asked, trace, "", lambda share: show(share, what), tape)
        why = "the simulation ended"
    finally:
        if tape is not None:
            tape.close(why)
    write(run, found, directory)
    console.print(*run_tables(found), sep="\n")
    _say(notices(found.settings), console)
    if tape is not None:
        console.print(f"Recording: {escape(str(tape.path))}", soft_wrap=True)
    console.print(f"Report: {escape(str(directory / REPORT))}", soft_wrap=True)


def _simulate_many(
    combinations: Sequence[tuple[str, Scenario]], directory: Path, num_processes: int, console: Console, again: str
) -> None:
    work = [
        Job(label, one, str(directory / slug(number, label))) for number, (label, one) in enumerate(combinations, 1)
    ]
    write_text(directory / LIBRARY, library())  # once, for the reports of all
    results = run_shown(work, num_processes)
    sketches = [result for result in results if not isinstance(result, Crash)]
    if sketches:
        _report(sketches, directory, console, again)
    require_all(results, [(label, command(one)) for label, one in combinations])


def run_shown(work: Sequence[Job], num_processes: int, what: str = "simulating") -> list[Sketch | Crash]:
    """All of them, under one progress bar that counts those that have ended."""
    with progress() as show:
        shares = [0.0] * len(work)

        def note(index: int, share: float) -> None:
            shares[index] = share
            ended = sum(s >= 1.0 for s in shares)
            show(sum(shares) / len(work), f"{what}, {ended} of {len(work)} done")

        return run_all(simulate_job, work, num_processes, note)


def _report(sketches: Sequence[Sketch], directory: Path, console: Console, again: str) -> None:
    console.print(ranking_table(sketches))
    if len(sketches) <= SIDE_BY_SIDE_MAX:
        console.print(*comparison_tables(sketches, console.width), sep="\n")
    groups = _by_seed(sketches)
    several = {label: group for label, group in groups.items() if len(group) > 1}
    if len(groups) > 1 and several:
        console.print(seeds_table(groups))
    if len(several) <= SIDE_BY_SIDE_MAX:
        console.print(*(over_seeds_table(label, group) for label, group in several.items()), sep="\n")
    _say(left_out_of(found.settings for found in sketches), console)
    for found in sketches:
        console.print(f"{found.digest}  {escape(found.label)}", soft_wrap=True)
    figures = [{"label": s.label, "settings": dict(s.settings), "digest": s.digest, "statistics": asdict(s.statistics)}
               for s in sketches]  # fmt: skip
    write_text(directory / "sweep.json", json.dumps({"halfmoon_sweep": 1, "runs": figures}, indent=2) + "\n")
    write_text(directory / REPORT, comparison_page(f"{len(sketches)} simulations", sketches, again, LIBRARY))
    console.print(f"Report: {escape(str(directory / REPORT))}", soft_wrap=True)


def _by_seed(sketches: Sequence[Sketch]) -> dict[str, list[Sketch]]:
    """Those that differ in their seed alone, by what they have in common."""
    groups: dict[str, list[Sketch]] = {}
    for found in sketches:
        groups.setdefault(without_seed(found.label), []).append(found)
    return groups


def _say(sentences: Sequence[str], console: Console) -> None:
    for sentence in sentences:
        console.print(sentence, style="yellow", markup=False, soft_wrap=True)
