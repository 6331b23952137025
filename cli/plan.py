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
    Final,
    Verdict,
    best_per_shape,
    finalists,
    finals,
    first_round,
    neighbours,
    next_round,
    num_nodes,
    on_seeds,
    tied,
    verdict,
)
from cli.scenario import Scenario, command, scenario
from cli.simulate import WORKLOAD_OPTIONS, run_shown, with_options
from cli.simulating import Job, config_of, left_out, trace_of
from cli.tables import make_console
from report.lines import percent

REQUESTS = 1000
"""Of the trace that each candidate serves, unless told otherwise: enough for a steady state, soon done."""

POLICIES = "baseline,early,predictive,forecast"
BELIEFS = (0.8, 1.2)
"""Times the truth, at first. (Told of no measurement, the conductor rejects by none of its estimates: a belief that
stayed wrong would show what measuring is worth, not what a fifth is.)"""

LOADS = (0.8, 1.2)
"""Times the speed: what a forecast of the traffic may well be off by."""

Verdicts = dict[Candidate, Verdict]
Change = tuple[str, str, Candidate]


@click.command()
@with_options(WORKLOAD_OPTIONS)
@click.option("--slo-ttft", "slo_ttft_s", type=float, required=True, help="Limit of every request's TTFT, s.")
@click.option(
    "--slo-tbt", "slo_tbt_s", type=float, required=True, help="Limit of the mean of its worst tenth of gaps, s."
)
@click.option("--gpus", type=int, required=True, help="How many there are.")
@click.option("--gpus-per-node", type=int, default=8, show_default=True)
@click.option("--policies", default=POLICIES, show_default=True, help="Of admission, to choose from.")
@click.option(
    "--seeds", type=click.IntRange(1, 100), default=3, show_default=True, help="On which the finalists are compared."
)
@click.option("--jobs", type=click.IntRange(1), help="Simulations at once.  [default: all cores]")
def plan(gpus: int, gpus_per_node: int, policies: str, seeds: int, jobs: int | None, **given: object) -> None:
    """Find the prefill:decode ratio and policy with the highest goodput, the runner-up, and how sure that is.

    Every figure comes from simulating the first --requests of the trace (1000 unless given): the search on one seed,
    its finalists on --seeds.
    """
    nodes = num_nodes(gpus, gpus_per_node)
    names = list(dict.fromkeys(name.strip() for name in policies.split(",")))
    base = scenario({"requests": REQUESTS} | {k: v for k, v in given.items() if v is not None}, "plan")
    for name in names:
        config_of(replace(base, policy=name))
    search = Search(base, jobs or cores())
    search.run(first_round(nodes, names[-1]), "first round")
    while wanted := next_round(search.verdicts, names):
        search.run(wanted, "narrowing down")
    chosen = finalists(search.verdicts)
    search.run([one for candidate in chosen for one in on_seeds(candidate, seeds)], "finalists")
    ranking = finals(search.verdicts, chosen, seeds)
    changes = changes_of(ranking[0].candidate, names)
    search.run([candidate for _, _, candidate in changes], "sensitivity")
    _print(make_console(), search, ranking, changes, seeds)


class Search:
    """What has been simulated so far, each candidate on the same arrivals."""

    def __init__(self, base: Scenario, num_processes: int) -> None:
        self.trace = trace_of(base)
        self.base = base
        self.num_requests = len(self.trace.requests)
        self.verdicts: Verdicts = {}
        self._num_processes = num_processes
        self._arrivals_s = (self.trace.requests[-1].at_s - self.trace.requests[0].at_s) / base.speedup

    def run(self, candidates: Sequence[Candidate], what: str) -> None:
        """Simulate those that have not been, and note their verdicts.

        Raises:
            Failed: one did not finish, naming it and how to repeat it.
        """
        new = [candidate for candidate in dict.fromkeys(candidates) if candidate not in self.verdicts]
        jobs = [Job(str(candidate), self.scenario(candidate)) for candidate in new]
        results = run_shown(jobs, self._num_processes, what)
        require_all(results, [(job.label, command(job.scenario)) for job in jobs])
        for candidate, found in zip(new, results, strict=True):
            assert not isinstance(found, Crash), "require_all lets none pass"
            arrivals_s = self._arrivals_s / candidate.load
            self.verdicts[candidate] = verdict(found, arrivals_s, self.base.slo_ttft_s, self.base.slo_tbt_s)

    def scenario(self, candidate: Candidate) -> Scenario:
        shape = candidate.shape
        return replace(
            self.base, prefill=shape.prefill, decode=shape.decode, coupled=shape.coupled, policy=candidate.policy,
            belief="" if candidate.belief is None else f"{candidate.belief:g}", seed=self.base.seed + candidate.seed,
            speedup=self.base.speedup * candidate.load,
        )  # fmt: skip


def changes_of(best: Candidate, policies: Sequence[str]) -> list[Change]:
    """(what, why, candidate): one step either side, other policies, beliefs that are off, and more or less load."""
    changes = [(str(shape), "one node moved", Candidate(shape, best.policy)) for shape in neighbours(best.shape)]
    changes += [(name, "another policy", replace(best, policy=name)) for name in policies if name != best.policy]
    changes += [(f"{b - 1:+.0%} at first", "costs believed", replace(best, belief=b)) for b in BELIEFS]
    changes += [(f"{load - 1:+.0%}", "load", replace(best, load=load)) for load in LOADS]
    return changes


def _print(console: Console, search: Search, ranking: Sequence[Final], changes: Sequence[Change], seeds: int) -> None:
    best = ranking[0].candidate
    console.print(_table(search, best_per_shape(search.verdicts), best, "The best policy of each shape"))
    if seeds > 1:
        console.print(_finals(ranking, f"The finalists over {seeds} seeds: mean (lowest to highest)"))
    console.print(_sensitivity(search, best, changes))
    console.print(f"Best: [bold]{best}[/bold]: {_words(ranking[0])}.", soft_wrap=True)
    second = next((final for final in ranking if final.candidate.shape != best.shape), None)
    if second is not None:
        console.print(f"Runner-up: {second.candidate}: {_words(second)}.", soft_wrap=True)
    console.print(_sureness(ranking, seeds), soft_wrap=True)
    if search.trace.skipped:
        said = left_out(search.trace.skipped, search.trace.first_skipped)
        console.print(said, style="yellow", markup=False, soft_wrap=True)
    console.print(
        f"All figures are from {len(search.verdicts)} simulations of {search.num_requests} requests of "
        f"{escape(search.base.trace)}, seed {search.base.seed}{f' and {seeds - 1} after it' if seeds > 1 else ''}; "
        "nothing was measured on hardware. Goodput is per second of arrivals.",
        soft_wrap=True, style="dim",
    )  # fmt: skip
    console.print(f"See it whole: {command(search.scenario(best))}", soft_wrap=True, style="dim")


def _words(said: Final) -> str:
    """Means; and between what they lie, where there is a between."""
    goodput, capacity = said.goodput_per_s, said.capacity
    between = "" if capacity.low == capacity.high else f" ({percent(capacity.low)} to {percent(capacity.high)})"
    return f"{goodput.mean:.3f} effective requests/s, {percent(capacity.mean)} % of all within both limits{between}"


def _sureness(ranking: Sequence[Final], seeds: int) -> str:
    same = "; ".join(str(final.candidate) for final in tied(ranking))
    if seeds == 1:
        return f"One seed does not tell how sure that is.{f' As many on it: {same}.' if same else ''}"
    if same:
        return (
            f"Tied with the best, their ranges overlap: {same}. The best is the one of the highest mean; more "
            "--seeds, --requests or a higher --speedup may tell them apart."
        )
    return f"No other finalist's range reaches the best's over {seeds} seeds."


def _finals(ranking: Sequence[Final], title: str) -> Table:
    table = _plain(title, "candidate", "")
    same = [final.candidate for final in tied(ranking)]
    for final in ranking:
        mark = "*" if final is ranking[0] else "tied" if final.candidate in same else ""
        goodput, capacity, strain = final.goodput_per_s, final.capacity, final.strain
        table.add_row(
            str(final.candidate),
            mark,
            f"{goodput.mean:.3f} ({goodput.low:.3f} to {goodput.high:.3f})",
            f"{percent(capacity.mean)} ({percent(capacity.low)} to {percent(capacity.high)})",
            f"{strain.mean * 100:.0f} ({strain.low * 100:.0f} to {strain.high * 100:.0f})",
        )
    return table


def _table(search: Search, candidates: Sequence[Candidate], best: Candidate, title: str) -> Table:
    table = _plain(title, "shape", "policy")
    for candidate in candidates:
        said = search.verdicts[candidate]
        star = " *" if candidate == best else ""
        table.add_row(f"{candidate.shape}{star}", candidate.policy, *_cells(said))
    return table


def _sensitivity(search: Search, best: Candidate, changes: Sequence[Change]) -> Table:
    """How goodput changes with them, on the first seed."""
    table = _plain("Sensitivity of the best, on the first seed", "change", "")
    base = search.verdicts[best].goodput_per_s
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
