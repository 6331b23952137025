"""docs/overload.md: the command that it gives is the very case that its benchmark runs."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

from benchmarks.overload import POOLS, Case, config_of
from cli import simulating
from cli.scenario import scenario
from cli.simulate import simulate
from workload.trace import Trace, TraceRequest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "overload.md"


def test_the_command_is_the_decode_bound_case() -> None:
    (said,) = re.findall(r"^halfmoon simulate (.*)$", PAGE.read_text(), re.MULTILINE)
    asked = simulate.make_context("simulate", shlex.split(said)).params
    asked = {name: value for name, value in asked.items() if name not in ("sweeps", "seeds", "jobs", "out", "record")}
    requests = tuple(TraceRequest(at_s=at_s, input_tokens=1, output_tokens=1) for at_s in (0.0, 3.0))
    ticked = Trace(source="chat", block_tokens=512, requests=requests)
    case = Case(pool=POOLS["decode-bound"], policy="forecast", speedup=2.0, seed=1, requests=0)
    found = simulating.config_of(scenario(asked), ticked)
    assert replace(found, shadows=False) == config_of(case)
