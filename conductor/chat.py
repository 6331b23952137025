"""Pure: a chat to token ids, with what the model itself said spliced in as ids.

Text that the model produced does not retokenise to the ids that it produced. Turns that carry ids are therefore
rendered as sentinels, the text between them is tokenised, and the ids are put where the sentinels stand: the next
turn's prompt begins with exactly the last turn's prompt and answer, and its KV blocks are found again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from halfmoon.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message. `token_ids`, if any, stand in place of `content`."""

    role: str
    content: str
    token_ids: tuple[int, ...] = ()


class ChatTokenizer(Protocol):
    """What this module needs of engine.tokenizer.Tokenizer."""

    @property
    def eos_token_ids(self) -> Sequence[int]: ...

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]: ...

    def render_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str: ...


def chat_token_ids(turns: Sequence[Turn], tokenizer: ChatTokenizer) -> list[int]:
    """The prompt of the next answer: the rendered chat with a generation prompt, in token ids.

    An end-of-sequence id that closes a turn's own ids and that the template writes as well stands once.

    Raises:
        InvalidRequest: if the template does not write every assistant turn verbatim, once and in order.
    """
    marks = _sentinels(turns)
    messages = [{"role": t.role, "content": marks.get(i, t.content)} for i, t in enumerate(turns)]
    rendered = tokenizer.render_chat(messages, add_generation_prompt=True)
    ids: list[int] = []
    for index, mark in marks.items():
        before, found, rendered = rendered.partition(mark)
        if not found or mark in rendered:
            raise InvalidRequest(
                field=f"messages[{index}].token_ids",
                value=turns[index].token_ids[:8],
                limit="no token ids: this model's chat template does not write an answer verbatim; send its content",
            )
        ids = _joined(ids, tokenizer.encode(before), tokenizer.eos_token_ids)
        ids.extend(turns[index].token_ids)
    return _joined(ids, tokenizer.encode(rendered), tokenizer.eos_token_ids)


def _joined(ids: list[int], text_ids: list[int], eos_token_ids: Sequence[int]) -> list[int]:
    """`ids + text_ids`, where an end of sequence that both say at the seam stands once."""
    twice = bool(ids) and bool(text_ids) and ids[-1] == text_ids[0] and ids[-1] in eos_token_ids
    return ids + text_ids[twice:]


def _sentinels(turns: Sequence[Turn]) -> dict[int, str]:
    """For every turn with ids, by its index, a text that occurs in no turn: private-use characters and numbers."""
    contents = "".join(turn.content for turn in turns)
    salt = 0
    while f"\ue000{salt}." in contents:
        salt += 1
    return {i: f"\ue000{salt}.{i}\ue001" for i, turn in enumerate(turns) if turn.token_ids}
