"""Pure: the answers of the smaller calls, as values of our own instead of wire messages."""

from __future__ import annotations

from dataclasses import dataclass

from halfmoon.v1 import admin_pb2, inference_pb2


@dataclass(frozen=True, kw_only=True)
class Model:
    """`admin_address`: of the operator's API, where the cluster tells it: only to its own host."""

    name: str
    context_tokens_max: int
    vocab_size: int
    block_size: int
    eos_token_ids: tuple[int, ...]
    weights: str
    admin_address: str = ""


@dataclass(frozen=True, kw_only=True)
class ClusterNode:
    """One node as the conductor sees it. `last_heard_s`: seconds since its last sign of life."""

    node_id: str
    epoch: str
    role: str
    address: str
    pid: int
    ready: bool
    draining: bool
    outstanding_attempts: int
    queued_attempts: int
    running_sequences: int
    num_device_blocks: int
    free_device_blocks: int
    evictable_device_blocks: int
    indexed_blocks: int
    index_mode: str
    last_heard_s: float
    held_blocks: int
    quarantined_blocks: int
    invariant_checks: int


@dataclass(frozen=True, kw_only=True)
class Cluster:
    conductor_id: str
    term: int
    model: str
    ready: bool
    nodes: tuple[ClusterNode, ...]
    requests_open: int
    counters: dict[str, int]
    registry_reachable: bool


def model_of(reply: inference_pb2.GetModelResponse) -> Model:
    return Model(
        name=reply.name,
        context_tokens_max=reply.context_tokens_max,
        vocab_size=reply.vocab_size,
        block_size=reply.block_size,
        eos_token_ids=tuple(reply.eos_token_ids),
        weights=reply.weights,
        admin_address=reply.admin_address,
    )


def cluster_of(reply: admin_pb2.GetClusterResponse) -> Cluster:
    return Cluster(
        conductor_id=reply.conductor_id,
        term=reply.term,
        model=reply.model,
        ready=reply.ready,
        nodes=tuple(_node_of(n) for n in reply.nodes),
        requests_open=reply.requests_open,
        counters=dict(reply.counters),
        registry_reachable=reply.registry_reachable,
    )


def _node_of(status: admin_pb2.NodeStatus) -> ClusterNode:
    info, load = status.info, status.load
    return ClusterNode(
        node_id=info.node_id,
        epoch=info.epoch,
        role=info.role,
        address=info.address,
        pid=info.pid,
        ready=status.ready,
        draining=load.draining,
        outstanding_attempts=status.outstanding_attempts,
        queued_attempts=load.queued_attempts,
        running_sequences=load.running_sequences,
        num_device_blocks=info.num_device_blocks,
        free_device_blocks=load.free_device_blocks,
        evictable_device_blocks=load.evictable_device_blocks,
        indexed_blocks=status.indexed_blocks,
        index_mode=status.index_mode,
        last_heard_s=status.last_heard_s,
        held_blocks=load.held_blocks,
        quarantined_blocks=load.quarantined_blocks,
        invariant_checks=load.invariant_checks,
    )
