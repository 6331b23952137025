"""Shell: `halfmoon plan`: which cluster to build of so many GPUs, found by simulating the candidates."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import click
from rich.console import Console
from rich.markup import escape

from cli.parallel import Crash, cores, require_all
from cli.planned import Planned, answer, counted_runs, no_answer
from cli.planning import (
    Candidate,
    Final,
    Verdict,
    best_of_kinds,
    changed,
    changes_of,
    finalists,
    finals,
    first_round,
    ladder,
    next_round,
    num_nodes,
    on_seeds,
    verdict,
)
from cli.scenario import NODES_MAX, Scenario, command, scenario
from cli.simulate import WORKLOAD_OPTIONS, run_shown, with_options
from cli.simulating import Job, config_of, hardware_of, trace_of
from cli.tables import make_console
from report.notices import left_out

REQUESTS = 1000
"""Of the trace that each candidate serves, unless told otherwise: enough for a steady state, soon done."""

POLICIES = "baseline,early,predictive,forecast"
GOAL = 90.0
"""Per cent of the requests: below it a cluster does not keep the limits. That of docs/coupled.md."""

ALONE = 0.05
"""Of the load: so little that requests hardly meet."""

EXIT_NO_ANSWER = 3


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
    "--chunks",
    default="",
    help="Tokens of one pass, to choose from.  [default: the preset's and its halves, five times]",
)
@click.option(
    "--goal",
    type=click.FloatRange(0, 100, min_open=True),
    default=GOAL,
    show_default=True,
    help="Per cent of all requests that must keep both limits.",
)
@click.option(
    "--seeds", type=click.IntRange(1, 100), default=3, show_default=True, help="On which the finalists are compared."
)
@click.option("--jobs", type=click.IntRange(1), help="Simulations at once.  [default: all cores]")
def plan(
    gpus: int,
    gpus_per_node: int,
    policies: str,
    chunks: str,
    goal: float,
    seeds: int,
    jobs: int | None,
    **given: object,
) -> None:
    """Find the prefill:decode ratio, chunk and policy with the highest goodput, the runner-up, and how sure that is.

    Every figure comes from simulating the first --requests of the trace (1000 unless given): the search on one seed,
    its finalists on --seeds. Exit code 3: no candidate keeps the limits.
    """
    nodes = num_nodes(gpus, gpus_per_node)
    names = list(dict.fromkeys(name.strip() for name in policies.split(",")))
    base = scenario({"requests": REQUESTS} | {k: v for k, v in given.items() if v is not None}, "plan")
    for name in names:
        config_of(replace(base, policy=name))
    sizes = ladder(hardware_of(base).tokens_per_pass_max, chunks)
    search = Search(base, jobs or cores())
    search.run(first_round(nodes, names[-1], sizes), "search")
    while wanted := next_round(search.verdicts, names, sizes):
        search.run(wanted, "search")
    chosen = finalists(search.verdicts)
    search.run([one for candidate in chosen for one in on_seeds(candidate, seeds)], "other seeds")
    ranking = finals(search.verdicts, chosen, seeds)
    console = make_console()
    if ranking[0].capacity.mean * 100 < goal:
        twice, alone = more_nodes(ranking[0].candidate, base.speedup)
        search.run([one for one in (twice, alone) if one is not None], "more nodes, less load")
        console.print(*no_answer(search.planned(ranking, seeds, goal), twice, alone), sep="\n", soft_wrap=True)
        search.say(console, ranking[0].candidate, seeds)
        sys.exit(EXIT_NO_ANSWER)
    changes = changes_of(ranking[0].candidate, best_of_kinds(search.verdicts), names, sizes, base, search.hides)
    search.run([candidate for _, _, candidate in changes], "sensitivity")
    console.print(*answer(search.planned(ranking, seeds, goal), changes), sep="\n", soft_wrap=True)
    search.say(console, ranking[0].candidate, seeds)


def more_nodes(best: Candidate, speedup: float) -> tuple[Candidate | None, Candidate]:
    """It with twice its nodes of each role, and with hardly a request at a time: what more nodes give, and could.

    None: so many are not simulated.
    """
    prefill, decode, coupled = (2 * nodes for nodes in (best.shape.prefill, best.shape.decode, best.shape.coupled))
    alone = changed(best, speedup=speedup * ALONE)
    if prefill + decode + coupled > NODES_MAX:
        return None, alone
    return changed(best, prefill=prefill, decode=decode, coupled=coupled), alone


class Search:
    """What has been simulated so far, each candidate on the same arrivals.

    Attributes:
        hides: whether the hardware as asked hides weights (Hardware.mixed_hides_weights).
        runs: simulations by what they were for.
    """

    def __init__(self, base: Scenario, num_processes: int) -> None:
        self.trace = trace_of(base)
        self.base = base
        self.verdicts: dict[Candidate, Verdict] = {}
        self.runs: dict[str, int] = {}
        self.hides = hardware_of(base).mixed_hides_weights
        self._num_processes = num_processes
        self._span_s = self.trace.requests[-1].at_s - self.trace.requests[0].at_s

    def run(self, candidates: Sequence[Candidate], what: str) -> None:
        """Simulate those that have not been, and note their verdicts.

        Raises:
            Failed: one did not finish, naming it and how to repeat it.
        """
        new = [candidate for candidate in dict.fromkeys(candidates) if candidate not in self.verdicts]
        jobs = [Job(str(candidate), self.scenario(candidate)) for candidate in new]
        results = run_shown(jobs, self._num_processes, what)
        require_all(results, [(job.label, command(job.scenario)) for job in jobs])
        for candidate, job, found in zip(new, jobs, results, strict=True):
            assert not isinstance(found, Crash), "require_all lets none pass"
            asked = job.scenario
            self.verdicts[candidate] = verdict(found, self._span_s / asked.speedup, asked.slo_ttft_s, asked.slo_tbt_s)
        self.runs[what] = self.runs.get(what, 0) + len(new)

    def scenario(self, candidate: Candidate) -> Scenario:
        shape = candidate.shape
        asked = replace(
            self.base, prefill=shape.prefill, decode=shape.decode, coupled=shape.coupled, policy=candidate.policy,
            chunk=candidate.chunk, seed=self.base.seed + candidate.seed,
        )  # fmt: skip
        return replace(asked, **dict(candidate.changes))  # type: ignore[arg-type]

    def planned(self, ranking: Sequence[Final], seeds: int, goal: float) -> Planned:
        return Planned(verdicts=self.verdicts, ranking=ranking, seeds=seeds, goal=goal)

    def say(self, console: Console, best: Candidate, seeds: int) -> None:
        """What all of it is from, and how to see the best, or the nearest, whole."""
        if self.trace.skipped:
            said = left_out(self.trace.skipped, self.trace.first_skipped)
            console.print(said, style="yellow", markup=False, soft_wrap=True)
        console.print(
            f"All figures are from {counted_runs(self.runs)} of {len(self.trace.requests)} requests of "
            f"{escape(self.base.trace)}, seed {self.base.seed}"
            f"{f' and {seeds - 1} after it' if seeds > 1 else ''}; nothing was measured on hardware. "
            "Goodput is per second of arrivals.",
            soft_wrap=True, style="dim",
        )  # fmt: skip
        console.print(f"See it whole: {command(self.scenario(best))}", soft_wrap=True, style="dim")
