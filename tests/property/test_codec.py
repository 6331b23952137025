"""Every message class survives the wire, and every field of every class has its place in the proto."""

from __future__ import annotations

import math
import time
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.messages import (
    Attach,
    AttemptStats,
    BlockCopy,
    Closed,
    KvEvents,
    PrefillDone,
    Refused,
    SnapshotCommand,
    StartCommand,
    StepTokens,
    Token,
    TokenLogprob,
)
from halfmoon.errors import InvalidRequest
from halfmoon.types import AttemptId, BlockHash, FinishReason, NodeId, RequestId, SamplingParams, Tier
from halfmoon.v1 import worker_pb2
from service import codec

FLOAT32_FIELDS = {("Token", "logprob"), ("TokenLogprob", "logprob")}  # `float` in the proto
SINGLE = st.floats(allow_nan=False, allow_infinity=False, width=32)
SAMPLING = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 2**32 - 1),
    seed=st.integers(0, 2**63 - 1),
    max_tokens=st.integers(1, 2**32 - 1),
    stop_token_ids=st.tuples(st.integers(0, 2**32 - 1)),
    stop=st.tuples(st.text("ab\u00e9", min_size=1, max_size=9)),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
)
BASES: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(0, 2**31 - 1),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.text(max_size=12),
    bytes: st.binary(max_size=20),
    bool: st.booleans(),
    SamplingParams: SAMPLING,
}


def strategy(cls: type) -> st.SearchStrategy[Any]:
    """Any value of a wire class."""
    hints = get_type_hints(cls)
    names = [f.name for f in fields(cls)] if is_dataclass(cls) else list(cls._fields)  # type: ignore[attr-defined]
    return st.builds(cls, **{n: SINGLE if (cls.__name__, n) in FLOAT32_FIELDS else of(hints[n]) for n in names})


def of(hint: Any) -> st.SearchStrategy[Any]:
    inner, optional, repeated = codec._shape(hint)
    if inner in BASES:
        base = BASES[inner]
    elif codec._is_message(inner):
        base = st.deferred(lambda: strategy(inner))
    else:
        base = st.sampled_from(inner)
    if repeated:
        return st.lists(base, max_size=3).map(tuple)
    return st.none() | base if optional else base


@pytest.mark.parametrize("cls", codec.WIRE_CLASSES, ids=lambda cls: cls.__name__)
def test_every_value_survives_the_wire(cls: type) -> None:
    @settings(max_examples=15, deadline=None)
    @given(BASES.get(cls) or strategy(cls))
    def survives(value: Any) -> None:
        message = codec.to_wire(value)
        arrived = codec.parse(type(message), message.SerializeToString())
        assert arrived == value
        assert type(arrived) is cls

    survives()


@pytest.mark.parametrize("cls", codec.WIRE_CLASSES, ids=lambda cls: cls.__name__)
def test_class_and_message_have_the_same_fields(cls: type) -> None:
    names = {f.name for f in fields(cls)} if is_dataclass(cls) else set(cls._fields)  # type: ignore[attr-defined]
    assert set(getattr(worker_pb2, cls.__name__).DESCRIPTOR.fields_by_name) == names


def test_every_command_and_event_has_its_place_in_the_envelope() -> None:
    for envelope, classes in ((worker_pb2.WorkerCommand, codec._COMMANDS), (worker_pb2.WorkerEvent, codec._EVENTS)):
        kinds = {f.name: getattr(f.message_type, "name", "") for f in envelope.DESCRIPTOR.oneofs_by_name["kind"].fields}
        assert kinds == {codec._snake(cls.__name__): cls.__name__ for cls in classes}


def test_an_envelope_says_which_message_it_carries_even_when_that_is_empty() -> None:
    message = codec.to_wire(SnapshotCommand())
    assert message.WhichOneof("kind") == "snapshot_command"
    assert codec.from_wire(message) == SnapshotCommand()


ATTEMPT = AttemptId(RequestId("r"), 1)
STATS = AttemptStats(node_id=NodeId("p0"))


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (worker_pb2.WorkerCommand(), "WorkerCommand.kind"),
        (worker_pb2.WorkerEvent(closed=worker_pb2.Closed()), "closed.attempt_id"),
        (worker_pb2.BlockCopy(block_hash=b"x"), "tier"),
        (worker_pb2.BlockCopy(block_hash=b"x", tier=7), "tier"),  # type: ignore[arg-type]
        (worker_pb2.KvEvents(stored=[worker_pb2.BlockCopy()]), "stored[].tier"),
        (worker_pb2.Token(attempt_id={"request_id": "r"}, logprob=math.nan), "logprob"),
        (worker_pb2.AttemptStats(queue_s=math.inf), "queue_s"),
        (
            worker_pb2.WorkerEvent(refused=worker_pb2.Refused(attempt_id={"number": 1}, reason="mood")),
            "refused.reason",
        ),
        (
            worker_pb2.WorkerCommand(
                prefill_command=worker_pb2.PrefillCommand(
                    attempt_id={"number": 1}, sampling=worker_pb2.SamplingParams(top_p=7, max_tokens=1)
                )
            ),
            "prefill_command.sampling.top_p",
        ),
    ],
)
def test_malformed_messages_are_refused_by_the_path_of_the_field(message: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        codec.from_wire(message)
    assert refusal.value.field == field


def test_bytes_that_are_no_message_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="WorkerCommand"):
        codec.parse(worker_pb2.WorkerCommand, b"\xff\xff\xff")


def test_absent_and_default_are_told_apart() -> None:
    last = PrefillDone(attempt_id=ATTEMPT, first_token_id=0, stats=STATS, finish_reason=FinishReason.STOP)
    assert codec.from_wire(codec.to_wire(last)).finish_reason is FinishReason.STOP
    assert codec.from_wire(codec.to_wire(Token(attempt_id=ATTEMPT, index=0, token_id=0))).stats is None
    zero = SamplingParams(logprobs=0)
    assert codec.from_wire(codec.to_wire(zero)).logprobs == 0


def test_a_step_of_64_tokens_takes_well_under_a_millisecond() -> None:
    top = tuple(TokenLogprob(token_id=i, logprob=-1.0) for i in range(2))
    step = StepTokens(tokens=tuple(Token(attempt_id=ATTEMPT, index=i, token_id=i, top_logprobs=top) for i in range(64)))
    data = codec.to_wire(step).SerializeToString()

    def best_s(call: Any) -> float:
        times = []
        for _ in range(20):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return min(times)

    assert best_s(lambda: codec.to_wire(step).SerializeToString()) < 2e-3, "0.3 ms on an idle machine"
    assert best_s(lambda: codec.parse(worker_pb2.StepTokens, data)) < 2e-3, "0.6 ms on an idle machine"


def test_values_that_no_message_carries_are_a_bug_not_a_message() -> None:
    with pytest.raises(AttributeError):
        codec.to_wire(object())
    for value in (Attach(conductor_id="c", term=1), StartCommand(attempt_id=ATTEMPT, first_token_id=3)):
        assert type(codec.to_wire(value)) is worker_pb2.WorkerCommand
    copies = (BlockCopy(block_hash=BlockHash(b"h" * 16), tier=Tier.DRAM),)
    for event in (Closed(attempt_id=ATTEMPT), KvEvents(event_id=1, stored=copies)):
        assert type(codec.to_wire(event)) is worker_pb2.WorkerEvent
    assert Refused in codec._EVENTS
