"""Pure: one record per request: what was known, predicted, judged, decided and why, and what happened then."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from conductor.actuals import Seen, checked, credible
from conductor.admission import Verdict
from conductor.effects import RequestSpec, RequestSummary
from conductor.policy import Placement
from conductor.scoring import DecodeScore, PrefillScore
from core.messages import AttemptStats
from core.plain import plain
from halfmoon.types import NodeId, Outcome, RequestId

STEPS_MAX = 64
"""Steps kept per record: every attempt takes at most about eight, refusals two."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One placement: the scores of the pair that was picked, and the candidates it was picked from.

    handover_s, pull_s: what the decode worker's pull is predicted to take beyond the first token, and alone.

    Only the best candidates' scores are kept, best first; `prefill_candidates` and `decode_candidates` count all.
    A rejected request's choice is the placement that its verdicts are about.
    """

    number: int
    at_s: float
    cause: str
    prefill: PrefillScore
    decode: DecodeScore
    handover_s: float
    pull_s: float
    prefill_candidates: int
    decode_candidates: int
    prefill_scores: tuple[PrefillScore, ...]
    decode_scores: tuple[DecodeScore, ...]

    @property
    def ttft_s(self) -> float:
        return self.prefill.ttft_s

    @property
    def in_range(self) -> bool:
        return self.prefill.in_range and self.decode.in_range

    @property
    def tbt_s(self) -> float:
        return self.decode.tbt_s

    @property
    def hit_blocks(self) -> int:
        return self.prefill.hit_blocks

    @property
    def fetch_blocks(self) -> int:
        return self.prefill.fetch_blocks

    @property
    def fetch_source(self) -> str:
        return self.prefill.source or ""

    @property
    def prefill_node(self) -> NodeId:
        return self.prefill.node_id

    @property
    def decode_node(self) -> NodeId:
        return self.decode.node_id

    def as_json(self) -> dict[str, object]:
        return {
            "number": self.number,
            "at_s": self.at_s,
            "cause": self.cause,
            "prefill_node": self.prefill_node,
            "decode_node": self.decode_node,
            "prefill": self.prefill._asdict(),
            "decode": self.decode._asdict(),
            "handover_s": self.handover_s,
            "pull_s": self.pull_s,
            "prefill_candidates": self.prefill_candidates,
            "decode_candidates": self.decode_candidates,
            "prefill_scores": [score._asdict() for score in self.prefill_scores],
            "decode_scores": [score._asdict() for score in self.decode_scores],
        }


class Term(NamedTuple):
    """One part of what a placement promised, and what it came to, in seconds. None: not predicted; not known."""

    predicted_s: float | None
    actual_s: float | None


@dataclass(frozen=True, kw_only=True)
class Step:
    """Something that happened, in seconds since the request arrived."""

    at_s: float
    number: int
    what: str
    node: str = ""


@dataclass(kw_only=True)
class DecisionRecord:
    """Grows until `outcome` is set. Times are seconds since the request arrived at the machine.

    number_before: the last attempt of an earlier request with the same id, as far as it is remembered.
    seen: what the front end saw; None: it has not said, or the machine ended the request first.
    actuals_refused: statements about what happened that were no durations; what they were about stays unknown.
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
    seen: Seen | None = None
    actuals_refused: int = 0
    ended_s: float | None = None
    outcome: Outcome | None = None
    error: str = ""

    def note(self, at_s: float, number: int, what: str, node: str = "") -> None:
        if len(self.steps) < STEPS_MAX:
            self.steps.append(Step(at_s=at_s, number=number, what=what, node=node))

    def keep_stats(self, number: int, leg: str, stats: AttemptStats) -> None:
        """A worker's later statement about the same leg of an attempt replaces its earlier one."""
        if credible(stats):
            self.stats[f"{number}.{leg}"] = stats
        else:
            self.actuals_refused += 1

    def keep_seen(self, seen: Seen) -> None:
        self.seen, refused = checked(seen)
        self.actuals_refused += refused

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

    # ---- predicted beside actual ----

    @property
    def first_token_s(self) -> float | None:
        """When the first token was there: by the front end's word, else as its worker's reached the machine."""
        seen = self.seen or Seen()
        if seen.ttft_s is not None and seen.tokenize_s is not None:
            return seen.ttft_s - seen.tokenize_s
        return self.prefill_done_s

    @property
    def first_token_choice(self) -> Choice | None:
        """The placement that gave the first token; None: there was none, or no token."""
        done_s = self.first_token_s
        return next((c for c in reversed(self.choices) if done_s is not None and c.at_s <= done_s), None)

    def terms(self) -> dict[str, Term]:
        """Of the placement that gave the first token; before there is one, of the last.

        `ttft_s` = `before_s` + `queue_s` + `fetch_s` + `prefill_s` + `held_s`, predicted and actual alike, as the
        front end sees it. `before_s`: until it was placed. `held_s`: until the first token was shown, there being no
        second; it is not predicted, and the gap to the second counts from when the first one was there. `fetch_s`: with
        the reading of its own hits from slower tiers. `queue_s`: whatever is none of the others, so that an actual one
        holds the wait for other prompts' passes as well as the network. On a coupled worker the decode steps that share
        a prompt's passes are in its `prefill_s`. An actual `pull_s` holds the wait for the prompt's blocks. `tbt_s`:
        one decode step, stalls included, against the mean of later gaps; the worst tenth of gaps, by which a request's
        TBT is judged, is not predicted.
        """
        given = self.first_token_choice
        choice = given or (self.choices[-1] if self.choices else None)
        if choice is None:
            return {}
        seen, prefill = self.seen or Seen(), choice.prefill
        before_s = choice.at_s + (seen.tokenize_s or 0.0)
        placed_s = None if given is None or self.first_token_s is None else self.first_token_s - given.at_s
        first = self.stats.get(f"{choice.number}.prefill") if given is not None else None
        joined = self.stats.get(f"{choice.number}.decode")
        held_s = seen.held_s or 0.0
        known_s = held_s if first is None else held_s + first.fetch_s + first.compute_s
        rest_s = None if placed_s is None or first is None else max(0.0, placed_s - known_s)
        gap_s = None if seen.second_gap_s is None else held_s + seen.second_gap_s
        return {
            "ttft_s": Term(before_s + prefill.ttft_s, None if placed_s is None else before_s + placed_s),
            "before_s": Term(before_s, before_s),
            "queue_s": Term(prefill.queue_s, rest_s),
            "fetch_s": Term(prefill.fetch_s + prefill.read_s, None if first is None else first.fetch_s),
            "prefill_s": Term(prefill.prefill_s + prefill.mixing_s, None if first is None else first.compute_s),
            "held_s": Term(None, held_s or None),
            "tbt_s": Term(choice.decode.tbt_s, seen.tbt_mean_s),
            "tbt_worst_s": Term(None, seen.tbt_worst_s),
            "second_gap_s": Term(choice.handover_s + choice.decode.tbt_s, gap_s),
            "handover_s": Term(choice.handover_s, self._handed_over_s(given)),
            "pull_s": Term(choice.pull_s, None if joined is None else joined.pull_s),
        }

    def _handed_over_s(self, given: Choice | None) -> float | None:
        """From the news of the first token to the news that all blocks are on the decode worker; None: no such news,
        or it was another attempt's."""
        joined_s, done_s = self.decode_joined_s, self.prefill_done_s
        if joined_s is None or done_s is None or given is not self.choices[-1]:
            return None
        return max(0.0, joined_s - done_s)

    def prediction_errors(self) -> dict[str, float]:
        """Actual minus predicted seconds of every term of which both are known, and mean the same."""
        return {
            name: actual - predicted
            for name, (predicted, actual) in self.terms().items()
            if predicted is not None and actual is not None and name not in ("before_s", "pull_s")
        }

    def as_json(self) -> dict[str, object]:
        """Plain dicts, lists, numbers and strings, ready for json.dumps."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        told = {
            **own,
            "choices": [choice.as_json() for choice in self.choices],
            "terms": {name: term._asdict() for name, term in self.terms().items()},
            "prediction_errors": self.prediction_errors(),
        }
        return {name: plain(value) for name, value in told.items()}


class Decisions:
    """The records of open requests, and a bounded ring of ended ones, oldest dropped first.

    Attributes:
        on_end: told each record when it is complete, in the middle of a call of the machine: it may only put it away.
    """

    def __init__(self, records_max: int) -> None:
        self.on_end: Callable[[DecisionRecord], None] = lambda record: None
        self._records_max = records_max
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
        self.on_end(record)

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
            prefill=prefill,
            decode=decode,
            handover_s=placement.handover_s,
            pull_s=placement.pull_s,
            prefill_candidates=placement.prefill_candidates,
            decode_candidates=placement.decode_candidates,
            prefill_scores=placement.prefill_scores,
            decode_scores=placement.decode_scores,
        )
