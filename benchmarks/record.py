"""Shell: what every benchmark needs: the machine in words, statistics with an interval, raw results kept in a file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
RESAMPLES = 2000
LOAD_AT_START = os.getloadavg()[0]  # when a benchmark imports this


def machine() -> dict[str, Any]:
    """CPU model, instruction sets that matter, cores, memory, kernel, Python and torch versions; the load."""
    import torch

    fields = _cpu()
    flags = fields.get("flags", "").split()
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": f"{_cpu_name(fields)} family {fields.get('cpu family')} model {fields.get('model')}",
        "isa": [f for f in ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16") if f in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_gib, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_at_start": LOAD_AT_START,
        "load_at_end": os.getloadavg()[0],
    }


def _cpu() -> dict[str, str]:
    info = Path("/proc/cpuinfo").read_text()
    return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in info.splitlines())}


def _cpu_name(fields: dict[str, str]) -> str:
    return fields.get("model name") or platform.processor() or platform.machine()


def cpu_slug() -> str:
    """This CPU as a part of a file's name. One name covers several generations, so family and model are in it."""
    fields = _cpu()
    words = f"{_cpu_name(fields)} f{fields.get('cpu family', '')} m{fields.get('model', '')}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def save(name: str, data: dict[str, Any]) -> Path:
    """Write results/<date>-<name>-<cpu>.json with the machine's description beside the data; returns the path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{datetime.datetime.now(tz=datetime.UTC).date()}-{name}-{cpu_slug()}.json"
    path.write_text(json.dumps({"benchmark": name, "machine": machine(), **data}, indent=1) + "\n")
    return path


def interval(
    values: Sequence[float], statistic: Callable[[Sequence[float]], float] = statistics.median, seed: int = 1
) -> tuple[float, float]:
    """A 95 % bootstrap interval of a statistic."""
    rng = random.Random(seed)
    found = sorted(statistic(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return found[int(0.025 * RESAMPLES)], found[int(0.975 * RESAMPLES)]


def quantile(values: Sequence[float], share: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
