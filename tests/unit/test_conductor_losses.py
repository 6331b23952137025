"""The conductor's machine when something is lost that nobody reports: a last token, a peer, room at both ends."""

from __future__ import annotations

from core.messages import FailureKind
from tests.conductor_kit import TAKES_ALL, Play, attempt_of, info, prompt, spec


def test_a_last_token_that_died_with_its_prefill_worker_is_computed_again() -> None:
    play = Play("p0 p1 d0")
    play.request(spec("r"))
    play.reserved("d0", "r#1")
    play.prefilled("p0", "r#1", last=True)  # the token itself is still on its way, by another stream
    assert play.lose("p0") == ["resume r: p0 lost: killed"]
    assert play.resume("r", [])[0] == "begin r#2"


def test_a_last_token_that_died_with_its_decode_worker_is_computed_again() -> None:
    play = Play("p0 d0 d1")
    play.request(spec("r"))
    play.reserved("d0", "r#1")
    play.prefilled("p0", "r#1")
    play.joined("d0", "r#1")
    play.ended("d0", "r#1")
    assert play.lose("p0") == []
    assert play.lose("d0") == ["resume r: d0 lost: killed"]
    play.join("p0@2")
    assert play.resume("r", [7, 8, 9])[1] == "d1 <- reserve r#2 43(40) from p0@e2"


def test_a_stream_that_is_complete_loses_nothing_by_a_death() -> None:
    play = Play("p0 d0")
    play.request(spec("r"))
    play.reserved("d0", "r#1")
    play.prefilled("p0", "r#1", last=True)
    play.finished_stream("r")
    assert play.lose("p0") == []
    assert play.counter("requests_finished") == 1


def test_the_wait_for_the_last_token_is_bounded() -> None:
    play = Play("p0 d0", last_token_wait_s=5.0)
    play.request(spec("r"))
    play.reserved("d0", "r#1")
    play.prefilled("p0", "r#1", last=True)
    assert play.wait(4.9) == []
    assert play.wait(0.1) == ["resume r: the last token did not come"]


def test_a_prefill_worker_that_a_peer_has_lost_is_not_tried_again_at_once() -> None:
    """Decode workers see it die first: four tries would be gone before its stream with the conductor breaks."""
    play = Play("p0 p1 d0")
    play.request(spec("r"))
    play.reserved("d0", "r#1")
    assert play.failed("d0", "r#1", FailureKind.PEER_LOST)[-1].startswith("resume r: peer_lost at d0")
    assert play.resume("r", [])[-1] == "p1 <- prefill r#2 40(40)"
    assert play.request(spec("s"))[-1] == "p1 <- prefill s#1 40(40)", "nor by others, until it speaks"
    play.load("p0")
    assert play.request(spec("t", tokens=prompt(40, seed=1)))[-1] == "p0 <- prefill t#1 40(40)"


def test_the_only_prefill_worker_is_waited_for_until_it_speaks() -> None:
    play = Play("p0 d0")
    play.request(spec("r"))
    play.reserved("d0", "r#1")
    play.failed("d0", "r#1", FailureKind.PEER_LOST)
    assert play.resume("r", []) == []
    assert play.wait(1.0) == []
    play.load("p0")
    assert play.wait(1.0)[0] == "begin r#2"


# ---- room ----


def crowd() -> Play:
    """One decode worker, whose room is booked by `a`."""
    play = Play("", admission=TAKES_ALL)
    play.join("p0")
    play.join("d0", num_device_blocks=4)
    play.now_s = 100.0
    play.request(spec("a"))
    return play


def test_where_decode_room_is_short_the_prefill_waits_for_it() -> None:
    play = crowd()
    assert play.request(spec("b")) == ["begin b#1", "d0 <- reserve b#1 40(40) from p0@e1"]
    assert play.refused("d0", "b#1") == []
    assert play.load("d0", free_device_blocks=3) == ["d0 <- reserve b#1 40(40) from p0@e1"]
    assert play.reserved("d0", "b#1") == ["p0 <- prefill b#1 40(40)"]
    assert play.prefilled("p0", "b#1") == ["d0 <- start b#1 7"]


def test_a_withheld_prefill_is_neither_missed_nor_cancelled_where_it_never_was() -> None:
    play = crowd()
    play.request(spec("b"))
    play.wait(5.0)
    assert play.say("p0", play.snapshot("p0", attempts=[attempt_of("a#1")])) == []
    assert play.cancel("b") == ["d0 <- cancel b#1: client gone"]
    play.cancel("a")
    assert play.books_empty()


def test_who_holds_prefill_room_until_it_may_decode_goes_first() -> None:
    """The prefill of `b` is withheld, so that it holds nothing; one that is still computed would end by itself."""
    play = crowd()
    play.request(spec("b"))
    for name in ("b", "a"):
        assert play.refused("d0", f"{name}#1") == []
    assert play.prefilled("p0", "a#1") == []
    assert play.load("d0", free_device_blocks=3) == ["d0 <- reserve a#1 40(40) from p0@e1"]


def test_waiting_for_room_costs_no_tries_and_is_bounded() -> None:
    play = crowd()
    play.request(spec("b"))
    for _ in range(20):
        play.refused("d0", "b#1")
        assert play.load("d0", free_device_blocks=3) == ["d0 <- reserve b#1 40(40) from p0@e1"]
    play.refused("d0", "b#1")
    assert "resume b: no decode worker had room" in play.wait(100.0)


def test_a_worker_that_ends_under_those_who_wait_for_room_costs_them_no_try() -> None:
    play = crowd()
    play.request(spec("b"))
    for epoch in range(1, 7):  # six tries are all there are
        assert "resume b: p0 lost: killed" in play.lose(f"p0@{epoch}")
        play.resume("a", [])
        assert play.resume("b", []) == []
        play.join(f"p0@{epoch + 1}")
    assert play.counter("requests_failed") == 1, "a's, which had begun"


def test_who_found_no_room_once_has_its_next_prefill_withheld() -> None:
    """The books said that there was room: only the first try holds prefill room while it looks for some."""
    play = Play("p0 d0")
    assert play.request(spec("r"))[-1] == "p0 <- prefill r#1 40(40)"
    assert play.refused("d0", "r#1") == []
    assert "p0 <- cancel r#1: no decode worker had room within 10 s" in play.wait(10.0)
    assert play.resume("r", []) == ["begin r#2", f"d0 <- reserve r#2 40(40) from p0@{info('p0').epoch}"]
