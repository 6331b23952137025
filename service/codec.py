"""Pure: core/messages.py <-> protobuf, by class and field name, compiled once per class.

A dataclass (or NamedTuple) `X` travels as the message `X` of worker.proto; every field by its own name. What may go
inside an envelope (commands and events) does; the rest travels bare.

    to_wire(StartCommand(...)) -> WorkerCommand          from_wire(WorkerCommand) -> StartCommand(...)
    to_wire(StepTokens(...))   -> StepTokens             from_wire(StepTokens)    -> StepTokens(...)
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from google.protobuf.message import DecodeError, Message

from core import messages
from halfmoon.blocks import Fingerprint
from halfmoon.errors import InvalidRequest
from halfmoon.types import AttemptId, SamplingParams
from halfmoon.v1 import worker_pb2

_COMMANDS: tuple[type, ...] = get_args(messages.Command)
_EVENTS: tuple[type, ...] = get_args(messages.WorkerEvent)
_BARE: tuple[type, ...] = (
    AttemptId,
    Fingerprint,
    SamplingParams,
    messages.NodeInfo,
    messages.Fetch,
    messages.AttemptStats,
    messages.BlockCopy,
    messages.PassSample,
    messages.TransferSample,
    messages.TokenLogprob,
    messages.Token,
    messages.StepTokens,
)
WIRE_CLASSES: tuple[type, ...] = _BARE + _COMMANDS + _EVENTS
"""Every class that has a message of its name."""

_ENVELOPES: dict[str, dict[str, type]] = {}  # envelope's name -> oneof field -> class
_ENVELOPE_OF: dict[type, tuple[type[Message], str]] = {}
_CLASS_OF: dict[str, type] = {cls.__name__: cls for cls in WIRE_CLASSES}

_Fill = Callable[[Any, Any], None]
_Read = Callable[[Any], Any]


def to_wire(value: Any) -> Any:
    """The message to send for `value`: commands and events in their envelope, everything else bare."""
    envelope = _ENVELOPE_OF.get(type(value))
    if envelope is None:
        return encode(value)
    message_class, kind = envelope
    message = message_class()
    inner = getattr(message, kind)
    inner.SetInParent()
    _filler(type(value))(value, inner)  # type: ignore[arg-type]
    return message


def from_wire(message: Any) -> Any:
    """The value that `message` carries; the inverse of `to_wire`.

    Raises:
        InvalidRequest: naming the field (a path from the message's top) that is missing or has no such value.
    """
    name = message.DESCRIPTOR.name
    kinds = _ENVELOPES.get(name)
    if kinds is None:
        return decode(message)
    kind = message.WhichOneof("kind")
    if kind is None:
        raise InvalidRequest(field=f"{name}.kind", value=None, limit=f"one of {', '.join(kinds)}")
    return _under(kind, _reader(kinds[kind]), getattr(message, kind))


def encode(value: Any) -> Any:
    """`value` as the bare message of its class's name."""
    message = getattr(worker_pb2, type(value).__name__)()
    _filler(type(value))(value, message)  # type: ignore[arg-type]
    return message


def decode(message: Any) -> Any:
    """The value of a bare message.

    Raises:
        InvalidRequest: as `from_wire`.
    """
    return _reader(_CLASS_OF[message.DESCRIPTOR.name])(message)


def parse(message_class: type[Message], data: bytes) -> Any:
    """Bytes of `message_class` to the value they carry.

    Raises:
        InvalidRequest: if the bytes are no such message, or as `from_wire`.
    """
    message = message_class()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise InvalidRequest(field=message_class.DESCRIPTOR.name, value=data, limit="its protobuf encoding") from error
    return from_wire(message)


# ---- value -> message ----------------------------------------------------------------------------------------------


@cache
def _filler(cls: type) -> _Fill:
    plain: list[str] = []
    steps: list[_Fill] = []
    for name, hint in _hints(cls):
        step = _fill_step(name, hint)
        if step is None:
            plain.append(name)
        else:
            steps.append(step)

    def fill(value: Any, message: Any) -> None:
        for name in plain:
            setattr(message, name, getattr(value, name))
        for step in steps:
            step(value, message)

    return fill


def _fill_step(name: str, hint: Any) -> _Fill | None:
    """How one field is written; None: by plain assignment."""
    inner, optional, repeated = _shape(hint)
    if _is_message(inner):
        return _fill_messages(name, _filler(inner)) if repeated else _fill_message(name, _filler(inner), optional)
    if repeated:
        return lambda value, message: getattr(message, name).extend(getattr(value, name))
    return _fill_optional(name) if optional else None


def _fill_optional(name: str) -> _Fill:
    def step(value: Any, message: Any) -> None:
        item = getattr(value, name)
        if item is not None:
            setattr(message, name, item)

    return step


def _fill_message(name: str, fill: _Fill, optional: bool) -> _Fill:
    def step(value: Any, message: Any) -> None:
        item = getattr(value, name)
        if item is not None:
            inner = getattr(message, name)
            inner.SetInParent()  # a value that is all defaults is still there
            fill(item, inner)
        else:
            assert optional, f"{name} is None in {value!r}"

    return step


def _fill_messages(name: str, fill: _Fill) -> _Fill:
    def step(value: Any, message: Any) -> None:
        add = getattr(message, name).add
        for item in getattr(value, name):
            fill(item, add())

    return step


# ---- message -> value ----------------------------------------------------------------------------------------------


@cache
def _reader(cls: type) -> _Read:
    steps = tuple((name, _read_step(name, hint)) for name, hint in _hints(cls))

    def read(message: Any) -> Any:
        return cls(**{name: step(message) for name, step in steps})

    return read


def _read_step(name: str, hint: Any) -> _Read:
    inner, optional, repeated = _shape(hint)
    if _is_message(inner):
        return _read_messages(name, _reader(inner)) if repeated else _read_message(name, _reader(inner), optional)
    check = _checker(name, inner)
    if repeated:
        assert check is None or inner is float, f"no repeated {inner}"
        return lambda message: tuple(getattr(message, name))
    if optional:
        return lambda message: _checked(check, getattr(message, name)) if message.HasField(name) else None
    if check is None:
        return lambda message: getattr(message, name)
    return lambda message: check(getattr(message, name))


def _read_message(name: str, read: _Read, optional: bool) -> _Read:
    def step(message: Any) -> Any:
        if message.HasField(name):
            return _under(name, read, getattr(message, name))
        if optional:
            return None
        raise InvalidRequest(field=name, value=None, limit="a message")

    return step


def _read_messages(name: str, read: _Read) -> _Read:
    def step(message: Any) -> Any:
        try:
            return tuple([read(item) for item in getattr(message, name)])
        except InvalidRequest as error:
            raise _moved(f"{name}[]", error) from error

    return step


def _under(name: str, read: _Read, message: Any) -> Any:
    try:
        return read(message)
    except InvalidRequest as error:
        raise _moved(name, error) from error


def _moved(prefix: str, error: InvalidRequest) -> InvalidRequest:
    return InvalidRequest(field=f"{prefix}.{error.field}", value=error.value, limit=error.limit)


def _checker(name: str, inner: Any) -> _Read | None:
    """What turns a wire scalar into the field's value, or refuses it; None: it is the value already."""
    if isinstance(inner, type) and issubclass(inner, enum.Enum):
        return _enum_checker(name, inner)
    return _finite_checker(name) if inner is float else None


def _enum_checker(name: str, enum_class: type[enum.Enum]) -> _Read:
    by_value = {member.value: member for member in enum_class}

    def check(value: Any) -> Any:
        member = by_value.get(value)
        if member is None:
            raise InvalidRequest(field=name, value=value, limit=f"one of {', '.join(map(str, by_value))}")
        return member

    return check


def _finite_checker(name: str) -> _Read:
    def check(value: float) -> float:
        if not math.isfinite(value):
            raise InvalidRequest(field=name, value=value, limit="a finite number")
        return value

    return check


def _checked(check: _Read | None, value: Any) -> Any:
    return value if check is None else check(value)


# ---- shapes --------------------------------------------------------------------------------------------------------


def _hints(cls: type) -> list[tuple[str, Any]]:
    hints = get_type_hints(cls)
    names = [f.name for f in fields(cls)] if is_dataclass(cls) else list(cls._fields)  # type: ignore[attr-defined]
    return [(name, hints[name]) for name in names]


def _shape(hint: Any) -> tuple[Any, bool, bool]:
    """(the bare type, may be None, is a tuple of it)."""
    if get_origin(hint) in (Union, UnionType):
        arms = [arm for arm in get_args(hint) if arm is not NoneType]
        assert len(arms) == 1, f"{hint} is not an Optional"
        return _base(arms[0]), True, False
    if get_origin(hint) is tuple:
        return _base(get_args(hint)[0]), False, True
    return _base(hint), False, False


def _base(hint: Any) -> Any:
    return getattr(hint, "__supertype__", hint)  # a NewType is its base on the wire


def _is_message(inner: Any) -> bool:
    return inner in WIRE_CLASSES


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _register(envelope: type[Message], classes: tuple[type, ...]) -> None:
    _ENVELOPES[envelope.DESCRIPTOR.name] = {_snake(cls.__name__): cls for cls in classes}
    _ENVELOPE_OF.update({cls: (envelope, _snake(cls.__name__)) for cls in classes})


_register(worker_pb2.WorkerCommand, _COMMANDS)
_register(worker_pb2.WorkerEvent, _EVENTS)
