"""Shell: runs a simulation: its generators, its wall clock, and what it takes to run it again."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from halfmoon.errors import Failed
from report.records import Run
from simulator.config import SimConfig
from simulator.policies import make_conductor
from simulator.simulation import MakeConductor, Simulation
from workload.trace import Trace

GC_OBJECTS = 100_000
"""New objects between two looks of the garbage collector."""


def simulate(
    trace: Trace,
    config: SimConfig,
    *,
    again: str = "",
    conductor: MakeConductor = make_conductor,
    on_progress: Callable[[int], None] = lambda ended: None,
) -> Run:
    """Run a trace through a simulated cluster.

    Args:
        again: the command that runs this again, for the message of what must not happen; empty: its settings are told.
        conductor: makes the conductor's machine: by default from the names in `config`.
        on_progress: told now and then how many requests have ended.

    Raises:
        ConfigError: an unknown policy. InvalidRequest: a request of the trace that cannot be.
        Failed: an invariant did not hold; its message says how to see it again.
    """
    began_s = time.perf_counter()
    simulation = Simulation(trace, config, lambda name: random.Random(f"{config.seed}/{name}"), conductor)
    try:
        with few_collections():
            result = simulation.run(on_progress)
    except AssertionError as error:
        at_s = simulation.world.now_s - simulation.began_s
        how = again or ", ".join(f"{name} {value}" for name, value in settings_of(trace, config).items())
        raise Failed(f"at {at_s:.6f} s: {error}\nagain: {how}") from error
    return Run(
        title=f"{trace.source} on {pools(config)}, {config.hardware.name}",
        settings=settings_of(trace, config),
        requests=result.rows,
        samples=result.samples,
        duration_s=result.duration_s,
        wall_s=time.perf_counter() - began_s,
        digest=result.digest,
        counters={**result.counters, "sim_events": result.num_events, "sim_passes": result.num_passes},
        residuals=result.residuals,
    )


@contextmanager
def few_collections() -> Iterator[None]:
    """Let the garbage collector look less often: a run makes few cycles, and holds much that it would scan."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_OBJECTS, 50, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def pools(config: SimConfig) -> str:
    """ "8P+8D", "16C", "4P+4D+2C"."""
    counts = ((config.prefill, "P"), (config.decode, "D"), (config.coupled, "C"))
    return "+".join(f"{count}{letter}" for count, letter in counts if count)


def settings_of(trace: Trace, config: SimConfig) -> dict[str, object]:
    """What it takes to run it again, in the order to print it."""
    return {
        "trace": trace.source,
        "requests": len(trace.requests),
        "nodes": pools(config),
        "hardware": f"{config.hardware.name} ({config.hardware.source})",
        "placement": config.placement,
        "admission": config.admission,
        "eviction": config.eviction,
        "speedup": config.speedup,
        "jitter_s": config.jitter_s,
        "seed": config.seed,
        "output_factor": config.output_factor,
        "outputs_told": config.outputs_told,
        "slo_ttft_s": config.slo_ttft_s,
        "slo_tbt_s": config.slo_tbt_s,
        "chunk_tokens": config.hardware.tokens_per_pass_max,
        "decode_room_tokens": config.hardware.decode_blocks * config.hardware.block_tokens,
        "noise": config.noise,
        "step_noise": config.step_noise,
        "belief_bias": config.belief_bias,
        "belief_factors": dict(config.belief_factors),
        "learn": config.learn,
        "fit": config.conductor.fit.value,
        "faults": str(config.faults) or "none",
        "macro": config.macro,
        "check": config.check,
    }
