"""Pure: one run: a trace's requests against a cluster, sampled every second, with faults; rows, samples, digest out."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from conductor.effects import RequestSpec, Slo
from conductor.machine import ConductorMachine
from conductor.oscillation import pool_loads
from core.messages import NodeInfo
from coupled_worker.machine import CoupledConfig, CoupledMachine
from decode_worker.machine import DecodeConfig, DecodeMachine
from halfmoon.blocks import Fingerprint, root_hash
from halfmoon.errors import HalfmoonError
from halfmoon.types import Epoch, NodeId, Outcome, Role, SamplingParams, Tier
from kv_store.tiers import KvCache
from kv_store.transfer import TransferMachine
from kv_store.transfer_values import TransferLimits
from prefill_worker.machine import PrefillConfig, PrefillMachine
from report.records import LoadSample, RequestRow
from simulator.audit import Audit
from simulator.clients import Client, row_of
from simulator.cluster import Cluster
from simulator.config import TERMS, SimConfig
from simulator.faults import Fault, Sky, schedule
from simulator.node import Machine, Node, Parts
from simulator.prompts import STOP, Prompts
from simulator.truth import Noise, TrueEngine, TruePhysics
from simulator.world import World
from workload.trace import Trace, TraceRequest

OUTPUT_TOKENS_LEAST = 2048
"""What every request asks for at least: nobody may guess an output's length from it."""
SAMPLE_S = 1.0
AFTER_S_MAX = 4000.0
"""After the last arrival a run may take this long: more than any request's deadline."""
REST_S_MAX = 700.0
"""After the last answer: until every node has let go of everything, and the conductor has heard of it."""
PING_S = 2.0
"""Between signs of life of a stream of blocks; the product's default of 0.5 s would be half of all messages here."""
ATTEMPTS_MAX = 4096
"""Of one node: the product's default of 256 is made for smaller nodes than these."""

Rng = Callable[[str], random.Random]
MakeConductor = Callable[[SimConfig, Fingerprint, dict[str, float], random.Random], ConductorMachine]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What report.records.Run is made of. Times count from the trace's beginning.

    Digest, duration, events and passes are those up to the last answer; counters and residuals have heard the workers'
    last reports.
    """

    rows: tuple[RequestRow, ...]
    samples: tuple[LoadSample, ...]
    digest: str
    counters: dict[str, int]
    residuals: dict[str, tuple[float, float]]
    duration_s: float
    num_events: int
    num_passes: int


class Simulation:
    """Built, then run once.

    Args:
        rng: a generator of its own for every name, the same for the same name.
        make_conductor: see simulator.policies.
    """

    def __init__(self, trace: Trace, config: SimConfig, rng: Rng, make_conductor: MakeConductor) -> None:
        self.world = World()
        self.trace = trace
        self.config = config
        self.began_s = config.conductor.slow_start_s + 2.0  # nodes are not young any more
        self._rng = rng
        self._fingerprint = _fingerprint(config)
        self._root = root_hash(self._fingerprint)
        self._prompts = Prompts(trace, self._root, config.hardware.block_tokens)
        self._audit = Audit() if config.check else None
        self._sky = Sky(self.world, config.faults, rng("storm"))
        self._incarnations: Counter[str] = Counter()
        factors = self._beliefs(rng("beliefs"))
        self.cluster = Cluster(
            self.world,
            TruePhysics(config.hardware),
            lambda: make_conductor(config, self._fingerprint, factors, rng("policy")),
            self._prompts.planned,
            rng("faults"),
            self._on_end,
            weather=self._sky,
            weather_calm=lambda: self._sky.calm,
            audit=self._audit,
        )
        self._roles = [
            (f"{role.value[0]}{i}", role)
            for role, count in (
                (Role.PREFILL, config.prefill),
                (Role.DECODE, config.decode),
                (Role.COUPLED, config.coupled),
            )
            for i in range(count)
        ]
        self._rows: list[RequestRow] = []
        self._samples: list[LoadSample] = []
        self._arrivals = _arrivals(trace, config, rng("jitter"), self.began_s)
        self._num_arrived = 0
        longest = max((r.output_tokens for r in trace.requests), default=1)
        asked = config.output_tokens_max or max(OUTPUT_TOKENS_LEAST, round(longest * config.output_factor))
        self._sampling = SamplingParams(max_tokens=asked, stop_token_ids=(STOP,), ignore_eos=True)

    # ---- the run ----

    def run(self, on_progress: Callable[[int], None] = lambda ended: None) -> Result:
        """Until every request has ended. `on_progress`: told of the number that have, now and then.

        Raises:
            AssertionError: an invariant does not hold, or requests do not end.
        """
        for name, role in self._roles:
            self.cluster.add(self._parts(name, role))
        if self._arrivals:
            self._plan_arrivals()
            last_s = self._arrivals[-1][0]
            self._plan_faults(last_s)
            limit_s = last_s + AFTER_S_MAX
            self.world.run(partial(self._done, on_progress), limit_s, self._where)
        result = self._result()
        self._come_to_rest()
        return replace(result, counters=self._counters(), residuals=self._residuals())

    def _come_to_rest(self) -> None:
        """Hear the workers' last reports. To be silent after REST_S_MAX breaks a promise, if those are checked."""
        if self._audit is not None:
            self.world.run(lambda: self.cluster.at_rest, REST_S_MAX, self._where)
            self._audit.finish()
            self.cluster.machine.check_invariants(blocks=True)
        elif self._arrivals:
            until_s = self.world.now_s + REST_S_MAX
            self.world.run(lambda: self.cluster.at_rest or self.world.now_s >= until_s, 2 * REST_S_MAX)

    def _result(self) -> Result:
        return Result(
            rows=tuple(sorted(self._rows, key=lambda row: (row.arrived_s, int(row.request_id[1:])))),
            samples=tuple(self._samples),
            digest=self.cluster.log.hex(),
            counters=self._counters(),
            residuals=self._residuals(),
            duration_s=self.world.now_s - self.began_s,
            num_events=self.world.num_events,
            num_passes=sum(node.compute.num_passes for node in self.cluster.peers.nodes.values()),
        )

    def _done(self, on_progress: Callable[[int], None]) -> bool:
        if self.world.num_events % 4096 == 0:
            on_progress(len(self._rows))
        return len(self._rows) == len(self._arrivals)

    def _where(self) -> str:
        nodes = "; ".join(str(node) for node in self.cluster.peers.nodes.values() if not node.at_rest)
        return f"{len(self.cluster.clients.open)} requests open; {nodes}"

    # ---- arrivals and ends ----

    def _plan_arrivals(self) -> None:
        self.world.at(self._arrivals[0][0], self._arrive)
        self.world.at(self._arrivals[0][0], self._sample)

    def _arrive(self) -> None:
        _, ordinal, request = self._arrivals[self._num_arrived]
        self._num_arrived += 1
        if self._num_arrived < len(self._arrivals):
            self.world.at(self._arrivals[self._num_arrived][0], self._arrive)
        planned = self._prompts.plan(request, ordinal, self.config.output_factor)
        told = self.config.outputs_told
        spec = RequestSpec(
            request_id=planned.request_id,
            token_ids=planned.token_ids,
            block_hashes=planned.hashes,
            sampling=replace(self._sampling, max_tokens=planned.output_tokens) if told else self._sampling,
            front_end="simulated",
            deadline_s=self.config.deadline_s,
            slo=Slo(ttft_s=self.config.slo_ttft_s, tbt_s=self.config.slo_tbt_s),
            priority=request.priority,
        )
        self.cluster.submit(spec, planned)

    def _on_end(self, client: Client, outcome: Outcome, error: HalfmoonError | None) -> None:
        record = self.cluster.machine.explain(client.spec.request_id)
        row = row_of(client, record, outcome, error, self.world.now_s)
        ended_s = self.world.now_s - self.began_s
        self._rows.append(replace(row, arrived_s=row.arrived_s - self.began_s, ended_s=ended_s))
        self._prompts.forget(client.planned)

    # ---- samples ----

    def _sample(self) -> None:
        """Every second between the first and the last arrival."""
        self._samples.append(sample_of(self.cluster, self.config, self.world.now_s, self.began_s))
        if self.world.now_s + SAMPLE_S <= self._arrivals[-1][0]:
            self.world.after(SAMPLE_S, self._sample)

    # ---- faults ----

    def _plan_faults(self, last_s: float) -> None:
        faults = self.config.faults
        for fault in schedule(
            faults, self._rng("schedule"), begin_s=self._arrivals[0][0], end_s=last_s, num_nodes=len(self._roles)
        ):
            self.world.at(fault.at_s, partial(self._strike, fault))

    def _strike(self, fault: Fault) -> None:
        cluster, faults = self.cluster, self.config.faults
        name, role = self._roles[fault.node]
        node = cluster.peers.nodes[NodeId(name)]
        if not node.alive and fault.kind not in ("storm", "conductor"):
            return  # it is down already
        cluster.counters[f"fault_{fault.kind}"] += 1
        match fault.kind:
            case "crash":
                cluster.kill(node)
                self.world.after(faults.restart_s, partial(self._revive, name, role))
            case "hang_up":
                cluster.break_link(node)
            case "tokens":
                cluster.break_tokens(node)
            case "partition":
                cluster.change(partial(self._sky.part, node.node_id, faults.partition_s))
            case "storm":
                cluster.change(self._sky.storm)
            case "stale":
                node.stale_s = faults.stale_delay_s
                self.world.after(faults.stale_s, partial(setattr, node, "stale_s", 0.0))
            case "slow_tier":
                node.move_factor = faults.slow_factor
                self.world.after(faults.slow_s, partial(setattr, node, "move_factor", 1.0))
            case "conductor":
                cluster.restart()

    def _revive(self, name: str, role: Role) -> None:
        self.cluster.add(self._parts(name, role))

    # ---- making ----

    def _beliefs(self, rng: random.Random) -> dict[str, float]:
        """Of each cost term: drawn, unless said."""
        bias = self.config.belief_bias
        drawn = {term: 1.0 + bias * rng.choice((-1.0, 1.0)) for term in TERMS}
        return {**drawn, **self.config.belief_factors}

    def _parts(self, name: str, role: Role) -> Parts:
        config, hardware = self.config, self.config.hardware
        self._incarnations[name] += 1
        number = self._incarnations[name]
        noise = config.noise if role is not Role.DECODE or config.step_noise is None else config.step_noise
        decodes_only = role is Role.DECODE
        device = hardware.decode_blocks if decodes_only else hardware.prefill_blocks
        dram = hardware.decode_dram_blocks if decodes_only else hardware.prefill_dram_blocks
        cache = KvCache(
            num_device_slots=device, num_dram_slots=dram, block_size=hardware.block_tokens, eviction=config.eviction
        )
        info = NodeInfo(
            node_id=NodeId(name),
            epoch=Epoch(f"{name}.{number}"),
            role=role,
            address=name,
            fingerprint=self._fingerprint,
            num_device_blocks=device,
            num_dram_blocks=dram,
            block_bytes=hardware.block_bytes,
            tokens_per_pass_max=hardware.tokens_per_pass_max,
            sequences_max=hardware.sequences_max,
        )
        limits = TransferLimits(
            pulls_max=ATTEMPTS_MAX,
            serves_max=ATTEMPTS_MAX,
            batch_bytes_max=hardware.batch_blocks * hardware.block_bytes,
            sessions_max=max(64, len(self._roles)),
            ping_interval_s=PING_S,
        )
        index = [known for known, _ in self._roles].index(name)
        return Parts(
            info=info,
            machine=self._machine(info, cache),
            cache=cache,
            engine=TrueEngine(hardware, self._prompts.planned, Noise(self._rng(f"noise/{name}.{number}"), noise)),
            transfers=TransferMachine(block_bytes=hardware.block_bytes, pins=cache, verify=False, limits=limits),
            steady=config.macro and decodes_only,
            learn=config.learn,
            audit=self._audit,
            report_interval_s=config.report_interval_s,
            report_offset_s=config.report_interval_s * (index + 1) / (len(self._roles) + 1),
        )

    def _machine(self, info: NodeInfo, cache: KvCache) -> Machine:
        hardware = self.config.hardware
        prefill = PrefillConfig(
            tokens_per_pass_max=hardware.tokens_per_pass_max,
            sequences_per_pass_max=hardware.prompts_per_pass_max,
            attempts_max=ATTEMPTS_MAX,
        )
        decode = DecodeConfig(sequences_max=hardware.sequences_max, attempts_max=ATTEMPTS_MAX)
        common: dict[str, Any] = {
            "node_id": info.node_id,
            "cache": cache,
            "root": self._root,
            "block_size": hardware.block_tokens,
            "names": self._prompts.name,
        }
        if info.role is Role.PREFILL:
            return PrefillMachine(**common, config=prefill)
        if info.role is Role.DECODE:
            return DecodeMachine(**common, config=decode)
        least = max(hardware.tokens_per_pass_max, decode.sequences_max + 1)
        return CoupledMachine(**common, config=CoupledConfig(tokens_per_pass_max=least, prefill=prefill, decode=decode))

    # ---- what is left ----

    def _counters(self) -> dict[str, int]:
        total: Counter[str] = Counter()
        for node in self.cluster.peers.nodes.values():
            total.update(node.counts)
            total["bytes_pulled"] += node.exchange.bytes_pulled
            total.update(node.transfers.counts())
        total.update(self.cluster.machine.counters)
        total.update(self.cluster.counters)
        total.update(self.cluster.clients.counts)
        return dict(sorted(total.items()))

    def _residuals(self) -> dict[str, tuple[float, float]]:
        """By term, over all workers, weighted by their samples."""
        sums: dict[str, tuple[int, float, float]] = {}
        for state in self.cluster.machine.status().nodes:
            for term, residual in state.residuals.items():
                count, bias, error = sums.get(term, (0, 0.0, 0.0))
                n = residual.samples
                sums[term] = (count + n, bias + n * residual.bias, error + n * residual.error)
        return {term: (bias / count, error / count) for term, (count, bias, error) in sums.items() if count}


def sample_of(cluster: Cluster, config: SimConfig, now_s: float, began_s: float) -> LoadSample:
    """Both pools now. Queues and loads are what the conductor believes; KV is what is there.

    The loads are conductor.oscillation.pool_loads, as a running conductor's metrics have them.
    """
    cluster.settle()
    view = cluster.machine.workers()
    queues = [w.queue_s(now_s) for w in view if w.prefills]
    decoding = [node.machine.decoding() for node in cluster.peers.nodes.values() if node.alive]
    loads = pool_loads(view, Slo(ttft_s=config.slo_ttft_s, tbt_s=config.slo_tbt_s), now_s)
    return LoadSample(
        at_s=now_s - began_s,
        prefill_queue_s=sum(queues) / len(queues) if queues else 0.0,
        prefill_load=loads.prefill,
        decode_load=loads.decode,
        decode_kv_tokens=sum(tokens for _, tokens in decoding),
        decode_sequences=sum(count for count, _ in decoding),
        decode_free_blocks=tuple(
            _free_blocks(n) for n in cluster.peers.nodes.values() if n.info.role is not Role.PREFILL
        ),
    )


def _free_blocks(node: Node) -> int:
    """What it could give to one more sequence, without those that it keeps for the sequences that it has."""
    if not node.alive:
        return 0
    kept = node.machine.spare_slots() if isinstance(node.machine, DecodeMachine) else 0
    return max(0, node.cache.available(Tier.DEVICE) - kept)


def _arrivals(
    trace: Trace, config: SimConfig, rng: random.Random, began_s: float
) -> list[tuple[float, int, TraceRequest]]:
    """(when, ordinal, what), in order of time: jittered, then sped up."""
    planned = [
        (began_s + (request.at_s + rng.uniform(0.0, config.jitter_s)) / config.speedup, ordinal, request)
        for ordinal, request in enumerate(trace.requests)
    ]
    return sorted(planned, key=lambda arrival: arrival[:2])


def _fingerprint(config: SimConfig) -> Fingerprint:
    """Of a model that exists nowhere."""
    return Fingerprint(
        weights=f"simulated {config.hardware.name}",
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        rope="none",
        block_size=config.hardware.block_tokens,
    )
