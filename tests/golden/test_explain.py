"""Golden: what `halfmoon explain` shows of a request that was served, one that was rejected, one that lost a worker.

When a change is meant: python -m tests.golden.test_explain --rewrite
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from rich.console import Console

from cli.explain import STEPS_SHOWN, explained
from conductor.actuals import Seen
from conductor.admission_config import AdmissionConfig
from conductor.config import Fit
from conductor.effects import Slo
from core.messages import AttemptFinished, AttemptStats, PrefillDone
from halfmoon.types import FinishReason, NodeId, RequestId
from tests.conductor_kit import Play, attempt_of, chain, prompt, spec

FILE = Path(__file__).parent / "explain.txt"
WIDTH = 80


def shown(play: Play, name: str) -> str:
    record = play.machine.explain(RequestId(name))
    assert record is not None
    console = Console(file=io.StringIO(), width=WIDTH, highlight=False)
    console.print(*explained(json.loads(json.dumps(record.as_json()))), sep="\n")
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def computed(play: Play, node: str, attempt: str, stats: AttemptStats) -> None:
    play.say(node, PrefillDone(attempt_id=attempt_of(attempt), first_token_id=7, stats=stats))


def served() -> str:
    """A prompt whose prefix a busy worker holds: another one fetches it."""
    play = Play("d0 d1", fit=Fit.FROZEN)
    play.now_s = 0.0
    play.join("p0", chain(prompt(800)))
    play.join("p1")
    play.now_s = 100.0
    play.request(spec("other", tokens=prompt(900, seed=3)))
    play.request(spec("request-1", tokens=prompt(850), max_tokens=5, slo=Slo(ttft_s=5.0, tbt_s=0.1)))
    assert play.machine.summary(RequestId("request-1")).decode_node == "d1"
    play.now_s += 0.003
    play.reserved("d1", "request-1#1")
    play.now_s += 0.130
    stats = AttemptStats(
        node_id=NodeId("p1"), queue_s=0.001, fetch_s=0.07, compute_s=0.052, computed_tokens=50, hit_tokens_remote=800
    )
    computed(play, "p1", "request-1#1", stats)
    play.now_s += 0.031
    play.joined("d1", "request-1#1")
    play.now_s += 0.120
    pulled = AttemptStats(node_id=NodeId("d1"), pull_s=0.058, pulled_blocks=54, overlap=0.9)
    done = AttemptFinished(
        attempt_id=attempt_of("request-1#1"), finish_reason=FinishReason.LENGTH, num_output_tokens=5, stats=pulled
    )
    play.say("d1", done)
    seen = Seen(tokenize_s=0.004, ttft_s=0.136, second_gap_s=0.06, tbt_mean_s=0.022, tbt_worst_s=0.06, tbt_max_s=0.06)
    play.machine.on_stream_finished(RequestId("request-1"), play.now_s, seen=seen)
    play.wait(1.0)
    return shown(play, "request-1")


def rejected() -> str:
    play = Play("p0 d0", fit=Fit.FROZEN, admission=AdmissionConfig(defer=False))
    play.request(spec("other", tokens=prompt(900, seed=3)))
    play.request(spec("request-2", slo=Slo(ttft_s=0.5)))
    return shown(play, "request-2")


def lost() -> str:
    play = Play("p0 d0")
    play.request(spec("request-3"))
    play.now_s += 0.02
    play.lose("p0")
    play.resume("request-3", [])
    return shown(play, "request-3")


def text() -> str:
    return "\n\n".join((served(), "-" * WIDTH, rejected(), "-" * WIDTH, lost())) + "\n"


def test_a_record_reads_as_it_did() -> None:
    assert text() == FILE.read_text()


def test_nothing_is_wider_than_a_terminal() -> None:
    assert max(map(len, text().splitlines())) <= WIDTH


def test_a_long_story_is_cut_short_and_says_so() -> None:
    play = Play("p0 p1 d0", attempts_max=40)
    play.request(spec("r"))
    for number in range(1, 20):
        play.failed(play.machine.summary(RequestId("r")).prefill_node, f"r#{number}")
        play.resume("r", [])
    record = play.machine.explain(RequestId("r"))
    assert record is not None
    assert f"… and {len(record.steps) - STEPS_SHOWN} more steps: --json shows them" in shown(play, "r")


if __name__ == "__main__" and "--rewrite" in sys.argv:
    FILE.write_text(text())
