"""Pure: what goes wrong in a simulated cluster: how often, when by a seed, and what the network does meanwhile."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from halfmoon.errors import ConfigError
from halfmoon.types import NodeId
from simulator.wire import CONDUCTOR
from simulator.world import World

COUNT_MAX = 10_000
LATE_S_MAX = 1.0
"""A late message in bad weather comes up to this much later."""


@dataclass(frozen=True, kw_only=True)
class Faults:
    """How many of each, at random moments between the first and the last arrival.

    Args:
        crash: a process dies at once and starts anew, empty, after `restart_s`.
        hang_up: a control stream breaks, and what was on its way is lost; it is dialled again.
        tokens: a token stream breaks, and is open again a moment later.
        partition: for `partition_s` nothing reaches a node or leaves it.
        storm: for `storm_s` messages to and from the conductor are lost, doubled or late, each with its probability.
        stale: for `stale_s` one node's news of blocks come `stale_delay_s` late.
        slow_tier: for `slow_s` the moves between one node's tiers take `slow_factor` times as long.
        conductor: the conductor dies, and another one begins with nothing.

    There is no SSD tier yet, so the slower tier is DRAM, where the hardware has it (`*_dram_blocks`).

    Raises:
        ConfigError: a value out of range.
    """

    crash: int = 0
    hang_up: int = 0
    tokens: int = 0
    partition: int = 0
    storm: int = 0
    stale: int = 0
    slow_tier: int = 0
    conductor: int = 0
    restart_s: float = 5.0
    partition_s: float = 8.0
    storm_s: float = 5.0
    stale_s: float = 20.0
    stale_delay_s: float = 5.0
    slow_s: float = 10.0
    slow_factor: float = 1000.0
    lost: float = 0.02
    doubled: float = 0.02
    late: float = 0.05

    def __post_init__(self) -> None:
        for spec in fields(self):
            value, key = getattr(self, spec.name), f"faults.{spec.name}"
            if spec.name in KINDS:
                if not 0 <= value <= COUNT_MAX:
                    raise ConfigError(key=key, value=value, expected=f"a number of times, 0 to {COUNT_MAX}")
            elif spec.name in ("lost", "doubled", "late"):
                if not 0.0 <= value <= 0.5:
                    raise ConfigError(key=key, value=value, expected="a probability in [0, 0.5]")
            elif spec.name == "slow_factor":
                if not 1.0 <= value <= 1e6:
                    raise ConfigError(key=key, value=value, expected="a factor in [1, 1e6]")
            elif not 0.0 < value <= 3600.0:
                raise ConfigError(key=key, value=value, expected="seconds in (0, 3600]")

    @property
    def any(self) -> bool:
        return any(getattr(self, kind) for kind in KINDS)

    def __str__(self) -> str:
        """As `parse_faults` reads it."""
        default = Faults()
        changed = [(s.name, getattr(self, s.name)) for s in fields(self)]
        return ",".join(f"{name}={value}" for name, value in changed if value != getattr(default, name))


KINDS = ("crash", "hang_up", "tokens", "partition", "storm", "stale", "slow_tier", "conductor")


def parse_faults(text: str) -> Faults:
    """ "crash=2,partition=1,storm": names of fields, with a value or once each.

    Raises:
        ConfigError: an unknown name, or a value out of range.
    """
    changes: dict[str, Any] = {}
    types = {spec.name: spec.type for spec in fields(Faults)}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        if name not in types:
            raise ConfigError(key="faults", value=part, expected=f"one of {', '.join(types)}")
        try:
            number = (int if types[name] == "int" else float)(value or 1)
        except ValueError:
            raise ConfigError(key=f"faults.{name}", value=value, expected="a number") from None
        changes[name] = number
    return Faults(**changes)


class Fault(NamedTuple):
    """`node`: an index among the nodes; of no meaning for storms and the conductor."""

    at_s: float
    kind: str
    node: int


def schedule(faults: Faults, rng: random.Random, *, begin_s: float, end_s: float, num_nodes: int) -> Sequence[Fault]:
    """When what happens to whom, in order of time."""
    drawn = [
        Fault(rng.uniform(begin_s, end_s), kind, rng.randrange(num_nodes))
        for kind in KINDS
        for _ in range(getattr(faults, kind))
    ]
    return sorted(drawn)


class Sky:
    """The network's state (simulator.wire.Weather)."""

    def __init__(self, world: World, faults: Faults, rng: random.Random) -> None:
        self._world = world
        self._faults = faults
        self._rng = rng
        self._storm_until_s = 0.0
        self._parted_until_s: dict[NodeId, float] = {}

    def storm(self) -> None:
        self._storm_until_s = self._world.now_s + self._faults.storm_s

    def part(self, node_id: NodeId, seconds: float) -> None:
        self._parted_until_s[node_id] = self._world.now_s + seconds

    @property
    def calm(self) -> bool:
        """No message to the conductor is lost, doubled or late now. (Those that wait for the end of a partition are
        not disturbed one by one.)"""
        now_s = self._world.now_s
        return now_s >= self._storm_until_s and all(until_s <= now_s for until_s in self._parted_until_s.values())

    def parted(self, one: NodeId, other: NodeId) -> bool:
        return self._left_s(one) > 0.0 or self._left_s(other) > 0.0

    def fates(self, ends: tuple[NodeId, NodeId]) -> Sequence[float] | None:
        if self._parted_until_s:
            wait_s = max(self._left_s(ends[0]), self._left_s(ends[1]))
            if wait_s > 0.0:
                return (wait_s,)  # as TCP: it is sent again until it gets through, or the stream is given up
        if self._world.now_s < self._storm_until_s and CONDUCTOR in ends:
            return self._in_storm()
        return None

    def _left_s(self, node_id: NodeId) -> float:
        until_s = self._parted_until_s.get(node_id)
        if until_s is None:
            return 0.0
        if until_s <= self._world.now_s:
            del self._parted_until_s[node_id]
            return 0.0
        return until_s - self._world.now_s

    def _in_storm(self) -> Sequence[float] | None:
        faults, draw = self._faults, self._rng.random()
        if draw < faults.lost:
            return ()
        if draw < faults.lost + faults.doubled:
            return (0.0, self._rng.uniform(0.0, LATE_S_MAX))
        if draw < faults.lost + faults.doubled + faults.late:
            return (self._rng.uniform(0.0, LATE_S_MAX),)
        return None
