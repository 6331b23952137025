"""Pure: one record per request: what was known, predicted, judged, decided and why, and what happened then."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass, field

from conductor.admission import Verdict
from conductor.effects import RequestSpec, RequestSummary
from conductor.policy import Placement
from conductor.scoring import DecodeScore, PrefillScore
from core.messages import AttemptStats
from halfmoon.types import Outcome, RequestId

STEPS_MAX = 64
"""Steps kept per record: every attempt takes at most about eight, refusals two."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One placement: the option that was picked, what it promised, and the candidates it was picked from.

    Only the best candidates' scores are kept, best first; `prefill_candidates` and `decode_candidates` count all.
    """

    number: int
    at_s: float
    cause: str
    prefill_node: str
    decode_node: str
    ttft_s: float
    tbt_s: float
    in_range: bool
    hit_blocks: int
    fetch_blocks: int
    fetch_source: str
    prefill_candidates: int
    decode_candidates: int
    prefill_scores: tuple[PrefillScore, ...]
    decode_scores: tuple[DecodeScore, ...]

    def as_json(self) -> dict[str, object]:
        scores = {
            "prefill_scores": [score._asdict() for score in self.prefill_scores],
            "decode_scores": [score._asdict() for score in self.decode_scores],
        }
        return {**asdict(self), **scores}


@dataclass(frozen=True, kw_only=True)
class Step:
    """Something that happened, in seconds since the request arrived."""

    at_s: float
    number: int
    what: str
    node: str = ""


@dataclass(kw_only=True)
class DecisionRecord:
    """Grows until `outcome` is set. Times are seconds since the request arrived.

    `number_before`: the last attempt of an earlier request with the same id, as far as it is remembered.
    """

    request_id: RequestId
    number_before: int
    tenant: str
    priority: int
    num_prompt_tokens: int
    num_prompt_blocks: int
    max_tokens: int
    slo_ttft_s: float | None
    slo_tbt_s: float | None
    deadline_s: float
    policy: str
    verdicts: tuple[Verdict, ...] = ()
    choices: list[Choice] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    stats: dict[str, AttemptStats] = field(default_factory=dict)
    prefill_done_s: float | None = None
    decode_joined_s: float | None = None
    output_tokens: int | None = None
    ended_s: float | None = None
    outcome: Outcome | None = None
    error: str = ""

    def note(self, at_s: float, number: int, what: str, node: str = "") -> None:
        if len(self.steps) < STEPS_MAX:
            self.steps.append(Step(at_s=at_s, number=number, what=what, node=node))

    def keep_stats(self, number: int, leg: str, stats: AttemptStats) -> None:
        """A worker's later statement about the same leg of an attempt replaces its earlier one."""
        self.stats[f"{number}.{leg}"] = stats

    @property
    def number(self) -> int:
        """The last attempt's."""
        return self.choices[-1].number if self.choices else self.number_before

    def summary(self) -> RequestSummary:
        last = self.choices[-1] if self.choices else None
        first = self.choices[0] if self.choices else None
        return RequestSummary(
            attempts=self.number - self.number_before,
            prefill_node=last.prefill_node if last else "",
            decode_node=last.decode_node if last else "",
            stats=tuple(self.stats.values()),
            predicted_ttft_s=first.ttft_s if first else None,
        )

    def as_json(self) -> dict[str, object]:
        """Plain dicts, lists, numbers and strings, ready for json.dumps."""
        choices = [choice.as_json() for choice in self.choices]
        return {**asdict(self), "choices": choices, "prediction_errors": self.prediction_errors()}

    def prediction_errors(self) -> dict[str, float]:
        """Actual minus predicted seconds, per term, of the attempt that gave the first token."""
        if self.prefill_done_s is None or not self.choices:
            return {}
        last = self.choices[-1]
        return {"ttft_s": self.prefill_done_s - last.at_s - last.ttft_s}


class Decisions:
    """The records of open requests, and a bounded ring of ended ones, oldest dropped first."""

    def __init__(self, records_max: int, candidates_max: int) -> None:
        self._records_max = records_max
        self._candidates_max = candidates_max
        self._open: dict[RequestId, DecisionRecord] = {}
        self._ended: OrderedDict[RequestId, DecisionRecord] = OrderedDict()

    def open(self, spec: RequestSpec, policy: str) -> DecisionRecord:
        earlier = self._ended.get(spec.request_id)
        record = self._open[spec.request_id] = DecisionRecord(
            request_id=spec.request_id,
            number_before=earlier.number if earlier is not None else 0,
            tenant=spec.tenant,
            priority=spec.priority,
            num_prompt_tokens=len(spec.token_ids),
            num_prompt_blocks=len(spec.block_hashes),
            max_tokens=spec.sampling.max_tokens,
            slo_ttft_s=spec.slo.ttft_s,
            slo_tbt_s=spec.slo.tbt_s,
            deadline_s=spec.deadline_s,
            policy=policy,
        )
        return record

    def end(self, request_id: RequestId, outcome: Outcome, error: str, at_s: float) -> None:
        """Complete a record; exactly once for each that was opened."""
        record = self._open.pop(request_id)
        record.outcome, record.error, record.ended_s = outcome, error, at_s
        self._ended.pop(request_id, None)
        self._ended[request_id] = record
        while len(self._ended) > self._records_max:
            self._ended.popitem(last=False)

    def get(self, request_id: RequestId) -> DecisionRecord | None:
        return self._open.get(request_id) or self._ended.get(request_id)

    def beginning(self, prefix: str) -> list[RequestId]:
        """The ids that begin so."""
        return [request_id for request_id in {**self._ended, **self._open} if request_id.startswith(prefix)]

    def choice(self, placement: Placement, number: int, cause: str, at_s: float) -> Choice:
        prefill, decode = placement.option
        return Choice(
            number=number,
            at_s=at_s,
            cause=cause,
            prefill_node=prefill.node_id,
            decode_node=decode.node_id,
            ttft_s=prefill.ttft_s,
            tbt_s=decode.tbt_s,
            in_range=prefill.in_range and decode.in_range,
            hit_blocks=prefill.hit_blocks,
            fetch_blocks=prefill.fetch_blocks,
            fetch_source=prefill.source or "",
            prefill_candidates=placement.prefill_candidates,
            decode_candidates=placement.decode_candidates,
            prefill_scores=placement.prefill_scores,
            decode_scores=placement.decode_scores,
        )
