"""Lines go to files of bounded size; records go to a file and a stream, and nobody waits for either."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from conductor.export import RecordExport
from conductor.settings import RecordsConfig
from halfmoon.errors import ConfigError, Unavailable
from service.lines import LineWriter
from service.registry import Registry
from tests.conductor_kit import Play, spec


class Stream:
    """A registry that takes entries, while it is there."""

    def __init__(self) -> None:
        self.away = False
        self.entries: list[str] = []

    async def append(self, stream: str, entries: list[str], length_max: int) -> None:
        assert (stream, length_max) == ("records", 10_000)
        if self.away:
            raise Unavailable("the registry does not answer")
        self.entries += entries


def export(registry: Stream, **settings: Any) -> RecordExport:
    return RecordExport(RecordsConfig(**settings), cast(Registry, registry))


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10.0):
        while not holds():  # noqa: ASYNC110  (what is waited for knows nothing of events)
            await asyncio.sleep(0.01)


# ---- lines ----


def test_a_log_is_rotated_and_the_oldest_file_goes(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    writer = LineWriter(path, bytes_max=10, files_max=3)
    for line in ("one", "two", "three", "four", "five", "six", "seven", "eight"):
        assert writer.offer(line)
    writer.close()
    writer.close()
    assert {p.name: p.read_text().split() for p in tmp_path.iterdir()} == {
        "records.jsonl": ["eight"],
        "records.jsonl.1": ["six", "seven"],
        "records.jsonl.2": ["four", "five"],
    }
    assert writer.refused == 0


def test_a_recording_that_is_full_ends_with_its_last_whole_line_and_a_word(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    writer = LineWriter(path, bytes_max=12, farewell=lambda why, lines: f"{lines} lines; {why}")
    for line in ("first", "second", "third", "4"):
        writer.offer(line)
    writer.close()
    assert path.read_text().splitlines() == ["first", "1 lines; it is full, at 12 bytes"]
    assert (writer.refused, writer.offer("5"), writer.refused) == (3, False, 4)


def test_a_recording_never_touches_an_earlier_one(tmp_path: Path) -> None:
    paths = []
    for _ in range(3):
        writer = LineWriter(tmp_path / "run.jsonl", bytes_max=100, fresh=True)
        writer.offer("x")
        writer.close()
        paths.append(writer.path.name)
    assert paths == ["run.jsonl", "run.2.jsonl", "run.3.jsonl"]
    assert [(tmp_path / name).read_text() for name in paths] == ["x\n"] * 3


def test_a_file_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a file that can be written \(No such file"):
        LineWriter(tmp_path / "no" / "such" / "run.jsonl", bytes_max=100)


def test_a_disk_that_takes_nothing_costs_the_lines_and_nothing_else() -> None:
    writer = LineWriter(Path("/dev/full"), bytes_max=1000, files_max=2)
    assert writer.offer("x")
    writer.close()
    assert (writer.refused, writer.failure) == (1, "")
    writer = LineWriter(Path("/dev/full"), bytes_max=1000)
    writer.offer("x")
    writer.close()
    assert writer.failure == "No space left on device"


# ---- records ----


def completed(sink: RecordExport, *names: str) -> None:
    play = Play("p0 d0")
    play.machine.tell_records(sink.offer)
    for name in names:
        play.request(spec(name))
        play.cancel(name)


def test_each_completed_record_is_a_line_and_an_entry(tmp_path: Path) -> None:
    async def story() -> None:
        stream = Stream()
        sink = export(stream, file=str(tmp_path / "records.jsonl"), stream="records")
        task = asyncio.create_task(sink.run())
        completed(sink, "a", "b")
        await until(lambda: len(stream.entries) == 2)
        task.cancel()
        sink.close()
        lines = (tmp_path / "records.jsonl").read_text().splitlines()
        assert lines == stream.entries
        told = [json.loads(line) for line in lines]
        assert [(r["request_id"], r["outcome"]) for r in told] == [("a", "cancelled"), ("b", "cancelled")]
        assert sink.counters == {"records_streamed": 2, "records_dropped_by_file": 0}

    asyncio.run(story())


def test_a_registry_that_is_away_costs_records_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conductor.export.RETRY_S", 0.01)

    async def story() -> None:
        stream = Stream()
        stream.away = True
        sink = export(stream, stream="records", waiting_max=2)
        completed(sink, "a", "b", "c")
        assert sink.counters["records_dropped_by_stream"] == 1
        task = asyncio.create_task(sink.run())
        await until(lambda: sink.counters["records_dropped_by_stream"] == 3)
        stream.away = False
        completed(sink, "d")
        await until(lambda: bool(stream.entries))
        task.cancel()
        assert [json.loads(e)["request_id"] for e in stream.entries] == ["d"]
        assert sink.counters == {
            "records_dropped_by_stream": 3, "records_streamed": 1, "records_dropped_by_file": 0,
        }  # fmt: skip

    asyncio.run(story())


def test_nothing_is_exported_unless_it_is_wanted() -> None:
    async def story() -> None:
        assert not export(Stream()).wanted
        assert export(Stream()).counters == {}

    asyncio.run(story())


def test_one_file_is_not_enough_to_rotate() -> None:
    with pytest.raises(ConfigError, match=r"records\.files_max: got 1; expected 2 or more"):
        RecordsConfig(files_max=1)
