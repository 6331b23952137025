"""Pure: the fake model's tokenizer: one id per UTF-8 byte, and a few special ids. No files, no dependencies."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

from engine.fake import EOS_TOKEN_ID, VOCAB_SIZE
from halfmoon.errors import InvalidRequest

SPECIALS = {"<|end|>": EOS_TOKEN_ID, "<|system|>": 257, "<|user|>": 258, "<|assistant|>": 259}
_BYTES = 256
_SPECIAL_TEXT = re.compile("(" + "|".join(re.escape(text) for text in SPECIALS) + ")")


class FakeTokenizer:
    """The methods of `engine.tokenizer.Tokenizer`. Text goes through it unchanged, special ids aside.

    Ids from 260 to `vocab_size` stand for no text: the model accepts them and never produces one.
    """

    def __init__(self) -> None:
        self.eos_token_ids: tuple[int, ...] = (EOS_TOKEN_ID,)
        self.vocab_size: int = VOCAB_SIZE
        self.generation_defaults: dict[str, float] = {}

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Special ids for their texts, wherever they stand, and bytes for the rest. There is no BOS to add."""
        ids: list[int] = []
        for part in _SPECIAL_TEXT.split(text):
            ids.extend([SPECIALS[part]] if part in SPECIALS else part.encode("utf-8", errors="replace"))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Special ids are skipped; bytes that are not UTF-8 become replacement characters."""
        return bytes(i for i in ids if i < _BYTES).decode("utf-8", errors="replace")

    def render_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """`<|role|>content<|end|>` for each message.

        Raises:
            InvalidRequest: an empty list, an unknown role, or content that is no text.
        """
        if not messages:
            raise InvalidRequest(field="messages", value=messages, limit="at least one message")
        text = "".join(_render(i, message) for i, message in enumerate(messages))
        return text + "<|assistant|>" if add_generation_prompt else text

    def stream(self, context: Sequence[int] = ()) -> FakeTextStream:
        """An incremental decoder for what follows `context` (whose text is not repeated)."""
        return FakeTextStream(context)


class FakeTextStream:
    """Ids in, text out as soon as it is whole characters. One per reply."""

    def __init__(self, context: Sequence[int] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token_id in context:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; "" while a character is incomplete, or for a special id."""
        return self._decoder.decode(bytes([token_id])) if token_id < _BYTES else ""

    def finish(self) -> str:
        """What an incomplete last character leaves: a replacement character, or ""."""
        return self._decoder.decode(b"", final=True)


def _render(index: int, message: dict[str, str]) -> str:
    role, content = message.get("role"), message.get("content")
    if f"<|{role}|>" not in SPECIALS or role == "end":
        raise InvalidRequest(field=f"messages[{index}].role", value=role, limit="system, user or assistant")
    if not isinstance(content, str):
        raise InvalidRequest(field=f"messages[{index}].content", value=content, limit="text")
    return f"<|{role}|>{content}<|end|>"
