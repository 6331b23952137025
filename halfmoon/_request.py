"""Pure: what a caller says, turned into the wire's request; chat sessions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypedDict, TypeVar

from halfmoon.errors import InvalidRequest
from halfmoon.types import SEED_MAX, STOP_STRING_CHARS_MAX, TOP_LOGPROBS_MAX
from halfmoon.v1 import inference_pb2 as pb

TIMEOUT_S_DEFAULT = 600.0
"""The deadline of every call that names none: a hung server becomes DeadlineExceeded, never a hung client."""

SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "seed", "max_tokens", "ignore_eos", "logprobs")
REPEATED_SAMPLING_FIELDS = ("stop_token_ids", "stop")
REQUEST_FIELDS = ("model", "request_id", "slo_ttft_s", "slo_tbt_s", "priority")

REQUEST_BYTES_MAX = 8 * 2**20
"""What a server reads at most: a prompt of a million token ids is 5 MB."""

TOKEN_IDS = "token ids: integers from 0, below the vocabulary's size"
TEXT = "a text (str) that UTF-8 can encode, so without lone surrogates"
UINT32_MAX = 2**32 - 1
LIMITS = {
    "temperature": "a finite number in [0, 100]",
    "top_p": "a number in (0, 1]",
    "top_k": f"an integer in [0, {UINT32_MAX}], 0 for off",
    "seed": f"an integer in [0, {SEED_MAX}]",
    "max_tokens": f"an integer in [1, {UINT32_MAX}]",
    "ignore_eos": "True or False",
    "logprobs": f"an integer in [0, {TOP_LOGPROBS_MAX}]",
    "stop_token_ids": TOKEN_IDS,
    "stop": f"strings of 1 to {STOP_STRING_CHARS_MAX} characters that UTF-8 can encode",
    "model": TEXT,
    "request_id": TEXT,
    "slo_ttft_s": "a number of seconds",
    "slo_tbt_s": "a number of seconds",
    "priority": "an integer in [-100, 100]",
}
"""What is said of a value that does not even fit on the wire; everything else is the server's to judge."""


class Options(TypedDict, total=False):
    """Keyword arguments of generate, complete and chat. What is left out, the server decides (inference.proto).

    temperature, top_p, top_k, seed, max_tokens, stop_token_ids, stop, ignore_eos: as in halfmoon.types.SamplingParams.
    logprobs: alternatives to report beside each token's own log probability; 0 reports the token's alone.
    model: refused unless it is the served one; request_id: unique, chosen by the client if left out.
    slo_ttft_s, slo_tbt_s: the request is refused at once if, by what was measured, it is predicted to miss them.
    priority: higher goes first. timeout_s: the call's deadline (default 600 s), on the server too.
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int
    max_tokens: int
    stop_token_ids: Sequence[int]
    stop: str | Sequence[str]
    ignore_eos: bool
    logprobs: int
    model: str
    request_id: str
    slo_ttft_s: float
    slo_tbt_s: float
    priority: int
    timeout_s: float


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn. `token_ids`: what the model itself said, used by the server in place of `content`."""

    role: str
    content: str = ""
    token_ids: tuple[int, ...] = ()


MessageLike = Message | dict[str, str]
Prompt = str | Sequence[int]
G = TypeVar("G")


class ChatSession(Generic[G]):
    """The turns of one conversation. Answers are kept as token ids, so that their KV blocks are found again.

    Owned by one caller; one answer at a time. A turn whose stream was cancelled or failed leaves no answer behind.
    """

    def __init__(self, messages: Sequence[MessageLike] = (), *, start: Callable[..., G] | None = None) -> None:
        self.messages = [message_of(m) for m in messages]
        self._start = start

    def user(self, content: str) -> ChatSession[G]:
        """Append a user turn. Modifies self and returns it, so that `client.chat(session.user("Hi"))` reads well."""
        self.messages.append(Message(role="user", content=content))
        return self

    def record(self, text: str, token_ids: Sequence[int]) -> None:
        """Append the model's own turn; the client calls it when an answer is complete."""
        self.messages.append(Message(role="assistant", content=text, token_ids=tuple(token_ids)))

    def send(self, content: str, **options: object) -> G:
        """Append a user turn and start the answer: the same as `client.chat(session.user(content), **options)`."""
        assert self._start is not None, "made by hand: use client.chat(session)"
        return self._start(self.user(content), **options)


ChatInput = Sequence[MessageLike] | ChatSession[G]


def message_of(message: MessageLike) -> Message:
    """Raises: InvalidRequest on a dict with other keys than role and content."""
    if isinstance(message, Message):
        return message
    if not {"role", "content"} >= message.keys():
        raise InvalidRequest(field="messages", value=sorted(message), limit="the keys role and content")
    return Message(role=message.get("role", ""), content=message.get("content", ""))


def chat_of(messages: Sequence[Message]) -> pb.Chat:
    """Raises: InvalidRequest: naming "messages[i].…"."""
    chat = pb.Chat()
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        _require_text(f"{name}.role", message.role)
        _require_text(f"{name}.content", message.content)
        turn = chat.messages.add(role=message.role, content=message.content)
        _extend(turn.token_ids, f"{name}.token_ids", message.token_ids, TOKEN_IDS)
    return chat


def prompt_request(prompt: Prompt, options: Options) -> pb.GenerateRequest:
    """Raises: InvalidRequest if a value does not fit on the wire."""
    request = _with_options(options)
    if isinstance(prompt, str):
        _require_text("prompt", prompt)
        request.prompt = prompt
    elif isinstance(prompt, bytes | bytearray | memoryview):
        limit = "a text (str), which UTF-8 encodes: decode bytes first; or a sequence of token ids"
        raise InvalidRequest(field="prompt", value=prompt, limit=limit)
    elif not isinstance(prompt, Iterable):
        raise InvalidRequest(field="prompt", value=prompt, limit="a text (str) or a sequence of token ids")
    else:
        _extend(request.prompt_token_ids.ids, "prompt_token_ids", prompt, TOKEN_IDS)
        request.prompt_token_ids.SetInParent()
    return _fitting(request, "prompt")


def chat_request(messages: Sequence[Message], options: Options) -> pb.GenerateRequest:
    """Raises: InvalidRequest if a value does not fit on the wire."""
    request = _with_options(options)
    request.chat.CopyFrom(chat_of(messages))
    request.chat.SetInParent()
    return _fitting(request, "messages")


def timeout_of(options: Options, default_s: float) -> float:
    timeout_s = options.get("timeout_s", default_s)
    if not timeout_s > 0:
        raise InvalidRequest(field="timeout_s", value=timeout_s, limit="a positive number of seconds")
    return timeout_s


def _with_options(options: Options) -> pb.GenerateRequest:
    known = {*SAMPLING_FIELDS, *REPEATED_SAMPLING_FIELDS, *REQUEST_FIELDS, "timeout_s"}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}; known: {', '.join(sorted(known))}")
    request = pb.GenerateRequest()
    for name, value in options.items():
        if value is None:
            continue
        if name in SAMPLING_FIELDS:
            _assign(request.sampling, name, value)
        elif name in REPEATED_SAMPLING_FIELDS:
            values = [value] if isinstance(value, str) else value
            _extend(getattr(request.sampling, name), name, values, LIMITS[name])
        elif name in REQUEST_FIELDS:
            _assign(request, name, value)
    return request


def _assign(message: pb.GenerateRequest | pb.Sampling, name: str, value: object) -> None:
    """protobuf refuses a wrong type or range with TypeError or ValueError; say which field it was, and its limit."""
    try:
        setattr(message, name, value)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(field=name, value=value, limit=LIMITS[name]) from error


def _extend(repeated: Any, name: str, values: object, limit: str) -> None:
    """As `_assign`, item by item, so that the one at fault is shown."""
    if not isinstance(values, Iterable):
        raise InvalidRequest(field=name, value=values, limit=limit)
    for value in values:
        try:
            repeated.append(value)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(field=name, value=value, limit=limit) from error


def _require_text(name: str, value: object) -> None:
    """protobuf would take bytes as well."""
    if not isinstance(value, str) or not _encodable(value):
        raise InvalidRequest(field=name, value=value, limit=TEXT)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fitting(request: pb.GenerateRequest, name: str) -> pb.GenerateRequest:
    size = request.ByteSize()
    if size > REQUEST_BYTES_MAX:
        limit = f"at most {REQUEST_BYTES_MAX} bytes in the whole request"
        raise InvalidRequest(field=name, value=f"{size} bytes", limit=limit)
    return request
