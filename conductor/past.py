"""Pure: a recorded run as values: what was placed where, what it came to, and what workers measured meanwhile."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from conductor.admission import Stage, Verdict
from conductor.admission_config import Mode
from conductor.config import ConductorConfig
from conductor.effects import Slo
from conductor.recording import Call, Ending, Header, config_of
from conductor.scoring import DecodeScore, PrefillScore
from conductor.tenancy import Room, Tenancy, tenancies_of
from core.cost import CostPrior, WorkerCost
from core.messages import LoadReport, NodeInfo, Snapshot
from halfmoon.errors import RecordingError
from halfmoon.types import BlockHash, NodeId, Outcome


class Stay(NamedTuple):
    """One attempt in a prefill worker's queue: when placed, its prefix there, computed (or given up).

    Times are the machine's. `booked_s`: what the queue ledger was told that it takes.
    """

    request_id: str
    begun_s: float
    ready_s: float
    done_s: float
    booked_s: float


class Load(NamedTuple):
    """A decode worker's own word on its batch."""

    at_s: float
    sequences: int
    kv_tokens: int


@dataclass(frozen=True, kw_only=True)
class Past:
    """One request on which admission was asked, with the placement that the answer was about. Seconds.

    Args:
        at_s: when it was placed or rejected, by the machine's clock. before_s: since its arrival at the front end.
        taken: it was not rejected on arrival; it may have been when its prefill had ended.
        pull_s: what its pull was predicted to take alone.
        fetched_blocks: of a cached prefix, that came from another worker.
        pulled_late_blocks: of the pull, those that came when the prompt was computed and its last chunk announced.
        terms: by name, as DecisionRecord.terms: (predicted, actual).
    """

    request_id: str
    at_s: float
    before_s: float
    num_tokens: int
    limits: Slo
    taken: bool
    outcome: Outcome
    verdicts: tuple[Verdict, ...]
    prefill: PrefillScore
    decode: DecodeScore
    pull_s: float
    computed_tokens: int | None
    fetched_blocks: int
    pulled_late_blocks: float
    output_tokens: int
    terms: Mapping[str, tuple[float | None, float | None]]

    @property
    def rejected(self) -> bool:
        """On arrival or later."""
        return self.outcome is Outcome.REJECTED

    @property
    def met(self) -> bool | None:
        """Whether it was served within its limits; None: nobody knows (it was rejected, or its client left)."""
        if self.rejected or self.outcome is Outcome.CANCELLED:
            return None
        if self.outcome is not Outcome.FINISHED:
            return False
        return _within(self.terms["ttft_s"][1], self.limits.ttft_s) and _within(
            self.terms["tbt_worst_s"][1], self.limits.tbt_s, unknown=True
        )


def _within(actual: float | None, limit: float | None, *, unknown: bool = False) -> bool:
    """A request of one token has no gap, and so keeps any limit on them."""
    return limit is None or (unknown if actual is None else actual <= limit)


@dataclass(kw_only=True)
class Recorded:
    """A whole run.

    Args:
        costs: fitted, per worker, to every sample of the run: hindsight.
    """

    header: Header
    config: ConductorConfig
    pasts: list[Past] = field(default_factory=list)
    stays: dict[NodeId, list[Stay]] = field(default_factory=dict)
    loads: dict[NodeId, list[Load]] = field(default_factory=dict)
    tenancies: dict[NodeId, list[Tenancy]] = field(default_factory=dict)
    rooms: dict[NodeId, Room] = field(default_factory=dict)
    names: dict[str, Sequence[BlockHash]] = field(default_factory=dict)
    """Of each request's full blocks."""
    costs: dict[NodeId, WorkerCost] = field(default_factory=dict)
    unjudged: int = 0
    """Requests that ended before admission was asked: no place in the queue, no worker."""

    def load_at(self, node_id: NodeId, at_s: float) -> Load:
        """The report nearest after that moment, else the last one."""
        loads = self.loads.get(node_id, [])
        index = bisect_left(loads, at_s, key=_at_s)
        return loads[min(index, len(loads) - 1)] if loads else Load(at_s, 0, 0)


def _at_s(load: Load) -> float:
    return load.at_s


def gather(entries: Iterator[Header | Call | Ending]) -> Recorded:
    """Take in a recording: what conductor.recording.read gives, or conductor.replay.rejudged.

    Raises:
        RecordingError: as those; settings or a record that this version cannot read.
    """
    header = next(entries)
    assert isinstance(header, Header)
    run = Recorded(header=header, config=config_of(header))
    for entry in entries:
        if isinstance(entry, Call):
            _hear(run, entry)
            for record in entry.records:
                try:
                    _keep(run, record, entry.at_s)
                except (KeyError, TypeError, ValueError) as error:
                    why = f"records: {type(error).__name__}: {error}"
                    raise RecordingError(line=entry.line, why=why) from error
    for stays in run.stays.values():
        stays.sort(key=lambda stay: stay.begun_s)
    return run


def _hear(run: Recorded, call: Call) -> None:
    event = call.arguments.get("event")
    if "spec" in call.arguments:
        spec = call.arguments["spec"]
        run.names[spec.request_id] = spec.block_hashes
    if isinstance(event, Snapshot):
        _join(run, event.info)
    elif "info" in call.arguments:
        _join(run, call.arguments["info"])
    elif isinstance(event, LoadReport):
        node_id = call.arguments["node_id"]
        run.loads.setdefault(node_id, []).append(Load(call.at_s, event.running_sequences, event.kv_tokens))
        cost = run.costs.get(node_id)
        if cost is not None:
            for sample in event.passes:
                cost.observe_pass(sample)
            for transfer in event.transfers:
                cost.observe_transfer(transfer)


def _join(run: Recorded, info: NodeInfo) -> None:
    """Hindsight begins with nothing: the recorded run's prior may be what was wrong with it."""
    run.rooms[info.node_id] = Room(info.num_device_blocks, max(1, info.sequences_max))
    if info.node_id not in run.costs:
        run.costs[info.node_id] = WorkerCost(CostPrior(), tokens_per_pass_max=max(1, info.tokens_per_pass_max))


def _keep(run: Recorded, record: Mapping[str, Any], ended_s: float) -> None:
    arrived_s = ended_s - record["ended_s"]
    choices = record["choices"]
    if not choices:
        run.unjudged += 1
        return
    _keep_stays(run, record, arrived_s)
    for node, tenancy in tenancies_of(record, arrived_s, run.names.get(record["request_id"], ())):
        run.tenancies.setdefault(NodeId(node), []).append(tenancy)
    taken = choices[0]["cause"] != "rejected"
    done_s = record["prefill_done_s"]
    given = [c for c in choices if done_s is None or c["at_s"] <= done_s]
    choice = given[-1] if given else choices[-1]
    stats = record["stats"].get(f"{choice['number']}.prefill")
    joined = record["stats"].get(f"{choice['number']}.decode")
    run.pasts.append(
        Past(
            request_id=record["request_id"],
            at_s=arrived_s + choice["at_s"],
            before_s=record["terms"]["before_s"]["actual_s"],
            num_tokens=record["num_prompt_tokens"],
            limits=_limits(run.config, record),
            taken=taken,
            outcome=Outcome(record["outcome"]),
            verdicts=tuple(_verdict(verdict) for verdict in record["verdicts"]),
            prefill=PrefillScore(**choice["prefill"]),
            decode=DecodeScore(**choice["decode"]),
            pull_s=choice["pull_s"],
            computed_tokens=stats["computed_tokens"] if stats else None,
            fetched_blocks=stats["hit_tokens_remote"] // run.header.block_size if stats else 0,
            pulled_late_blocks=joined["pulled_blocks"] * (1.0 - joined["overlap"]) if joined else 0.0,
            output_tokens=record["output_tokens"] or 0,
            terms={name: (term["predicted_s"], term["actual_s"]) for name, term in record["terms"].items()},
        )
    )


def _verdict(tree: Mapping[str, Any]) -> Verdict:
    idle = tuple(NodeId(name) for name in tree.get("idle", ()))
    return Verdict(**{**tree, "mode": Mode(tree["mode"]), "stage": Stage(tree["stage"]), "idle": idle})


def _limits(config: ConductorConfig, record: Mapping[str, Any]) -> Slo:
    default = config.slo if config.enforce_default_slo else Slo()
    ttft_s, tbt_s = record["slo_ttft_s"], record["slo_tbt_s"]
    return Slo(
        ttft_s=default.ttft_s if ttft_s is None else ttft_s,
        tbt_s=default.tbt_s if tbt_s is None else tbt_s,
    )


def _keep_stays(run: Recorded, record: Mapping[str, Any], arrived_s: float) -> None:
    """An attempt's place is free when its prompt is computed, when the next attempt begins, or at the end."""
    choices = [c for c in record["choices"] if c["cause"] != "rejected"]
    ends = [c["at_s"] for c in choices[1:]] + [record["ended_s"]]
    for choice, end_s in zip(choices, ends, strict=False):  # none, if it was rejected
        done_s = record["prefill_done_s"]
        until_s = done_s if done_s is not None and choice["at_s"] <= done_s <= end_s else end_s
        score = choice["prefill"]
        stats = record["stats"].get(f"{choice['number']}.prefill")
        stay = Stay(
            record["request_id"],
            arrived_s + choice["at_s"],
            arrived_s + min(until_s, choice["at_s"] + (stats["fetch_s"] if stats else 0.0)),
            arrived_s + until_s,
            score["ttft_s"] - score["queue_s"],
        )
        run.stays.setdefault(NodeId(choice["prefill_node"]), []).append(stay)
