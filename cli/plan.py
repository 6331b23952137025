"""Shell: `halfmoon plan`: which cluster to build of so many GPUs, found by simulating the candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cli.parallel import Crash, cores, require_all
from cli.planning import (
    Candidate,
    Verdict,
    best_per_shape,
    first_round,
    indistinct,
    neighbours,
    next_round,
    num_nodes,
    ranked,
    runner_up,
    verdict,
)
from cli.scenario import Scenario, command, scenario
from cli.simulate import WORKLOAD_OPTIONS, run_shown, with_options
from cli.simulating import Job, config_of, trace_of
from cli.tables import make_console
from report.lines import percent

REQUESTS = 1000
"""Of the trace that each candidate serves, unless told otherwise: enough for a steady state, soon done."""

POLICIES = "baseline,early,predictive,forecast"
BELIEFS = (0.8, 1.2)
"""Times the truth, at first. (Told of no measurement, the conductor rejects by none of its estimates: a belief that
stayed wrong would show what measuring is worth, not what a fifth is.)"""

Verdicts = dict[Candidate, Verdict]


@click.command()
@with_options(WORKLOAD_OPTIONS)
@click.option("--slo-ttft", "slo_ttft_s", type=float, required=True, help="Limit of every request's TTFT, s.")
@click.option(
    "--slo-tbt", "slo_tbt_s", type=float, required=True, help="Limit of the mean of its worst tenth of gaps, s."
)
@click.option("--gpus", type=int, required=True, help="How many there are.")
@click.option("--gpus-per-node", type=int, default=8, show_default=True)
@click.option("--policies", default=POLICIES, show_default=True, help="Of admission, to choose from.")
@click.option("--jobs", type=click.IntRange(1), help="Simulations at once.  [default: all cores]")
def plan(gpus: int, gpus_per_node: int, policies: str, jobs: int | None, **given: object) -> None:
    """Find the prefill:decode ratio and policy with the highest goodput, the runner-up, and how sure that is.

    Every figure comes from simulating the first --requests of the trace (1000 unless given), on one seed.
    """
    nodes = num_nodes(gpus, gpus_per_node)
    names = list(dict.fromkeys(name.strip() for name in policies.split(",")))
    base = scenario({"requests": REQUESTS} | {k: v for k, v in given.items() if v is not None})
    for name in names:
        config_of(replace(base, policy=name))
    search = Search(base, jobs or cores())
    search.run(first_round(nodes, names[-1]), "first round")
    while wanted := next_round(search.verdicts, names):
        search.run(wanted, "narrowing down")
    best = ranked(search.verdicts)[0]
    search.run([replace(best, belief=belief) for belief in BELIEFS], "sensitivity")
    _print(make_console(), search, best)


class Search:
    """What has been simulated so far, each candidate on the same arrivals."""

    def __init__(self, base: Scenario, num_processes: int) -> None:
        trace = trace_of(base)
        self.base = base
        self.num_requests = len(trace.requests)
        self.verdicts: Verdicts = {}
        self._num_processes = num_processes
        self._arrivals_s = (trace.requests[-1].at_s - trace.requests[0].at_s) / base.speedup

    def run(self, candidates: Sequence[Candidate], what: str) -> None:
        """Simulate them and note their verdicts.

        Raises:
            Failed: one did not finish, naming it and how to repeat it.
        """
        jobs = [Job(str(candidate), self.scenario(candidate)) for candidate in candidates]
        results = run_shown(jobs, self._num_processes, what)
        require_all(results, [(job.label, command(job.scenario)) for job in jobs])
        for candidate, found in zip(candidates, results, strict=True):
            assert not isinstance(found, Crash), "require_all lets none pass"
            self.verdicts[candidate] = verdict(found, self._arrivals_s, self.base.slo_ttft_s, self.base.slo_tbt_s)

    def scenario(self, candidate: Candidate) -> Scenario:
        shape = candidate.shape
        return replace(
            self.base, prefill=shape.prefill, decode=shape.decode, coupled=shape.coupled, policy=candidate.policy,
            belief="" if candidate.belief is None else f"{candidate.belief:g}",
        )  # fmt: skip


def _print(console: Console, search: Search, best: Candidate) -> None:
    second = runner_up(search.verdicts)
    console.print(_table(search, best_per_shape(search.verdicts), best, "The best policy of each shape"))
    console.print(_sensitivity(search, best))
    said = search.verdicts[best]
    console.print(f"Best: [bold]{best}[/bold]: {_words(said)}.", soft_wrap=True)
    if second is not None:
        console.print(f"Runner-up: {second}: {_words(search.verdicts[second])}.", soft_wrap=True)
    same = indistinct(search.verdicts)
    if same > 1:
        console.print(
            f"{same} shapes serve as many; the best is the one furthest under its limits. A higher --speedup tells "
            "them apart.", soft_wrap=True,
        )  # fmt: skip
    console.print(
        f"All figures are from {len(search.verdicts)} simulations of {search.num_requests} requests of "
        f"{escape(search.base.trace)}, seed {search.base.seed}; nothing was measured on hardware. "
        "Goodput is per second of arrivals.",
        soft_wrap=True, style="dim",
    )  # fmt: skip
    console.print(f"See it whole: {command(search.scenario(best))}", soft_wrap=True, style="dim")


def _words(said: Verdict) -> str:
    return f"{said.goodput_per_s:.3f} effective requests/s, {percent(said.capacity)} % of all within both limits"


def _table(search: Search, candidates: Sequence[Candidate], best: Candidate, title: str) -> Table:
    table = _plain(title, "shape", "policy")
    for candidate in candidates:
        said = search.verdicts[candidate]
        star = " *" if candidate == best else ""
        table.add_row(f"{candidate.shape}{star}", candidate.policy, *_cells(said))
    return table


def _sensitivity(search: Search, best: Candidate) -> Table:
    """How goodput changes one step either side, under other policies, and where beliefs are off."""
    table = _plain("Sensitivity of the best", "change", "")
    base = search.verdicts[best].goodput_per_s
    changes = [(str(shape), "one node moved", Candidate(shape, best.policy)) for shape in neighbours(best.shape)]
    changes += [(c.policy, "another policy", c) for c in ranked(search.verdicts)
                if c.shape == best.shape and c.policy != best.policy]  # fmt: skip
    changes += [(f"{b - 1:+.0%} at first", "costs believed", replace(best, belief=b)) for b in BELIEFS]
    for what, why, candidate in changes:
        said = search.verdicts[candidate]
        change = f"{(said.goodput_per_s / base - 1) * 100:+.1f} %" if base else ""
        table.add_row(f"{why}: {what}", change, *_cells(said))
    return table


def _plain(title: str, first: str, second: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1))
    table.add_column(first, overflow="fold")
    table.add_column(second, justify="left")
    for name in ("goodput/s", "within %", "p90 of limit %"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cells(said: Verdict) -> tuple[str, str, str]:
    return f"{said.goodput_per_s:.3f}", percent(said.capacity), f"{said.strain * 100:.0f}"
