"""Pure: the demo's prompts: several share a long prefix, one is a second chat turn, one is long and cold."""

from __future__ import annotations

import random

RULES = (
    "You answer questions about the Half Moon Harbour lighthouse, from its log book below. "
    "Answer in one or two short sentences. If the log does not say, say so.\n\nLog book:\n"
)
KEEPERS = ("Ada", "Bram", "Cleo", "Dirk", "Elsa")
WEATHER = ("fog from the north", "a clear night", "heavy rain", "light snow", "a strong gale", "still air")
EVENTS = (
    "a fishing boat asked for shelter",
    "the lamp was trimmed and the lens polished",
    "two crates of oil were delivered",
    "the fog bell was rung for an hour",
    "a visitor signed the guest book",
    "the stairs were painted green",
)
QUESTIONS = (
    "Who kept the light on the first night?",
    "What was delivered to the lighthouse?",
    "What colour were the stairs painted?",
)


def log_book(seed: int, num_entries: int) -> str:
    """About 27 tokens an entry with the demo's tokenizer; the same text for the same arguments."""
    rng = random.Random(seed)
    entries = (
        f"Night {n}: {rng.choice(KEEPERS)} kept the light; {rng.choice(WEATHER)}; {rng.choice(EVENTS)}."
        for n in range(1, num_entries + 1)
    )
    return "\n".join(entries)


def shared_system(num_entries: int = 40) -> str:
    return RULES + log_book(7, num_entries)


def long_prompt(tokens: list[int], num_tokens: int) -> list[int]:
    """The first `num_tokens` of a text that is long enough."""
    assert len(tokens) >= num_tokens, f"{len(tokens)} tokens of text, {num_tokens} wanted"
    return tokens[:num_tokens]
