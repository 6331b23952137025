"""Benchmark results of two machines on one day stand side by side, also where both CPUs have one name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import record


def cpu(model: int) -> dict[str, str]:
    return {"model name": "AMD EPYC (TM) Processor", "cpu family": "25", "model": str(model), "flags": "avx2 sse"}


def test_two_generations_under_one_name_do_not_overwrite_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    for model in (1, 17):
        monkeypatch.setattr(record, "_cpu", lambda: cpu(model))  # noqa: B023 - called at once
        record.save("engine", {"value": model})
    found = sorted(tmp_path.iterdir())
    assert [path.name.partition("-engine-")[2] for path in found] == [
        "amd-epyc-tm-processor-f25-m1.json",
        "amd-epyc-tm-processor-f25-m17.json",
    ]
    kept = json.loads(found[1].read_text())
    assert kept["value"] == 17
    assert kept["machine"]["cpu"] == "AMD EPYC (TM) Processor family 25 model 17"
    assert kept["machine"]["isa"] == ["avx2"]
