"""Shell: what the cluster of benchmarks/conductor.py holds, and a peer's radix tree with the same blocks and prompts.

This file runs in two places: `run_peer` in the project's environment, the rest under .venv-bench, where nothing but the
peer is wanted.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VENV = Path(__file__).resolve().parents[1] / ".venv-bench"
PACKAGE = "ai-dynamo-runtime==1.6.1"
TIMEOUT_S = 600.0
PROMPT_BLOCKS = 188
SHARED_BLOCKS = 8
"""Of a system prompt with which all prompts begin, so that every worker holds some of every prompt."""
HOLDERS_SHARE = 50
"""Every worker holds one of so many prompts, so every prompt is with some two of 100 workers, and one more."""


@dataclass(frozen=True)
class Population:
    """chains: the blocks of each prompt, 16 bytes each. held: for each worker, the prompts whose blocks it has."""

    chains: list[list[bytes]]
    held: list[list[int]]


def population(blocks: int, workers: int) -> Population:
    rng = random.Random(1)
    shared = [rng.randbytes(16) for _ in range(SHARED_BLOCKS)]
    own = PROMPT_BLOCKS - SHARED_BLOCKS
    chains = [[*shared, *(rng.randbytes(16) for _ in range(own))] for _ in range(blocks // own)]
    held = [rng.sample(range(len(chains)), k=max(1, len(chains) // HOLDERS_SHARE)) for _ in range(workers)]
    for number in range(len(chains)):  # so that every prompt is somewhere
        held[number % workers].append(number)
    return Population(chains, held)


def prompts(people: Population, count: int) -> list[int]:
    rng = random.Random(2)
    return [rng.randrange(len(people.chains)) for _ in range(count)]


def percentiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50_us": round(1e6 * cuts[49], 1), "p99_us": round(1e6 * cuts[98], 1)}


def run_peer(blocks: int, workers: int, count: int) -> dict[str, Any] | None:
    """The peer's figures; None, with a line that says why: it does not work here. Installs it on first use."""
    python = str(VENV / "bin" / "python")
    if not VENV.exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", PACKAGE], check=True)
    order = [python, __file__, str(blocks), str(workers), str(count)]
    done = subprocess.run(order, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(f"{PACKAGE} does not work here: {reason}")
        return None
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


# ---- under .venv-bench ---------------------------------------------------------------------------------------------


def measure(blocks: int, workers: int, count: int) -> dict[str, Any]:
    from dynamo._core import RadixTree

    people, tree = population(blocks, workers), RadixTree()
    names = [[int.from_bytes(block[:8], "little") for block in chain] for chain in people.chains]
    building_s = time.perf_counter()
    for worker, numbers in enumerate(people.held):
        for event, number in enumerate(numbers):
            tree.apply_event(worker, _stored(event, names[number]))
    building_s = time.perf_counter() - building_s
    seconds = []
    for number in prompts(people, count):
        began_s = time.perf_counter()
        found = tree.find_matches(names[number]).scores
        seconds.append(time.perf_counter() - began_s)
        assert max(found.values()) == PROMPT_BLOCKS, "the prompt is held by somebody"
        assert len(found) == workers, "and the system prompt by everybody"
    copies = sum(len(numbers) for numbers in people.held) * PROMPT_BLOCKS
    return {"peer": PACKAGE, **percentiles(seconds), "ingest_blocks_per_s": round(copies / building_s)}


def _stored(event_id: int, names: list[int]) -> bytes:
    blocks = [{"block_hash": name, "tokens_hash": name, "mm_extra_info": None} for name in names]
    stored = {"parent_hash": None, "blocks": blocks}
    return json.dumps({"event_id": event_id, "data": {"stored": stored}, "dp_rank": 0}).encode()


if __name__ == "__main__":
    print(json.dumps(measure(*(int(text) for text in sys.argv[1:4]))))
