"""Shell: text to token ids and back, chat templates, and what a checkpoint says about generation.

Built on `tokenizers` and a jinja2 sandbox with transformers' template environment; transformers itself is imported
only for a directory that has no tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from engine.chat_template import ChatTemplate
from engine.checkpoint_files import GENERATION_CONFIG, optional_json, read_json
from halfmoon.errors import CheckpointError, InvalidRequest

TOKENIZER = "tokenizer.json"
OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json")
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """One checkpoint's tokenizer. Safe to use from several threads.

    Args:
        eos_token_ids: tokens that end a reply: the generation config's and the tokenizer's own.
        vocab_size: of the tokenizer, added tokens included; the model's embedding may be larger.
        generation_defaults: generation_config.json's sampling values that are set (temperature, top_p, top_k).
    """

    def __init__(
        self,
        fast: FastTokenizer,
        *,
        eos_token_ids: tuple[int, ...],
        template: ChatTemplate | None,
        generation_defaults: dict[str, float],
    ) -> None:
        self._fast = fast
        self._template = template
        self.eos_token_ids = eos_token_ids
        self.vocab_size: int = fast.get_vocab_size(with_added_tokens=True)
        self.generation_defaults = generation_defaults

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        ids: list[int] = self._fast.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens are skipped."""
        text: str = self._fast.decode(list(ids), skip_special_tokens=True)
        return text

    def render_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt text of a chat; encode it with add_special_tokens=False.

        Raises:
            InvalidRequest: no chat template, an empty or malformed list, or messages that the template refuses.
        """
        if self._template is None:
            raise InvalidRequest(field="messages", value="a chat", limit="a prompt: this model has no chat template")
        return self._template.render(messages, add_generation_prompt)

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        """An incremental decoder for what follows `context` (whose text is not repeated)."""
        return TextStream(self, self._fast, context)


class TextStream:
    """Token ids in, text out as soon as it is whole characters. One per reply; not for two threads at once."""

    def __init__(self, tokenizer: Tokenizer, fast: FastTokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._fast = fast
        self._decoder = DecodeStream(ids=list(context), skip_special_tokens=True)
        self._held: list[int] = []  # since text last came out: bounded by a character's bytes, or by `finish`

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; "" while a character is incomplete, or for a special token."""
        text: str | None = self._decoder.step(self._fast, token_id)
        if text is None:
            self._held.append(token_id)
            return ""
        self._held.clear()
        return text

    def finish(self) -> str:
        """What an incomplete last character leaves: replacement characters, or "". The stream is over."""
        held, self._held = self._held, []
        return self._tokenizer.decode(held) if held else ""


def open_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory.

    Raises:
        CheckpointError: naming the file that is missing or damaged.
    """
    fast = _open_fast(directory)
    settings = optional_json(directory / TOKENIZER_CONFIG)
    generation = optional_json(directory / GENERATION_CONFIG) or optional_json(directory / "config.json")
    specials = {name: text for name in SPECIAL_NAMES if (text := _token_text(settings.get(name))) is not None}
    template = _template_source(directory, settings)
    return Tokenizer(
        fast,
        eos_token_ids=_eos_ids(generation.get("eos_token_id"), fast.token_to_id(specials.get("eos_token", ""))),
        template=None if template is None else ChatTemplate(template, specials),
        generation_defaults=_defaults(generation),
    )


def check_tokenizer(directory: Path) -> None:
    """As `open_tokenizer`, but what transformers would have to convert is only looked for: that takes seconds.

    Raises:
        CheckpointError
    """
    if (directory / TOKENIZER).exists():
        open_tokenizer(directory)
    else:
        _require_other(directory)


def _open_fast(directory: Path) -> FastTokenizer:
    path = directory / TOKENIZER
    if not path.exists():
        return _convert(directory)
    read_json(path)  # says it better than the parser when the file is cut short
    try:
        return FastTokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(f"{path}: not a tokenizer: {error}") from error


def _convert(directory: Path) -> FastTokenizer:
    """From another tokenizer format, by transformers."""
    _require_other(directory)
    from transformers import AutoTokenizer  # slow to import, and seldom needed

    try:
        return AutoTokenizer.from_pretrained(str(directory)).backend_tokenizer
    except (OSError, ValueError, ImportError, AttributeError, TypeError, LookupError) as error:
        why = str(error).strip().partition("\n")[0]  # its advice on what else to install is for other programs
        raise CheckpointError(f"{directory}: no {TOKENIZER}, and none can be made of what is there: {why}") from error


def _require_other(directory: Path) -> None:
    if not any((directory / name).exists() for name in OTHER_TOKENIZERS):
        raise CheckpointError(f"{directory}: no tokenizer: neither {TOKENIZER} nor {' nor '.join(OTHER_TOKENIZERS)}")


def _template_source(directory: Path, settings: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = optional_json(directory / "chat_template.json").get("chat_template") or settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _token_text(token: Any) -> str | None:
    """A special token stands as text, or as an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _eos_ids(stated: Any, own: int | None) -> tuple[int, ...]:
    ids = stated if isinstance(stated, list) else [stated]
    return tuple(sorted({i for i in [*ids, own] if isinstance(i, int)}))


def _defaults(generation: dict[str, Any]) -> dict[str, float]:
    if not generation.get("do_sample", False):
        return {}
    return {key: generation[key] for key in ("temperature", "top_p", "top_k") if generation.get(key) is not None}
