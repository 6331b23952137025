"""One decision record out of a recording or an exported file, as `explain` shows it of a running cluster."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.main import main
from conductor.kept import find
from halfmoon.errors import InvalidRequest, NotFound, RecordingError
from halfmoon.types import RequestId
from tests.conductor_kit import Play, prompt, spec
from tests.unit.test_recording import Taped


def played(play: Play) -> dict[str, object]:
    """Three requests that end, and one that does not. The record of the second, as a cluster tells it."""
    for name in ("wave-1", "wave-2", "other", "open"):
        play.request(spec(name, tokens=prompt(40, seed=len(name))))
        if name != "open":
            play.cancel(name)
    record = play.machine.explain(RequestId("wave-2"))
    assert record is not None
    told: dict[str, object] = json.loads(json.dumps(record.as_json()))
    return told


def exported() -> tuple[list[str], dict[str, object]]:
    play = Play("p0 d0")
    told = played(play)
    records = [play.machine.explain(RequestId(name)) for name in ("wave-1", "wave-2", "other")]
    return [json.dumps(record.as_json()) + "\n" for record in records if record is not None], told


def taped() -> tuple[list[str], dict[str, object]]:
    play = Taped("p0 d0")
    told = played(play)
    play.machine.end_recording("closed")
    return play.lines, told


@pytest.mark.parametrize("made", [exported, taped])
def test_a_record_is_found_by_its_id_or_the_beginning_of_it(
    made: Callable[[], tuple[list[str], dict[str, object]]], tmp_path: Path
) -> None:
    lines, told = made()
    assert find(lines, "wave-2") == told
    assert find(lines, "oth")["request_id"] == "other"
    with pytest.raises(InvalidRequest, match="2 ids begin so"):
        find(lines, "wave")
    for name in ("open", "nobody", ""):
        with pytest.raises(NotFound, match=f"request '{name}': it is none of the 3 records in the file"):
            find(lines, name)
    file = tmp_path / "kept.jsonl"
    file.write_text("".join(lines))
    done = CliRunner().invoke(main, ["explain", "wave-2", "--file", str(file)])
    assert done.exit_code == 0, done.output
    assert "wave-2: cancelled" in done.output
    assert "placement algorithm1, admission forecast; the chosen are starred" in done.output
    whole = CliRunner().invoke(main, ["explain", "wave-2", "--file", str(file), "--json"])
    assert json.loads(whole.output) == told
    missing = CliRunner().invoke(main, ["explain", "nobody", "--file", str(file)])
    assert (missing.exit_code, missing.output.startswith("NotFound: request 'nobody'")) == (1, True)


def test_of_one_id_the_last_record_counts_and_the_whole_id_before_longer_ones() -> None:
    lines, _ = exported()
    again = {**json.loads(lines[0]), "request_id": "wave", "output_tokens": 1}
    lines += [json.dumps(again), json.dumps({**again, "output_tokens": 2})]
    assert find(lines, "wave")["output_tokens"] == 2


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "line 4.*no JSON"),
        ("[1]", "line 4.*neither a decision record nor a recording's header"),
        ('{"request_id": "x"}', "line 4.*a decision record has actuals_refused, choices, deadline_s"),
    ],
)
def test_a_line_that_is_no_record_is_named(line: str, why: str) -> None:
    with pytest.raises(RecordingError, match=why):
        find([*exported()[0], line], "wave-1")


def test_an_empty_file_has_no_record() -> None:
    with pytest.raises(NotFound, match="none of the 0 records"):
        find([], "r")
