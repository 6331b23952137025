"""Shell: the operator's gRPC service, on a port of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from conductor.driver import Driver
from conductor.frontend import FrontEnd
from conductor.status import NodeState
from halfmoon.errors import InvalidRequest, NotFound
from halfmoon.types import NodeId, RequestId
from halfmoon.v1 import admin_pb2, admin_pb2_grpc
from service.codec import encode


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the process knows beside its machine, asked for anew each time."""

    term: int
    ready: bool
    registry_reachable: bool
    counters: Mapping[str, int]


class AdminService(admin_pb2_grpc.AdminServicer):
    """GetCluster, Drain, Explain.

    Args:
        facts: of the process, now.
    """

    def __init__(self, *, driver: Driver, front_end: FrontEnd, model: str, facts: Callable[[], Facts]) -> None:
        self._driver = driver
        self._front_end = front_end
        self._model = model
        self._facts = facts

    async def GetCluster(self, request: Any, context: Any) -> admin_pb2.GetClusterResponse:  # noqa: N802
        status, facts = self._driver.machine.status(), self._facts()
        return admin_pb2.GetClusterResponse(
            conductor_id=status.conductor_id,
            term=facts.term,
            model=self._model,
            ready=facts.ready and status.ready,
            nodes=[_node_status(node) for node in status.nodes],
            requests_open=self._front_end.num_open,
            counters={**status.counters, **facts.counters},
            registry_reachable=facts.registry_reachable,
        )

    async def Drain(self, request: admin_pb2.DrainRequest, context: Any) -> admin_pb2.DrainResponse:  # noqa: N802
        """One node, or all of them and new requests; or their return. Raises: NotFound."""
        nodes = {node.info.node_id for node in self._driver.machine.status().nodes}
        if request.node_id and request.node_id not in nodes:
            raise NotFound(f"node {request.node_id!r}; known: {', '.join(sorted(nodes)) or 'none'}")
        if not request.node_id:
            self._front_end.refuse(None if request.undo else "the cluster is draining, by an operator's word")
        self._driver.drain(NodeId(request.node_id) if request.node_id else None, undo=request.undo)
        return admin_pb2.DrainResponse()

    async def Explain(self, request: admin_pb2.ExplainRequest, context: Any) -> admin_pb2.ExplainResponse:  # noqa: N802
        """The decision record. Raises: NotFound: never seen, or dropped for newer ones; InvalidRequest: ambiguous."""
        machine, name = self._driver.machine, request.request_id
        record = machine.explain(RequestId(name))
        if record is None and name and (found := machine.ids_beginning(name)):
            if len(found) > 1:
                raise InvalidRequest(field="request_id", value=name, limit=f"more of it: {len(found)} ids begin so")
            record = machine.explain(found[0])
        if record is None:
            raise NotFound(f"request {request.request_id!r}: unknown, or its record has been dropped for newer ones")
        return admin_pb2.ExplainResponse(record_json=json.dumps(record.as_json()))


def _node_status(node: NodeState) -> admin_pb2.NodeStatus:
    return admin_pb2.NodeStatus(
        info=encode(node.info),
        load=encode(node.load),
        ready=node.ready,
        outstanding_attempts=node.outstanding_attempts,
        indexed_blocks=node.indexed_blocks,
        index_mode=node.index_mode.value,
        last_heard_s=node.last_heard_s,
    )
