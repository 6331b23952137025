"""Shell: a run as files: what it takes to look at it again, or to ask it something that no table answers.

`requests.parquet` (a row per request), `samples.parquet` (a row per second), `summary.json` (everything else: settings,
digest, counters, and every figure of report.statistics). `load` makes the same Run of them again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from halfmoon.errors import ConfigError
from halfmoon.types import Outcome
from report.records import LoadSample, RequestRow, Run
from report.statistics import Statistics

FORMAT = 1
REQUESTS, SAMPLES, SUMMARY = "requests.parquet", "samples.parquet", "summary.json"

ARROW_TYPES: dict[object, pa.DataType] = {
    str: pa.string(), int: pa.int64(), float: pa.float64(), float | None: pa.float64(), Outcome: pa.string(),
    tuple[int, ...]: pa.list_(pa.int64()),
}  # fmt: skip


def save(run: Run, figures: Statistics, directory: Path) -> None:
    """Write the three files, replacing those of an earlier run; makes the directory.

    Raises:
        ConfigError: the directory cannot be written, or a setting is no JSON value.
    """
    try:
        text = json.dumps(summary(run, figures), indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ConfigError(key="settings", value=str(error), expected="names and finite JSON values") from error
    try:
        directory.mkdir(parents=True, exist_ok=True)
        pq.write_table(_table(run.requests, RequestRow), directory / REQUESTS)
        pq.write_table(_table(run.samples, LoadSample), directory / SAMPLES)
        (directory / SUMMARY).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(key="out", value=str(directory), expected=f"a directory to write to ({error})") from error


def summary(run: Run, figures: Statistics) -> dict[str, object]:
    """What is in summary.json: `run`'s fields but its rows, and every figure."""
    rows = ("requests", "samples")
    return {
        "halfmoon_run": FORMAT,
        **{f.name: _plain(getattr(run, f.name)) for f in fields(Run) if f.name not in rows},
        "statistics": asdict(figures),
    }


def load(directory: Path) -> Run:
    """The run that `save` wrote.

    Raises:
        ConfigError: a file is missing, unreadable, or of another format.
    """
    try:
        said = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
        requests = pq.read_table(directory / REQUESTS).to_pylist()
        samples = pq.read_table(directory / SAMPLES).to_pylist()
    except (OSError, ValueError) as error:
        raise _unreadable(directory, str(error)) from error
    if not isinstance(said, dict) or said.get("halfmoon_run") != FORMAT:
        raise _unreadable(directory, f"{SUMMARY} has no halfmoon_run: {FORMAT}")
    try:
        return Run(
            requests=tuple(RequestRow(**entry | {"outcome": Outcome(entry["outcome"])}) for entry in requests),
            samples=tuple(_sample(entry) for entry in samples),
            **_run_fields(said),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(directory, f"{type(error).__name__}: {error}") from error


def _run_fields(said: Mapping[str, Any]) -> dict[str, Any]:
    known = {f.name: said[f.name] for f in fields(Run) if f.name in said}
    return known | {"residuals": {term: tuple(pair) for term, pair in said["residuals"].items()}}


def _table(rows: tuple[RequestRow, ...] | tuple[LoadSample, ...], kind: type) -> pa.Table:
    """Column by column, in the fields' order, with their types even where there is no row."""
    hints = get_type_hints(kind)
    schema = pa.schema([(f.name, ARROW_TYPES[hints[f.name]]) for f in fields(kind)])
    columns = [pa.array([_plain(getattr(row, f.name)) for row in rows], type=schema.field(f.name).type)
               for f in fields(kind)]  # fmt: skip
    return pa.Table.from_arrays(columns, schema=schema)


def _sample(entry: dict[str, Any]) -> LoadSample:
    free = entry.get("decode_free_blocks") or ()  # files of before this was sampled have none
    return LoadSample(**{**entry, "decode_free_blocks": tuple(free)})


def _plain(value: object) -> object:
    if isinstance(value, Outcome):
        return value.value
    return dict(value) if isinstance(value, Mapping) else value


def _unreadable(directory: Path, why: str) -> ConfigError:
    return ConfigError(key="directory", value=str(directory), expected=f"{SUMMARY} and its tables ({why})")
