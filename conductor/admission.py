"""Pure: whether a request is taken on. Every policy gives a verdict; only those in force refuse.

A prediction outside what the cost models have seen, or one that their own recent errors contradict, refuses nobody: a
number that is not known is no reason. And a worker with nothing to do refuses nobody: only work gives samples, so a
model that has gone wrong could otherwise lock its worker up for good. Such a request goes as a probe, and its record
says so.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from conductor.effects import Slo
from conductor.policy import Placement
from conductor.view import ClusterView
from core.cost import Estimate
from halfmoon.errors import Rejected
from halfmoon.types import NodeId

RETRY_S_MIN = 0.1
RETRY_S_MAX = 60.0


class Mode(enum.StrEnum):
    OFF = "off"
    SHADOW = "shadow"  # judged and recorded, never obeyed
    ENFORCE = "enforce"


class Flight(NamedTuple):
    """An open attempt, as a forecast needs it: where it is, and since when or until when (seconds from now)."""

    decode_node: NodeId
    tokens: int
    prefill_left_s: float
    decoding_for_s: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is judged.

    Args:
        slo: the request's own limits, or the defaults where those are in force.
        view: every worker, with what is booked on it (read only).
        flights: the open attempts; asked for only by policies that forecast.
        decode_s: how long a request decodes, as a running mean; None before any has ended.
    """

    slo: Slo
    priority: int
    placement: Placement
    view: ClusterView
    flights: Callable[[], Sequence[Flight]]
    decode_s: float | None
    now_s: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One policy's opinion. With `accept` the other fields tell which limit came closest.

    `reason` with `accept`: "probe", where an idle worker is given what it is predicted to miss; else empty.
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

    def error(self) -> Rejected:
        return Rejected(
            reason=self.reason,
            predicted=self.predicted,
            limit=self.limit,
            unit=self.unit,
            retry_after_s=self.retry_after_s,
        )


class AdmissionPolicy(Protocol):
    @property
    def name(self) -> str: ...

    def judge(self, case: Case, mode: Mode) -> Verdict: ...


class Baseline:
    """Refuses what would miss its own SLO on the placement that was picked for it, judged by the load now.

    Never by a guess, and never where the worker that would miss it is idle: that one is probed.
    """

    name = "baseline"

    def judge(self, case: Case, mode: Mode) -> Verdict:
        (prefill, decode), slo = case.placement.option, case.slo
        ttft, tbt = case.placement.ttft, case.placement.tbt
        late, slow = _misses(ttft, slo.ttft_s), _misses(tbt, slo.tbt_s)
        if late and not _idle(case, prefill.node_id):
            return self._refuse(mode, "ttft_slo", ttft, slo.ttft_s, ttft.seconds - (slo.ttft_s or 0.0))
        if slow and not _idle(case, decode.node_id):
            worker = case.view.get(decode.node_id)
            batch = max(1, worker.batch if worker else 1)
            next_end_s = (case.decode_s or 1.0) / batch  # sequences that began at random times end this often
            return self._refuse(mode, "tbt_slo", tbt, slo.tbt_s, next_end_s)
        closest, limit = (tbt, slo.tbt_s) if slow and not late else (ttft, slo.ttft_s)
        return Verdict(
            policy=self.name,
            mode=mode,
            accept=True,
            reason="probe" if late or slow else "",
            predicted=closest.seconds,
            limit=limit or 0.0,
            in_range=ttft.in_range and tbt.in_range,
        )

    def _refuse(self, mode: Mode, reason: str, value: Estimate, limit: float | None, retry_s: float) -> Verdict:
        return Verdict(
            policy=self.name,
            mode=mode,
            accept=False,
            reason=reason,
            predicted=value.seconds,
            limit=limit or 0.0,
            retry_after_s=min(RETRY_S_MAX, max(RETRY_S_MIN, retry_s)),
        )


def _misses(value: Estimate, limit: float | None) -> bool:
    return limit is not None and value.in_range and value.seconds > limit


def _idle(case: Case, node_id: NodeId) -> bool:
    worker = case.view.get(node_id)
    return worker is not None and worker.attempts == 0


class Admission:
    """The policies, each with its mode."""

    def __init__(self, policies: Sequence[tuple[AdmissionPolicy, Mode]] = ((Baseline(), Mode.ENFORCE),)) -> None:
        self._policies = tuple((policy, mode) for policy, mode in policies if mode is not Mode.OFF)

    def judge(self, case: Case) -> tuple[Verdict, ...]:
        """Every policy that is not off, in order."""
        return tuple(policy.judge(case, mode) for policy, mode in self._policies)


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
