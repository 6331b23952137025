"""Pure: published trace formats, line by line: Mooncake's JSON Lines, Azure's and BurstGPT's CSV.

What the formats say, and what is made of it:

    mooncake   `timestamp` in ms, `input_length`, `output_length`, `hash_ids`: one name per 512 tokens of the prompt,
               the last block usually partial. Keys that are not known are passed over.
    azure      TIMESTAMP (date and time, with or without a zone: UTC then), ContextTokens, GeneratedTokens, in the 2023
               and in the 2024 release.
    burstgpt   Timestamp in s, Request tokens, Response tokens; Model, Total tokens, Log Type, Session ID and Elapsed
               time are passed over. 0 response tokens mark a request that failed: such a line is malformed here.

Times are counted from Mooncake's own zero, and from the first good line of the other two. A line that is earlier than
the one before it is malformed, not sorted in: it is what two traces joined to one look like.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np

from halfmoon.errors import TraceError
from workload.trace import Trace, TraceRequest

BLOCK_TOKENS = 512
"""Tokens of one of Mooncake's hash ids; the other formats have none."""

TOKENS_MAX = 1 << 24  # of one prompt or output: ten times the longest context that is served anywhere
LINE_CHARS_MAX = 1 << 20  # 2,000 ids of a prompt of a million tokens take 20 kB: refuses binary files early
REQUESTS_MAX = 4_000_000  # about 1 GB of values; a longer trace is read in part, by `limit`
SKIPPED_TOLD = 3  # of malformed lines: one shows a slip, three a pattern

FORMATS = ("mooncake", "azure", "burstgpt")
_COLUMNS = {
    "azure": ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    "burstgpt": ("Timestamp", "Request tokens", "Response tokens"),
}

_DATE = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.\d{1,9})?)(?:Z|([+-])(\d\d):?(\d\d))?")

Line = tuple[int, str]
"""Number from 1, text."""


class _Malformed(Exception):
    """One line's fault, before it is known where it stands."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        self.field, self.value, self.expected = field, value, expected


Parser = Callable[[str], TraceRequest]
"""A line's text -> its request, at the format's own time. Raises _Malformed."""


def parse_trace(
    lines: Iterable[str], *, source: str, kind: str = "auto", skip_bad: bool = False, limit: int | None = None
) -> Trace:
    """A whole trace from its text lines.

    Args:
        source: the file's name, for errors and reports.
        kind: one of FORMATS, or "auto": told by the first line that is not blank.
        skip_bad: leave malformed lines out, count them in `Trace.skipped` and tell of the first few.
        limit: read this many good lines and no more.

    Raises:
        TraceError: the format is unknown or cannot be told, nothing (good) is there, more than REQUESTS_MAX requests,
            or a malformed line: file, line, field, what was expected.
    """
    numbered = ((number, text) for number, text in enumerate(lines, 1) if text.strip())
    kind, rows = _resolve(numbered, source, kind)
    parser = _mooncake if kind == "mooncake" else _csv_parser(rows, source, kind)
    requests, skipped, first_skipped = _collect(rows, parser, source, skip_bad, limit)
    start_s = 0.0 if kind == "mooncake" else requests[0].at_s
    return Trace(
        source=source,
        block_tokens=BLOCK_TOKENS,
        requests=tuple(_shifted(request, start_s) for request in requests) if start_s else tuple(requests),
        skipped=skipped,
        first_skipped=first_skipped,
    )


def to_mooncake(trace: Trace) -> Iterator[str]:
    """The trace as Mooncake's JSON Lines, times rounded to ms. Priorities have no place there."""
    for request in trace.requests:
        fields = {
            "timestamp": round(request.at_s * 1000),
            "input_length": request.input_tokens,
            "output_length": request.output_tokens,
            "hash_ids": list(request.block_ids),
        }
        yield json.dumps(fields) + "\n"


# ---- which format --------------------------------------------------------------------------------------------------


def _resolve(lines: Iterator[Line], source: str, kind: str) -> tuple[str, Iterator[Line]]:
    """The format's name, and all the lines again."""
    if kind != "auto":
        if kind not in FORMATS:
            raise TraceError(source=source, field="format", value=kind, expected=f"auto, {', '.join(FORMATS)}")
        return kind, lines
    first = next(lines, None)
    if first is None:
        raise TraceError(source=source, value="an empty file", expected="a trace")
    return _detect(first, source), chain((first,), lines)


def _detect(first: Line, source: str) -> str:
    number, text = first
    if text.lstrip().startswith("{"):
        return "mooncake"
    columns = _columns(text)
    for kind, needed in _COLUMNS.items():
        if set(needed) <= set(columns):
            return kind
    known = "; ".join(f"{kind}: {','.join(needed)}" for kind, needed in _COLUMNS.items())
    expected = f"a JSON object (mooncake), or a header with the columns of {known}"
    raise TraceError(source=source, line=number, value=text.strip(), expected=expected)


def _columns(text: str) -> list[str]:
    return [name.strip().lstrip("\ufeff") for name in next(csv.reader([text]), [])]


# ---- all lines -----------------------------------------------------------------------------------------------------


def _collect(
    rows: Iterable[Line], parser: Parser, source: str, skip_bad: bool, limit: int | None
) -> tuple[list[TraceRequest], int, tuple[str, ...]]:
    """The good lines' requests, how many lines were skipped, and what is wrong with the first of those."""
    requests: list[TraceRequest] = []
    skipped = 0
    first_skipped: tuple[str, ...] = ()
    for number, text in rows:
        if limit is not None and len(requests) >= limit:
            break
        try:
            request = _parse_in_order(parser, text, requests)
        except _Malformed as bad:
            error = TraceError(source=source, line=number, field=bad.field, value=bad.value, expected=bad.expected)
            if not skip_bad:
                raise error from None
            skipped += 1
            first_skipped = (*first_skipped, str(error))[:SKIPPED_TOLD]
            continue
        if len(requests) == REQUESTS_MAX:
            expected = f"at most {REQUESTS_MAX:,} requests, or a limit on how many to read"
            raise TraceError(source=source, line=number, value="one more", expected=expected)
        requests.append(request)
    if not requests:
        raise TraceError(source=source, value=f"no request, {skipped} bad lines", expected="one request at least")
    return requests, skipped, first_skipped


def _parse_in_order(parser: Parser, text: str, before: list[TraceRequest]) -> TraceRequest:
    if len(text) > LINE_CHARS_MAX:
        raise _Malformed("", f"{len(text):,} characters and more", f"at most {LINE_CHARS_MAX:,} on one line")
    request = parser(text)
    if before and request.at_s < before[-1].at_s:
        expected = f"at least {before[-1].at_s:.3f} s, the line before's (sort the file by time first)"
        raise _Malformed("timestamp", f"{request.at_s:.3f} s", expected)
    return request


def _shifted(request: TraceRequest, start_s: float) -> TraceRequest:
    return TraceRequest(
        at_s=request.at_s - start_s, input_tokens=request.input_tokens, output_tokens=request.output_tokens
    )


# ---- Mooncake ------------------------------------------------------------------------------------------------------


def _mooncake(text: str) -> TraceRequest:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: JSONDecodeError, and integers of absurd length
        raise _Malformed("", text.strip(), f"a JSON object ({error})") from None
    if not isinstance(fields, dict):
        raise _Malformed("", text.strip(), "a JSON object")
    input_tokens = _tokens("input_length", _field(fields, "input_length"))
    return TraceRequest(
        at_s=_time("timestamp", _field(fields, "timestamp")) / 1000,
        input_tokens=input_tokens,
        output_tokens=_tokens("output_length", _field(fields, "output_length")),
        block_ids=_block_ids(_field(fields, "hash_ids"), input_tokens),
    )


def _field(fields: dict[str, Any], name: str) -> Any:
    if name not in fields:
        raise _Malformed(name, None, "this field")
    return fields[name]


def _block_ids(value: Any, input_tokens: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(name) is int and name >= 0 for name in value):
        raise _Malformed("hash_ids", value, "a list of integers, 0 or more each")
    needed = -(-input_tokens // BLOCK_TOKENS)
    if len(value) != needed:
        expected = f"{needed}, one per {BLOCK_TOKENS} of the {input_tokens} tokens of input_length"
        raise _Malformed("hash_ids", f"{len(value)} ids", expected)
    return tuple(value)


# ---- CSV -----------------------------------------------------------------------------------------------------------


def _csv_parser(lines: Iterator[Line], source: str, kind: str) -> Parser:
    """Takes the header from the lines; the parser is for the columns that it names, in whatever order."""
    number, header = next(lines, (0, ""))
    columns = _columns(header)
    needed = _COLUMNS[kind]
    for name in needed:
        if name not in columns:
            expected = f"a header with the columns {','.join(needed)}"
            raise TraceError(source=source, line=number, field=name, value=header.strip(), expected=expected)
    at, prompt, output = needed
    time_of = _azure_time if kind == "azure" else _csv_time

    def parse(text: str) -> TraceRequest:
        values = _row(text, columns)
        return TraceRequest(
            at_s=time_of(at, values[at]),
            input_tokens=_tokens(prompt, _integer(prompt, values[prompt])),
            output_tokens=_tokens(output, _integer(output, values[output])),
        )

    return parse


def _row(text: str, columns: list[str]) -> dict[str, str]:
    try:
        values = next(csv.reader([text], strict=True))
    except csv.Error as error:
        raise _Malformed("", text.strip(), f"a line of CSV ({error})") from None
    if len(values) != len(columns):
        raise _Malformed("", f"{len(values)} values", f"{len(columns)}, one per column of the header")
    return {name: value.strip() for name, value in zip(columns, values, strict=True)}


def _azure_time(field: str, text: str) -> float:
    """Seconds since 1970. Both releases: 2023's has seven decimals and no zone, 2024's six and +00:00."""
    match = _DATE.fullmatch(text)
    try:
        moment = np.datetime64(match[1].replace(" ", "T"), "us") if match else None
    except ValueError:  # the 30th of February
        moment = None
    if match is None or moment is None:
        raise _Malformed(field, text, "a date and time, as in 2023-11-16 18:17:03.9799600")
    sign, hours, minutes = match[2] or "+", int(match[3] or 0), int(match[4] or 0)
    ahead_s = (hours * 3600 + minutes * 60) * (1 if sign == "+" else -1)
    return int(moment.astype(np.int64)) / 1e6 - ahead_s


def _csv_time(field: str, text: str) -> float:
    try:
        return _time(field, float(text))
    except ValueError:
        raise _Malformed(field, text, "a number of seconds") from None


def _integer(field: str, text: str) -> int | str:
    """The text itself where it is no integer: `_tokens` says so. "12.0" is one: it is how tables with gaps write 12."""
    digits = text.removesuffix(".0")
    return int(digits) if digits.isascii() and digits.removeprefix("-").isdigit() and len(digits) < 20 else text


# ---- values --------------------------------------------------------------------------------------------------------


def _time(field: str, value: Any) -> float:
    """A finite number, 0 or more."""
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise _Malformed(field, value, "a finite number, 0 or more")
    return float(value)


def _tokens(field: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= TOKENS_MAX:
        raise _Malformed(field, value, f"an integer from 1 to {TOKENS_MAX:,}")
    return value
