"""Pure: whether a request is taken on. Every policy gives a verdict; only those in force refuse.

A prediction outside what the cost models have seen, or one that their own recent errors contradict, refuses nobody: a
number that is not known is no reason. One that they vouch for refuses, also where the worker has nothing to do, but for
a probe now and then (conductor.probing): a model that has gone wrong could otherwise lock its worker up for good. The
record says which of the two let a request in.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from conductor.admission_config import AdmissionConfig, Mode, Reserve
from conductor.effects import Slo
from conductor.probing import LOAD_MAX, Probes
from conductor.scoring import DecodeScore, PrefillScore
from conductor.survival import OutputLengths
from conductor.view import ClusterView, Worker
from halfmoon.errors import Rejected
from halfmoon.types import NodeId, RequestId

RETRY_S_MIN = 0.1
RETRY_S_MAX = 60.0

PROBE = "probe"
"""The reason for which a request is let in on an idle worker that is sure to be late."""

HEADROOM_MAX = 0.5
"""Of a limit, that lower classes must leave to higher ones."""


class Stage(enum.StrEnum):
    """When it is judged."""

    ARRIVAL = "arrival"
    DECODE = "decode"  # its prefill has ended, and decode room was not asked for before


class Flight(NamedTuple):
    """An open attempt, as a forecast needs it. Seconds count from now.

    Args:
        decode_node: where it decodes or will; None: not chosen yet.
        tokens: of KV when it joins the batch, `emitted` of them output of earlier attempts.
        output_max: the most output that it asked for.
        prefill_left_s: until its prefill is predicted to end; 0 once it has.
        decoding_for_s: None before it has joined the batch.
        share: how much of it counts, where its decode worker may be any of several.
        reserved: its decode worker has given it room.
    """

    decode_node: NodeId | None
    tokens: int
    emitted: int
    output_max: int
    prefill_left_s: float
    decoding_for_s: float | None
    share: float = 1.0
    reserved: bool = False


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is judged.

    Args:
        slo: the request's own limits, or the defaults where those are in force.
        default_slo: what loads are measured by where there is no limit.
        now_s, waited_s: the time, and how long ago the request arrived.
        tokens: of KV that it brings to the decode worker; `output_tokens` more are expected, `output_max` at most.
        prefill: the placement's prefill side; None at stage `decode`.
        decode: its decode side; both name the same node where that is coupled.
        view: every worker, with what is booked on it (read only).
        flights: the open attempts on one decode worker; None: all of them, those without a decode worker included.
        in_line: attempts that have begun, and found no decode room yet.
        decode_s: how long a request decodes, as a running mean; None before any has ended.
        lengths: what is known of output lengths.
    """

    stage: Stage
    request_id: RequestId
    slo: Slo
    default_slo: Slo
    priority: int
    now_s: float
    waited_s: float
    tokens: int
    output_tokens: int
    output_max: int
    block_size: int
    prefill: PrefillScore | None
    decode: DecodeScore
    view: ClusterView
    flights: Callable[[NodeId | None], Sequence[Flight]]
    in_line: int
    decode_s: float | None
    lengths: OutputLengths
    config: AdmissionConfig

    @property
    def coupled(self) -> bool:
        return self.prefill is not None and self.prefill.node_id == self.decode.node_id

    @property
    def worker(self) -> Worker | None:
        """The decode worker."""
        return self.view.get(self.decode.node_id)

    @property
    def share(self) -> float:
        """Of every limit, how much this request may use: lower classes leave some to higher ones, until they aged."""
        step = self.priority + self.waited_s / self.config.priority_step_s
        return 1.0 - min(HEADROOM_MAX, max(0.0, -step) * self.config.class_headroom)


class Doubt(enum.StrEnum):
    """Why a limit that is predicted to be missed refuses nobody, nevertheless."""

    GUESS = "guess"  # the prediction is outside what was measured, or contradicted by it
    FREE = "free"  # room is counted, and the worker's is all free


class Finding(NamedTuple):
    """One limit and what is predicted against it. Over its limit with a `doubt`, it refuses nobody.

    waits: it may be kept later, when others have ended. A TTFT is not: each second of waiting is one of it.
    idle: the worker that it is about, if that has nothing to do: it may be probed.
    """

    reason: str
    predicted: float
    limit: float
    unit: str
    doubt: Doubt | None
    retry_s: float
    waits: bool = True
    idle: NodeId | None = None

    @property
    def load(self) -> float:
        return self.predicted / self.limit if self.limit > 0.0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One policy's opinion at one stage. With `accept` the other fields tell which limit came closest.

    `reason` with `accept`: why it is let in over a limit, a Doubt or PROBE; else empty. `in_range`: the cost models
    vouch for `predicted`. `idle`: the idle workers that would be late, so that it is a probe of each, or might
    have been one; `probed_ago_s`: since the last probe of the first of them, None if there was none.
    `waits`: a refusal that may be none later, when others have ended. `load`: the largest of predicted TTFT / SLO,
    TBT / SLO, KV tokens / room, as this policy sees them.
    """

    policy: str
    mode: Mode
    accept: bool
    reason: str = ""
    predicted: float = 0.0
    limit: float = 0.0
    unit: str = "s"
    in_range: bool = True
    retry_after_s: float | None = None
    stage: Stage = Stage.ARRIVAL
    load: float = 0.0
    waits: bool = False
    idle: tuple[NodeId, ...] = ()
    probed_ago_s: float | None = None

    def error(self) -> Rejected:
        return Rejected(
            reason=self.reason if self.stage is Stage.ARRIVAL else f"{self.reason} at {self.stage}",
            predicted=self.predicted,
            limit=self.limit,
            unit=self.unit,
            retry_after_s=self.retry_after_s,
        )


class AdmissionPolicy(Protocol):
    """Deterministic, and without state of its own: what it knows comes with the case."""

    @property
    def name(self) -> str: ...

    @property
    def reserve(self) -> Reserve:
        """When decode room is asked for, if this policy is enforced; never `policy`."""
        ...

    def findings(self, case: Case) -> Sequence[Finding]:
        """Every limit that this policy looks at, at the case's stage."""
        ...


def judge(policy: AdmissionPolicy, case: Case, mode: Mode) -> Verdict:
    """The verdict by the worst limit that is certainly missed, else by the one that comes closest."""
    findings, share = policy.findings(case), case.share
    worst = max(findings, key=_load, default=None)
    if worst is None:
        return Verdict(policy=policy.name, mode=mode, accept=True, stage=case.stage)
    missed = [f for f in findings if f.load > share]
    probes = [f for f in missed if f.idle is not None and f.doubt is None and f.load <= LOAD_MAX * share]
    let_in = [f for f in probes if _due(policy.name, f, case)]
    refusing = max((f for f in missed if f.doubt is None and f not in let_in), key=_gravity, default=None)
    shown = refusing or max(let_in, key=_load, default=worst)
    reason = refusing.reason if refusing is not None else PROBE if let_in else (worst.doubt or "") if missed else ""
    retry_s = None if refusing is None else _retry_s(policy.name, refusing, case)
    idle = tuple(dict.fromkeys(f.idle for f in probes if f.idle is not None))
    return Verdict(
        policy=policy.name,
        mode=mode,
        accept=refusing is None,
        reason=reason,
        predicted=shown.predicted,
        limit=shown.limit * share,
        unit=shown.unit,
        in_range=shown.doubt is not Doubt.GUESS,
        retry_after_s=retry_s,
        stage=case.stage,
        load=worst.load,
        waits=refusing is not None and refusing.waits,
        idle=idle,
        probed_ago_s=_probes(policy.name, idle[0], case).ago_s(case.now_s) if idle else None,
    )


def _due(policy: str, finding: Finding, case: Case) -> bool:
    assert finding.idle is not None
    config = case.config
    return _probes(policy, finding.idle, case).due(case.request_id, case.now_s, config.probe_s, config.probe_one_in)


def _retry_s(policy: str, finding: Finding, case: Case) -> float:
    """On an idle worker not before its next probe may be: nothing else will change there."""
    retry_s = finding.retry_s
    if finding.idle is not None:
        retry_s = max(retry_s, _probes(policy, finding.idle, case).due_in_s(case.now_s, case.config.probe_s))
    return min(RETRY_S_MAX, max(RETRY_S_MIN, retry_s))


def _probes(policy: str, node_id: NodeId, case: Case) -> Probes:
    worker = case.view.get(node_id)
    return (worker.probes.get(policy) if worker is not None else None) or Probes()


def _load(finding: Finding) -> float:
    return finding.load


def _gravity(finding: Finding) -> tuple[bool, float]:
    return (not finding.waits, finding.load)


EARLIEST = (Reserve.BEFORE, Reserve.WITH, Reserve.DURING, Reserve.AFTER)


class Admission:
    """The policies, each with its mode."""

    def __init__(self, policies: Sequence[tuple[AdmissionPolicy, Mode]], config: AdmissionConfig | None = None) -> None:
        self.config = config or AdmissionConfig()
        self._policies = tuple((policy, mode) for policy, mode in policies if mode is not Mode.OFF)
        wanted = {policy.reserve for policy, mode in self._policies if mode is Mode.ENFORCE} or {Reserve.WITH}
        self.reserve = self.config.reserve
        if self.reserve is Reserve.POLICY:
            self.reserve = next(when for when in EARLIEST if when in wanted)

    def judge(self, case: Case) -> tuple[Verdict, ...]:
        """Every policy that is not off, in order."""
        return tuple(judge(policy, case, mode) for policy, mode in self._policies)

    def refuses(self, case: Case) -> Verdict | None:
        """The first refusal that is in force; the policies in shadow are not asked."""
        return refusal([judge(policy, case, mode) for policy, mode in self._policies if mode is Mode.ENFORCE])


def refusal(verdicts: Sequence[Verdict]) -> Verdict | None:
    """The first refusal that is in force."""
    return next((v for v in verdicts if not v.accept and v.mode is Mode.ENFORCE), None)


def queue_full(open_requests: int, limit: int, retry_after_s: float) -> Rejected:
    """The bound on what is placed and held at once, judged before anything is scored."""
    return Rejected(
        reason="queue_full",
        predicted=float(open_requests + 1),
        limit=float(limit),
        unit="requests",
        retry_after_s=min(RETRY_S_MAX, max(RETRY_S_MIN, retry_after_s)),
    )


def no_turn(waited_s: float, limit_s: float, retry_after_s: float) -> Rejected:
    """It was deferred for as long as its TTFT limit allows, and others had the room that it would have fitted into."""
    return Rejected(
        reason="no_turn",
        predicted=waited_s,
        limit=limit_s,
        unit="s",
        retry_after_s=min(RETRY_S_MAX, max(RETRY_S_MIN, retry_after_s)),
    )
