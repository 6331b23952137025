"""Shell: what a simulated run costs on one core: CPU seconds and memory, single steps against macro-steps.

    python -m benchmarks.simulator [--repeats 5] [--exact-repeats 1]

The conversation trace on 8 prefill and 8 decode nodes of the paper's kind, twice as fast; and its first quarter and
half, since the cost should grow with the requests and no faster. Each run has a process of its own, and they go one
after another. That both ways give the same decisions is asserted by their digests.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import click
from rich import box
from rich.table import Table

from benchmarks.record import save
from benchmarks.simulations import console
from cli.parallel import Crash, run_all
from simulator.config import SimConfig
from simulator.presets import load_hardware
from simulator.run import simulate
from workload.files import CONVERSATION, read_trace
from workload.transforms import TICK_S

HARDWARE = "a800-llama-70b"
SHARES = (0.25, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """`share`: of the trace's requests, from the first on."""

    macro: bool
    share: float
    repeat: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """`memory_mib`: the largest resident size of the process, the interpreter and its libraries included."""

    requests: int
    events: int
    cpu_s: float
    wall_s: float
    memory_mib: float
    digest: str


def run_case(case: Case, progress: Callable[[float], None]) -> Cost:
    trace = read_trace(CONVERSATION)
    trace = replace(trace, requests=trace.requests[: round(case.share * len(trace.requests))])
    config = SimConfig(hardware=load_hardware(HARDWARE), speedup=2.0, jitter_s=TICK_S, macro=case.macro)
    began_s, cpu_s = time.perf_counter(), time.process_time()
    run = simulate(trace, config)
    return Cost(
        requests=len(run.requests),
        events=run.counters["sim_events"],
        cpu_s=time.process_time() - cpu_s,
        wall_s=time.perf_counter() - began_s,
        memory_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        digest=run.digest,
    )


def show(found: dict[Case, Cost]) -> None:
    table = Table(box=box.SIMPLE_HEAD, title=f"{CONVERSATION}, 8P+8D of {HARDWARE}, 2x, one core")
    for name in ("steps", "requests", "runs", "events", "CPU s (least to most)", "ms a request", "memory MiB"):
        table.add_column(name, justify="left" if name == "steps" else "right")
    for macro, share in dict.fromkeys((case.macro, case.share) for case in found):
        costs = [cost for case, cost in found.items() if (case.macro, case.share) == (macro, share)]
        cpu = [cost.cpu_s for cost in costs]
        median = statistics.median(cpu)
        table.add_row(
            "macro" if macro else "single",
            f"{costs[0].requests:,}",
            str(len(costs)),
            f"{costs[0].events:,}",
            f"{median:.1f} ({min(cpu):.1f} to {max(cpu):.1f})",
            f"{1000 * median / costs[0].requests:.2f}",
            f"{max(cost.memory_mib for cost in costs):.0f}",
        )
    console.print(table)


def check_same(found: dict[Case, Cost]) -> None:
    """One trace, one digest, whichever way it was run."""
    for share in SHARES:
        digests = {cost.digest for case, cost in found.items() if case.share == share}
        if len(digests) != 1:
            raise SystemExit(f"the runs of {share:.0%} of the trace differ: digests {sorted(digests)}")


@click.command()
@click.option("--repeats", default=5, show_default=True, help="With macro-steps, of each size.")
@click.option("--exact-repeats", default=1, show_default=True, help="With single steps, of each size.")
def main(repeats: int, exact_repeats: int) -> None:
    """What a simulated run costs: CPU seconds and memory, single steps against macro-steps."""
    counts = {True: repeats, False: exact_repeats}
    todo = [Case(macro=m, share=s, repeat=n) for m in counts for s in SHARES for n in range(counts[m])]
    found: dict[Case, Cost] = {}
    for case in todo:
        [result] = run_all(run_case, [case], 1)
        if isinstance(result, Crash):
            raise SystemExit(f"{case}: {result.why}")
        found[case] = result
        console.print(f"{case}: {result.cpu_s:.1f} CPU s")
    show(found)
    check_same(found)
    rows = [asdict(case) | asdict(cost) for case, cost in found.items()]
    console.print(f"raw: {save('simulator', {'command': sys.argv[1:], 'hardware': HARDWARE, 'runs': rows})}")


if __name__ == "__main__":
    main()
