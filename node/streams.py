"""Shell: what leaves a worker: one bounded outbox for the conductor, one for each front end.

A stream that does not keep up is closed and its content dropped: the conductor reconnects and gets a snapshot, a front
end sees a gap in the token indices and resumes. So a slow reader costs memory up to a limit, and nobody else anything.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from typing import Generic, TypeVar

from core.messages import Attach, Snapshot, StepTokens, Token, WorkerEvent
from halfmoon.errors import HalfmoonError, StaleTerm, Unavailable

log = logging.getLogger("node.streams")

EVENTS_MAX = 16_384  # a conductor that is a minute behind has lost the thread; the snapshot is shorter
STEPS_MAX = 4_096  # a minute and more of decode steps
FRONT_ENDS_MAX = 64  # conductor processes in a cluster, dead ones that nobody has taken back included

Item = TypeVar("Item")


class Outbox(Generic[Item]):
    """A bounded queue with one writer (the loop) and one reader (a stream's coroutine)."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: deque[Item] = deque()
        self._readable = asyncio.Event()
        self._closed_by: HalfmoonError | None = None

    def __len__(self) -> int:
        return len(self._items)

    @property
    def closed(self) -> bool:
        return self._closed_by is not None

    def put(self, item: Item) -> bool:
        """Append; False, and the outbox is closed, when it is full or was closed before."""
        if self.closed:
            return False
        if len(self._items) >= self._limit:
            self.close(Unavailable(f"the reader fell {self._limit} messages behind; connect again"))
            return False
        self._items.append(item)
        self._readable.set()
        return True

    def close(self, why: HalfmoonError) -> None:
        """Drop the content; the reader gets `why`. The first reason counts."""
        if self._closed_by is None:
            self._closed_by = why
            self._items.clear()
            self._readable.set()

    def pour_into(self, other: Outbox[Item]) -> None:
        """Move what is waiting here, if this outbox is open, to the end of `other`."""
        while self._items:
            other.put(self._items.popleft())

    async def take(self) -> list[Item]:
        """Wait for items and take them all.

        Raises:
            HalfmoonError: why the outbox was closed.
        """
        await self._readable.wait()
        if self._closed_by is not None:
            raise self._closed_by
        items = list(self._items)
        self._items.clear()
        self._readable.clear()
        return items


class Streams:
    """All outboxes of one worker, and the highest conductor's term seen. Owned by the loop."""

    def __init__(self) -> None:
        self.term = 0
        self.dropped_steps = 0
        self._control: Outbox[WorkerEvent] | None = None
        self._tokens: OrderedDict[str, Outbox[StepTokens]] = OrderedDict()
        self._readers: dict[str, object] = {}

    @property
    def attached(self) -> bool:
        return self._control is not None and not self._control.closed

    def check_term(self, term: int, who: str) -> None:
        """Refuse the superseded.

        Raises:
            StaleTerm
        """
        if term < self.term:
            raise StaleTerm(f"{who} has term {term}; this worker has seen term {self.term}")

    # ---- to the conductor ----

    def attach(self, attach: Attach, snapshot: Snapshot) -> Outbox[WorkerEvent]:
        """Replace the control stream by a new one that begins with `snapshot`.

        Raises:
            StaleTerm: nothing has changed.
        """
        self.check_term(attach.term, f"conductor {attach.conductor_id}")
        if self._control is not None:
            self._control.close(StaleTerm(f"conductor {attach.conductor_id} has attached with term {attach.term}"))
        self.term = attach.term
        self._control = Outbox(EVENTS_MAX)
        self._control.put(snapshot)
        return self._control

    def detach(self, outbox: Outbox[WorkerEvent]) -> None:
        """The stream that read `outbox` has ended. Attempts go on; their events wait for the next snapshot."""
        outbox.close(Unavailable("the control stream has ended"))
        if self._control is outbox:
            self._control = None

    def report(self, event: WorkerEvent) -> bool:
        """Send to the conductor; False when nobody listens."""
        return self._control is not None and self._control.put(event)

    # ---- to front ends ----

    def connect(self, front_end: str, reader: object) -> Outbox[StepTokens]:
        """The outbox of `front_end`, now read by `reader`; an earlier reader's stream ends."""
        old = self._tokens.get(front_end)
        outbox: Outbox[StepTokens] = Outbox(STEPS_MAX)
        if old is not None:
            old.pour_into(outbox)
            old.close(Unavailable(f"front end {front_end} has connected again"))
        self._tokens[front_end] = outbox
        self._tokens.move_to_end(front_end)
        self._readers[front_end] = reader
        self._bound()
        return outbox

    def disconnect(self, front_end: str, reader: object) -> None:
        """Its stream has ended; what is emitted now waits for the next one, within the limit."""
        if self._readers.get(front_end) is reader:
            del self._readers[front_end]

    def emit(self, front_end: str, tokens: list[Token]) -> None:
        """Send one step's tokens; counted in `dropped_steps` when they cannot be kept."""
        outbox = self._tokens.get(front_end)
        if outbox is None or outbox.closed:
            outbox = self._tokens[front_end] = Outbox(STEPS_MAX)
            self._bound()
        if not outbox.put(StepTokens(tokens=tuple(tokens))):
            self.dropped_steps += 1
            log.warning("front end %s does not keep up: its tokens are dropped", front_end)

    async def flush(self, timeout_s: float) -> None:
        """Wait until the streams that are open have taken everything, but at most `timeout_s`."""
        until_s = asyncio.get_running_loop().time() + timeout_s
        while self._pending():
            if asyncio.get_running_loop().time() >= until_s:
                return
            await asyncio.sleep(0.01)

    def _pending(self) -> int:
        read = [self._tokens[name] for name in self._readers if name in self._tokens]
        return sum(map(len, read)) + (0 if self._control is None else len(self._control))

    def close(self, why: HalfmoonError) -> None:
        """End every stream."""
        for outbox in self._tokens.values():
            outbox.close(why)
        if self._control is not None:
            self._control.close(why)

    def describe(self) -> str:
        sizes = ", ".join(f"{name}: {len(outbox)} steps" for name, outbox in self._tokens.items())
        control = "no conductor" if self._control is None else f"{len(self._control)} events for the conductor"
        return f"term {self.term}; {control}; {sizes or 'no front ends'}; {self.dropped_steps} steps dropped"

    def _bound(self) -> None:
        """Forget the front ends that have been without a stream for longest."""
        idle = [name for name in self._tokens if name not in self._readers]
        for name in idle[: max(0, len(self._tokens) - FRONT_ENDS_MAX)]:
            del self._tokens[name]
