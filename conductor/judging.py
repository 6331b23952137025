"""Pure: puts requests before the admission policies, records what they say, rejects or defers."""

from __future__ import annotations

from collections.abc import Sequence

from conductor.admission import Case, Flight, Stage, Verdict, no_turn, queue_full, refusal
from conductor.attempts import Attempt, Phase, Request
from conductor.desk import Desk
from conductor.effects import Slo
from conductor.policy import Placement
from conductor.probing import Probes
from conductor.scoring import DecodeScore, PrefillScore, Query, fits_decode, fits_prefill
from conductor.shares import size_class
from conductor.view import Claim
from conductor.waiting import Line
from halfmoon.errors import InvalidRequest, Rejected
from halfmoon.types import NodeId, Outcome

SLOW_HANDOVER = 0.5
"""Of the TBT limit: one that takes longer is slow. Its next step is a part of the same gap."""


class Judge:
    """Writes verdicts into records; rejects requests, or puts them into the waiting room."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def impossible(self, request: Request, query: Query) -> InvalidRequest | None:
        """Whether no worker that is known could ever hold the request. Pools that are absent are not judged."""
        view = self._desk.view
        if any(fits_prefill(query, w) and not w.incompatible for w in view) and any(
            fits_decode(query, w) and not w.incompatible for w in view
        ):
            return None  # nearly always, and after a look at two workers
        workers = [w for w in view if not w.incompatible]
        if any(w.coupled and fits_decode(query, w) for w in workers):
            return None
        size = query.block_size
        prefills = [w for w in workers if w.prefills]
        if prefills and not any(fits_prefill(query, w) for w in prefills):
            return _too_long(request, max(w.info.num_device_blocks for w in prefills) * size)
        decodes = [w for w in workers if w.decodes]
        if decodes and not any(fits_decode(query, w) for w in decodes):
            return _too_long(request, max(w.info.num_device_blocks for w in decodes) * size)
        return None

    def admitted(self, request: Request, query: Query, placement: Placement, now_s: float) -> bool:
        """Admission, until it is placed for the first time: what was accepted is not rejected later on arrival.

        False: it was put off, or has ended.
        """
        desk = self._desk
        if request.placed:
            return True
        prefill, decode = placement.option
        case = self._case(Stage.ARRIVAL, request, query, prefill, decode, now_s)
        ends_s = self._slack_ends_s(request, prefill)
        newcomer = request.spec.request_id not in desk.waiting
        if not newcomer and now_s < ends_s and self._refused_again(case):
            self._wait(request, query, placement, ends_s)
            return False
        request.record.verdicts = desk.admission.judge(case)
        refused = refusal(request.record.verdicts)
        line = Line(request.spec.priority, size_class(query.blocks_expected * query.block_size))
        why = refused.reason if refused is not None else self._must_wait(request)
        if not why or (refused is None and newcomer and now_s >= ends_s):  # it cannot let others go first
            desk.waiting.shares.see(line.size, let_in=True)
            self._note_probes(request, request.record.verdicts, now_s, let_in=True)
            return True
        waits = desk.admission.config.defer and (refused is None or refused.waits)
        if waits and now_s < ends_s and self._defer(request, line, why, now_s, ends_s):
            self._wait(request, query, placement, ends_s)
            return False
        desk.waiting.shares.see(line.size, let_in=False)
        self._note_probes(request, request.record.verdicts, now_s, let_in=False)
        at_s = now_s - request.arrived_s
        request.record.choices.append(desk.decisions.choice(placement, request.number, "rejected", at_s))
        error = refused.error() if refused is not None else self._passed_over(request, now_s, ends_s)
        desk.counters[f"rejected_{why if refused is not None else error.reason}"] += 1
        desk.end(request, Outcome.REJECTED, error, now_s)
        return False

    def on_prefilled(self, request: Request, query: Query, decode: DecodeScore, now_s: float) -> Verdict | None:
        verdicts = self._desk.admission.judge(self._case(Stage.DECODE, request, query, None, decode, now_s))
        before = tuple(v for v in request.record.verdicts if v.stage is Stage.ARRIVAL)
        request.record.verdicts = before + verdicts
        refused = refusal(verdicts)
        self._note_probes(request, verdicts, now_s, let_in=refused is None)
        return refused

    def slo(self, request: Request) -> Slo:
        """Its own limits, and the defaults where those are in force."""
        own, config = request.spec.slo, self._desk.config
        if not config.enforce_default_slo:
            return own
        return Slo(
            ttft_s=config.slo.ttft_s if own.ttft_s is None else own.ttft_s,
            tbt_s=config.slo.tbt_s if own.tbt_s is None else own.tbt_s,
        )

    def slow_handover(self, query: Query, predicted_s: float) -> bool:
        """Whether a hand-over may break the limit on TBT: as predicted, or as others have lately turned out, which wait
        for each other on a link and for room."""
        lately_s = max(self._desk.handovers_s, default=0.0)
        return query.slo.tbt_s is not None and max(predicted_s, lately_s) > SLOW_HANDOVER * query.slo.tbt_s

    def hold_first(self, request: Request, now_s: float) -> None:
        """Its second token may be late: let the front end keep the first one until then.

        The gap between the two would be the worst of a short output's. A client with limits on both has said what it
        would rather wait for.
        """
        desk, slo = self._desk, self.slo(request)
        if slo.ttft_s is not None and slo.tbt_s is not None:
            until_s = request.arrived_s + desk.admission.config.hold_first_share * slo.ttft_s
            desk.hold_first(request, until_s - now_s, now_s)

    # ---- inside ----

    def _note_probes(self, request: Request, verdicts: Sequence[Verdict], now_s: float, *, let_in: bool) -> None:
        """Each policy has its own books, so that one in shadow changes nothing. Who was accepted by one and not let in
        is neither a probe nor refused."""
        for verdict in verdicts:
            if verdict.accept and not let_in:
                continue
            for node_id in verdict.idle:
                worker = self._desk.view.get(node_id)
                assert worker is not None, f"{node_id} was judged but is not there"
                probes = worker.probes.setdefault(verdict.policy, Probes())
                probes.see(request.spec.request_id, now_s, let_in=verdict.accept)

    def _refused_again(self, case: Case) -> bool:
        """One that waits is refused for now, still. Its record keeps the verdicts of its arrival until the last ones:
        the policies in shadow are asked no more often than somebody reads their answer."""
        refused = self._desk.admission.refuses(case)
        return refused is not None and refused.waits

    def _wait(self, request: Request, query: Query, placement: Placement, ends_s: float) -> None:
        request.set_phase(Phase.DEFERRED, defer=ends_s)
        if request.spec.request_id == self._desk.waiting.in_turn:
            self._claim(request, query, placement)

    def _slack_ends_s(self, request: Request, prefill: PrefillScore) -> float:
        """Until when it may wait, and then still have its first token in time, if no other prompt is ahead of it."""
        config = self._desk.admission.config
        limit = self.slo(request).ttft_s
        if limit is None:
            return request.arrived_s + config.defer_s_max
        needs_s = prefill.ttft_s - prefill.queue_s if prefill.in_range else 0.0
        return request.arrived_s + config.slack_share * limit - needs_s

    def _must_wait(self, request: Request) -> str:
        """Why a request that would be taken on must let others go first; empty if it need not.

        A newcomer waits where others do, for the next judgement at least: its turn may be before theirs. Who has
        waited is let in in its turn only, even at the end of its wait.
        """
        waiting, request_id = self._desk.waiting, request.spec.request_id
        if not waiting or not self._desk.admission.config.defer or request_id == waiting.in_turn:
            return ""
        if request_id not in waiting:
            waiting.freed = True
        return f"{len(waiting) - (request_id in waiting)} others wait"

    def _passed_over(self, request: Request, now_s: float, ends_s: float) -> Rejected:
        """Nothing refuses it but that others go first: too many wait, or it has waited for as long as it could."""
        desk = self._desk
        retry_s = desk.decode_s.value or 1.0
        if request.spec.request_id in desk.waiting:
            return no_turn(now_s - request.arrived_s, ends_s - request.arrived_s, retry_s)
        return queue_full(len(desk.waiting), desk.admission.config.deferred_max, retry_s)

    def _defer(self, request: Request, line: Line, why: str, now_s: float, ends_s: float) -> bool:
        """Let it wait for room, if there is room for one more that waits."""
        desk, request_id = self._desk, request.spec.request_id
        if request_id in desk.waiting:
            return True
        if len(desk.waiting) >= desk.admission.config.deferred_max:
            return False
        desk.waiting.add(request_id, line, request.arrived_s, ends_s)
        desk.counters["deferred"] += 1
        desk.note(request, now_s, f"deferred: {why}")
        return True

    def _claim(self, request: Request, query: Query, placement: Placement) -> None:
        """Keep room for it where it would have been placed."""
        prefill, decode = placement.option
        worker = self._desk.view.get(decode.node_id)
        assert worker is not None, f"{decode.node_id} was picked but is not there"
        claim = Claim(
            request_id=request.spec.request_id,
            tokens=query.num_tokens,
            blocks=query.blocks_expected,
            output_max=request.spec.sampling.max_tokens,
            prefill_s=prefill.ttft_s,
        )
        self._desk.waiting.claim(worker, claim)

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
            request_id=request.spec.request_id,
            slo=query.slo,
            default_slo=desk.config.slo,
            priority=request.spec.priority,
            now_s=now_s,
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
        if worker is not None and worker.claim is not None:
            flights.append(_claimed(worker.claim, node_id))
        seeking = [requests[name] for name in self._desk.seekers]
        if seeking:
            share = 1.0 / max(1, sum(w.decodes for w in self._desk.view))
            free = ((r, r.attempt) for r in seeking)
            flights += [_flight(r, a, now_s, share) for r, a in free if a is not None and a.decode is None]
        return flights


def _claimed(claim: Claim, node_id: NodeId) -> Flight:
    """As if it had been let in just now."""
    return Flight(
        decode_node=node_id,
        tokens=claim.tokens,
        emitted=0,
        output_max=claim.output_max,
        prefill_left_s=claim.prefill_s,
        decoding_for_s=None,
    )


def _flight(request: Request, attempt: Attempt, now_s: float, share: float = 1.0) -> Flight:
    """In the order of its fields, without their names: a judgement makes one for every open request."""
    spec, decode, joined_s, emitted = request.spec, attempt.decode, attempt.joined_s, len(request.emitted)
    prefilled = attempt.first_token_id is not None
    return Flight(
        None if decode is None else decode.node_id,
        len(spec.token_ids) + emitted,
        emitted,
        spec.sampling.max_tokens,
        0.0 if prefilled else max(0.0, attempt.begun_s + attempt.predicted_s - now_s),
        None if joined_s is None else now_s - joined_s,
        share,
        attempt.reserved,
    )


def _too_long(request: Request, tokens_max: int) -> InvalidRequest:
    prompt, wanted = len(request.spec.token_ids), request.spec.sampling.max_tokens
    if prompt >= tokens_max:
        limit = f"at most {tokens_max - 1} tokens in any worker's KV pool"
        return InvalidRequest(field="prompt", value=f"{prompt} tokens", limit=limit)
    limit = f"at most {tokens_max - prompt} after {prompt} prompt tokens in any worker's KV pool"
    return InvalidRequest(field="max_tokens", value=wanted, limit=limit)
