"""docs/simulate.md names the folders that its commands really write to."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from cli.scenario import scenario
from cli.simulate import default_name, simulate, with_seeds

PAGE = Path(__file__).resolve().parents[2] / "docs" / "simulate.md"


def test_reports_lie_where_the_page_says() -> None:
    text = PAGE.read_text().replace("\\\n", " ")
    reports = list(re.finditer(r"^Report: (\S+)$", text, re.MULTILINE))
    assert len(reports) >= 2
    for report in reports:
        said = re.findall(r"^halfmoon simulate (.*)$", text[: report.start()], re.MULTILINE)[-1]
        asked = simulate.make_context("simulate", shlex.split(said)).params
        sweeps, seeds, _, out = (asked.pop(name) for name in ("sweeps", "seeds", "jobs", "out"))
        assert out is None
        said_to = scenario(asked)
        name = default_name(said_to, with_seeds(sweeps, said_to.seed, seeds))
        assert report.group(1) == f"runs/{name}/report.html"
