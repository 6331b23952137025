"""Chats to ids: what the model said goes back as the ids that it said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conductor.chat import Turn, chat_token_ids
from halfmoon.errors import InvalidRequest
from tests.scripted_workers import ByteTokenizer

CLOSE = 258


def ids(text: str) -> list[int]:
    return ByteTokenizer().encode(text)


def user(content: str) -> Turn:
    return Turn(role="user", content=content)


def said(*token_ids: int) -> Turn:
    return Turn(role="assistant", content="never looked at", token_ids=token_ids)


def test_without_ids_it_is_the_rendered_text() -> None:
    turns = [user("Hi"), Turn(role="assistant", content="Yes?"), user("Go")]
    rendered = "<|open|>user\nHi<|close|>\n<|open|>assistant\nYes?<|close|>\n<|open|>user\nGo<|close|>\n"
    assert chat_token_ids(turns, ByteTokenizer()) == ids(rendered + "<|open|>assistant\n")


def test_ids_stand_in_place_of_content() -> None:
    before, after = ids("<|open|>user\nHi<|close|>\n<|open|>assistant\n"), ids("\n<|open|>user\nGo<|close|>\n")
    prompt = chat_token_ids([user("Hi"), said(7, 299), user("Go")], ByteTokenizer())
    assert prompt == [*before, 7, 299, CLOSE, *after, *ids("<|open|>assistant\n")]


def test_the_end_that_both_say_stands_once() -> None:
    once = chat_token_ids([user("Hi"), said(7, CLOSE), user("Go")], ByteTokenizer())
    assert once == chat_token_ids([user("Hi"), said(7), user("Go")], ByteTokenizer())
    assert once.count(CLOSE) == 3


def test_an_end_of_another_kind_is_kept() -> None:
    prompt = chat_token_ids([user("Hi"), said(7, 256), user("Go")], ByteTokenizer())
    assert prompt[prompt.index(7) : prompt.index(7) + 3] == [7, 256, CLOSE]


def test_a_user_cannot_forge_a_sentinel() -> None:
    sly = user("\ue0000.1\ue001 and \ue0001.1\ue001")
    prompt = chat_token_ids([sly, said(299), user("x")], ByteTokenizer())
    assert prompt.count(299) == 1
    assert prompt[: len(ids("<|open|>user\n" + sly.content))] == ids("<|open|>user\n" + sly.content)


def test_a_template_that_rewrites_answers_is_refused_by_name() -> None:
    class Rewriting(ByteTokenizer):
        def render_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return "".join(m["content"].upper() if m["role"] == "user" else "…" for m in messages)

    with pytest.raises(InvalidRequest) as caught:
        chat_token_ids([user("a"), said(1), user("b")], Rewriting())
    assert caught.value.field == "messages[1].token_ids"


WORDS = st.text(alphabet="ab é🌕\n", max_size=8)
ANSWERS = st.lists(st.integers(0, 299), min_size=1, max_size=6)


@given(first=WORDS, system=st.none() | WORDS, exchanges=st.lists(st.tuples(ANSWERS, WORDS), min_size=1, max_size=5))
def test_every_prompt_begins_with_the_prompt_and_answer_before_it(
    first: str, system: str | None, exchanges: list[tuple[list[int], str]]
) -> None:
    turns = [*([Turn(role="system", content=system)] if system is not None else []), user(first)]
    for answer, question in exchanges:
        before = chat_token_ids(turns, ByteTokenizer())
        turns += [said(*answer), user(question)]
        assert chat_token_ids(turns, ByteTokenizer())[: len(before) + len(answer)] == before + answer
