"""Traces for tests: the committed one, and the published one where it is to be had."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from halfmoon.errors import NotFound
from workload.files import CONVERSATION, find_trace, read_trace
from workload.synthetic import generate, profile
from workload.trace import Trace

FIXTURE = Path(__file__).parent / "fixtures" / "synthetic_chat.jsonl"
"""Ten minutes of `fixture_trace`, as a file."""


def fixture_trace() -> Trace:
    """What made FIXTURE: the conversation profile, slowed down so that sessions come back within 300 requests."""
    return generate(replace(profile("conversation"), rate_per_s=0.5), 300, Random(1))


def conversation_trace() -> Trace:
    """Mooncake's published trace; the test is skipped where it is not found."""
    try:
        find_trace(CONVERSATION)
    except NotFound as error:
        pytest.skip(str(error))
    return read_trace(CONVERSATION)
