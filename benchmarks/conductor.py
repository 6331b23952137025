"""Shell: how fast the conductor decides: placements and KV events per second at the size it is designed for.

100 workers (half prefill, half decode) that hold 1e6 blocks in three tiers, prompts of 188 full blocks that begin with
one system prompt, and always `--open` requests that wait, prefill or decode. A placement is `on_request` of the whole
machine: judged by the default policies, recorded, booked, commanded; and once more with `predictive` in the shadow too,
which looks at every open request. Beside it the prefix walk alone is measured, with a prompt of 2,000 blocks, a naive
walk (one set of blocks per worker) and ai-dynamo-runtime's radix tree on the same blocks and prompts (`--peer`; wall
time, for its work is done in a thread of its own). All other times are CPU seconds of the one thread, so that a busy
host does not count as work; `additions_ms` is what a million integer additions took in the same run. The raw figures go
to benchmarks/results.

    python -m benchmarks.conductor [--blocks 1000000] [--workers 100] [--placements 5000] [--open 400] [--peer]
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from benchmarks.conductor_peer import (
    PROMPT_BLOCKS,
    SHARED_BLOCKS,
    Population,
    percentiles,
    population,
    prompts,
    run_peer,
)
from benchmarks.record import save
from conductor import index_dump
from conductor.admission_config import AdmissionConfig, Mode
from conductor.admission_policies import admission_of
from conductor.config import ConductorConfig
from conductor.desk import Layout
from conductor.effects import RequestSpec
from conductor.machine import ConductorMachine
from core.messages import (
    AttemptFinished,
    AttemptStats,
    BlockCopy,
    DecodeJoined,
    KvEvents,
    LoadReport,
    NodeInfo,
    PassSample,
    PrefillDone,
    Reserved,
    Snapshot,
)
from halfmoon.blocks import Fingerprint
from halfmoon.types import (
    AttemptId,
    BlockHash,
    Epoch,
    FinishReason,
    NodeId,
    RequestId,
    Role,
    SamplingParams,
    Tier,
)

BLOCK_SIZE = 64
FINGERPRINT = Fingerprint(
    weights="bench", num_layers=80, num_kv_heads=8, head_dim=128, rope="rope", block_size=BLOCK_SIZE
)
STATS = AttemptStats(node_id=NodeId("bench"))
LONG_BLOCKS = 2000
MESSAGES = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--placements", type=int, default=5000)
    parser.add_argument("--open", type=int, default=400)
    parser.add_argument("--peer", action="store_true", help="ai-dynamo-runtime too, installed in .venv-bench")
    result = run(parser.parse_args())
    print(json.dumps(result, indent=2))
    print(save("conductor", result))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(1)
    peer = run_peer(arguments.blocks, arguments.workers, arguments.placements) if arguments.peer else None
    people = population(arguments.blocks, arguments.workers)
    infos = [_info(i) for i in range(arguments.workers)]
    machine = _machine()
    seconds = _timed(lambda: _join(machine, infos, people))
    copies = sum(len(numbers) for numbers in people.held) * PROMPT_BLOCKS
    gc.collect()
    gc.freeze()
    walks, walks_cpu = _walks(machine, people, arguments.placements)
    lives = _lives(machine, people, infos, arguments.placements, arguments.open)
    machine._desk.admission = admission_of(AdmissionConfig(predictive=Mode.SHADOW))
    lives_judged = _lives(machine, people, infos, arguments.placements, arguments.open, life=1)
    return {
        "additions_ms": round(1e3 * _timed(_a_million_additions), 1),
        "workers": len(infos),
        "blocks": len(machine._desk.index),
        "copies": copies,
        "prompt_blocks": PROMPT_BLOCKS,
        "open_requests": arguments.open,
        "snapshot_blocks_per_s": round(copies / seconds),
        "request_whole_life": lives,
        "request_whole_life_all_judging": lives_judged,
        "prefix_walk": walks,
        "prefix_walk_cpu": walks_cpu,
        "prefix_walk_naive": _naive_walks(people),
        "prefix_walk_peer": peer,
        "peer_p50_over_ours": round(peer["p50_us"] / walks["p50_us"], 2) if peer else None,
        "index_dump": _dumped(machine),
        "ingest_events_per_s": _ingest(machine, infos, rng),
        "prefix_walk_2000_blocks": _long_walks(machine, infos, rng),
        "node_removal_ms": round(1e3 * _timed(lambda: machine.on_node_lost(*_who(infos[0]), "bench", 1e4)), 2),
    }


def _lives(
    machine: ConductorMachine, people: Population, infos: list[NodeInfo], count: int, num_open: int, *, life: int = 0
) -> dict[str, float]:
    """on_request alone is timed as the placement; the events of its whole life go into requests_per_s.

    The first `num_open` only fill the cluster. Each life goes on one step a placement: prefilled after half of the
    time that it is open, gone at its end. `life`: counts the calls for one machine, 0 first; all end at once at last.
    """
    epochs = {info.node_id: info.epoch for info in infos}
    lives: deque[tuple[RequestSpec, int]] = deque()
    placing: list[float] = []
    began_s = 0.0
    for number, chain in enumerate(prompts(people, num_open + count)):
        if number == num_open:
            began_s = time.thread_time()
        spec = _spec(f"r{life}-{number}", people.chains[chain])
        now_s = 100.0 * (1 + life) + number * 1e-3
        took_s = _timed(lambda spec=spec, now_s=now_s: machine.on_request(spec, now_s))  # type: ignore[misc]
        lives.append((spec, number))
        if number >= num_open:
            placing.append(took_s)
        if len(lives) > num_open // 2:
            _prefilled(machine, lives[-num_open // 2 - 1][0], epochs, now_s)
        if len(lives) > num_open:
            _ended(machine, lives.popleft()[0], epochs, now_s)
    total_s = time.thread_time() - began_s
    for spec, _ in lives:
        machine.on_cancel(spec.request_id, "the bench is over", now_s)
    return {
        **percentiles(placing),
        "placements_per_s": round(count / sum(placing)),
        "requests_per_s": round(count / total_s),
    }


def _prefilled(machine: ConductorMachine, spec: RequestSpec, epochs: dict[NodeId, Epoch], now_s: float) -> None:
    attempt_id = AttemptId(spec.request_id, 1)
    summary = machine.summary(spec.request_id)
    prefill, decode = NodeId(summary.prefill_node), NodeId(summary.decode_node)
    done = PrefillDone(attempt_id=attempt_id, first_token_id=1, stats=STATS)
    machine.on_worker_event(decode, epochs[decode], Reserved(attempt_id=attempt_id), now_s)
    machine.on_worker_event(prefill, epochs[prefill], done, now_s)
    machine.on_worker_event(decode, epochs[decode], DecodeJoined(attempt_id=attempt_id, stats=STATS), now_s)


def _ended(machine: ConductorMachine, spec: RequestSpec, epochs: dict[NodeId, Epoch], now_s: float) -> None:
    attempt_id = AttemptId(spec.request_id, 1)
    decode = NodeId(machine.summary(spec.request_id).decode_node)
    finished = AttemptFinished(
        attempt_id=attempt_id, finish_reason=FinishReason.LENGTH, num_output_tokens=64, stats=STATS
    )
    machine.on_worker_event(decode, epochs[decode], finished, now_s)
    machine.on_stream_finished(spec.request_id, now_s)


def _walks(machine: ConductorMachine, people: Population, count: int) -> tuple[dict[str, float], dict[str, float]]:
    """By the clock, as the peer is measured, and in CPU time."""
    index, seconds, cpu = machine._desk.index, [], []
    for number in prompts(people, count):
        chain = [BlockHash(block) for block in people.chains[number]]
        began_s, began_cpu_s = time.perf_counter(), time.thread_time()
        found = index.match(chain)
        cpu.append(time.thread_time() - began_cpu_s)
        seconds.append(time.perf_counter() - began_s)
        assert max(found.values()) == PROMPT_BLOCKS, "the prompt is held by somebody"
        assert len(found) == len(people.held), "and the system prompt by everybody"
    return percentiles(seconds), percentiles(cpu)


def _dumped(machine: ConductorMachine) -> dict[str, float]:
    kept: list[bytes] = []
    dump_s = _timed(lambda: kept.append(index_dump.dump(machine._desk.index)))
    load_s = _timed(lambda: index_dump.load(kept[0]))
    return {"mib": round(len(kept[0]) / 2**20, 1), "dump_s": round(dump_s, 2), "load_s": round(load_s, 2)}


def _naive_walks(people: Population, count: int = 200) -> dict[str, float]:
    sets = [{block for number in numbers for block in people.chains[number]} for numbers in people.held]

    def walk(chain: list[bytes]) -> dict[int, int]:
        matched = {}
        for node, blocks in enumerate(sets):
            length = next((i for i, block in enumerate(chain) if block not in blocks), len(chain))
            if length:
                matched[node] = length
        return matched

    picks = [people.chains[number] for number in prompts(people, count)]
    return percentiles([_timed(lambda chain=chain: walk(chain)) for chain in picks])  # type: ignore[misc]


def _long_walks(machine: ConductorMachine, infos: list[NodeInfo], rng: random.Random) -> dict[str, float]:
    """One prompt of 2,000 blocks, of which the first worker holds all, the next one 20 fewer, and so on."""
    chain = [BlockHash(rng.randbytes(16)) for _ in range(LONG_BLOCKS)]
    step = LONG_BLOCKS // len(infos)
    for number, info in enumerate(infos):
        blocks = chain[: LONG_BLOCKS - step * number]
        stored = tuple(BlockCopy(block_hash=block, tier=Tier(1 + i % 3)) for i, block in enumerate(blocks))
        machine.on_worker_event(*_who(info), KvEvents(event_id=1 + MESSAGES // len(infos), stored=stored), 6e3)
    seconds, found = [], {}
    for _ in range(500):
        began_s = time.thread_time()
        found = machine._desk.index.match(chain)
        seconds.append(time.thread_time() - began_s)
    assert list(found.values()).count(LONG_BLOCKS) == 1, "one worker holds it all"
    assert len(found) == len(infos), "and everybody a part"
    return percentiles(seconds)


def _ingest(machine: ConductorMachine, infos: list[NodeInfo], rng: random.Random) -> int:
    """Messages of 32 stored and 32 removed blocks; the figure counts blocks."""
    copies = [BlockCopy(block_hash=BlockHash(rng.randbytes(16)), tier=Tier.DEVICE) for _ in range(32 * MESSAGES)]
    steps = []
    for number in range(MESSAGES):
        stored = tuple(copies[32 * number : 32 * number + 32])
        removed = tuple(copies[32 * number - 320 : 32 * number - 288]) if number >= 10 else ()
        info = infos[number % len(infos)]
        steps.append((info, KvEvents(event_id=1 + number // len(infos), stored=stored, removed=removed)))
    seconds = _timed(lambda: [machine.on_worker_event(*_who(info), events, 5e3) for info, events in steps])
    return round(sum(len(e.stored) + len(e.removed) for _, e in steps) / seconds)


def _join(machine: ConductorMachine, infos: list[NodeInfo], people: Population) -> None:
    """Four prompts in five lie in DEVICE, the others in DRAM and on SSD; the system prompt is in DEVICE everywhere."""
    tiers = (Tier.DEVICE,) * 16 + (Tier.DRAM,) * 3 + (Tier.SSD,)
    for info, held in zip(infos, people.held, strict=True):
        blocks = tuple(
            BlockCopy(block_hash=BlockHash(block), tier=tiers[number % 20] if i >= SHARED_BLOCKS else Tier.DEVICE)
            for number in held
            for i, block in enumerate(people.chains[number])
        )
        snapshot = Snapshot(info=info, last_event_id=0, blocks=blocks, attempts=())
        machine.on_worker_event(*_who(info), snapshot, 0.0)
        machine.on_worker_event(*_who(info), _load(), 100.0)


def _load() -> LoadReport:
    prefills = [
        PassSample(new_tokens=n, context_tokens=c, batch=0, kv_tokens=0, seconds=0.01 + 2e-5 * n + 1e-9 * n * c)
        for n, c in ((64, 0), (512, 0), (2048, 0), (2048, 4096), (1024, 8192), (256, 256), (2048, 9984), (8, 8))
    ]
    decodes = [
        PassSample(new_tokens=0, context_tokens=0, batch=b, kv_tokens=k, seconds=0.02 + 1e-4 * b + 1e-8 * k)
        for b, k in ((1, 100), (4, 10_000), (16, 200_000), (64, 800_000), (2, 2000), (8, 9000), (32, 64), (3, 5))
    ]
    return LoadReport(passes=tuple(prefills + decodes))


def _machine() -> ConductorMachine:
    config = ConductorConfig(suspect_s=1e8, silent_s=1e9, slow_start_s=1.0)
    layout = Layout(block_size=BLOCK_SIZE, block_bytes=20_971_520)
    return ConductorMachine(config=config, layout=layout, conductor_id="bench", fingerprint=FINGERPRINT)


def _info(number: int) -> NodeInfo:
    role = Role.PREFILL if number % 2 == 0 else Role.DECODE
    return NodeInfo(
        node_id=NodeId(f"{role}{number}"),
        epoch=Epoch(f"e{number}"),
        role=role,
        address=f"10.0.0.{number}:7000",
        fingerprint=FINGERPRINT,
        num_device_blocks=50_000,
        num_dram_blocks=0,
        block_bytes=20_971_520,
        tokens_per_pass_max=2048,
        sequences_max=256,
    )


def _spec(name: str, chain: list[bytes]) -> RequestSpec:
    return RequestSpec(
        request_id=RequestId(name),
        token_ids=(1,) * (PROMPT_BLOCKS * BLOCK_SIZE + 7),
        block_hashes=tuple(BlockHash(block) for block in chain),
        sampling=SamplingParams(max_tokens=64),
        front_end="bench",
        deadline_s=600.0,
    )


def _who(info: NodeInfo) -> tuple[NodeId, Epoch]:
    return info.node_id, info.epoch


def _timed(work: Callable[[], object]) -> float:
    began_s = time.thread_time()
    work()
    return time.thread_time() - began_s


def _a_million_additions() -> int:
    total = 0
    for number in range(1_000_000):
        total += number
    return total


if __name__ == "__main__":
    main()
