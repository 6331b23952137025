"""Which rejected requests would have kept their limits: small worlds that can be reckoned by hand."""

from __future__ import annotations

from halfmoon.types import Outcome
from report.false_rejections import Found, false_rejections
from report.records import LoadSample, RequestRow, Run

FREE = [(7,)] * 40
"""Blocks of one decode worker, every second."""


def row(name: str, arrived_s: float, tokens: int, *, served: bool = True, **more: object) -> RequestRow:
    """One that is served has its first token after 1 s, and 100 more in 10 s; it takes 1 s of p0 and room on d0."""
    told: dict[str, object] = {
        "request_id": name,
        "arrived_s": arrived_s,
        "input_tokens": tokens,
        "output_tokens": 100 if served else 0,
        "outcome": Outcome.FINISHED if served else Outcome.REJECTED,
        "slo_ttft_s": 5.0,
        "slo_tbt_s": 0.2,
    }
    if served:
        told |= {"ttft_s": 1.0, "tbt_p50_s": 0.1, "tbt_worst_s": 0.1, "ended_s": arrived_s + 11.0}
        told |= {"prefill_s": 1.0, "prefill_node": "p0", "decode_node": "d0"}
    return RequestRow(**(told | more))  # type: ignore[arg-type]


def run_of(rows: tuple[RequestRow, ...], free: list[tuple[int, ...]]) -> Run:
    samples = tuple(
        LoadSample(
            at_s=float(t),
            prefill_queue_s=0.0,
            prefill_load=0.0,
            decode_load=0.0,
            decode_kv_tokens=0,
            decode_sequences=0,
            decode_free_blocks=blocks,
        )
        for t, blocks in enumerate(free)
    )
    return Run(title="", settings={}, requests=rows, samples=samples, duration_s=40.0, wall_s=0.0)


def found(*rows: RequestRow, output: int = 100, free: list[tuple[int, ...]] = FREE) -> Found:
    result = false_rejections(run_of(rows, free), {r.request_id: output for r in rows}, 100)
    assert result is not None
    return result


def refused(arrived_s: float, tokens: int, **more: object) -> RequestRow:
    """At once."""
    return row("b", arrived_s, tokens, served=False, **({"ended_s": arrived_s} | more))


def test_there_was_room_for_it_all_the_time() -> None:
    """500 tokens and up to 100 more need 7 blocks, the spare one counted."""
    assert found(row("a", 0.0, 500), refused(2.0, 500)) == Found(rejected=1, false_rejections=1, checked=1, right=1)
    assert found(row("a", 0.0, 500), refused(2.0, 600)).false_rejections == 0


def test_there_was_room_when_it_came_and_none_later() -> None:
    free = [(7,)] * 8 + [(6,)] * 32
    assert found(row("a", 0.0, 500), refused(2.0, 500), free=free).false_rejections == 0
    assert found(row("a", 0.0, 500), refused(2.0, 500), free=free, output=20).false_rejections == 1  # over before


def test_one_worker_must_have_the_room_all_the_time() -> None:
    turns = [(7, 0), (0, 7)] * 20
    assert found(row("a", 0.0, 500), refused(2.0, 500), free=turns).false_rejections == 0
    assert found(row("a", 0.0, 500), refused(2.0, 500), free=[(0, 7)] * 40).false_rejections == 1


def test_room_that_came_while_it_waited_would_have_done() -> None:
    free = [(0,)] * 6 + [(7,)] * 34
    assert found(row("a", 0.0, 500), refused(2.0, 500), free=free).false_rejections == 0
    assert found(row("a", 0.0, 500), refused(2.0, 500, ended_s=5.5), free=free).false_rejections == 1


def test_its_first_token_would_have_been_late() -> None:
    """Six prompts of a second each are before it, one after the other."""
    before = [row(f"a{i}", 0.0, 10, ttft_s=1.0 + i, ended_s=11.0 + i) for i in range(6)]
    assert found(*before, refused(0.5, 10)).false_rejections == 0
    assert found(*before, refused(2.5, 10)).false_rejections == 1


def test_those_that_came_later_do_not_go_first() -> None:
    after = [row(f"a{i}", 0.1, 10, ttft_s=0.9 + i, ended_s=11.0 + i) for i in range(6)]
    assert found(*after, refused(0.0, 10)).false_rejections == 1


def test_one_that_was_computed_and_then_rejected_took_what_it_took() -> None:
    late = refused(0.0, 10, ttft_s=6.0, prefill_s=1.0, prefill_node="p0", ended_s=6.0)
    assert found(row("a", 0.0, 10), late).false_rejections == 0


def test_the_pace_of_the_run_is_beyond_the_limit() -> None:
    assert found(row("a", 0.0, 10), refused(20.0, 10, slo_tbt_s=0.05)).false_rejections == 0


def test_an_accepted_one_is_reckoned_with_its_own_blocks_given_back() -> None:
    full = found(row("a", 0.0, 500), free=[(0,)] * 40)
    assert (full.checked, full.right) == (1, 1)


def test_of_a_run_that_served_nobody_nothing_is_known() -> None:
    assert false_rejections(run_of((refused(0.0, 10),), FREE), {"b": 100}, 100) is None
