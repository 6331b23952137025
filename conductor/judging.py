"""Pure: puts requests before the admission policies, records what they say, rejects or defers."""

from __future__ import annotations

from collections.abc import Sequence

from conductor.admission import Case, Flight, Stage, Verdict, queue_full, refusal
from conductor.attempts import Attempt, Phase, Request
from conductor.desk import Desk
from conductor.effects import Slo
from conductor.policy import Placement
from conductor.scoring import DecodeScore, PrefillScore, Query
from conductor.waiting import rank
from halfmoon.types import NodeId, Outcome


class Judge:
    """Writes verdicts into records; rejects requests, or puts them into the waiting room."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def admitted(self, request: Request, query: Query, placement: Placement, now_s: float) -> bool:
        """Admission, until it is placed for the first time: what was accepted is not rejected later on arrival.

        False: it was put off, or has ended.
        """
        desk = self._desk
        if request.placed:
            return True
        prefill, decode = placement.option
        case = self._case(Stage.ARRIVAL, request, query, prefill, decode, now_s)
        if request.spec.request_id in desk.waiting and self._still_waits(request, case, prefill, now_s):
            return False
        request.record.verdicts = desk.admission.judge(case)
        refused = refusal(request.record.verdicts)
        why = refused.reason if refused is not None else self._must_wait(request, prefill)
        if not why:
            return True
        ends_s = self._slack_ends_s(request, prefill)
        if refused is None and now_s >= ends_s:
            return True  # it cannot let others go first, and only a guess says that it is late already
        waits = desk.admission.config.defer and (refused is None or refused.waits)
        if waits and now_s < ends_s and self._defer(request, prefill, why, now_s):
            request.set_phase(Phase.DEFERRED, defer=ends_s)
            return False
        at_s = now_s - request.arrived_s
        request.record.choices.append(desk.decisions.choice(placement, request.number, "rejected", at_s))
        desk.counters[f"rejected_{why if refused is not None else 'queue_full'}"] += 1
        full = queue_full(len(desk.waiting), desk.admission.config.deferred_max, desk.decode_s.value or 1.0)
        desk.end(request, Outcome.REJECTED, full if refused is None else refused.error(), now_s)
        return False

    def on_prefilled(self, request: Request, query: Query, decode: DecodeScore, now_s: float) -> Verdict | None:
        verdicts = self._desk.admission.judge(self._case(Stage.DECODE, request, query, None, decode, now_s))
        before = tuple(v for v in request.record.verdicts if v.stage is Stage.ARRIVAL)
        request.record.verdicts = before + verdicts
        return refusal(verdicts)

    def slo(self, request: Request) -> Slo:
        """Its own limits, and the defaults where those are in force."""
        own, config = request.spec.slo, self._desk.config
        if not config.enforce_default_slo:
            return own
        return Slo(
            ttft_s=config.slo.ttft_s if own.ttft_s is None else own.ttft_s,
            tbt_s=config.slo.tbt_s if own.tbt_s is None else own.tbt_s,
        )

    # ---- inside ----

    def _still_waits(self, request: Request, case: Case, prefill: PrefillScore, now_s: float) -> bool:
        """Judged again, and still refused for now. Its record keeps the verdicts of its arrival until the last ones."""
        refused = self._desk.admission.refuses(case)
        if refused is None or not refused.waits:
            return False
        ends_s = self._slack_ends_s(request, prefill)
        if now_s >= ends_s:
            return False
        request.set_phase(Phase.DEFERRED, defer=ends_s)
        return True

    def _slack_ends_s(self, request: Request, prefill: PrefillScore) -> float:
        """Until when it may wait, and then still have its first token in time, if no other prompt is ahead of it."""
        config = self._desk.admission.config
        limit = self.slo(request).ttft_s
        if limit is None:
            return request.arrived_s + config.defer_s_max
        needs_s = prefill.ttft_s - prefill.queue_s if prefill.in_range else 0.0
        return request.arrived_s + config.slack_share * limit - needs_s

    def _must_wait(self, request: Request, prefill: PrefillScore) -> str:
        """Why a request that would be taken on must let others go first; empty if it need not."""
        waiting, config = self._desk.waiting, self._desk.admission.config
        if not waiting or not config.defer or request.spec.request_id in waiting:
            return ""
        ahead = waiting.ahead_of(self._rank(request, prefill))
        return f"{ahead} others wait" if ahead > config.backfill else ""

    def _defer(self, request: Request, prefill: PrefillScore, why: str, now_s: float) -> bool:
        """Let it wait for room, if there is room for one more that waits."""
        desk, request_id = self._desk, request.spec.request_id
        if request_id in desk.waiting:
            return True
        if len(desk.waiting) >= desk.admission.config.deferred_max:
            return False
        desk.waiting.add(request_id, self._rank(request, prefill))
        desk.counters["deferred"] += 1
        desk.note(request, now_s, f"deferred: {why}")
        return True

    def _rank(self, request: Request, prefill: PrefillScore) -> float:
        compute_s = prefill.ttft_s - prefill.queue_s
        return rank(request.arrived_s, request.spec.priority, compute_s, self._desk.admission.config)

    def _case(
        self,
        stage: Stage,
        request: Request,
        query: Query,
        prefill: PrefillScore | None,
        decode: DecodeScore,
        now_s: float,
    ) -> Case:
        desk = self._desk
        return Case(
            stage=stage,
            slo=query.slo,
            default_slo=desk.config.slo,
            priority=request.spec.priority,
            waited_s=now_s - request.arrived_s,
            tokens=query.num_tokens,
            output_tokens=query.output_tokens,
            output_max=request.spec.sampling.max_tokens,
            block_size=query.block_size,
            prefill=prefill,
            decode=decode,
            view=desk.view,
            flights=lambda node_id: self._flights(node_id, now_s),
            in_line=len(desk.seekers),
            decode_s=desk.decode_s.value,
            lengths=desk.lengths,
            config=desk.admission.config,
        )

    def _flights(self, node_id: NodeId | None, now_s: float) -> Sequence[Flight]:
        requests = self._desk.requests
        if node_id is None:
            return [_flight(r, r.attempt, now_s) for r in requests.values() if r.attempt is not None]
        worker = self._desk.view.get(node_id)
        booked = worker.decoding() if worker is not None else ()
        here = (requests[a.request_id] for a in booked if a.request_id in requests)
        flights = [_flight(r, r.attempt, now_s) for r in here if r.attempt is not None]
        seeking = [requests[name] for name in self._desk.seekers]
        if seeking:
            share = 1.0 / max(1, sum(w.decodes for w in self._desk.view))
            free = ((r, r.attempt) for r in seeking)
            flights += [_flight(r, a, now_s, share) for r, a in free if a is not None and a.decode is None]
        return flights


def _flight(request: Request, attempt: Attempt, now_s: float, share: float = 1.0) -> Flight:
    left_s = max(0.0, attempt.begun_s + attempt.predicted_s - now_s)
    return Flight(
        decode_node=None if attempt.decode is None else attempt.decode.node_id,
        tokens=len(request.spec.token_ids) + len(request.emitted),
        emitted=len(request.emitted),
        output_max=request.spec.sampling.max_tokens,
        prefill_left_s=0.0 if attempt.first_token_id is not None else left_s,
        decoding_for_s=None if attempt.joined_s is None else now_s - attempt.joined_s,
        share=share,
    )
