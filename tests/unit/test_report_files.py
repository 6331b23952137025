"""A run comes back from its files as it was; other files are refused by name."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from halfmoon.errors import ConfigError
from report.files import REQUESTS, SUMMARY, load, save
from report.records import Run
from report.statistics import statistics
from tests.report_runs import row, run, seeded_run


def saved(made: Run, directory: Path) -> Path:
    save(made, statistics(made), directory)
    return directory


def test_a_run_comes_back(tmp_path: Path) -> None:
    made = seeded_run(requests=200)
    assert load(saved(made, tmp_path / "new" / "folder")) == made


def test_a_run_without_requests_comes_back(tmp_path: Path) -> None:
    assert load(saved(run(), tmp_path)) == run()


def test_columns_keep_their_types_where_nothing_has_a_value(tmp_path: Path) -> None:
    schema = pq.read_schema(saved(run(row()), tmp_path) / REQUESTS)
    assert str(schema.field("ttft_s").type) == "double"
    assert str(schema.field("hit_tokens_dram").type) == "int64"


def test_the_summary_has_every_figure(tmp_path: Path) -> None:
    made = seeded_run(requests=200)
    said = json.loads((saved(made, tmp_path) / SUMMARY).read_text())
    assert (said["digest"], said["settings"], said["counters"]) == (made.digest, made.settings, made.counters)
    assert said["statistics"] == json.loads(json.dumps(asdict(statistics(made))))


def test_a_later_run_replaces_an_earlier_one(tmp_path: Path) -> None:
    saved(seeded_run(requests=200), tmp_path)
    assert load(saved(run(row()), tmp_path)) == run(row())


def test_settings_that_no_file_can_hold_are_refused(tmp_path: Path) -> None:
    for bad in (object(), float("nan")):
        with pytest.raises(ConfigError, match="settings"):
            saved(run(settings={"seed": bad}), tmp_path)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"config out: .*file/x"):
        saved(run(), tmp_path / "file" / "x")


@pytest.mark.parametrize("damage", ["missing", "not json", "another format", "no row", "unknown field"])
def test_files_that_are_no_run_are_refused(tmp_path: Path, damage: str) -> None:
    directory = saved(seeded_run(requests=5), tmp_path / "run")
    if damage == "missing":
        (directory / REQUESTS).unlink()
    elif damage == "not json":
        (directory / SUMMARY).write_text("{")
    elif damage == "another format":
        (directory / SUMMARY).write_text(json.dumps({"halfmoon_run": 99}))
    elif damage == "no row":
        (directory / REQUESTS).write_bytes((directory / "samples.parquet").read_bytes())
    else:
        (directory / SUMMARY).write_text(json.dumps({"halfmoon_run": 1, "title": "x"}))
    with pytest.raises(ConfigError, match="config directory"):
        load(directory)


def test_equal_runs_are_equal_files(tmp_path: Path) -> None:
    made = replace(seeded_run(requests=50), wall_s=1.0)
    first, second = saved(made, tmp_path / "a"), saved(made, tmp_path / "b")
    for name in (SUMMARY, REQUESTS):
        assert (first / name).read_bytes() == (second / name).read_bytes()
