"""Pure: streams of messages: in order, each after a delay, as long as nothing is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from halfmoon.types import NodeId
from simulator.world import Action, World

CONDUCTOR = NodeId("conductor")
"""Its end of streams."""


class Weather(Protocol):
    """What is wrong with the network now."""

    def fates(self, ends: tuple[NodeId, NodeId]) -> Sequence[float] | None:
        """Of a message that is sent now: the extra delay of each of its copies; none: it is lost. None: all is well."""
        ...

    def parted(self, one: NodeId, other: NodeId) -> bool:
        """No byte passes between the two now."""
        ...


class Stream:
    """One direction of one stream. A message that is late holds up those behind it, as in any stream.

    Args:
        ends: who sends, who receives: for faults.
        delay_s: of the next message.
    """

    def __init__(
        self, world: World, ends: tuple[NodeId, NodeId], delay_s: Callable[[], float], weather: Weather | None = None
    ) -> None:
        self._ends = ends
        self._world = world
        self._delay_s = delay_s
        self._weather = weather
        self._due_s = 0.0
        self._late_until_s = 0.0

    def send(self, action: Action) -> bool:
        """Whether it comes once, and at its usual time."""
        fates = None if self._weather is None else self._weather.fates(self._ends)
        if fates is None:
            self._world.at(self.due_s(self._world.now_s), action)
            return self._world.now_s >= self._late_until_s
        for extra_s in fates:
            self._due_s = self._late_until_s = self.due_s(self._world.now_s) + extra_s
            self._world.at(self._due_s, action)
        return False

    def due_s(self, sent_s: float) -> float:
        """When a message arrives that is sent at `sent_s`, which is not earlier than those before it. Books it."""
        self._due_s = max(sent_s + self._delay_s(), self._due_s)
        return self._due_s
