"""Pure: the admission policies: what each predicts of the two pools, and against which limit.

`Baseline`, `Early` and `Predictive` are those of Mooncake's paper (arXiv 2407.00079, section 7), which ask for decode
room when the prefill has ended, and may then find none: that prefill is wasted. `Forecast` is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from conductor.admission import Admission, AdmissionPolicy, Case, Doubt, Finding, Flight, Stage
from conductor.admission_config import AdmissionConfig, Mode, Reserve
from conductor.view import Worker
from halfmoon.errors import ConfigError
from halfmoon.types import NodeId

CHECKPOINTS_MAX = 4
"""Moments at which `Forecast` looks at a worker: this prefill's end, and the latest of those already let in."""

SHARED_MAX = 0.5
"""More than this is not believed of a report that may be late."""

SEQUENCE_BLOCKS = 1.5
"""What a sequence takes beside its tokens: half of its last block, and the block that its worker keeps for its next."""


# ---- what every policy looks at ----


def ttft(case: Case) -> list[Finding]:
    """What it has waited and the predicted rest, against its TTFT limit. Never by a guess."""
    limit, score = case.slo.ttft_s, case.prefill
    if limit is None or score is None:
        return []
    predicted = case.waited_s + score.ttft_s
    idle = score.node_id if _idle(case, score.node_id) else None
    return [Finding("ttft_slo", predicted, limit, "s", _guess(score.in_range), predicted - limit, False, idle)]


def tbt(case: Case, seconds: float, in_range: bool) -> list[Finding]:
    """A decode step against the TBT limit. Never by a guess. Where nobody decodes, nobody's end makes it shorter."""
    limit, node_id = case.slo.tbt_s, case.decode.node_id
    if limit is None:
        return []
    idle = node_id if _idle(case, node_id) else None
    return [Finding("tbt_slo", seconds, limit, "s", _guess(in_range), _next_end_s(case), idle is None, idle)]


def room(case: Case, tokens: float, worker: Worker) -> Finding:
    """KV tokens against the room of one decode worker. Room is counted, not guessed."""
    limit = float(worker.num_blocks * case.block_size)
    wait_s = (case.decode_s or 1.0) * max(0.0, tokens / limit - 1.0)  # it is left all over in about one lifetime
    return Finding("decode_room", tokens, limit, "KV tokens", _free(case, worker), max(wait_s, _next_end_s(case)))


def sequences(case: Case, count: float, worker: Worker) -> Finding:
    limit = float(worker.sequences_max)
    return Finding("decode_sequences", count, limit, "sequences", _free(case, worker), _next_end_s(case))


def decode_now(case: Case) -> list[Finding]:
    """The decode side by its load now: who is in its batch or about to join it, and this request."""
    worker = case.worker
    if worker is None:
        return []
    flights = [f for f in case.flights(worker.node_id) if f.prefill_left_s == 0.0]
    tokens = max(sum(f.tokens for f in flights), worker.load.kv_tokens) + case.tokens
    batch = max(len(flights), worker.load.running_sequences) + 1
    step = worker.cost.decode_step_s(batch, tokens)
    return [
        *tbt(case, step.seconds + case.decode.stall_s, step.in_range and case.decode.in_range),
        room(case, tokens, worker),
        sequences(case, batch, worker),
    ]


def shared(worker: Worker, flights: Sequence[Flight], block_size: int) -> float:
    """Of the KV that sequences on this worker have, the share that they have in common, so that it takes room once.

    By its last report, which counts the tokens of each sequence and the blocks of all; those that have room and do not
    run yet are in its blocks only.
    """
    load = worker.load
    pulling = sum(f.tokens for f in flights if f.reserved and f.decoding_for_s is None)
    tokens = load.kv_tokens + pulling + 0.5 * block_size * load.running_sequences
    used = (worker.num_blocks - load.room) * block_size
    return min(SHARED_MAX, max(0.0, 1.0 - used / tokens)) if load.kv_tokens > 0 and load.room > 0 else 0.0


def _guess(in_range: bool) -> Doubt | None:
    return None if in_range else Doubt.GUESS


def _free(case: Case, worker: Worker) -> Doubt | None:
    return Doubt.FREE if _idle(case, worker.node_id) else None


def _idle(case: Case, node_id: NodeId) -> bool:
    worker = case.view.get(node_id)
    return worker is not None and worker.attempts == 0


def _next_end_s(case: Case) -> float:
    """Sequences that began at random times end this often."""
    worker = case.worker
    return (case.decode_s or 1.0) / max(1, worker.batch if worker is not None else 1)


# ---- the policies ----


class Baseline:
    """Each stage by its own load, when it comes."""

    name = "baseline"
    reserve = Reserve.AFTER

    def findings(self, case: Case) -> Sequence[Finding]:
        if case.stage is Stage.ARRIVAL and not case.coupled:
            return ttft(case)
        return [*ttft(case), *decode_now(case)]


class Early:
    """Both pools on arrival, by their load now; and the decode side once more when the prefill has ended."""

    name = "early"
    reserve = Reserve.AFTER

    def findings(self, case: Case) -> Sequence[Finding]:
        return [*ttft(case), *decode_now(case)]


class Predictive:
    """As `Early`, but the decode pool as it will be when this prefill ends, every request decoding equally long.

    The load is the pool's mean, as in the paper: those whose prefill ends by then are spread evenly over the decode
    workers, those that will have decoded for longer than the running mean are taken for finished.
    """

    name = "predictive"
    reserve = Reserve.AFTER

    def findings(self, case: Case) -> Sequence[Finding]:
        if case.stage is Stage.DECODE or case.prefill is None:
            return decode_now(case)
        worker, pool = case.worker, [w for w in case.view if w.decodes]
        if worker is None:
            return ttft(case)
        at_s, step_s = case.prefill.ttft_s, case.decode.tbt_s
        there = [f for f in case.flights(None) if _decodes_at(f, at_s, case.decode_s)]
        tokens = sum(f.tokens + (f.decoding_for_s or 0.0) / step_s if step_s else f.tokens for f in there)
        tokens, batch = tokens / len(pool) + case.tokens, len(there) / len(pool) + 1
        step = worker.cost.decode_step_s(round(batch), round(tokens))
        return [
            *ttft(case),
            *tbt(case, step.seconds, step.in_range),
            room(case, tokens, worker),
            sequences(case, batch, worker),
        ]


def _decodes_at(flight: Flight, at_s: float, decode_s: float | None) -> bool:
    if flight.decoding_for_s is None:
        return flight.prefill_left_s <= at_s
    return decode_s is None or flight.decoding_for_s + at_s <= decode_s


class Forecast:
    """The KV expected on the decode worker when this prefill ends, and when those let in before it end theirs.

    A running request is expected to be there still as often as outputs of its age have gone on for so long; what they
    may leave within `horizon_s` is counted on, less `sigmas` standard deviations. While everything that is booked fits
    in full, nothing is forecast. Not judged again when its prefill has ended: what was let in gets its room.
    """

    name = "forecast"
    reserve = Reserve.DURING

    def findings(self, case: Case) -> Sequence[Finding]:
        worker = case.worker
        if case.stage is Stage.DECODE or case.prefill is None or worker is None:
            return []
        if case.decode.room_load <= 1.0 and not case.in_line:
            size = worker.num_blocks * case.block_size
            booked = room(case, case.decode.room_load * size, worker)
            return [*ttft(case), *tbt(case, case.decode.tbt_s, case.decode.in_range), booked]
        at_s, flights = case.prefill.ttft_s, case.flights(worker.node_id)
        later = sorted({f.prefill_left_s for f in flights if f.prefill_left_s > at_s})[-CHECKPOINTS_MAX:]
        alone = 1.0 - shared(worker, flights, case.block_size)
        expected = max(self._expected(case, worker, flights, alone, at_s, t) for t in (at_s, *later))
        tokens, batch = expected
        step = worker.cost.decode_step_s(max(1, round(batch)), round(tokens))
        return [
            *ttft(case),
            *tbt(case, step.seconds + case.decode.stall_s, step.in_range and case.decode.in_range),
            room(case, tokens, worker),
            sequences(case, batch, worker),
        ]

    def _expected(
        self, case: Case, worker: Worker, flights: Sequence[Flight], alone: float, joins_s: float, at_s: float
    ) -> tuple[float, float]:
        """KV tokens, with the margin, and sequences at `at_s`, this request having joined at `joins_s`.

        alone: of the tokens of those that are there, the share that takes room of its own.
        """
        outlives, horizon_s = case.lengths.outlives, case.config.horizon_s
        steps = 1.0 / max(1e-6, worker.cost.decode_seconds(max(1, worker.batch), worker.kv_tokens))
        overhead = SEQUENCE_BLOCKS * case.block_size
        tokens = variance = batch = 0.0
        for f in flights:
            if f.prefill_left_s > at_s:
                continue
            age = f.emitted + (f.decoding_for_s or 0.0) * steps
            more = min(at_s - f.prefill_left_s, horizon_s) * steps
            there = outlives(age, more, f.output_max)
            kv = alone * (f.tokens - f.emitted + min(age + more, f.output_max)) + overhead
            tokens += f.share * there * kv
            variance += f.share * there * (1.0 - there) * kv * kv
            batch += f.share * there
        more = min(at_s - joins_s, horizon_s) * steps
        there = outlives(0.0, more, case.output_max) if more > 0.0 else 1.0
        tokens += there * (case.tokens + more + overhead)
        return tokens + case.config.sigmas * math.sqrt(variance), batch + there


def admission_of(config: AdmissionConfig) -> Admission:
    """The policies as configured, the paper's first."""
    policies: tuple[tuple[AdmissionPolicy, Mode], ...] = (
        (Baseline(), config.baseline),
        (Early(), config.early),
        (Predictive(), config.predictive),
        (Forecast(), config.forecast),
    )
    return Admission(policies, config)


PAPERS = ("baseline", "early", "predictive")
POLICIES = (*PAPERS, "forecast")
DEFER = "+defer"
NAMES = (*POLICIES, *(f"{name}{DEFER}" for name in PAPERS))
NO_ADMISSION = "none"
"""Everything is taken on."""

ALL_NAMES = (*NAMES, NO_ADMISSION)


def admission_named(name: str, config: AdmissionConfig, others: Mode = Mode.SHADOW) -> AdmissionConfig:
    """One policy in force and the others in its shadow, for comparing them: "baseline", "early", "predictive",
    "forecast", or "none". The paper's policies refuse at once and keep no first token back, unless the name ends in
    "+defer".

    Args:
        others: what becomes of the others.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in ALL_NAMES:
        raise ConfigError(key="admission", value=name, expected=f"one of {', '.join(ALL_NAMES)}")
    bare = name.removesuffix(DEFER)
    baseline, early, predictive, forecast = (Mode.ENFORCE if policy == bare else others for policy in POLICIES)
    defer = name.endswith(DEFER) or (bare == "forecast" and config.defer)
    held = config.hold_first_share if defer or bare == "forecast" else 0.0
    return replace(
        config,
        baseline=baseline,
        early=early,
        predictive=predictive,
        forecast=forecast,
        defer=defer,
        hold_first_share=held,
    )


def name_of(config: AdmissionConfig) -> str:
    """What is in force, by the names of `admission_named`: "forecast", "early+defer", "baseline and early", "none"."""
    in_force = [name for name in POLICIES if getattr(config, name) is Mode.ENFORCE]
    return " and ".join(f"{n}{DEFER}" if n in PAPERS and config.defer else n for n in in_force) or NO_ADMISSION


def put_in_force(name: str, config: AdmissionConfig) -> AdmissionConfig:
    """As `admission_named`, but what is off stays off: `predictive` costs a look at every open request.

    Raises:
        ConfigError: an unknown name.
    """
    named = admission_named(name, config)
    off = [p for p in POLICIES if getattr(config, p) is Mode.OFF and getattr(named, p) is Mode.SHADOW]
    modes: dict[str, Mode] = dict.fromkeys(off, Mode.OFF)
    return replace(named, **modes)  # type: ignore[arg-type]
