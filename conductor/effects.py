"""Pure: what goes into the conductor's machine from front ends, and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass

from core.messages import AttemptStats, Command
from halfmoon.errors import HalfmoonError
from halfmoon.types import AttemptId, BlockHash, Epoch, NodeId, Outcome, RequestId, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Slo:
    """Limits in seconds; None: no limit. A request's TBT is the mean of its worst 10 % of gaps."""

    ttft_s: float | None = None
    tbt_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class RequestSpec:
    """A validated, tokenised request. `block_hashes` names the full blocks of `token_ids`.

    `deadline_s` is a duration from `on_request`.
    """

    request_id: RequestId
    token_ids: tuple[int, ...]
    block_hashes: tuple[BlockHash, ...]
    sampling: SamplingParams
    front_end: str
    deadline_s: float
    slo: Slo = Slo()
    priority: int = 0
    tenant: str = ""
    cache_salt: bytes = b""
    public_tokens: int = 0


# ---- effects ----


@dataclass(frozen=True, kw_only=True)
class Send:
    """Send a command on a node's control stream; dropped (and counted) if that epoch is gone."""

    node_id: NodeId
    epoch: Epoch
    command: Command


@dataclass(frozen=True, kw_only=True)
class Begin:
    """From now on only tokens of this attempt count; earlier attempts' tokens are dropped and counted."""

    attempt_id: AttemptId


@dataclass(frozen=True, kw_only=True)
class HoldFirst:
    """If the present attempt brings the output's first token, its client sees it with the second, or after `hold_s`."""

    request_id: RequestId
    hold_s: float


@dataclass(frozen=True, kw_only=True)
class Resume:
    """An attempt was lost. The front end answers with `on_resume(request_id, emitted tokens)` of its log."""

    request_id: RequestId
    reason: str


@dataclass(frozen=True, kw_only=True)
class End:
    """The machine ends the request: rejected or failed (finished and cancelled come from the front end)."""

    request_id: RequestId
    outcome: Outcome
    error: HalfmoonError


Effect = Send | Begin | HoldFirst | Resume | End


@dataclass(frozen=True, kw_only=True)
class RequestSummary:
    """What a client's usage block is made of, so far."""

    attempts: int
    prefill_node: str
    decode_node: str
    stats: tuple[AttemptStats, ...]
    predicted_ttft_s: float | None
