"""Chats and incremental text on the real tokenizer and chat template of the built-in model."""

from __future__ import annotations

import pytest

from conductor.chat import Turn, chat_token_ids
from engine.load import load_tokenizer
from engine.tokenizer import Tokenizer

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("smollm2-135m-instruct")


@pytest.mark.parametrize("end", [(), (2,)])
def test_every_prompt_begins_with_the_prompt_and_answer_before_it(tokenizer: Tokenizer, end: tuple[int, ...]) -> None:
    turns = [Turn(role="user", content="Hi there, what is the moon?")]
    for question in ("And the sun?", "  spaces \n and <|lines|>", "🌕"):
        prompt = chat_token_ids(turns, tokenizer)
        # An answer that its own text does not give back: one id per character.
        answer = [i for letter in " The moon. 🌕" for i in tokenizer.encode(letter)] + list(end)
        assert tokenizer.encode(tokenizer.decode(answer)) != answer
        turns.append(Turn(role="assistant", content="", token_ids=tuple(answer)))
        turns.append(Turn(role="user", content=question))
        after = chat_token_ids(turns, tokenizer)
        assert after[: len(prompt) + len(answer)] == prompt + answer
        assert after[len(prompt) + len(answer) - len(end)] == 2  # the turn is closed, once
        assert after[len(prompt) + len(answer) + 1 - len(end)] != 2


def test_without_ids_it_is_what_the_template_says(tokenizer: Tokenizer) -> None:
    turns = [Turn(role="user", content="Hi"), Turn(role="assistant", content="Yes?"), Turn(role="user", content="Go")]
    rendered = tokenizer.render_chat([{"role": t.role, "content": t.content} for t in turns])
    assert chat_token_ids(turns, tokenizer) == tokenizer.encode(rendered)


def test_text_does_not_depend_on_how_much_context_the_decoder_got(tokenizer: Tokenizer) -> None:
    prompt, output = tokenizer.encode("Once, é🌕月 upon a time"), tokenizer.encode(", a 月 rose. 🌕🌕")
    for kept in range(len(prompt) + 1):
        stream = tokenizer.stream(prompt[len(prompt) - kept :])
        assert "".join(stream.push(i) for i in output) + stream.finish() == ", a 月 rose. 🌕🌕", kept
