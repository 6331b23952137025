"""Trace files: three formats read to the same values, and every malformed line named."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfmoon.errors import NotFound, TraceError
from tests.traces import FIXTURE, conversation_trace, fixture_trace
from workload.files import find_trace, read_trace, write_trace
from workload.formats import LINE_CHARS_MAX, parse_trace
from workload.statistics import statistics
from workload.trace import TraceRequest

MOONCAKE = """\
{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}
{"timestamp": 3000, "input_length": 1024, "output_length": 7, "hash_ids": [0, 2], "session": "a"}
"""
AZURE_2023 = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.2299600,3180,8
"""
AZURE_2024 = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:01+00:00,2399,6
"""
BURSTGPT = """\
Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45.5,GPT-4,1087,230,1317,API log
"""
BURSTGPT_SESSIONS = """\
Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,a,1.5,ChatGPT,472.0,18.0,490.0,Conversation log
"""


def parse(text: str, **options: object) -> tuple[TraceRequest, ...]:
    return parse_trace(text.splitlines(keepends=True), source="t", **options).requests  # type: ignore[arg-type]


def test_mooncake_keeps_its_clock_and_its_blocks() -> None:
    assert parse(MOONCAKE) == (
        TraceRequest(at_s=0.0, input_tokens=600, output_tokens=5, block_ids=(0, 1)),
        TraceRequest(at_s=3.0, input_tokens=1024, output_tokens=7, block_ids=(0, 2)),
    )


def test_azure_of_both_years_counts_from_its_first_line() -> None:
    first, second = parse(AZURE_2023)
    assert (first.at_s, first.input_tokens, first.output_tokens, first.block_ids) == (0.0, 4808, 10, ())
    assert second.at_s == pytest.approx(0.25)
    assert [r.at_s for r in parse(AZURE_2024)] == pytest.approx([0.0, 0.99007])
    zoned = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10T02:00:00+02:00,1,1\n2024-05-10T00:00:30Z,1,1\n"
    assert [r.at_s for r in parse(zoned)] == [0.0, 30.0]


def test_burstgpt_with_and_without_sessions() -> None:
    assert parse(BURSTGPT) == (
        TraceRequest(at_s=0.0, input_tokens=472, output_tokens=18),
        TraceRequest(at_s=40.5, input_tokens=1087, output_tokens=230),
    )
    assert parse(BURSTGPT_SESSIONS) == (TraceRequest(at_s=0.0, input_tokens=472, output_tokens=18),)


def test_columns_are_found_by_name_and_blank_lines_passed_over() -> None:
    text = "\nGeneratedTokens,TIMESTAMP,ContextTokens\n\n7,2023-11-16 18:17:03,9\n"
    assert parse(text) == (TraceRequest(at_s=0.0, input_tokens=9, output_tokens=7),)


GOOD = '{"timestamp": 10, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}'
BAD_MOONCAKE = {
    "no JSON": ('{"timestamp": 1', "", "a JSON object"),
    "no object": ("[1, 2]", "", "a JSON object"),
    "a missing field": ('{"timestamp": 11, "output_length": 5, "hash_ids": [0]}', "input_length", "this field"),
    "a negative length": (GOOD.replace("600", "-600"), "input_length", "from 1"),
    "a length that is 0": (GOOD.replace(": 5", ": 0"), "output_length", "from 1"),
    "a fraction of a token": (GOOD.replace(": 5", ": 5.5"), "output_length", "an integer"),
    "a length that is true": (GOOD.replace(": 5", ": true"), "output_length", "an integer"),
    "a length as text": (GOOD.replace(": 5", ': "5"'), "output_length", "an integer"),
    "an absurd length": (GOOD.replace(": 5", f": {1 << 25}"), "output_length", "16,777,216"),
    "no number": (GOOD.replace(": 10", ": NaN"), "timestamp", "finite"),
    "an endless time": (GOOD.replace(": 10", ": Infinity"), "timestamp", "finite"),
    "a negative time": (GOOD.replace(": 10", ": -10"), "timestamp", "0 or more"),
    "too few ids": (GOOD.replace("[0, 1]", "[0]"), "hash_ids", "2, one per 512"),
    "too many ids": (GOOD.replace("[0, 1]", "[0, 1, 2]"), "hash_ids", "2, one per 512"),
    "ids that are text": (GOOD.replace("[0, 1]", '["0", "1"]'), "hash_ids", "a list of integers"),
    "ids that are none": (GOOD.replace("[0, 1]", "null"), "hash_ids", "a list of integers"),
    "an earlier time": (GOOD.replace(": 10", ": 9"), "timestamp", "at least 0.010 s"),
    "too long a line": ("[" * (LINE_CHARS_MAX + 1), "", "1,048,576"),
    "deep nesting": ("[" * 100_000, "", "a JSON object"),
}


@pytest.mark.parametrize("case", BAD_MOONCAKE)
def test_a_malformed_line_is_named_or_counted(case: str) -> None:
    line, field, expected = BAD_MOONCAKE[case]
    lines = [GOOD, "", line, GOOD]
    with pytest.raises(TraceError) as caught:
        parse_trace(lines, source="chat.jsonl", kind="mooncake")
    error = caught.value
    assert (error.source, error.line, error.field) == ("chat.jsonl", 3, field)
    assert expected in error.expected
    assert "chat.jsonl, line 3" in str(error)
    skipping = parse_trace(lines, source="chat.jsonl", kind="mooncake", skip_bad=True)
    assert (len(skipping.requests), skipping.skipped) == (2, 1)


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("2023-11-16 18:17:04,1", ""),
        ("yesterday,1,1", "TIMESTAMP"),
        ("now,1,1", "TIMESTAMP"),
        ("2023-11-31 18:17:04,1,1", "TIMESTAMP"),
        ("2023-11-16 18:17:04,1.5,1", "ContextTokens"),
        ("2023-11-16 18:17:04,,1", "ContextTokens"),
        ("2023-11-16 18:17:04,nan,1", "ContextTokens"),
        ("2023-11-16 18:17:04,1,-1", "GeneratedTokens"),
        ('2023-11-16 18:17:04,1,"1', ""),
        ("2023-11-16 18:17:02,1,1", "timestamp"),
    ],
)
def test_a_malformed_line_of_csv(line: str, field: str) -> None:
    with pytest.raises(TraceError) as caught:
        parse(AZURE_2023.splitlines(keepends=True)[0] + "2023-11-16 18:17:03,1,1\n" + line + "\n")
    assert (caught.value.line, caught.value.field) == (3, field)


def test_a_failed_request_of_burstgpt_has_no_answer() -> None:
    text = BURSTGPT + "50,ChatGPT,100,0,100,API log\n60,ChatGPT,nan,1,1,API log\nx,GPT-4,1,1,2,API log\n"
    with pytest.raises(TraceError, match="t, line 4, Response tokens: got 0; expected an integer from 1"):
        parse(text)
    assert parse_trace(text.splitlines(), source="t", skip_bad=True).skipped == 3
    many = parse_trace([*text.splitlines(), *["nonsense"] * 3], source="t", skip_bad=True)
    assert (many.skipped, len(many.first_skipped)) == (6, 3)


@pytest.mark.parametrize("text", ["hello\n", "a,b,c\n1,2,3\n", "TIMESTAMP,ContextTokens\n"])
def test_a_format_that_cannot_be_told(text: str) -> None:
    with pytest.raises(
        TraceError, match=r"t, line 1: got .*; expected a JSON object \(mooncake\), or a header"
    ) as caught:
        parse(text)
    assert "burstgpt: Timestamp,Request tokens,Response tokens" in caught.value.expected


def test_a_format_that_is_not_what_was_said_or_unknown() -> None:
    with pytest.raises(TraceError, match="t, line 1, Timestamp: got 'TIMESTAMP"):
        parse(AZURE_2023, kind="burstgpt")
    with pytest.raises(TraceError, match="expected auto, mooncake, azure, burstgpt"):
        parse(AZURE_2023, kind="csv")


def test_nothing_to_read() -> None:
    for text, kind in (("", "auto"), ("\n\n", "auto"), ("", "mooncake"), ("", "azure"), ("x\n", "mooncake")):
        with pytest.raises(TraceError):
            parse(text, kind=kind, skip_bad=True)


def test_a_limit_reads_no_further() -> None:
    assert len(parse(MOONCAKE + "broken\n", limit=2)) == 2


# ---- files ----


def test_the_fixture_is_what_the_generator_makes() -> None:
    assert read_trace(FIXTURE).requests == tuple(
        TraceRequest(
            at_s=round(r.at_s * 1000) / 1000,
            input_tokens=r.input_tokens,
            output_tokens=r.output_tokens,
            block_ids=r.block_ids,
        )
        for r in fixture_trace().requests
    )


def test_a_trace_written_reads_back(tmp_path: Path) -> None:
    trace = parse_trace(MOONCAKE.splitlines(), source="t")
    write_trace(tmp_path / "t.jsonl", trace)
    assert read_trace(tmp_path / "t.jsonl").requests == trace.requests


def test_a_file_with_a_mark_of_its_encoding_and_windows_lines(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_bytes(b"\xef\xbb\xbf" + AZURE_2023.replace("\n", "\r\n").encode())
    assert len(read_trace(path).requests) == 2


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"{" + bytes([255, 0, 7]) * LINE_CHARS_MAX)
    with pytest.raises(TraceError, match=r"model\.bin, line 1: got '1,048,577 characters and more'"):
        read_trace(path)
    with pytest.raises(TraceError, match="expected a readable file"):
        read_trace(tmp_path)


def test_where_traces_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chat.jsonl").write_text(MOONCAKE)
    monkeypatch.setenv("HALFMOON_TRACES", str(tmp_path))
    assert find_trace("chat.jsonl") == tmp_path / "chat.jsonl"
    with pytest.raises(NotFound, match=f"no trace other.jsonl in .*{tmp_path.name}.*; HALFMOON_TRACES"):
        find_trace("other.jsonl")
    with pytest.raises(NotFound, match="no trace /no/such"):
        find_trace("/no/such")


def test_the_published_conversation_trace() -> None:
    found = statistics(conversation_trace())
    assert (found.num_requests, found.num_blocks, found.num_unique_blocks) == (12_031, 288_500, 182_790)
    assert round(found.input_tokens_mean) == 12_035
    assert round(found.output_tokens_mean) == 343
    assert round(found.hit_rate, 3) == 0.366
