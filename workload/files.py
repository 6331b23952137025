"""Shell: trace files: where they are found, and reading and writing them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from halfmoon.errors import NotFound, TraceError
from service import settings
from workload.formats import LINE_CHARS_MAX, parse_trace, to_mooncake
from workload.trace import Trace

CONVERSATION = "conversation_trace.jsonl"
"""Mooncake's published trace of an hour of chat, under its published name."""

_CHECKOUT = Path(__file__).resolve().parent.parent


def read_trace(
    path: Path | str,
    format: str = "auto",  # noqa: A002
    skip_bad: bool = False,
    limit: int | None = None,
) -> Trace:
    """Read a trace file; a name that is no file here is looked for where traces are kept (`find_trace`).

    Args:
        format: "mooncake", "azure", "burstgpt", or "auto": told by the first line.
        skip_bad: leave malformed lines out and count them in `Trace.skipped`.
        limit: read this many requests and no more.

    Raises:
        NotFound: no such file, naming where it was looked for.
        TraceError: a file that cannot be read, or is no trace: file, line, field, what was expected.
    """
    found = find_trace(path)
    try:
        with found.open(encoding="utf-8-sig", errors="replace", newline=None) as file:
            return parse_trace(_lines(file), source=str(path), kind=format, skip_bad=skip_bad, limit=limit)
    except OSError as error:
        raise TraceError(source=str(path), value=error.strerror, expected="a readable file") from error


def write_trace(path: Path, trace: Trace) -> None:
    """As Mooncake's JSON Lines."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(to_mooncake(trace))


def find_trace(path: Path | str) -> Path:
    """The file itself, or the one of that name in HALFMOON_TRACES, in traces/ in the checkout, or beside the checkout.

    Raises:
        NotFound: naming every folder that was searched.
    """
    given = Path(path).expanduser()
    if given.exists() or given.is_absolute():
        candidates = [given]
    else:
        candidates = [given, *(folder / given for folder in _folders())]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    searched = ", ".join(str(candidate.parent) for candidate in candidates)
    raise NotFound(f"no trace {path} in {searched}; HALFMOON_TRACES may name a folder that has it")


def _folders() -> list[Path]:
    named = settings.traces_directory()
    beside = [_CHECKOUT / "traces", _CHECKOUT.parent / "traces", *sorted(_CHECKOUT.parent.glob("*/data"))]
    return beside if named is None else [named, *beside]


def _lines(file: TextIO) -> Iterator[str]:
    """Lines; one that is too long comes cut, just too long still, and its rest is read past."""
    while line := file.readline(LINE_CHARS_MAX + 1):
        rest = line
        while len(rest) > LINE_CHARS_MAX and not rest.endswith("\n"):
            rest = file.readline(LINE_CHARS_MAX + 1)
        yield line
