"""Stop strings over text that comes in pieces."""

from __future__ import annotations

import pytest

from conductor.stop_strings import StopMatcher


def feed(stop: list[str], pieces: list[str]) -> tuple[list[str], bool, str]:
    """(what each piece made certain, whether a stop string was matched, what was left at the end)."""
    matcher, shown = StopMatcher(stop), []
    for piece in pieces:
        shown.append(matcher.feed(piece))
        if matcher.matched:
            break
    return shown, matcher.matched, matcher.flush()


@pytest.mark.parametrize(
    ("stop", "pieces", "expected"),
    [
        ([], ["a", "b"], (["a", "b"], False, "")),
        (["."], ["a", "b.c"], (["a", "b"], True, "")),
        (["END"], ["xE", "N", "D", "y"], (["x", "", ""], True, "")),
        (["END"], ["xE", "N", "E", "ND"], (["x", "", "EN", ""], True, "")),
        (["END"], ["xEN"], (["x"], False, "EN")),
        (["aab"], ["a", "a", "a", "b"], (["", "", "a", ""], True, "")),
        (["\n\n"], ["a\n", "b\n", "\n"], (["a", "\nb", ""], True, "")),
        (["cd", "bc"], ["abcd"], (["a"], True, "")),  # the match that starts first counts
        (["abc", "ab"], ["xab"], (["x"], True, "")),  # of two that start together, the shorter
        (["🌕🌕"], ["🌕", "x", "🌕", "🌕"], (["", "🌕x", "", ""], True, "")),
        (["é."], ["caf", "é", "!"], (["caf", "", "é!"], False, "")),
        (["stop"], ["", "", "st"], (["", "", ""], False, "st")),
    ],
)
def test_table(stop: list[str], pieces: list[str], expected: tuple[list[str], bool, str]) -> None:
    assert feed(stop, pieces) == expected


def test_nothing_may_follow_a_match() -> None:
    matcher = StopMatcher(["."])
    matcher.feed("a.")
    with pytest.raises(AssertionError, match="after the output's end"):
        matcher.feed("b")
