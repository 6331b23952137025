"""Shell: a checkpoint's chat template in a jinja2 sandbox, in the environment that transformers gives it.

Templates come with checkpoints and are not trusted: an immutable sandbox, plain strings in, bounded text out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from halfmoon.errors import CheckpointError, InvalidRequest

MESSAGES_MAX = 10_000  # in one chat: far beyond any context
RENDERED_CHARS_MAX = 16 << 20  # a template that loops on its own is stopped


class ChatTemplate:
    """Args:
        source: jinja2 text.
        special_tokens: bos_token, eos_token, … as the template may name them.

    Raises:
        CheckpointError: if `source` does not compile.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template does not compile: {error}") from error

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """Raises: InvalidRequest: malformed messages, or messages that the template refuses."""
        _check(messages)
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(
                messages=[dict(m) for m in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            ):
                parts.append(part)
                size += len(part)
                if size > RENDERED_CHARS_MAX:
                    raise InvalidRequest(field="messages", value=size, limit=f"{RENDERED_CHARS_MAX} characters")
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise InvalidRequest(field="messages", value=str(error), limit="a chat that the template takes") from error
        return "".join(parts)


def _check(messages: list[dict[str, str]]) -> None:
    if not 0 < len(messages) <= MESSAGES_MAX:
        raise InvalidRequest(field="messages", value=len(messages), limit=f"1 to {MESSAGES_MAX} messages")
    for index, message in enumerate(messages):
        if not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InvalidRequest(field=f"messages[{index}]", value=message, limit="role and content, both strings")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Not jinja2's own filter, which escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
