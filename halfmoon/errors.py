"""Pure: the one exception tree, and its one mapping to gRPC status.

HalfmoonError
├── InvalidRequest        the caller's fault: names the field, the value and the limit
├── Rejected              no capacity within the SLO now: reason, predicted value, limit, retry_after_s
├── Unavailable           a pool is empty or dead, or the cluster is draining; retrying later may help
├── DeadlineExceeded      the request's own deadline passed
├── Cancelled             the caller, or an operator, ended it
├── NotFound              no such request, node or model
├── Failed                an accepted request that could not be completed in its tries
├── ConfigError           a setting: names the key, the value and what was expected
├── RecordingError        a recorded run that cannot be read or replayed: names the line and why
├── CheckpointError       a model directory or file that cannot be used: names what and why
├── TraceError            a workload file that cannot be used: names file, line, field and what was expected
├── TransferError         blocks that did not arrive: names the transfer, the peer and the phase
│   ├── PeerLost          the peer's process or link is gone
│   ├── TransferTimeout   the transfer's deadline passed
│   ├── IntegrityError    bytes that are not what their name says (checksum, length, generation)
│   └── TransferAborted   one side ended it
├── StaleTerm             a conductor, or its front end, that a later one has superseded
└── Conflict              a second owner of something that has one (directory, lease, port)
"""

from __future__ import annotations

import enum


class StatusCode(enum.IntEnum):
    """gRPC's status numbers, so that this module needs no gRPC."""

    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


class HalfmoonError(Exception):
    """Root of everything this project raises on purpose."""

    status = StatusCode.INTERNAL


class InvalidRequest(HalfmoonError):
    """The caller's fault. `field`, `value` and `limit` are for people and for programs; `text` is said instead."""

    status = StatusCode.INVALID_ARGUMENT

    def __init__(self, *, field: str, value: object, limit: str, text: str = "") -> None:
        super().__init__(text or f"{field}: got {_short(value)}; expected {limit}")
        self.field = field
        self.value = value
        self.limit = limit


class Rejected(HalfmoonError):
    """Refused before any work was spent, because an SLO or a limit would be missed.

    Args:
        reason: the limit that would be missed, one of conductor.policy's words.
        predicted, limit: the value expected and the value allowed, in `unit`.
        retry_after_s: when a retry may succeed; None if unknown.
        text: the whole sentence, where somebody has already made it.
    """

    status = StatusCode.RESOURCE_EXHAUSTED

    def __init__(
        self,
        *,
        reason: str,
        predicted: float,
        limit: float,
        unit: str,
        retry_after_s: float | None = None,
        text: str = "",
    ) -> None:
        hint = "" if retry_after_s is None else f"; retry in {retry_after_s:.1f} s"
        said = f"rejected ({reason}): predicted {predicted:.4g} {unit}, limit {limit:.4g} {unit}{hint}"
        super().__init__(text or said)
        self.reason = reason
        self.predicted = predicted
        self.limit = limit
        self.unit = unit
        self.retry_after_s = retry_after_s


class Unavailable(HalfmoonError):
    status = StatusCode.UNAVAILABLE


class DeadlineExceeded(HalfmoonError):
    status = StatusCode.DEADLINE_EXCEEDED


class Cancelled(HalfmoonError):
    status = StatusCode.CANCELLED


class NotFound(HalfmoonError):
    status = StatusCode.NOT_FOUND


class Failed(HalfmoonError):
    status = StatusCode.INTERNAL


class ConfigError(HalfmoonError):
    status = StatusCode.INVALID_ARGUMENT

    def __init__(self, *, key: str, value: object, expected: str) -> None:
        super().__init__(f"config {key}: got {_short(value)}; expected {expected}")
        self.key = key
        self.value = value
        self.expected = expected


class RecordingError(HalfmoonError):
    status = StatusCode.FAILED_PRECONDITION

    def __init__(self, *, line: int, why: str) -> None:
        super().__init__(f"line {line}: {why}")
        self.line = line
        self.why = why


class CheckpointError(HalfmoonError):
    status = StatusCode.FAILED_PRECONDITION


class TraceError(HalfmoonError):
    """A workload file that cannot be used.

    Args:
        source: the file, as its reader was told.
        line: counted from 1; 0: the file as a whole.
        field: of the line; empty: the line as a whole.
    """

    status = StatusCode.INVALID_ARGUMENT

    def __init__(self, *, source: str, line: int = 0, field: str = "", value: object = None, expected: str) -> None:
        where = source + (f", line {line}" if line else "") + (f", {field}" if field else "")
        super().__init__(f"{where}: got {_short(value)}; expected {expected}")
        self.source = source
        self.line = line
        self.field = field
        self.value = value
        self.expected = expected


class TransferError(HalfmoonError):
    status = StatusCode.UNAVAILABLE


class PeerLost(TransferError):
    pass


class TransferTimeout(TransferError):
    pass


class IntegrityError(TransferError):
    pass


class TransferAborted(TransferError):
    pass


class StaleTerm(HalfmoonError):
    status = StatusCode.FAILED_PRECONDITION


class Conflict(HalfmoonError):
    status = StatusCode.ABORTED


def _short(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
