"""Pure: every input of the conductor's machine as a line of JSON, and back: what a replay is made of.

    {"halfmoon_recording": 1, "halfmoon": "0.1.0", "policy": "algorithm1", "block_size": 16, …, "config": {…}}
    {"n": 1, "at_s": 17.25, "call": "on_request", "spec": {…}, "effects": ["begin r#1", …], "digest": "8f…"}
    {"n": 2, "at_s": 17.26, "call": "on_worker_event", "node_id": "p0", "epoch": "e1", "event": "<base64>", …}
    {"end": "closed", "calls": 2}

What has a protobuf message travels as its bytes in base64, floats as their shortest exact decimals. `effects` are for
people; `digest` runs over the exact effects of all calls so far, so that a line that was changed or lost shows.
`records`: the decision records that the call has completed, absent if none; `raised`: the call did not return.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from typing import Any

from google.protobuf.message import DecodeError

from conductor.actuals import Seen
from conductor.config import ConductorConfig
from conductor.effects import Begin, Effect, End, HoldFirst, RequestSpec, Resume, Send, Slo
from core.plain import plain
from halfmoon.blocks import Fingerprint
from halfmoon.errors import ConfigError, HalfmoonError, InvalidRequest, RecordingError
from halfmoon.types import BlockHash, SamplingParams
from halfmoon.v1 import worker_pb2
from service import codec
from service.settings import load

FORMAT = 1
DIGEST_BYTES = 8

CALLS: dict[str, tuple[str, ...]] = {
    "on_request": ("spec",),
    "on_resume": ("request_id", "emitted_token_ids"),
    "on_cancel": ("request_id", "reason", "seen"),
    "on_stream_finished": ("request_id", "stopped", "seen"),
    "on_tokens_lost": ("node_id", "epoch"),
    "on_gap": ("request_id", "reason"),
    "on_node_joined": ("info",),
    "on_node_lost": ("node_id", "epoch", "reason"),
    "on_drain": ("node_id", "undo"),
    "on_worker_event": ("node_id", "epoch", "event"),
    "on_tick": (),
}
"""The machine's methods and their arguments, `now_s` aside."""

OPTIONAL = frozenset({"seen", "on_drain.node_id"})


@dataclass(frozen=True, kw_only=True)
class Header:
    """What it takes to build the machine again.

    Args:
        halfmoon: the version of the program that recorded.
        policy: the placement policy's name, as it was built from `config`.
        config: the machine's settings, as plain values.
    """

    halfmoon: str
    conductor_id: str
    policy: str
    block_size: int
    block_bytes: int
    fingerprint: Fingerprint | None
    config: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One input. `arguments` by name; `line` counts the file's lines from 1."""

    line: int
    n: int
    at_s: float
    name: str
    arguments: Mapping[str, Any]
    effects: tuple[str, ...]
    digest: str
    records: tuple[Mapping[str, Any], ...]
    raised: bool


@dataclass(frozen=True, kw_only=True)
class Ending:
    """The recording's own last word: why it ends here."""

    why: str
    calls: int


class Digest:
    """Runs over the effects of all calls, in order."""

    def __init__(self) -> None:
        self._hash = blake2b(digest_size=DIGEST_BYTES)

    def update(self, n: int, effects: Sequence[Effect]) -> str:
        self._hash.update(b"%d:%d;" % (n, len(effects)))
        for effect in effects:
            part = _exact(effect)
            self._hash.update(b"%d;" % len(part))
            self._hash.update(part)
        return self._hash.copy().hexdigest()


def _exact(effect: Effect) -> bytes:
    """Bytes that are equal exactly if the effects are."""
    match effect:
        case Send():
            message: bytes = codec.to_wire(effect.command).SerializeToString(deterministic=True)
            return f"{effect.node_id}\0{effect.epoch}\0".encode() + message
        case End():
            told = sorted((name, repr(value)) for name, value in vars(effect.error).items())
            return repr(
                (effect.request_id, effect.outcome, type(effect.error).__name__, str(effect.error), told)
            ).encode()
        case _:
            return repr(effect).encode()


def in_words(effect: Effect) -> str:
    match effect:
        case Begin():
            return f"begin {effect.attempt_id}"
        case HoldFirst():
            return f"hold {effect.request_id}: {effect.hold_s:.6f} s"
        case Resume():
            return f"resume {effect.request_id}: {effect.reason}"
        case End():
            return f"end {effect.request_id} {effect.outcome}: {type(effect.error).__name__}: {effect.error}"
        case Send():
            attempt = getattr(effect.command, "attempt_id", None)
            return f"{effect.node_id} <- {type(effect.command).__name__} {attempt or ''}".rstrip()


# ---- writing -------------------------------------------------------------------------------------------------------


def header_line(header: Header) -> str:
    tree = {"halfmoon_recording": FORMAT, **asdict(header)}
    tree["fingerprint"] = None if header.fingerprint is None else _packed(codec.encode(header.fingerprint))
    return _line(tree)


def call_line(
    n: int,
    at_s: float,
    name: str,
    arguments: Mapping[str, Any],
    *,
    effects: Sequence[Effect],
    digest: str,
    records: Iterable[Mapping[str, Any]] = (),
    raised: bool = False,
) -> str:
    tree: dict[str, Any] = {"n": n, "at_s": at_s, "call": name}
    for key, value in arguments.items():
        if value is not None:
            tree[key] = _WRITE[key](value) if key in _WRITE else value
    tree["effects"] = [in_words(effect) for effect in effects]
    tree["digest"] = digest
    if found := list(records):
        tree["records"] = found
    if raised:
        tree["raised"] = True
    return _line(tree)


def ending_line(why: str, calls: int) -> str:
    return _line({"end": why, "calls": calls})


def _line(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, separators=(",", ":"))


def _packed(message: Any) -> str:
    return base64.b64encode(message.SerializeToString(deterministic=True)).decode()


def _spec_tree(spec: RequestSpec) -> dict[str, Any]:
    return {
        **{f.name: getattr(spec, f.name) for f in fields(spec)},
        "block_hashes": [name.hex() for name in spec.block_hashes],
        "cache_salt": spec.cache_salt.hex(),
        "sampling": asdict(spec.sampling),
        "slo": asdict(spec.slo),
    }


_WRITE: dict[str, Callable[[Any], Any]] = {
    "spec": _spec_tree,
    "emitted_token_ids": list,
    "event": lambda event: _packed(codec.to_wire(event)),
    "info": lambda info: _packed(codec.encode(info)),
    "seen": plain,
}


def config_of(header: Header) -> ConductorConfig:
    """Raises: RecordingError: settings that this version does not have, or whose values it refuses."""
    try:
        return load(ConductorConfig, header.config, path="config")
    except ConfigError as error:
        raise RecordingError(line=1, why=str(error)) from error


# ---- reading -------------------------------------------------------------------------------------------------------


def read(lines: Iterable[str]) -> Iterator[Header | Call | Ending]:
    """The header, then the calls in order, then the ending if there is one.

    Raises:
        RecordingError: naming the line, and what is wrong with it: damaged, cut off, out of order, of another format.
    """
    number, n, ended = 0, 0, False
    for number, text in enumerate(lines, 1):
        if ended:
            raise RecordingError(line=number, why="something follows the recording's end")
        tree = _tree(number, text)
        if number == 1:
            yield _header(tree)
        elif "end" in tree:
            ended = True
            yield _ending(number, tree, n)
        else:
            call = _call(number, tree)
            if call.n != n + 1:
                raise RecordingError(line=number, why=f"call {call.n} follows call {n}: lines are missing or doubled")
            n = call.n
            yield call
    if number == 0:
        raise RecordingError(line=1, why="the file is empty")


def _tree(number: int, text: str) -> dict[str, Any]:
    if not text.endswith("\n"):
        raise RecordingError(
            line=number, why="it is cut off: it has no end of line (without it, the rest can be replayed)"
        )
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordingError(line=number, why=f"it is no JSON ({error})") from error
    if not isinstance(tree, dict):
        raise RecordingError(line=number, why=f"it is {type(tree).__name__}; expected a JSON object")
    return tree


def _header(tree: Mapping[str, Any]) -> Header:
    if "halfmoon_recording" not in tree:
        raise RecordingError(line=1, why="this is no recording: it does not begin with halfmoon_recording")
    if tree["halfmoon_recording"] != FORMAT:
        why = f"the recording's format is {tree['halfmoon_recording']!r}; this version reads {FORMAT}"
        raise RecordingError(line=1, why=why)
    field = _Fields(1, tree)
    packed = tree.get("fingerprint")
    return Header(
        halfmoon=field.take("halfmoon", str),
        conductor_id=field.take("conductor_id", str),
        policy=field.take("policy", str),
        block_size=field.take("block_size", int),
        block_bytes=field.take("block_bytes", int),
        fingerprint=None if packed is None else field.made("fingerprint", _unpacked(worker_pb2.Fingerprint)),
        config=field.take("config", dict),
    )


def _ending(number: int, tree: Mapping[str, Any], n: int) -> Ending:
    field = _Fields(number, tree)
    ending = Ending(why=field.take("end", str), calls=field.take("calls", int))
    if ending.calls != n:
        raise RecordingError(line=number, why=f"it counts {ending.calls} calls, and {n} are here")
    return ending


def _call(number: int, tree: Mapping[str, Any]) -> Call:
    field = _Fields(number, tree)
    name = field.take("call", str)
    if name not in CALLS:
        raise RecordingError(line=number, why=f"call: {name!r}; expected one of {', '.join(CALLS)}")
    arguments: dict[str, Any] = {}
    for key in CALLS[name]:
        if key in tree:
            arguments[key] = field.made(key, _READ[key])
        elif key in OPTIONAL or f"{name}.{key}" in OPTIONAL:
            arguments[key] = None
        else:
            raise RecordingError(line=number, why=f"{key} is missing")
    return Call(
        line=number,
        n=field.take("n", int),
        at_s=float(field.take("at_s", (int, float))),
        name=name,
        arguments=arguments,
        effects=tuple(map(str, field.take("effects", list))),
        digest=field.take("digest", str),
        records=tuple(tree.get("records", ())),
        raised=bool(tree.get("raised", False)),
    )


class _Fields:
    """One line's fields, read with errors that name the line and the field."""

    def __init__(self, line: int, tree: Mapping[str, Any]) -> None:
        self._line = line
        self._tree = tree

    def take(self, key: str, kind: type | tuple[type, ...]) -> Any:
        value = self._tree.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            name = kind.__name__ if isinstance(kind, type) else "number"
            raise RecordingError(line=self._line, why=f"{key}: got {value!r:.60}; expected {name}")
        return value

    def made(self, key: str, make: Callable[[Any], Any]) -> Any:
        try:
            return make(self._tree[key])
        except RecordingError:
            raise
        except HalfmoonError as error:
            raise RecordingError(line=self._line, why=f"{key}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError, binascii.Error, DecodeError) as error:
            raise RecordingError(line=self._line, why=f"{key}: {type(error).__name__}: {error}") from error


def _unpacked(message_class: Any) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        message = message_class()
        message.ParseFromString(base64.b64decode(text, validate=True))
        return codec.from_wire(message)

    return read


def _spec(tree: Mapping[str, Any]) -> RequestSpec:
    sampling = tree["sampling"]
    lists = {key: tuple(sampling[key]) for key in ("stop_token_ids", "stop")}
    token_ids = tuple(tree["token_ids"])
    if not all(isinstance(token, int) for token in token_ids):
        raise InvalidRequest(field="token_ids", value=tree["token_ids"], limit="integers")
    return RequestSpec(
        **{
            **tree,
            "token_ids": token_ids,
            "block_hashes": tuple(BlockHash(bytes.fromhex(name)) for name in tree["block_hashes"]),
            "cache_salt": bytes.fromhex(tree["cache_salt"]),
            "sampling": SamplingParams(**{**sampling, **lists}),
            "slo": Slo(**tree["slo"]),
        }
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"got {value!r:.60}; expected a string")
    return value


_READ: dict[str, Callable[[Any], Any]] = {
    "request_id": _text,
    "node_id": _text,
    "epoch": _text,
    "reason": _text,
    "stopped": bool,
    "undo": bool,
    "emitted_token_ids": lambda ids: tuple(int(i) for i in ids),
    "spec": _spec,
    "event": _unpacked(worker_pb2.WorkerEvent),
    "info": _unpacked(worker_pb2.NodeInfo),
    "seen": lambda tree: Seen(**tree),
}
