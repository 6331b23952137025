"""Logs are one line each whatever is in them; metrics have bounded labels and a page."""

from __future__ import annotations

import logging
import shlex
import urllib.request

import pytest

from core.messages import LoadReport
from halfmoon.errors import ConfigError, Conflict
from node.metrics import GAUGES, instrument
from service.logs import LINE_CHARS_MAX, LineFormatter, fields
from service.metrics import BoundedLabel, Metrics


def line(message: str, *args: object, **more: object) -> str:
    record = logging.getLogger("a.b").makeRecord("a.b", logging.WARNING, "f", 1, message, args, None, extra=None)
    for name, value in more.items():
        setattr(record, name, value)
    return LineFormatter("p 0").format(record)


def test_a_record_is_one_line_of_keys_and_values() -> None:
    text = line("lost %s\nand found", "d0", **fields(term=3, why='a "quoted" word'))
    assert "\n" not in text
    parts = dict(part.split("=", 1) for part in shlex.split(text))
    assert parts["time"].endswith("Z")
    assert (parts["level"], parts["node"], parts["from"], parts["term"]) == ("warning", "p 0", "a.b", "3")
    assert parts["msg"] == "lost d0\\nand found"
    assert parts["why"] == 'a "quoted" word'


def test_an_exception_stays_on_the_line_and_the_line_has_an_end() -> None:
    try:
        raise ValueError("deep\nwater")
    except ValueError as error:
        text = line("failed", exc_info=(ValueError, error, error.__traceback__))
    assert "\n" not in text
    assert "ValueError: deep" in text
    assert len(line("x" * 20_000)) == LINE_CHARS_MAX


def test_label_values_are_bounded() -> None:
    bounded = BoundedLabel(2)
    assert [bounded(value) for value in ("a", "b", "c", "a", "d")] == ["a", "b", "other", "a", "other"]


class Loop:
    passes, pass_s, last_load = 7, 1.5, LoadReport(queued_tokens=11, held_blocks=2)


def test_the_page_shows_a_workers_last_report() -> None:
    metrics = Metrics()
    instrument(Loop(), metrics)  # type: ignore[arg-type]
    address, close = metrics.serve("127.0.0.1:0")
    try:
        page = urllib.request.urlopen(f"http://{address}/metrics", timeout=5).read().decode()
        with pytest.raises(Conflict, match="in use"):
            Metrics().serve(address)
    finally:
        close()
    for expected in ("queued_tokens 11.0", "held_blocks 2.0", "passes 7.0", "pass_seconds 1.5"):
        assert f"halfmoon_worker_{expected}" in page
    assert all(f"halfmoon_worker_{name}" in page for name in GAUGES)


@pytest.mark.parametrize("address", ["9090", "127.0.0.1:", "127.0.0.1:http"])
def test_a_metrics_address_is_host_and_port(address: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        Metrics().serve(address)


def test_durations_say_so_in_their_name() -> None:
    metrics = Metrics()
    metrics.seconds("pass_seconds", "x").observe(0.02)
    with pytest.raises(AssertionError):
        metrics.seconds("pass_time", "x")
