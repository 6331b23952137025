"""Pure: the front end's part: each request's log and the moments of its tokens, until its one end; then a row of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from conductor.decisions import Choice, DecisionRecord
from conductor.effects import RequestSpec
from conductor.streams import StreamLog, Verdict
from core.messages import AttemptStats, Token
from halfmoon.errors import HalfmoonError, Rejected
from halfmoon.types import AttemptId, Outcome, RequestId
from report.gaps import tbt_of
from report.records import RequestRow
from simulator.prompts import Planned


@dataclass(kw_only=True, eq=False)
class Client:
    """One open request. `tokens_s`: when each token that was not held back could be shown; forgotten with it."""

    spec: RequestSpec
    planned: Planned
    arrived_s: float
    log: StreamLog = field(default_factory=StreamLog)
    tokens_s: list[float] = field(default_factory=list)
    first_attempt: int = 0

    def show(self, now_s: float) -> None:
        """As conductor.session.Session: every token, unless the first is held back."""
        if not self.log.holds(now_s):
            self.tokens_s.extend([now_s] * (self.log.num_tokens - len(self.tokens_s)))

    @property
    def holding(self) -> bool:
        return self.log.num_tokens > len(self.tokens_s)


class Clients:
    """Every open request, as the front end sees it.

    Args:
        on_finished: called when a request's last token has come, after its end.
        on_hole: called when too many tokens came ahead of one that is missing.
        on_held: called when a first token is held back: it is to be shown at `log.hold_until_s` at the latest.
    """

    def __init__(
        self,
        on_finished: Callable[[Client], None],
        on_hole: Callable[[Client], None],
        on_held: Callable[[Client], None],
    ) -> None:
        self.open: dict[RequestId, Client] = {}
        self.counts: Counter[str] = Counter()
        self._on_finished = on_finished
        self._on_hole = on_hole
        self._on_held = on_held
        self._holes: dict[RequestId, Client] = {}

    def offer(self, token: Token, now_s: float) -> None:
        """A token has come; unknown requests have ended."""
        client = self.open.get(token.attempt_id.request_id)
        if client is None:
            self.counts["tokens_unknown"] += 1
            return
        verdict, _ = client.log.offer(token, now_s)
        if verdict is not Verdict.ACCEPTED:
            self._on_odd(client, verdict)
            return
        if token.index == 0:
            client.first_attempt = token.attempt_id.number
        client.show(now_s)
        if client.holding:
            self._on_held(client)
        if client.log.finish_reason is not None:
            self._on_finished(client)

    def offer_run(self, attempt_id: AttemptId, first_index: int, ids: Sequence[int], times_s: Sequence[float]) -> None:
        """As `offer` of each of these, which are not the last ones, at its own moment; none of these is yet to come."""
        client = self.open.get(attempt_id.request_id)
        if client is not None and not client.holding and client.log.offer_run(attempt_id, first_index, ids):
            client.tokens_s.extend(times_s)
            return
        for i, (token_id, at_s) in enumerate(zip(ids, times_s, strict=True)):
            self.offer(Token(attempt_id=attempt_id, index=first_index + i, token_id=token_id), at_s)

    def _on_odd(self, client: Client, verdict: Verdict) -> None:
        if verdict is Verdict.AHEAD:
            self._holes[client.spec.request_id] = client
            return
        self.counts[f"tokens_{verdict.value}"] += 1
        if verdict is Verdict.OVERFLOW:
            self._on_hole(client)

    def holes(self, before_s: float) -> list[Client]:
        """Those that have missed a token since before this moment."""
        stale = [r for r, c in self._holes.items() if c.log.hole_since_s is None or r not in self.open]
        for request_id in stale:
            del self._holes[request_id]
        since = [(c, c.log.hole_since_s) for c in self._holes.values()]
        return [client for client, since_s in since if since_s is not None and since_s < before_s]

    def close(self, client: Client) -> None:
        """Its terminal event: whatever else comes for it is unknown."""
        del self.open[client.spec.request_id]


def row_of(
    client: Client, record: DecisionRecord | None, outcome: Outcome, error: HalfmoonError | None, now_s: float
) -> RequestRow:
    """What became of a request, at its end. Times are the world's, less its beginning's: see `Rows`.

    `record`: None: the conductor has forgotten it.
    """
    spec, planned, log = client.spec, client.planned, client.log
    choices = record.choices if record is not None else []
    giving = next((c for c in choices if c.number == client.first_attempt), choices[-1] if choices else None)
    first_s = client.tokens_s[0] if client.tokens_s else None
    tbt = tbt_of(client.tokens_s)
    stats = [*log.prefill_stats, *log.decode_stats]
    return RequestRow(
        request_id=spec.request_id,
        arrived_s=client.arrived_s,
        input_tokens=planned.input_tokens,
        output_tokens=log.num_tokens,
        outcome=outcome,
        priority=spec.priority,
        stage=_stage(client, record) if outcome is Outcome.REJECTED else "",
        reason=_reason(error),
        ttft_s=None if first_s is None else first_s - client.arrived_s,
        tbt_p50_s=tbt.p50_s if tbt else None,
        tbt_worst_s=tbt.worst_s if tbt else None,
        tbt_max_s=tbt.max_s if tbt else None,
        ended_s=now_s,
        slo_ttft_s=spec.slo.ttft_s,
        slo_tbt_s=spec.slo.tbt_s,
        predicted_ttft_s=giving.at_s + giving.ttft_s if giving else None,
        predicted_tbt_s=giving.tbt_s if giving else None,
        hit_tokens_device=_sum(log.prefill_stats, "hit_tokens_device"),
        hit_tokens_dram=_sum(log.prefill_stats, "hit_tokens_dram"),
        hit_tokens_remote=_sum(log.prefill_stats, "hit_tokens_remote"),
        prefill_s=planned.prefill_s,
        attempts=_attempts(choices),
        preemptions=_sum(stats, "preemptions"),
        prefill_node=giving.prefill_node if giving else "",
        decode_node=log.decode_stats[-1].node_id if log.decode_stats else giving.decode_node if giving else "",
    )


def _stage(client: Client, record: DecisionRecord | None) -> str:
    """Where a rejected request was rejected: after its prefill, while that waited or ran, or before anything."""
    if client.tokens_s or (record is not None and record.prefill_done_s is not None):
        return "decode"
    return "prefill" if client.log.attempt is not None else "arrival"


def _reason(error: HalfmoonError | None) -> str:
    if error is None:
        return ""
    return error.reason if isinstance(error, Rejected) else type(error).__name__


def _attempts(choices: Sequence[Choice]) -> int:
    return len({choice.number for choice in choices if choice.cause != "rejected"})


def _sum(stats: Sequence[AttemptStats], name: str) -> int:
    return sum(getattr(one, name) for one in stats)
