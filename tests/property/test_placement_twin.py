"""Placement against a naive twin that prices everything, everywhere, and sorts: the same decision, term by term."""

from __future__ import annotations

from math import inf

from hypothesis import given, settings
from hypothesis import strategies as st

from conductor.config import ConductorConfig
from conductor.effects import Slo
from conductor.policy import JOINED_MAX, LOAD_STEP, TTFT_STEP, place, placement_policy
from conductor.scoring import Query
from conductor.view import DecodeBook, SendingBook, Worker
from core.messages import BlockCopy, KvEvents, PassSample
from halfmoon.types import AttemptId, RequestId, Tier
from tests.conductor_kit import BLOCK_BYTES, PRIOR, attempt_of, chain
from tests.unit.test_placement import NOW_S, TOKENS, Scene

CHAIN = chain(TOKENS)
ROLES = st.sampled_from("pppdddc")
WORKER = st.fixed_dictionaries(
    {
        "role": ROLES,
        "cached": st.integers(0, 10),
        "slow": st.sampled_from([0, 0, 4, 10]),
        "hole": st.sampled_from([False, False, True]),
        "tier": st.sampled_from([Tier.DRAM, Tier.SSD]),
        "queue_s": st.sampled_from([0.0, 0.1, 9.0]),
        "sending": st.sampled_from([0, 5, 300]),
        "batch": st.integers(0, 4),
        "speed": st.sampled_from([0.5, 1.0, 1.0, 4.0]),
        "age_s": st.sampled_from([0.0, 3.0, 500.0]),
        "copied": st.sampled_from([0, 200, 499]),
        "num_device_blocks": st.sampled_from([9, 400, 1000]),
    }
)


def build(config: ConductorConfig, people: list[dict]) -> Scene:
    scene = Scene(config)
    for number, person in enumerate(people):
        worker = scene.add(
            f"{person['role']}{number}",
            cached=person["cached"],
            queue_s=person["queue_s"],
            batch=person["batch"],
            kv_tokens=300 * person["batch"],
            blocks=20 * person["batch"],
            ready_s=NOW_S - person["age_s"],
            num_device_blocks=person["num_device_blocks"],
        )
        slow = tuple(BlockCopy(block_hash=h, tier=person["tier"]) for h in CHAIN[: person["slow"]])
        moved = tuple(BlockCopy(block_hash=h, tier=Tier.DEVICE) for h in CHAIN[2:4] if person["hole"])
        scene.index.on_events(worker.node_id, KvEvents(event_id=1, stored=slow, removed=moved))
        if person["sending"]:
            book = SendingBook(person["sending"] * BLOCK_BYTES, NOW_S - 1.0, NOW_S + 1.0)
            worker.book_sending(attempt_of("s#1"), "fetch", book)
        if person["copied"]:
            worker.book_copy(person["copied"], NOW_S, config)
        for i in range(9):
            seconds = person["speed"] * (0.01 + 1e-3 * (10 + 40 * i))
            sample = PassSample(new_tokens=10 + 40 * i, context_tokens=0, batch=0, kv_tokens=0, seconds=seconds)
            worker.cost.observe_pass(sample)
        worker.book_decode(AttemptId(RequestId(f"x{number}"), 1), DecodeBook(7, 1))
    return scene


class Twin:
    """Algorithm 1 as it stands in the paper and the plan: every worker priced in full with `Estimate`s."""

    def __init__(self, scene: Scene, query: Query) -> None:
        self.scene, self.query = scene, query
        self.ready = [w for w in scene.view if w.state(NOW_S, scene.config.suspect_s) == "ready"]
        self.open = [w for w in self.ready if w.node_id not in query.excluded]
        self.own = {w.node_id: self.prefix(w) for w in self.ready}
        self.policy = placement_policy(scene.config)

    def prefix(self, worker: Worker) -> int:
        held = self.scene.index.copies(worker.node_id)
        return next((i for i, block in enumerate(self.query.hashes) if block not in held), len(self.query.hashes))

    def read_s(self, worker: Worker, first: int, end: int) -> float:
        held = self.scene.index.copies(worker.node_id)
        fastest = [Tier((held[b] & -held[b]).bit_length() - 1) for b in self.query.hashes[first:end]]
        return sum(
            [
                worker.cost.read_s(fastest.count(tier) * BLOCK_BYTES, tier)
                for tier in (Tier.DRAM, Tier.SSD)
                if tier in fastest
            ]
        )

    def senders(self) -> list[Worker]:
        worth: list[Worker] = []
        holders = [w for w in self.ready if self.own[w.node_id]]
        for w in sorted(holders, key=lambda w: (-self.own[w.node_id], w.sending_bytes(NOW_S), w.node_id)):
            if not worth or w.sending_bytes(NOW_S) < worth[-1].sending_bytes(NOW_S):
                worth.append(w)
        return worth[: self.policy.senders_max]

    def prefill(self, worker: Worker) -> dict:
        query, cost, own, config = self.query, worker.cost, self.own[worker.node_id], self.scene.config

        def compute_s(blocks: int) -> float:
            context = blocks * query.block_size
            return cost.prefill_s(query.num_tokens - context, context).seconds

        best = {"fetch_s": 0.0, "prefill_s": compute_s(own), "blocks": own, "source": None}
        refused_s = inf
        for sender in self.senders():
            blocks = self.own[sender.node_id]
            if blocks <= own:
                continue
            num_bytes = (blocks - own) * query.block_bytes + sender.sending_bytes(NOW_S)
            moved_s = cost.transfer_s(num_bytes, sender.node_id).seconds + self.read_s(sender, own, blocks)
            total_s, before_s = moved_s + compute_s(blocks), best["fetch_s"] + best["prefill_s"]
            if self.policy.fetches(own, blocks, total_s, before_s):
                if worker.may_copy(blocks - own, NOW_S, config):
                    best.update(fetch_s=moved_s, prefill_s=compute_s(blocks), blocks=blocks, source=sender.node_id)
                else:
                    refused_s = min(refused_s, total_s)
        queue_s, read_s, mixing_s = worker.queue_s(NOW_S), self.read_s(worker, 0, own), 0.0
        if worker.coupled and worker.batch:
            passes = -(-(query.num_tokens - best["blocks"] * query.block_size) // worker.info.tokens_per_pass_max)
            mixing_s = cost.decode_step_s(worker.batch, worker.kv_tokens).seconds * passes
        best["ttft_s"] = queue_s + best["fetch_s"] + read_s + best["prefill_s"] + mixing_s
        best["uncapped_s"] = inf
        if refused_s < best["fetch_s"] + best["prefill_s"]:
            best["uncapped_s"] = queue_s + refused_s + read_s + mixing_s
        return best

    def decode(self, worker: Worker) -> float:
        query = self.query
        stall_s = 0.0
        if worker.coupled and worker.queue_s(NOW_S):
            stall_s = min(worker.queue_s(NOW_S), worker.cost.prefill_s(worker.info.tokens_per_pass_max, 0).seconds)
        step_s = worker.cost.decode_step_s(worker.batch + 1, worker.kv_tokens + query.num_tokens).seconds
        limit_s = query.slo.tbt_s or self.scene.config.slo.tbt_s
        tbt_load = (step_s + stall_s) / limit_s if limit_s else 0.0
        blocks = (worker.decode_blocks + query.blocks_expected) / worker.num_blocks
        return max(tbt_load, blocks, (worker.batch + 1) / worker.sequences_max)

    def handover_s(self, source: Worker, prefill: dict, worker: Worker) -> float:
        query = self.query
        missing = range(self.own[worker.node_id], query.blocks_prefill)
        num_bytes = len(missing) * query.block_bytes
        start = prefill["blocks"] * query.block_size
        while query.num_tokens - start > source.info.tokens_per_pass_max:
            start += source.info.tokens_per_pass_max
        last = [i for i in missing if (i + 1) * query.block_size > start]
        last_s = worker.cost.transfer_s(len(last) * query.block_bytes, source.node_id).seconds
        alone_s = worker.cost.transfer_s(num_bytes, source.node_id).seconds
        behind_s = worker.cost.transfer_s(num_bytes + source.sending_bytes(NOW_S), source.node_id).seconds
        return max(last_s, alone_s - prefill["prefill_s"], behind_s - prefill["ttft_s"])

    def decide(self) -> tuple | None:
        query, config = self.query, self.scene.config
        loads = {w.node_id: self.decode(w) for w in self.open if w.decodes and query.blocks_max <= w.num_blocks}
        young = {w.node_id: w.young(NOW_S, config) for w in self.open}
        by_name = {w.node_id: w for w in self.open}

        def order(n: str) -> tuple:
            return (loads[n] > 1.0, young[n], int(loads[n] / LOAD_STEP), -self.own[n], loads[n], n)

        apart = sorted((n for n in loads if not by_name[n].coupled), key=order)
        partners = [n for n in apart[:JOINED_MAX] if order(n)[:3] == order(apart[0])[:3]]
        options = []
        for w in self.open:
            if not w.prefills or query.blocks_prefill > w.num_blocks:
                continue
            mates = ([w.node_id] if w.node_id in loads else []) if w.coupled else partners
            if mates:
                mate = mates[0]
                bid = self.prefill(w)
                key = (loads[mate] > 1.0, young[w.node_id] or young[mate], bid["ttft_s"], loads[mate], w.node_id)
                options.append((key, w, bid, mates))
        if not options:
            return None
        options.sort(key=lambda option: option[0])
        limit = options[0][0]
        pairs = [
            (0.0 if w.coupled else self.handover_s(w, bid, by_name[mate]), rank, i, w, bid, mate)
            for rank, (key, w, bid, mates) in enumerate(options[:JOINED_MAX])
            if key[:2] == limit[:2] and bid["ttft_s"] <= limit[2] * (1.0 + TTFT_STEP)
            for i, mate in enumerate(mates)
        ]
        handover_s, _, _, worker, bid, mate = min(pairs, key=lambda pair: pair[:3])
        capped = any((*key[:2], other["uncapped_s"]) < limit for key, _, other, _ in options)
        return worker.node_id, mate, bid["ttft_s"], bid["source"], bid["blocks"], loads[mate], handover_s, capped


@given(
    people=st.lists(WORKER, min_size=2, max_size=9),
    name=st.sampled_from(["algorithm1", "mooncake", "local_prefix"]),
    num_tokens=st.one_of(st.just(161), st.integers(1, 161)),
    tbt_s=st.sampled_from([None, 0.02, 0.5]),
    excluded=st.sets(st.integers(0, 8), max_size=2),
)
@settings(max_examples=200, deadline=None)
def test_the_decision_is_the_naive_twins(
    people: list[dict], name: str, num_tokens: int, tbt_s: float | None, excluded: set[int]
) -> None:
    config = ConductorConfig(prior=PRIOR, suspect_s=1e6, silent_s=2e6, placement=name)  # type: ignore[arg-type]
    scene = build(config, people)
    out = frozenset(w.node_id for i, w in enumerate(scene.view) if i in excluded)
    query = scene.query(num_tokens=num_tokens, slo=Slo(tbt_s=tbt_s), excluded=out)
    found = place(query, scene.view, scene.index, placement_policy(config), config, NOW_S)
    expected = Twin(scene, query).decide()
    if found is None:
        assert expected is None
        return
    prefill, decode = found.option
    blocks = prefill.hit_blocks + prefill.fetch_blocks
    assert expected == (
        prefill.node_id,
        decode.node_id,
        prefill.ttft_s,
        prefill.source,
        blocks,
        decode.load,
        found.handover_s,
        found.capped,
    )
