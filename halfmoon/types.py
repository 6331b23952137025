"""Pure: the words every room shares: ids, tiers, roles, sampling parameters, terminal states."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import NamedTuple, NewType

from halfmoon.errors import InvalidRequest

RequestId = NewType("RequestId", str)
NodeId = NewType("NodeId", str)
Epoch = NewType("Epoch", str)
"""One incarnation of a node: start time and random digits; compared for equality only."""
BlockHash = NewType("BlockHash", bytes)
TransferId = NewType("TransferId", str)

TOP_LOGPROBS_MAX = 20
STOP_STRINGS_MAX = 16
STOP_STRING_CHARS_MAX = 256
STOP_TOKENS_MAX = 64
SEED_MAX = 2**63 - 1


class AttemptId(NamedTuple):
    """One try at serving one request. Everything that is sent, pinned or granted carries it."""

    request_id: RequestId
    number: int

    def __str__(self) -> str:
        return f"{self.request_id}#{self.number}"


class Tier(enum.IntEnum):
    """Where a copy of a block lies, fastest first."""

    DEVICE = 1
    DRAM = 2
    SSD = 3


class Role(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    COUPLED = "coupled"

    @property
    def prefills(self) -> bool:
        return self is not Role.DECODE

    @property
    def decodes(self) -> bool:
        return self is not Role.PREFILL


class FinishReason(enum.StrEnum):
    """Why a finished request produced no further token."""

    LENGTH = "length"
    STOP = "stop"  # end-of-sequence, a stop token or a stop string


class Outcome(enum.StrEnum):
    """The four terminal events; every accepted request ends in exactly one."""

    FINISHED = "finished"
    REJECTED = "rejected"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. Complete: no field is left to a default elsewhere.

    Args:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: nucleus mass in (0, 1]; 1 is off.
        top_k: number of candidates kept; 0 is off.
        seed: the sampling noise is a function of (seed, position) only.
        max_tokens: output tokens of the whole request, over all its attempts.
        stop_token_ids: tokens that end the output; the checkpoint's end-of-sequence ids
            are added by the front end unless `ignore_eos`.
        stop: strings that end the output, matched by the front end.
        ignore_eos: go on past the checkpoint's end-of-sequence tokens.
        logprobs: how many alternatives to report beside the token's own log probability;
            None reports nothing.

    Raises:
        InvalidRequest: naming the field and the limit.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    max_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _require(
            math.isfinite(self.temperature) and 0.0 <= self.temperature <= 100.0,
            "temperature",
            self.temperature,
            "a finite number in [0, 100]",
        )
        _require(math.isfinite(self.top_p) and 0.0 < self.top_p <= 1.0, "top_p", self.top_p, "a number in (0, 1]")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or a positive integer")
        _require(0 <= self.seed <= SEED_MAX, "seed", self.seed, f"an integer in [0, {SEED_MAX}]")
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _require(len(self.stop) <= STOP_STRINGS_MAX, "stop", len(self.stop), f"at most {STOP_STRINGS_MAX} strings")
        for text in self.stop:
            good = 0 < len(text) <= STOP_STRING_CHARS_MAX
            _require(good, "stop", text, f"strings of 1 to {STOP_STRING_CHARS_MAX} characters")
        _require(
            len(self.stop_token_ids) <= STOP_TOKENS_MAX,
            "stop_token_ids",
            len(self.stop_token_ids),
            f"at most {STOP_TOKENS_MAX} ids",
        )
        _require(
            self.logprobs is None or 0 <= self.logprobs <= TOP_LOGPROBS_MAX,
            "logprobs",
            self.logprobs,
            f"an integer in [0, {TOP_LOGPROBS_MAX}]",
        )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def _require(ok: bool, field: str, value: object, limit: str) -> None:
    if not ok:
        raise InvalidRequest(field=field, value=value, limit=limit)
