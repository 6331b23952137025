"""What a user does to see the blame work: `simulate --record` with one belief ten times too high, then `replay`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.main import main
from tests.traces import FIXTURE

OVER = 10.0
RUN = (
    "--trace", str(FIXTURE), "--requests", "150", "--speedup", "4", "--prefill", "4", "--decode", "3",
    "--slo-ttft", "10", "--policy", "baseline", "--belief-bias", "0", "--fit", "frozen",
)  # fmt: skip


def halfmoon(*words: str) -> str:
    result = CliRunner().invoke(main, words)
    assert result.exit_code in (0, 1), result.output
    return result.output


def recording(directory: Path, wrong: str) -> Path:
    file = directory / "run.jsonl"
    said = halfmoon("simulate", *RUN, "--belief", f"{wrong}=10", "--record", str(file), "--out", str(directory / "out"))
    assert f"Recording: {file}" in said
    return file


def factors(text: str) -> dict[str, float]:
    """The last column of the table of terms."""
    rows = re.findall(r"^ (queue|prefill|transfer|decode) \*? +\d.* (\d+\.\d\d) *$", text, re.MULTILINE)
    return {term: float(factor) for term, factor in rows}


@pytest.mark.parametrize("wrong", ["prefill", "transfer", "decode", "queue"])
def test_the_commands_name_the_cost_that_was_wrong_by_what_happened_alone(wrong: str, tmp_path: Path) -> None:
    file = recording(tmp_path, wrong)
    text = halfmoon("replay", str(file), "--counterfactual")
    assert f"To blame: {wrong}, off by " in text
    found = factors(text)
    assert 0.5 * OVER < found.pop(wrong) < 1.2 * OVER
    assert len(found) == 3
    assert max(found.values()) < 1.5
    header, *rest = file.read_text().splitlines(keepends=True)
    told = json.loads(header)
    assert told["config"].pop("prior")
    file.write_text("".join([json.dumps(told) + "\n", *rest]))
    assert halfmoon("replay", str(file), "--counterfactual") == text
    if wrong == "queue":
        return
    assert "The first difference is at" in halfmoon("replay", str(file))  # the prior was what it decided by


def test_a_simulated_recording_is_decided_again_and_no_file_is_touched(tmp_path: Path) -> None:
    file = recording(tmp_path, "prefill")
    text = halfmoon("replay", str(file))
    assert "Every decision is bit-equal" in text
    assert "It ends because: the simulation ended." in text
    before = file.read_text()
    halfmoon("simulate", *RUN, "--belief", "prefill=10", "--record", str(file), "--out", str(tmp_path / "out"))
    assert file.read_text() == before == (tmp_path / "run.2.jsonl").read_text()


def test_a_recording_is_of_one_conductor_in_one_run(tmp_path: Path) -> None:
    words = ("simulate", *RUN, "--record", str(tmp_path / "run.jsonl"))
    for more in (("--sweep", "seed=1,2"), ("--faults", "conductor=1")):
        result = CliRunner().invoke(main, [*words, *more])
        assert result.exit_code == 2
        assert "--record" in result.output
    nowhere = CliRunner().invoke(main, ["simulate", *RUN, "--record", str(tmp_path / "no" / "run.jsonl")])
    assert nowhere.exit_code == 1
    assert "simulate.record" in nowhere.output
