"""A recorded run replays bit by bit; a file that is damaged in any way says where."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from conductor.actuals import Seen
from conductor.config import ConductorConfig, Fit
from conductor.desk import Layout
from conductor.effects import Slo
from conductor.recording import FORMAT, Header, in_words, read
from conductor.replay import CUT, machine_of, replay
from conductor.taped import TapedMachine
from core.messages import LoadReport, PassSample, RefusalReason
from halfmoon.errors import RecordingError
from halfmoon.types import Epoch, NodeId, RequestId, Tier
from tests.conductor_kit import BLOCK_BYTES, BLOCK_SIZE, FINGERPRINT, PRIOR, Play, chain, info, prompt, spec


class Taped(Play):
    """The cast's machine, on tape."""

    def __init__(self, workers: str = "", **config: object) -> None:
        super().__init__(**config)
        self.lines: list[str] = []
        self.taking = True
        settings = {"prior": PRIOR, "suspect_s": 1e6, "silent_s": 2e6, **config}
        self.machine = TapedMachine(
            write=self.write,
            version="0.1.0",
            config=ConductorConfig(**settings),  # type: ignore[arg-type]
            layout=Layout(block_size=BLOCK_SIZE, block_bytes=BLOCK_BYTES),
            conductor_id="c",
            fingerprint=FINGERPRINT,
        )
        self.now_s = 0.0
        for name in workers.split():
            self.join(name)
        self.now_s = 100.0

    def write(self, line: str) -> bool:
        self.lines.append(line + "\n")
        return self.taking


def eventful() -> Taped:
    """Every kind of call, a loss, a refusal, a rejection, a fetch and an odd float among them."""
    play = Taped("p0 p1 d0", fit=Fit.FROZEN)
    machine = play.machine
    play.join("p2", chain(prompt(160)))
    play.now_s += 20.0
    play.request(spec("a", tokens=prompt(160)))
    play.refused("p0", "a#1", RefusalReason.NO_ROOM)
    play.request(spec("b", slo=Slo(ttft_s=1e-9)))
    play.request(spec("c", slo=Slo(ttft_s=1e-9), tokens=prompt(20, seed=4)))
    play.request(spec("d", slo=Slo(ttft_s=1e-9), tokens=prompt(30, seed=5)))
    play.request(spec("e", slo=Slo(ttft_s=1e-9), tokens=prompt(30, seed=6)))
    play.load("p1", passes=(PassSample(new_tokens=3, context_tokens=0, batch=0, kv_tokens=0, seconds=0.1 + 0.2),))
    node = machine.summary(RequestId("a")).prefill_node
    play.reserved("d0", "a#1")
    play.prefilled(node, "a#1")
    play.joined("d0", "a#1")
    play.now_s += 1 / 3
    play.failed("d0", "a#1")
    play.resume("a", [7, 8])
    machine.on_gap(RequestId("a"), "token 3 is missing", play.now_s)
    play.resume("a", [7, 8])
    machine.on_stream_finished(RequestId("a"), play.now_s, stopped=True, seen=Seen(ttft_s=0.1 + 0.2))
    play.cancel("b")
    play.tokens_lost("p0")
    play.lose("p1")
    machine.on_drain(NodeId("d0"), play.now_s)
    machine.on_drain(None, play.now_s)
    machine.on_drain(NodeId("d0"), play.now_s, undo=True)
    play.wait(1.0)
    machine.end_recording("closed")
    return play


def test_every_kind_of_call_is_played_again_bit_by_bit() -> None:
    play = eventful()
    result = replay(play.lines)
    assert result.difference is None
    assert {json.loads(line)["call"] for line in play.lines[1:-1]} == {
        "on_request", "on_resume", "on_cancel", "on_stream_finished", "on_tokens_lost", "on_gap", "on_node_joined",
        "on_node_lost", "on_drain", "on_worker_event", "on_tick",
    }  # fmt: skip
    assert (result.calls, result.ended, result.header.policy) == (len(play.lines) - 2, "closed", "algorithm1")
    assert result.digest == json.loads(play.lines[-2])["digest"]
    assert result.outcomes["rejected"] == 4
    assert result.outcomes["finished"] == 1
    assert [len(json.loads(line)["effects"]) for line in play.lines[1:-1]].count(0) < result.calls
    assert result.seconds == pytest.approx(play.now_s)


def test_probes_of_idle_workers_and_those_refused_between_them_are_decided_again() -> None:
    play = Taped("p0 d0", fit=Fit.FROZEN)
    for number in range(25):
        name = f"r{number}"
        if play.request(spec(name, slo=Slo(ttft_s=0.01)))[0].startswith("begin"):
            play.cancel(name)
        play.now_s += 1.0
    result = replay(play.lines)
    assert (result.difference, result.outcomes) == (None, {"rejected": 23, "cancelled": 2})


def test_the_caller_of_a_taped_machine_sees_no_difference() -> None:
    taped, plain = Taped("p0 d0"), Play("p0 d0")
    told: list[str] = []
    taped.machine.tell_records(lambda record: told.append(record.request_id))
    for play in (taped, plain):
        play.request(spec("r"))
        play.reserved("d0", "r#1")
        play.prefilled("p0", "r#1", last=True)
        play.finished_stream("r")
    assert [in_words(e) for e in taped.effects] == [in_words(e) for e in plain.effects]
    assert taped.counter("requests_finished") == plain.counter("requests_finished") == 1
    assert told == ["r"]


def test_a_recording_that_cannot_go_on_ends_and_the_machine_does_not() -> None:
    play = Taped("p0 d0")
    play.taking = False
    assert play.request(spec("r"))[0] == "begin r#1"
    length = len(play.lines)
    play.reserved("d0", "r#1")
    play.machine.end_recording("closed")
    assert (len(play.lines), play.counter("recording_ended")) == (length, 1)


def test_a_call_that_raised_is_on_tape() -> None:
    play = Taped("p0 d0")
    play.request(spec("r"))
    play.machine._placer.place = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        play.failed("p0", "r#1") and play.resume("r", [])
    result = replay(play.lines)
    assert result.difference is not None
    assert (result.difference.what, result.difference.call.name) == ("the recorded call raised", "on_resume")
    assert result.ended == CUT


# ---- decisions that differ ----


def changed(line: str, change: Callable[[dict[str, Any]], None]) -> str:
    tree = json.loads(line)
    change(tree)
    return json.dumps(tree) + "\n"


def line_of(play: Taped, call: str) -> int:
    return next(i for i, line in enumerate(play.lines) if json.loads(line).get("call") == call)


def test_the_first_decision_that_differs_is_named_with_both_sides() -> None:
    play = eventful()
    at = line_of(play, "on_request")
    play.lines[at] = changed(play.lines[at], lambda tree: tree["spec"].update(deadline_s=1.0))
    difference = replay(play.lines).difference
    assert difference is not None
    assert (difference.call.line, difference.call.name) == (at + 1, "on_request")
    assert difference.what == "effects that differ within (or an earlier line was changed)"
    play.lines[at] = changed(play.lines[at], lambda tree: tree["spec"].update(request_id="z"))
    difference = replay(play.lines).difference
    assert difference is not None
    assert (difference.what, difference.recorded[0], difference.replayed[0]) == (
        "other effects", "begin a#1", "begin z#1",
    )  # fmt: skip


def test_a_record_that_differs_is_named_by_its_path() -> None:
    play = eventful()
    at = next(i for i, line in enumerate(play.lines) if "records" in json.loads(line))
    play.lines[at] = changed(
        play.lines[at], lambda tree: tree["records"][0]["choices"][0]["prefill"].update(ttft_s=9.0)
    )
    difference = replay(play.lines).difference
    assert difference is not None
    assert difference.what == "records[0].choices[0].prefill.ttft_s"
    assert difference.recorded == ("9.0",)


# ---- damaged files ----


def broken(change: Callable[[list[str]], None]) -> RecordingError:
    lines = list(eventful().lines)
    change(lines)
    with pytest.raises(RecordingError) as caught:
        replay(lines)
    return caught.value


def put(lines: list[str], index: int, **fields: object) -> None:
    tree = json.loads(lines[index])
    tree.update(fields)
    lines[index] = json.dumps({k: v for k, v in tree.items() if v != "gone"}) + "\n"


@pytest.mark.parametrize(
    ("change", "line", "why"),
    [
        (lambda lines: lines.clear(), 1, "the file is empty"),
        (lambda lines: lines.__setitem__(0, "{}\n"), 1, "no recording"),
        (lambda lines: put(lines, 0, halfmoon_recording=FORMAT + 1), 1, f"format is {FORMAT + 1}; this version reads"),
        (lambda lines: put(lines, 0, config={"retry_seconds": 1}), 1, "config.retry_seconds"),
        (lambda lines: put(lines, 0, policy="psychic"), 1, "'psychic'"),
        (lambda lines: put(lines, 0, block_size="16"), 1, "block_size: got '16'; expected int"),
        (lambda lines: put(lines, 0, fingerprint="!"), 1, "fingerprint: "),
        (lambda lines: lines.__setitem__(3, lines[3][:-20]), 4, "cut off"),
        (lambda lines: lines.__setitem__(3, lines[3][:-20] + "\n"), 4, "it is no JSON"),
        (lambda lines: lines.__setitem__(3, "[]\n"), 4, "it is list"),
        (lambda lines: lines.pop(3), 4, "call 4 follows call 2: lines are missing"),
        (lambda lines: put(lines, 3, call="on_whim"), 4, "call: 'on_whim'; expected one of on_request, "),
        (lambda lines: put(lines, 1, info="gone"), 2, "info is missing"),
        (lambda lines: put(lines, 1, info="AAAA"), 2, "info: "),
        (lambda lines: put(lines, 2, epoch=5), 3, "epoch: TypeError: got 5"),
        (lambda lines: put(lines, 2, at_s="noon"), 3, "at_s: got 'noon'; expected number"),
        (lambda lines: lines.append(lines[3]), "after", "something follows the recording's end"),
        (lambda lines: put(lines, -1, calls=3), "last", "it counts 3 calls, and "),
    ],
)
def test_a_damaged_recording_names_the_line_and_what_is_wrong(change: Any, line: int | str, why: str) -> None:
    error = broken(change)
    count = len(eventful().lines)
    assert error.line == {"after": count + 1, "last": count}.get(line, line)  # type: ignore[call-overload]
    assert why in error.why


def test_a_request_that_could_not_be_is_refused_by_its_field() -> None:
    lines = list(eventful().lines)
    at = next(i for i, line in enumerate(lines) if json.loads(line).get("call") == "on_request")
    lines[at] = changed(lines[at], lambda tree: tree["spec"]["sampling"].update(top_p=7.0))
    with pytest.raises(RecordingError, match=f"line {at + 1}: spec: top_p: got 7.0"):
        replay(lines)


def test_a_recording_that_was_cut_between_lines_says_so() -> None:
    result = replay(eventful().lines[:-1])
    assert (result.difference, result.ended) == (None, CUT)


def test_a_header_builds_the_machine_that_was_recorded() -> None:
    header = next(read(eventful().lines))
    assert isinstance(header, Header)
    assert machine_of(header).policy_name == "algorithm1"
    assert header.config["fit"] == "frozen"
    assert header.fingerprint == FINGERPRINT


def test_what_a_worker_said_comes_back_exactly() -> None:
    play = Taped()
    node = info("p0")
    samples = (PassSample(new_tokens=1, context_tokens=2, batch=3, kv_tokens=4, seconds=1e-9, pairs=7),)
    report = LoadReport(passes=samples)
    play.machine.on_worker_event(node.node_id, Epoch("e9"), report, 0.1)
    play.machine.on_node_joined(node, 0.1 + 0.2)
    play.join("p1", chain(prompt(64)))
    _, *calls = read(play.lines)
    assert [dict(c.arguments).get("event") for c in calls[:1]] == [report]  # type: ignore[union-attr]
    assert calls[1].arguments["info"] == node  # type: ignore[union-attr]
    assert calls[1].at_s == 0.1 + 0.2  # type: ignore[union-attr]
    assert calls[3].arguments["event"].blocks[0].tier is Tier.DEVICE  # type: ignore[union-attr]
