"""Every bad input, by the exact name of its field."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from conductor.validation import (
    MESSAGES_MAX,
    REQUEST_ID_CHARS_MAX,
    ServedModel,
    check_envelope,
    check_prompt,
    fit_max_tokens,
    sampling_of,
    slo_of,
)
from halfmoon.errors import InvalidRequest
from halfmoon.v1 import inference_pb2 as pb

MODEL = ServedModel(
    name="moon",
    vocab_size=300,
    context_tokens_max=100,
    block_size=4,
    eos_token_ids=(256, 258),
    generation_defaults={"temperature": 0.6, "top_k": 20},
)

Spoil = Callable[[pb.GenerateRequest], object]


def good() -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt="Hi")


def sampling(**values: object) -> Spoil:
    return lambda r: r.sampling.CopyFrom(pb.Sampling(**values))  # type: ignore[arg-type]


def ids(*values: int) -> Spoil:
    return lambda r: r.prompt_token_ids.CopyFrom(pb.TokenIds(ids=values))


def chat(*messages: pb.ChatMessage) -> Spoil:
    return lambda r: r.chat.CopyFrom(pb.Chat(messages=messages))


def message(role: str = "user", content: str = "x", token_ids: tuple[int, ...] = ()) -> pb.ChatMessage:
    return pb.ChatMessage(role=role, content=content, token_ids=token_ids)


def put(name: str, value: object) -> Spoil:
    return lambda r: setattr(r, name, value)


BAD: list[tuple[str, Spoil, str]] = [
    ("long id", put("request_id", "x" * (REQUEST_ID_CHARS_MAX + 1)), "request_id"),
    ("id with a space", put("request_id", "a b"), "request_id"),
    ("id with a line break", put("request_id", "a\nb"), "request_id"),
    ("other model", put("model", "sun"), "model"),
    ("priority too high", put("priority", 101), "priority"),
    ("priority too low", put("priority", -101), "priority"),
    ("no input", lambda r: r.ClearField("input"), "input"),
    ("empty prompt", put("prompt", ""), "prompt"),
    ("prompt of 3201 characters", put("prompt", "x" * 3201), "prompt"),
    ("no ids", ids(), "prompt_token_ids"),
    ("id out of range", ids(1, 300), "prompt_token_ids"),
    ("more ids than context", ids(*([1] * 101)), "prompt_token_ids"),
    ("no messages", chat(), "messages"),
    ("too many messages", chat(*([message(content="")] * (MESSAGES_MAX + 1))), "messages"),
    ("messages too long", chat(message(content="x" * 2000), message(content="x" * 2000)), "messages"),
    ("no role", chat(message(), message(role="")), "messages[1].role"),
    ("long role", chat(message(role="r" * 33)), "messages[0].role"),
    ("role with a line break", chat(message(role="a\n")), "messages[0].role"),
    ("ids of a user", chat(message(token_ids=(1,))), "messages[0].token_ids"),
    ("empty last turn", chat(message(), message(content="")), "messages[1].content"),
    ("neither text nor ids", chat(message("assistant", ""), message()), "messages[0].content"),
    ("said out of range", chat(message("assistant", "", (300,))), "messages[0].token_ids"),
    ("negative temperature", sampling(temperature=-0.1), "temperature"),
    ("temperature not a number", sampling(temperature=math.nan), "temperature"),
    ("endless temperature", sampling(temperature=math.inf), "temperature"),
    ("top_p of 0", sampling(top_p=0.0), "top_p"),
    ("top_p above 1", sampling(top_p=1.1), "top_p"),
    ("top_p not a number", sampling(top_p=math.nan), "top_p"),
    ("seed too large", sampling(seed=2**63), "seed"),
    ("max_tokens of 0", sampling(max_tokens=0), "max_tokens"),
    ("stop token out of range", sampling(stop_token_ids=[300]), "stop_token_ids"),
    ("too many stop tokens", sampling(stop_token_ids=list(range(65))), "stop_token_ids"),
    ("too many stop strings", sampling(stop=["x"] * 17), "stop"),
    ("empty stop string", sampling(stop=["x", ""]), "stop"),
    ("long stop string", sampling(stop=["x" * 257]), "stop"),
    ("too many logprobs", sampling(logprobs=21), "logprobs"),
    ("TTFT of 0", put("slo_ttft_s", 0.0), "slo_ttft_s"),
    ("negative TBT", put("slo_tbt_s", -1.0), "slo_tbt_s"),
    ("TTFT not a number", put("slo_ttft_s", math.nan), "slo_ttft_s"),
    ("endless TBT", put("slo_tbt_s", math.inf), "slo_tbt_s"),
]


@pytest.mark.parametrize(("spoil", "field"), [(s, f) for _, s, f in BAD], ids=[name for name, _, _ in BAD])
def test_bad_input_is_named(spoil: Spoil, field: str) -> None:
    request = good()
    spoil(request)
    with pytest.raises(InvalidRequest) as caught:
        check_envelope(request, MODEL)
    assert caught.value.field == field
    assert caught.value.limit


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: None,
        ids(0, 299),
        chat(message("system"), message(), message("assistant", "", (258,)), message()),
        put("model", "moon"),
        put("request_id", "ä" * REQUEST_ID_CHARS_MAX),
        sampling(temperature=0.0, top_p=1.0, top_k=2**32 - 1, seed=2**63 - 1, logprobs=20),
    ],
)
def test_good_input_passes(spoil: Spoil) -> None:
    request = good()
    spoil(request)
    check_envelope(request, MODEL)


def test_unset_fields_take_the_checkpoints_defaults_then_the_apis() -> None:
    params = sampling_of(pb.Sampling(), MODEL, seed=5)
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.6, 1.0, 20, 5)
    assert (params.max_tokens, params.logprobs, params.ignore_eos) == (256, None, False)
    chosen = sampling_of(pb.Sampling(temperature=0.0, top_k=0, seed=0), MODEL, seed=5)
    assert (chosen.temperature, chosen.top_k, chosen.seed) == (0.0, 0, 0)


def test_ends_of_sequence_are_stop_tokens_unless_ignored() -> None:
    assert sampling_of(pb.Sampling(stop_token_ids=[7, 256]), MODEL, seed=0).stop_token_ids == (7, 256, 258)
    assert sampling_of(pb.Sampling(stop_token_ids=[7], ignore_eos=True), MODEL, seed=0).stop_token_ids == (7,)


@pytest.mark.parametrize("num_tokens", [0, 100, 101])
def test_a_prompt_must_leave_room_for_a_token(num_tokens: int) -> None:
    check_prompt("prompt", 99, MODEL)
    with pytest.raises(InvalidRequest) as caught:
        check_prompt("chat", num_tokens, MODEL)
    assert (caught.value.field, caught.value.value) == ("messages", f"{num_tokens} tokens")


def test_a_chosen_length_must_fit_and_the_default_is_cut() -> None:
    default, chosen = pb.Sampling(), pb.Sampling(max_tokens=21)
    assert fit_max_tokens(sampling_of(default, MODEL, seed=0), default, 80, MODEL).max_tokens == 20
    assert fit_max_tokens(sampling_of(chosen, MODEL, seed=0), chosen, 79, MODEL).max_tokens == 21
    with pytest.raises(InvalidRequest) as caught:
        fit_max_tokens(sampling_of(chosen, MODEL, seed=0), chosen, 80, MODEL)
    assert (caught.value.field, caught.value.value) == ("max_tokens", 21)
    assert caught.value.limit == "at most 20 (context 100, prompt 80 tokens)"


def test_slos() -> None:
    slo = slo_of(pb.GenerateRequest(slo_ttft_s=0.5))
    assert (slo.ttft_s, slo.tbt_s) == (0.5, None)
