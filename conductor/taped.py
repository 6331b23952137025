"""Pure: a conductor's machine that writes down every call, with what it led to, before anybody acts on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from conductor.actuals import Seen
from conductor.config import ConductorConfig
from conductor.decisions import DecisionRecord
from conductor.desk import Layout
from conductor.effects import Effect, RequestSpec
from conductor.machine import ConductorMachine
from conductor.recording import Digest, Header, call_line, ending_line, header_line
from core.messages import NodeInfo, WorkerEvent
from core.plain import plain
from halfmoon.blocks import Fingerprint
from halfmoon.types import Epoch, NodeId, RequestId

Write = Callable[[str], bool]
"""Takes one line without its end; False: it cannot, and the recording ends there."""


class TapedMachine(ConductorMachine):
    """Its caller sees no difference. Where the recording cannot go on it ends (counted: recording_ended), and it alone.

    Args:
        write: where the lines go.
        version: of the program, for the header.
        others: as ConductorMachine's.
    """

    def __init__(
        self,
        *,
        write: Write,
        version: str,
        config: ConductorConfig,
        layout: Layout,
        conductor_id: str,
        fingerprint: Fingerprint | None = None,
        **others: Any,
    ) -> None:
        super().__init__(config=config, layout=layout, conductor_id=conductor_id, fingerprint=fingerprint, **others)
        self._write = write
        self._taping = True
        self._calls = 0
        self._digest = Digest()
        self._completed: list[DecisionRecord] = []
        self._told: Callable[[DecisionRecord], None] = lambda record: None
        super().tell_records(self._on_record)
        header = Header(
            halfmoon=version,
            conductor_id=conductor_id,
            policy=self._desk.policy.name,
            block_size=layout.block_size,
            block_bytes=layout.block_bytes,
            fingerprint=fingerprint,
            config=plain(config),
        )
        self._put(header_line(header))

    def end_recording(self, why: str) -> None:
        """Say why it ends here. Idempotent; nothing is written afterwards."""
        if self._taping:
            self._put(ending_line(why, self._calls))
            self._taping = False

    def tell_records(self, on_end: Callable[[DecisionRecord], None]) -> None:
        self._told = on_end

    # ---- the calls ----

    def on_request(self, spec: RequestSpec, now_s: float) -> list[Effect]:
        with self._call("on_request", now_s, spec=spec) as effects:
            effects += super().on_request(spec, now_s)
        return effects

    def on_resume(self, request_id: RequestId, emitted_token_ids: Sequence[int], now_s: float) -> list[Effect]:
        arguments = {"request_id": request_id, "emitted_token_ids": emitted_token_ids}
        with self._call("on_resume", now_s, **arguments) as effects:
            effects += super().on_resume(request_id, emitted_token_ids, now_s)
        return effects

    def on_cancel(self, request_id: RequestId, reason: str, now_s: float, *, seen: Seen | None = None) -> list[Effect]:
        with self._call("on_cancel", now_s, request_id=request_id, reason=reason, seen=seen) as effects:
            effects += super().on_cancel(request_id, reason, now_s, seen=seen)
        return effects

    def on_stream_finished(
        self, request_id: RequestId, now_s: float, *, stopped: bool = False, seen: Seen | None = None
    ) -> list[Effect]:
        arguments = {"request_id": request_id, "stopped": stopped, "seen": seen}
        with self._call("on_stream_finished", now_s, **arguments) as effects:
            effects += super().on_stream_finished(request_id, now_s, stopped=stopped, seen=seen)
        return effects

    def on_tokens_lost(self, node_id: NodeId, epoch: Epoch, now_s: float) -> list[Effect]:
        with self._call("on_tokens_lost", now_s, node_id=node_id, epoch=epoch) as effects:
            effects += super().on_tokens_lost(node_id, epoch, now_s)
        return effects

    def on_gap(self, request_id: RequestId, reason: str, now_s: float) -> list[Effect]:
        with self._call("on_gap", now_s, request_id=request_id, reason=reason) as effects:
            effects += super().on_gap(request_id, reason, now_s)
        return effects

    def on_node_joined(self, info: NodeInfo, now_s: float) -> list[Effect]:
        with self._call("on_node_joined", now_s, info=info) as effects:
            effects += super().on_node_joined(info, now_s)
        return effects

    def on_node_lost(self, node_id: NodeId, epoch: Epoch, reason: str, now_s: float) -> list[Effect]:
        with self._call("on_node_lost", now_s, node_id=node_id, epoch=epoch, reason=reason) as effects:
            effects += super().on_node_lost(node_id, epoch, reason, now_s)
        return effects

    def on_drain(self, node_id: NodeId | None, now_s: float, *, undo: bool = False) -> list[Effect]:
        with self._call("on_drain", now_s, node_id=node_id, undo=undo) as effects:
            effects += super().on_drain(node_id, now_s, undo=undo)
        return effects

    def on_worker_event(self, node_id: NodeId, epoch: Epoch, event: WorkerEvent, now_s: float) -> list[Effect]:
        with self._call("on_worker_event", now_s, node_id=node_id, epoch=epoch, event=event) as effects:
            effects += super().on_worker_event(node_id, epoch, event, now_s)
        return effects

    def on_tick(self, now_s: float) -> list[Effect]:
        with self._call("on_tick", now_s) as effects:
            effects += super().on_tick(now_s)
        return effects

    # ---- inside ----

    @contextmanager
    def _call(self, name: str, now_s: float, **arguments: Any) -> Iterator[list[Effect]]:
        """Writes the line when the call is over; one that raises is written too: a replay then shows it again."""
        effects: list[Effect] = []
        returned = False
        try:
            yield effects
            returned = True
        finally:
            self._tape(name, now_s, arguments, effects, raised=not returned)

    def _tape(
        self, name: str, now_s: float, arguments: dict[str, Any], effects: Sequence[Effect], *, raised: bool
    ) -> None:
        completed, self._completed = self._completed, []
        if not self._taping:
            return
        self._calls += 1
        digest = self._digest.update(self._calls, effects)
        records = [record.as_json() for record in completed]
        line = call_line(
            self._calls, now_s, name, arguments, effects=effects, digest=digest, records=records, raised=raised
        )
        self._put(line)

    def _on_record(self, record: DecisionRecord) -> None:
        self._completed.append(record)
        self._told(record)

    def _put(self, line: str) -> None:
        if not self._write(line):
            self._taping = False
            self._desk.counters["recording_ended"] += 1
