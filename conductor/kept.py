"""Pure: one decision record out of a file: a recording, or the conductor's export, one record a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from conductor.decisions import DecisionRecord
from conductor.recording import Call, read
from halfmoon.errors import InvalidRequest, NotFound, RecordingError

KEYS = frozenset(DecisionRecord.__dataclass_fields__) | {"terms"}
"""Of a record as JSON, without which nobody can explain it."""


def find(lines: Iterable[str], request_id: str) -> dict[str, Any]:
    """The record of this id, or of the only one that begins so; of several with one id the last.

    Raises:
        NotFound: there is none.
        InvalidRequest: several ids begin so.
        RecordingError: a line that is neither.
    """
    found: dict[str, dict[str, Any]] = {}
    count = 0
    for record in _records(lines):
        count += 1
        if request_id and str(record["request_id"]).startswith(request_id):
            found[record["request_id"]] = record
    if request_id in found:
        return found[request_id]
    if len(found) > 1:
        raise InvalidRequest(field="request_id", value=request_id, limit=f"more of it: {len(found)} ids begin so")
    if not found:
        raise NotFound(
            f"request {request_id!r}: it is none of the {count:,} records in the file, "
            "which has those of requests that had ended"
        )
    return next(iter(found.values()))


def _records(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Each with all keys; those of a recording have their line in its own reader's errors."""
    rest = iter(lines)
    first = next(rest, None)
    if first is None:
        return
    tree = _parsed(first, 1)
    whole = chain([first], rest)
    if "halfmoon_recording" in tree:
        for entry in read(whole):
            if isinstance(entry, Call):
                yield from (_whole(record, entry.line) for record in entry.records)
    else:
        yield from (_whole(_parsed(line, number), number) for number, line in enumerate(whole, 1))


def _parsed(line: str, number: int) -> Mapping[str, Any]:
    try:
        tree = json.loads(line)
    except ValueError as error:
        raise RecordingError(line=number, why=f"it is no JSON: {error}") from error
    if not isinstance(tree, dict):
        raise RecordingError(line=number, why="it is neither a decision record nor a recording's header")
    return tree


def _whole(record: Mapping[str, Any], line: int) -> dict[str, Any]:
    missing = sorted(KEYS - record.keys())
    if missing:
        raise RecordingError(line=line, why=f"a decision record has {', '.join(missing[:3])}, and this has not")
    return dict(record)
