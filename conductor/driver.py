"""Shell: drives the conductor's machine: events go in one at a time, effects are carried out in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from conductor.actuals import Seen
from conductor.effects import Begin, Effect, End, HoldFirst, RequestSpec, Resume, Send
from conductor.machine import ConductorMachine
from core.messages import Command, NodeInfo, WorkerEvent
from halfmoon.errors import HalfmoonError
from halfmoon.types import AttemptId, Epoch, NodeId, Outcome, RequestId


class Streams(Protocol):
    """The front end, as the machine's effects need it. Unknown requests have ended: they are ignored."""

    def begin(self, attempt_id: AttemptId) -> None: ...

    def hold_first(self, request_id: RequestId, hold_s: float) -> None: ...

    def suspend(self, request_id: RequestId) -> tuple[int, ...] | None: ...

    def end(self, request_id: RequestId, error: HalfmoonError, outcome: Outcome) -> None: ...


class Commands(Protocol):
    """The nodes, as the machine's effects need them."""

    def send(self, node_id: NodeId, epoch: Epoch, command: Command) -> None: ...


Step = Callable[[float], list[Effect]]


class Driver:
    """The one caller of the machine, on the one loop of the process.

    An effect may cause the next event (a full command buffer loses its node): such events wait until the effects of
    the present one are done, so the machine is never entered twice. Call `connect` before anything else.
    """

    def __init__(self, machine: ConductorMachine, clock: Callable[[], float]) -> None:
        self.machine = machine
        self.clock = clock
        self._streams: Streams | None = None
        self._commands: Commands | None = None
        self._inbox: deque[Step] = deque()
        self._busy = False

    def connect(self, streams: Streams, commands: Commands) -> None:
        self._streams, self._commands = streams, commands

    # ---- from the front end ----

    def request(self, spec: RequestSpec) -> None:
        self._run(lambda now_s: self.machine.on_request(spec, now_s))

    def cancel(self, request_id: RequestId, reason: str, *, seen: Seen | None = None) -> None:
        self._run(lambda now_s: self.machine.on_cancel(request_id, reason, now_s, seen=seen))

    def stream_finished(self, request_id: RequestId, *, stopped: bool, seen: Seen | None = None) -> None:
        self._run(lambda now_s: self.machine.on_stream_finished(request_id, now_s, stopped=stopped, seen=seen))

    def gap(self, request_id: RequestId, reason: str) -> None:
        self._run(lambda now_s: self.machine.on_gap(request_id, reason, now_s))

    # ---- from the nodes ----

    def tokens_lost(self, node_id: NodeId, epoch: Epoch) -> None:
        self._run(lambda now_s: self.machine.on_tokens_lost(node_id, epoch, now_s))

    def node_joined(self, info: NodeInfo) -> None:
        self._run(lambda now_s: self.machine.on_node_joined(info, now_s))

    def node_lost(self, node_id: NodeId, epoch: Epoch, reason: str) -> None:
        self._run(lambda now_s: self.machine.on_node_lost(node_id, epoch, reason, now_s))

    def worker_event(self, node_id: NodeId, epoch: Epoch, event: WorkerEvent) -> None:
        self._run(lambda now_s: self.machine.on_worker_event(node_id, epoch, event, now_s))

    # ---- from operators and the clock ----

    def drain(self, node_id: NodeId | None, *, undo: bool = False) -> None:
        self._run(lambda now_s: self.machine.on_drain(node_id, now_s, undo=undo))

    def tick(self) -> None:
        self._run(self.machine.on_tick)

    # ---- inside ----

    def _run(self, step: Step) -> None:
        self._inbox.append(step)
        if self._busy:
            return
        self._busy = True
        try:
            while self._inbox:
                for effect in self._inbox.popleft()(self.clock()):
                    self._perform(effect)
        finally:
            self._busy = False

    def _perform(self, effect: Effect) -> None:
        assert self._streams is not None
        assert self._commands is not None
        match effect:
            case Send():
                self._commands.send(effect.node_id, effect.epoch, effect.command)
            case Begin():
                self._streams.begin(effect.attempt_id)
            case HoldFirst():
                self._streams.hold_first(effect.request_id, effect.hold_s)
            case Resume():
                self._resume(effect.request_id)
            case End():
                self._streams.end(effect.request_id, effect.error, effect.outcome)

    def _resume(self, request_id: RequestId) -> None:
        """Answer Resume with the log, from which nothing more of the lost attempt counts."""
        assert self._streams is not None
        emitted = self._streams.suspend(request_id)
        if emitted is not None:
            self._run(lambda now_s: self.machine.on_resume(request_id, emitted, now_s))
