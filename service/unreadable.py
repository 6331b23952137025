"""Pure: a request that protobuf cannot read: which of its fields is to blame."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from halfmoon.errors import InvalidRequest

DEPTH_MAX = 8
"""Messages inside messages that are searched; ours nest three deep."""

UNSAID = ("sampling.", "chat.")
"""Messages that only group: a caller says `stop`, not `sampling.stop`."""


def blame(kind: Any, data: bytes, error: DecodeError) -> InvalidRequest:
    """Why `data` is no `kind` (a Descriptor): naming the first text that is no UTF-8, else the whole "request"."""
    path, value = next(bad_texts(kind, data), ("", b""))
    if not path:
        return InvalidRequest(field="request", value=data[:16], limit=f"a {kind.name} ({error})")
    for group in UNSAID:
        path = path.removeprefix(group)
    return InvalidRequest(field=path, value=value, limit="text in UTF-8")


def bad_texts(kind: Descriptor, data: bytes, depth: int = DEPTH_MAX) -> Iterator[tuple[str, bytes]]:
    """Path and bytes of each string field in `data`, a serialised `kind`, that is no UTF-8."""
    counts: dict[str, int] = {}
    for number, value in _fields(data):
        field = kind.fields_by_number.get(number)
        if field is None or not isinstance(value, bytes):
            continue
        index = counts[field.name] = counts.get(field.name, -1) + 1
        path = f"{field.name}[{index}]" if field.is_repeated else field.name
        if field.type == FieldDescriptor.TYPE_STRING and not _is_text(value):
            yield path, value
        elif field.message_type is not None and depth > 0:
            for inner, text in bad_texts(field.message_type, value, depth - 1):
                yield f"{path}.{inner}", text


def _fields(data: bytes) -> list[tuple[int, object]]:
    """Number and raw value of each field: to a message without fields all are unknown, and kept as they are."""
    try:
        unknown: Any = UnknownFieldSet(Empty.FromString(data))  # its stubs do not know that it can be iterated
    except DecodeError:
        return []
    return [(field.field_number, field.data) for field in unknown]


def _is_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True
