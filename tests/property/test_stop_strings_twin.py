"""StopMatcher against a twin that sees the whole text at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conductor.stop_strings import StopMatcher

LETTERS = st.text(alphabet="ab🌕", max_size=6)


@given(stop=st.lists(LETTERS.filter(bool), max_size=3), pieces=st.lists(LETTERS, max_size=12))
def test_shown_text_is_the_text_before_the_first_match(stop: list[str], pieces: list[str]) -> None:
    matcher, shown, seen = StopMatcher(stop), "", ""
    for piece in pieces:
        seen += piece
        shown += matcher.feed(piece)
        starts = [seen.find(s) for s in stop if s in seen]
        assert matcher.matched == bool(starts)
        if starts:
            assert shown == seen[: min(starts)]
            return
        held = seen[len(shown) :]
        assert seen.startswith(shown)
        assert not held or any(s.startswith(held) for s in stop)  # nothing is held back in vain
    assert shown + matcher.flush() == seen
