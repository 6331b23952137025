"""Shell: logs: one line per record on stderr, `key=value`, with the node's id on every line."""

from __future__ import annotations

import datetime
import json
import logging
import sys

LINE_CHARS_MAX = 8000  # a stack is cut rather than splitting the line (pipes and collectors split at 8 KiB)
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.:/#@+%")


class LineFormatter(logging.Formatter):
    """`time=... level=... node=... from=... msg="..." key=value ... [error="..."]`, always one line."""

    def __init__(self, node_id: str) -> None:
        super().__init__()
        self._node_id = quoted(node_id)

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        parts = [
            f"time={moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z",
            f"level={record.levelname.lower()}",
            f"node={self._node_id}",
            f"from={record.name}",
            f"msg={quoted(record.getMessage())}",
        ]
        parts += [f"{key}={quoted(value)}" for key, value in getattr(record, "fields", {}).items()]
        if record.exc_info:
            parts.append(f"error={quoted(self.formatException(record.exc_info))}")
        return " ".join(parts)[:LINE_CHARS_MAX]


def configure(node_id: str, *, level: str = "info") -> None:
    """Send every logger of the process to stderr through LineFormatter. Replaces earlier handlers."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(node_id))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def fields(**values: object) -> dict[str, dict[str, object]]:
    """`log.info("attached", extra=fields(term=3))`: values as keys of the line. Never secrets."""
    return {"fields": values}


def quoted(value: object) -> str:
    text = str(value)
    return text if text and _PLAIN.issuperset(text) else json.dumps(text, ensure_ascii=False)
