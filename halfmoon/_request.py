"""Pure: what a caller says, turned into the wire's request; chat sessions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypedDict, TypeVar

from halfmoon.errors import InvalidRequest
from halfmoon.v1 import inference_pb2 as pb

TIMEOUT_S_DEFAULT = 600.0
"""The deadline of every call that names none: a hung server becomes DeadlineExceeded, never a hung client."""

SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "seed", "max_tokens", "ignore_eos", "logprobs")
REPEATED_SAMPLING_FIELDS = ("stop_token_ids", "stop")
REQUEST_FIELDS = ("model", "request_id", "slo_ttft_s", "slo_tbt_s", "priority")


class Options(TypedDict, total=False):
    """Keyword arguments of generate, complete and chat. What is left out, the server decides (inference.proto).

    temperature, top_p, top_k, seed, max_tokens, stop_token_ids, stop, ignore_eos: as in halfmoon.types.SamplingParams.
    logprobs: alternatives to report beside each token's own log probability; 0 reports the token's alone.
    model: refused unless it is the served one; request_id: unique, chosen by the client if left out.
    slo_ttft_s, slo_tbt_s: the request is refused at once if the cluster predicts to miss them.
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
    turns = [pb.ChatMessage(role=m.role, content=m.content, token_ids=m.token_ids) for m in messages]
    return pb.Chat(messages=turns)


def prompt_request(prompt: Prompt, options: Options) -> pb.GenerateRequest:
    """Raises: InvalidRequest if a value does not fit its wire type."""
    request = _with_options(options)
    if isinstance(prompt, str):
        _fit("prompt", prompt, lambda: setattr(request, "prompt", prompt))
    else:
        _fit("prompt_token_ids", prompt, lambda: request.prompt_token_ids.ids.extend(prompt))
        request.prompt_token_ids.SetInParent()
    return request


def chat_request(messages: Sequence[Message], options: Options) -> pb.GenerateRequest:
    """Raises: InvalidRequest if a value does not fit its wire type."""
    request = _with_options(options)
    _fit("messages", messages, lambda: request.chat.CopyFrom(chat_of(messages)))
    request.chat.SetInParent()
    return request


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
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if name in SAMPLING_FIELDS:
            _fit(name, value, lambda n=name, v=value: setattr(request.sampling, n, v))  # type: ignore[misc]
        elif name in REPEATED_SAMPLING_FIELDS:
            values = [value] if isinstance(value, str) else value
            _fit(name, values, lambda n=name, v=values: getattr(request.sampling, n).extend(v))  # type: ignore[misc]
        elif name in REQUEST_FIELDS:
            _fit(name, value, lambda n=name, v=value: setattr(request, n, v))  # type: ignore[misc]
    return request


def _fit(field: str, value: object, assign: Callable[[], object]) -> None:
    """protobuf refuses a wrong type or range with TypeError or ValueError; say which field it was."""
    try:
        assign()
    except (TypeError, ValueError) as error:
        raise InvalidRequest(field=field, value=value, limit=f"a value of the wire's type ({error})") from error
