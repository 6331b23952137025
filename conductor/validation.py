"""Pure: everything a client may get wrong, refused with the field's name, the value and the limit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from conductor.chat import Turn
from conductor.effects import Slo
from halfmoon.errors import InvalidRequest
from halfmoon.types import SamplingParams
from halfmoon.v1 import inference_pb2 as pb

REQUEST_ID_CHARS_MAX = 128  # it is a key in logs, records and on every wire
ROLE_CHARS_MAX = 32
MESSAGES_MAX = 4096
PRIORITY_MAX = 100
SLO_S_MAX = 86_400.0
CHARS_PER_TOKEN_MAX = 32
"""A text longer than this times the context cannot fit: no vocabulary averages so many characters a token."""

API_MAX_TOKENS_DEFAULT = 256
SAMPLING_DEFAULTS: Mapping[str, float] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What requests are judged by.

    generation_defaults: the checkpoint's own temperature, top_p and top_k, where it names them.
    """

    name: str
    vocab_size: int
    context_tokens_max: int
    block_size: int
    eos_token_ids: tuple[int, ...]
    generation_defaults: Mapping[str, float] = field(default_factory=dict)

    @property
    def prompt_chars_max(self) -> int:
        return self.context_tokens_max * CHARS_PER_TOKEN_MAX


def check_envelope(request: pb.GenerateRequest, model: ServedModel) -> None:
    """Everything that can be judged before the text is tokenised.

    Raises:
        InvalidRequest
    """
    check_request_id(request.request_id)
    _require(request.model in ("", model.name), "model", request.model, f"{model.name!r}, or nothing")
    _require(abs(request.priority) <= PRIORITY_MAX, "priority", request.priority, f"within ±{PRIORITY_MAX}")
    slo_of(request)
    sampling_of(request.sampling, model, seed=0)
    kind = request.WhichOneof("input")
    if kind == "prompt":
        check_text("prompt", request.prompt, model)
    elif kind == "prompt_token_ids":
        check_token_ids("prompt_token_ids", request.prompt_token_ids.ids, model)
        _require(len(request.prompt_token_ids.ids) > 0, "prompt_token_ids", [], "at least one token id")
    elif kind == "chat":
        check_chat(request.chat, model)
    else:
        raise InvalidRequest(field="input", value=None, limit="one of prompt, prompt_token_ids, chat")


def check_request_id(request_id: str) -> None:
    """Raises: InvalidRequest unless it is empty or printable without spaces."""
    good = len(request_id) <= REQUEST_ID_CHARS_MAX and request_id.isprintable() and " " not in request_id
    limit = f"at most {REQUEST_ID_CHARS_MAX} printable characters without spaces"
    _require(good, "request_id", request_id, limit)


def check_text(name: str, text: str, model: ServedModel) -> None:
    """Raises: InvalidRequest"""
    _require(text != "", name, text, "a text that is not empty")
    _require(
        len(text) <= model.prompt_chars_max, name, _size(len(text)), f"at most {model.prompt_chars_max} characters"
    )


def check_token_ids(name: str, ids: Sequence[int], model: ServedModel) -> None:
    """Raises: InvalidRequest"""
    limit = f"ids in [0, {model.vocab_size})"
    _require(not ids or max(ids) < model.vocab_size, name, max(ids, default=None), limit)
    fits = len(ids) <= model.context_tokens_max
    _require(fits, name, f"{len(ids)} ids", f"at most {model.context_tokens_max} (the context)")


def check_chat(chat: pb.Chat, model: ServedModel) -> None:
    """Raises: InvalidRequest"""
    messages = chat.messages
    _require(len(messages) > 0, "messages", [], "at least one message")
    _require(len(messages) <= MESSAGES_MAX, "messages", len(messages), f"at most {MESSAGES_MAX} messages")
    for index, message in enumerate(messages):
        _check_message(f"messages[{index}]", message, model)
    total = sum(len(m.content) for m in messages)
    limit = f"at most {model.prompt_chars_max} characters in all"
    _require(total <= model.prompt_chars_max, "messages", _size(total), limit)


def check_prompt(kind: str, num_prompt_tokens: int, model: ServedModel) -> None:
    """`kind`: which input it was. Raises: InvalidRequest if no token could follow."""
    name = "messages" if kind == "chat" else kind
    limit = f"at most {model.context_tokens_max - 1} tokens (context {model.context_tokens_max})"
    _require(0 < num_prompt_tokens < model.context_tokens_max, name, f"{num_prompt_tokens} tokens", limit)


def slo_of(request: pb.GenerateRequest) -> Slo:
    """Raises: InvalidRequest"""
    return Slo(ttft_s=_slo_s(request, "slo_ttft_s"), tbt_s=_slo_s(request, "slo_tbt_s"))


def sampling_of(wire: pb.Sampling, model: ServedModel, *, seed: int) -> SamplingParams:
    """Complete parameters: the client's, then the checkpoint's defaults, then the API's; `seed` if it named none.

    max_tokens is not fitted to the context yet: `fit_max_tokens` does that when the prompt's length is known.

    Raises:
        InvalidRequest
    """
    check_token_ids("stop_token_ids", wire.stop_token_ids, model)
    eos = () if wire.ignore_eos else model.eos_token_ids
    return SamplingParams(
        temperature=_number(wire, "temperature", model),
        top_p=_number(wire, "top_p", model),
        top_k=int(_number(wire, "top_k", model)),
        seed=wire.seed if wire.HasField("seed") else seed,
        max_tokens=wire.max_tokens if wire.HasField("max_tokens") else API_MAX_TOKENS_DEFAULT,
        stop_token_ids=tuple(dict.fromkeys((*wire.stop_token_ids, *eos))),
        stop=tuple(wire.stop),
        ignore_eos=wire.ignore_eos,
        logprobs=wire.logprobs if wire.HasField("logprobs") else None,
    )


def fit_max_tokens(
    params: SamplingParams, wire: pb.Sampling, num_prompt_tokens: int, model: ServedModel
) -> SamplingParams:
    """A chosen max_tokens must fit behind the prompt; the default one is cut to what fits.

    Raises:
        InvalidRequest
    """
    room = model.context_tokens_max - num_prompt_tokens
    assert room > 0, "check_prompt comes first"
    if not wire.HasField("max_tokens"):
        return replace(params, max_tokens=min(params.max_tokens, room))
    limit = f"at most {room} (context {model.context_tokens_max}, prompt {num_prompt_tokens} tokens)"
    _require(params.max_tokens <= room, "max_tokens", params.max_tokens, limit)
    return params


def turns_of(chat: pb.Chat) -> list[Turn]:
    return [Turn(role=m.role, content=m.content, token_ids=tuple(m.token_ids)) for m in chat.messages]


def _check_message(name: str, message: pb.ChatMessage, model: ServedModel) -> None:
    good = message.role.isprintable() and 0 < len(message.role) <= ROLE_CHARS_MAX
    _require(good, f"{name}.role", message.role, f"1 to {ROLE_CHARS_MAX} printable characters")
    check_token_ids(f"{name}.token_ids", message.token_ids, model)
    own = not message.token_ids or message.role == "assistant"
    _require(own, f"{name}.token_ids", f"{len(message.token_ids)} ids", "ids only in the assistant's turns")
    said = bool(message.content or message.token_ids)
    _require(said, f"{name}.content", message.content, "a text that is not empty, or the ids of an answer")


def _slo_s(request: pb.GenerateRequest, name: str) -> float | None:
    if not request.HasField(name):
        return None
    value: float = getattr(request, name)
    good = math.isfinite(value) and 0 < value <= SLO_S_MAX
    _require(good, name, value, f"seconds in (0, {SLO_S_MAX:g}]")
    return value


def _number(wire: pb.Sampling, name: str, model: ServedModel) -> float:
    if wire.HasField(name):
        value: float = getattr(wire, name)
        return value
    return model.generation_defaults.get(name, SAMPLING_DEFAULTS[name])


def _size(chars: int) -> str:
    return f"{chars} characters"


def _require(ok: bool, name: str, value: object, limit: str) -> None:
    if not ok:
        raise InvalidRequest(field=name, value=value, limit=limit)
