"""Golden transcripts of the conductor's machine: every input and every effect, line by line.

When a change of behaviour is meant: python -m tests.golden.test_conductor_transcripts --rewrite
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from conductor.admission_config import AdmissionConfig
from conductor.admission_policies import admission_named
from conductor.config import PlacementName
from conductor.decisions import Choice
from conductor.effects import Slo
from core.messages import LoadReport, PassSample
from tests.conductor_kit import Play, attempt_of, chain, prompt, spec

HERE = Path(__file__).parent


class Scribe:
    """Calls a Play's acts by name and writes down what it said and heard."""

    def __init__(self, workers: str, **config: object) -> None:
        self.play = Play(workers, **config)  # type: ignore[arg-type]
        self.lines = [f"workers: {workers}"]

    def __call__(self, title: str, words: list[str]) -> None:
        self.lines.append(f"{self.play.now_s:7.2f}  {title}")
        self.lines += [f"           {word}" for word in words]

    def text(self) -> str:
        status = self.play.machine.status()
        self.lines += ["", "at the end", f"  open {status.requests_open}, closing {status.closing}"]
        self.lines += [f"  {n.info.node_id}: {n.state}, books {n.books}" for n in status.nodes]
        self.lines += [f"  {name}: {count}" for name, count in sorted(status.counters.items())]
        return "\n".join(self.lines) + "\n"


def life() -> str:
    tell = Scribe("p0 p1 d0 d1")
    play = tell.play
    tell("request a, 40 tokens", play.request(spec("a")))
    tell("request b, 40 tokens", play.request(spec("b", tokens=prompt(40, seed=1))))
    for name, prefill, decode in (("a", "p0", "d0"), ("b", "p1", "d1")):
        tell(f"{decode} reserved {name}#1", play.reserved(decode, f"{name}#1"))
        play.now_s += 0.05
        tell(f"{prefill} prefilled {name}#1", play.prefilled(prefill, f"{name}#1"))
        tell(f"{decode} joined {name}#1", play.joined(decode, f"{name}#1"))
    play.now_s += 0.5
    tell("d0 finished a#1", play.ended("d0", "a#1"))
    tell("stream of a finished", play.finished_stream("a"))
    tell("stop string in b", play.finished_stream("b", stopped=True))
    tell("d1 closed b#1", play.closed("d1", "b#1"))
    tell("a tick", play.wait(0.1))
    return tell.text()


def failover() -> str:
    tell = Scribe("p0 p1 d0 d1")
    play = tell.play
    tell("request r", play.request(spec("r", tokens=prompt(200))))
    tell("d0 has no room", play.refused("d0", "r#1"))
    tell("d1 reserved r#1", play.reserved("d1", "r#1"))
    tell("p0 dies", play.lose("p0"))
    tell("log of r: nothing yet", play.resume("r", []))
    tell("d1 closed r#1", play.closed("d1", "r#1"))
    tell("p0 is back, empty", play.join("p0@2"))
    decode = play.machine.summary(attempt_of("r#2").request_id).decode_node
    tell(f"{decode} reserved r#2", play.reserved(decode, "r#2"))
    tell("p1 prefilled r#2", play.prefilled("p1", "r#2", token=11))
    tell(f"{decode} joined r#2", play.joined(decode, "r#2"))
    tell("a late word of the dead p0 about r#1", play.prefilled("p0@1", "r#1"))
    play.now_s += 2.0
    tell(f"{decode} dies", play.lose(decode))
    tell("log of r: 3 tokens", play.resume("r", [11, 12, 13]))
    tell("token stream of p1 is lost", play.tokens_lost("p1"))
    tell("client gone", play.cancel("r"))
    tell("a minute later", play.wait(60.0))
    return tell.text()


def admission() -> str:
    tell = Scribe("d0", requests_max=3)
    play = tell.play
    tell("request early", play.request(spec("early")))
    tell("p0 joins with a cached prefix", play.join("p0", chain(prompt(160))))
    passes = tuple(
        PassSample(new_tokens=n, context_tokens=c, batch=0, kv_tokens=0, seconds=0.01 + n * 1e-3)
        for n in range(1, 400, 3)
        for c in (0, 200)
    )
    tell("p0 reports passes", play.say("p0", LoadReport(passes=passes)))
    tell("request a, cached", play.request(spec("a", tokens=prompt(170), slo=Slo(ttft_s=0.1))))
    tell("request b, not cached", play.request(spec("b", tokens=prompt(170, seed=1), slo=Slo(ttft_s=0.1))))
    tell("request c, too long", play.request(spec("c", tokens=prompt(100), max_tokens=16_000)))
    tell("request d", play.request(spec("d")))
    tell("request e", play.request(spec("e")))
    tell("request f", play.request(spec("f")))
    for name in "ade":
        tell(f"cancel {name}", play.cancel(name))
    return tell.text()


def coupled() -> str:
    tell = Scribe("c0 p0 d0")
    play = tell.play
    tell("request a", play.request(spec("a", tokens=prompt(500))))
    tell("request b", play.request(spec("b", tokens=prompt(500, seed=1))))
    tell("request c", play.request(spec("c", tokens=prompt(20, seed=2))))
    tell("p0 dies", play.lose("p0"))
    tell("log of b", play.resume("b", []))
    tell("log of c", play.resume("c", []))
    tell("c0 prefilled a#1, its only token", play.prefilled("c0", "a#1", last=True))
    tell("stream of a finished", play.finished_stream("a"))
    tell("c0 dies", play.lose("c0"))
    for name in "bc":
        tell(f"log of {name}", play.resume(name, []))
    tell("nobody comes back", play.wait(20.0))
    return tell.text()


def placements() -> str:
    """The same eight requests under every policy: a hot prefix at p0, a part of it at p1, and prompts of their own."""
    lines = []
    for policy in PlacementName:
        play = Play("p2 d0 d1", placement=policy, copies_share_max=0.015, copies_window_s=100.0)
        play.join("p0", chain(prompt(320)))
        play.join("p1", chain(prompt(320))[:5])
        play.now_s += 100.0
        lines.append(policy.value)
        for number in range(8):
            hot = number % 4 != 3
            tokens = (*prompt(320), *prompt(30, seed=number)) if hot else prompt(200, seed=number)
            play.request(spec(f"r{number}", tokens=tokens))
            play.now_s += 0.02
            record = play.machine.explain(attempt_of(f"r{number}#1").request_id)
            assert record is not None
            lines.append(f"  {'hot' if hot else 'own'} {_chosen(record.choices[0])}")
        lines.append(f"  copies capped: {play.counter('copies_capped')}")
    return "\n".join(lines) + "\n"


def _chosen(choice: Choice) -> str:
    prefill = next(score for score in choice.prefill_scores if score.node_id == choice.prefill_node)
    terms = " + ".join(f"{name} {1e3 * getattr(prefill, f'{name}_s'):.1f}" for name in ("queue", "fetch", "prefill"))
    fetched = f", {choice.fetch_blocks} fetched from {choice.fetch_source}" if choice.fetch_blocks else ""
    return (
        f"{choice.prefill_node} -> {choice.decode_node}: {terms} = {1e3 * choice.ttft_s:.1f} ms, "
        f"{choice.hit_blocks} blocks hit{fetched}, of {choice.prefill_candidates}"
    )


def small(policy: str, blocks: int, **config: object) -> Scribe:
    """One prefill worker, and one decode worker of so many blocks of 16 tokens."""
    tell = Scribe("p0", admission=replace(admission_named(policy, AdmissionConfig()), **config))  # type: ignore[arg-type]
    tell.lines[0] = f"workers: p0, d0 of {blocks} blocks; {policy}"
    tell.play.join("d0", num_device_blocks=blocks)
    tell.play.now_s = 200.0
    return tell


def verdicts(play: Play, name: str) -> list[str]:
    record = play.machine.explain(attempt_of(f"{name}#1").request_id)
    assert record is not None
    said = [(v, "yes" if v.accept else "no", f"{v.predicted:.4g}/{v.limit:.4g} {v.unit}") for v in record.verdicts]
    return [f"{v.policy} ({v.mode}, {v.stage}): {word} {v.reason} {values}" for v, word, values in said]


def baseline() -> str:
    """The decode side is judged when a prefill has ended; c's is wasted."""
    tell = small("baseline", 6)
    play = tell.play
    for name in "abc":
        tell(f"request {name}, 40 tokens", play.request(spec(name)))
    for name in "abc":
        play.now_s += 0.05
        tell(f"p0 prefilled {name}#1", play.prefilled("p0", f"{name}#1"))
        tell(f"  {name}'s verdicts", verdicts(play, name))
    tell("d0 reserved a#1", play.reserved("d0", "a#1"))
    tell("d0 has no room for b#1 after all", play.refused("d0", "b#1"))
    tell("d0 joined a#1", play.joined("d0", "a#1"))
    tell("d0 finished a#1", play.ended("d0", "a#1"))
    return tell.text()


def early() -> str:
    """Both sides on arrival by their load now, which knows nothing of what is being computed."""
    tell = small("early", 6)
    play = tell.play
    for name in "ab":
        tell(f"request {name}, 40 tokens", play.request(spec(name)))
        tell(f"p0 prefilled {name}#1", play.prefilled("p0", f"{name}#1"))
        tell(f"d0 reserved {name}#1", play.reserved("d0", f"{name}#1"))
    tell("request c, 40 tokens", play.request(spec("c")))
    tell("  c's verdicts", verdicts(play, "c"))
    return tell.text()


def predictive() -> str:
    """The decode pool as it will be when this prefill ends: b's ends before, so c is refused; `early` would take it.

    The pool's mean lets e in; the worker that is left when its prefill has ended has no room.
    """
    tell = small("predictive", 6)
    play = tell.play
    tell("request a, 40 tokens", play.request(spec("a")))
    tell("p0 prefilled a#1", play.prefilled("p0", "a#1"))
    tell("d0 reserved a#1", play.reserved("d0", "a#1"))
    tell("d0 joined a#1", play.joined("d0", "a#1"))
    tell("request b, 40 tokens", play.request(spec("b")))
    tell("request c, 40 tokens", play.request(spec("c")))
    tell("  c's verdicts", verdicts(play, "c"))
    tell("p0 prefilled b#1", play.prefilled("p0", "b#1"))
    tell("d0 reserved b#1", play.reserved("d0", "b#1"))
    tell("d1 joins, as small", play.join("d1", num_device_blocks=6))
    tell("request e, 50 tokens", play.request(spec("e", tokens=prompt(50, seed=1))))
    tell("d1 dies", play.lose("d1"))
    tell("p0 prefilled e#1", play.prefilled("p0", "e#1"))
    tell("  e's verdicts", verdicts(play, "e"))
    return tell.text()


def deferral() -> str:
    """Who finds no room waits, the higher class first, and no longer than its TTFT limit allows."""
    tell = small("forecast", 4)
    play = tell.play
    tell("request a, 40 tokens", play.request(spec("a")))
    tell("request b, priority -1", play.request(replace(spec("b"), priority=-1)))
    tell("request c, first token within 1 s", play.request(spec("c", slo=Slo(ttft_s=1.0))))
    tell("request d", play.request(spec("d")))
    tell("  d's verdicts", verdicts(play, "d"))
    tell("a second later", play.wait(1.0))
    tell("request e, priority 1", play.request(replace(spec("e"), priority=1)))
    tell("client of a gone", play.cancel("a"))
    tell("client of e gone", play.cancel("e"))
    tell("a tick later", play.wait(0.1))
    tell("client of d gone", play.cancel("d"))
    tell("a tick later", play.wait(0.1))
    return tell.text()


def forecast() -> str:
    """Outputs have had 8 tokens so far: after some steps their room is counted on, and asked for during the prefill."""
    tell = small("forecast", 8)
    play = tell.play
    for i in range(20):
        name = f"n{i}"
        play.request(spec(name))
        play.reserved("d0", f"{name}#1")
        play.prefilled("p0", f"{name}#1")
        play.joined("d0", f"{name}#1")
        play.ended("d0", f"{name}#1")
        play.finished_stream(name)
    tell("request a, 100 tokens", play.request(spec("a", tokens=prompt(100), max_tokens=20)))
    tell("d0 reserved a#1", play.reserved("d0", "a#1"))
    tell("p0 prefilled a#1", play.prefilled("p0", "a#1"))
    tell("d0 joined a#1", play.joined("d0", "a#1"))
    tell("request b, 100 tokens", play.request(spec("b", tokens=prompt(100, seed=1), max_tokens=20)))
    tell("some steps later", play.wait(0.12))
    tell("  b's verdicts", verdicts(play, "b"))
    tell("its prefill will have ended when its KV can be there", play.wait(0.11))
    tell("d0 finished a#1", play.ended("d0", "a#1"))
    tell("d0 reserved b#1", play.reserved("d0", "b#1"))
    tell("p0 prefilled b#1", play.prefilled("p0", "b#1"))
    return tell.text()


SCENES: dict[str, Callable[[], str]] = {
    "baseline": baseline,
    "early": early,
    "predictive": predictive,
    "deferral": deferral,
    "forecast": forecast,
    "life": life,
    "failover": failover,
    "admission": admission,
    "coupled": coupled,
    "placements": placements,
}


@pytest.mark.parametrize("name", SCENES)
def test_the_transcript_is_as_kept(name: str) -> None:
    assert SCENES[name]() == (HERE / f"conductor_{name}.txt").read_text()


if __name__ == "__main__" and "--rewrite" in sys.argv:
    for scene, play_it in SCENES.items():
        (HERE / f"conductor_{scene}.txt").write_text(play_it())
