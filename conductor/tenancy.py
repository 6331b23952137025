"""Pure: who held decode room in a recorded run, and from when on one request more would have found some."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from halfmoon.types import BlockHash


class Room(NamedTuple):
    """A decode worker's: blocks of its pool, sequences of its batch."""

    blocks: int
    sequences: int


class Tenancy(NamedTuple):
    """One attempt's decode room: when its worker said that it has it, joined its batch, let go of it. Seconds.

    `joined_s`: None: it never did. Its KV is taken to grow evenly, from `tokens` by `output_tokens`. `names`: of its
    prompt's full blocks, which those who have the same ones share.
    """

    request_id: str
    begun_s: float
    joined_s: float | None
    ended_s: float
    tokens: int
    output_tokens: int
    names: Sequence[BlockHash] = ()

    def tokens_at(self, at_s: float) -> float:
        if self.joined_s is None or at_s <= self.joined_s:
            return self.tokens
        done = min(1.0, (at_s - self.joined_s) / max(1e-9, self.ended_s - self.joined_s))
        return self.tokens + self.output_tokens * done


class Found(NamedTuple):
    """`wait_s`: until there was room. `lasting`: and for as long as it would have stayed, with everybody's growth."""

    wait_s: float
    lasting: bool


def tenancies_of(record: Mapping[str, Any], arrived_s: float, names: Sequence[BlockHash]) -> list[tuple[str, Tenancy]]:
    """(node, tenancy) of every attempt of a completed decision record that a decode worker had room for."""
    found, steps, ended_s = [], record["steps"], record["ended_s"]
    for index, step in enumerate(steps):
        if step["what"] != "Reserved":
            continue
        later = steps[index + 1 :]
        joined = [s["at_s"] for s in later if s["what"] == "DecodeJoined" and s["number"] == step["number"]]
        lost = [s["at_s"] for s in later if s["number"] == step["number"] and s["what"].startswith("lost")]
        found.append(
            (
                step["node"],
                Tenancy(
                    record["request_id"],
                    arrived_s + step["at_s"],
                    arrived_s + joined[0] if joined else None,
                    arrived_s + min([*lost, ended_s]),
                    record["num_prompt_tokens"],
                    record["output_tokens"] or 0,
                    names,
                ),
            )
        )
    return found


class Tenants:
    """Of one decode worker, over a whole run."""

    def __init__(self, tenancies: Sequence[Tenancy], room: Room, block_size: int) -> None:
        self._all = sorted(tenancies, key=_begun_s)
        self._room = room
        self._size = block_size
        self._longest_s = max((t.ended_s - t.begun_s for t in tenancies), default=0.0)

    def find(self, one: Tenancy) -> Found:
        """For one more, that asks when it begins. Those that had room before it keep theirs; those that came later
        are taken to give way to it."""
        at_s, life_s = one.begun_s, one.ended_s - one.begun_s
        first = bisect_left(self._all, at_s - self._longest_s, key=_begun_s)
        last = bisect_right(self._all, at_s, key=_begun_s)
        there = [t for t in self._all[first:last] if t.ended_s > at_s and t.request_id != one.request_id]
        if self._most(there, one) <= self._room.blocks and len(there) < self._room.sequences:
            return Found(0.0, True)  # the usual case, told quickly
        begin_s = next(s for s in sorted({at_s, *(t.ended_s for t in there)}) if self._fits(there, one, s, spare=1))
        ends = [t.ended_s for t in there if begin_s < t.ended_s < begin_s + life_s]
        ages = [life_s, *(end_s - begin_s - 1e-9 for end_s in ends)]
        return Found(begin_s - at_s, all(self._fits(there, one, begin_s, spare=0, age_s=age_s) for age_s in ages))

    def _most(self, there: Sequence[Tenancy], one: Tenancy) -> int:
        """Blocks, if everybody came to full length at once and shared nothing, and each had its spare one."""
        return sum((t.tokens + t.output_tokens) // self._size + 2 for t in (*there, one))

    def _fits(self, there: Sequence[Tenancy], one: Tenancy, begin_s: float, *, spare: int, age_s: float = 0.0) -> bool:
        """Whether all fit, the one having begun then and being `age_s` old: with `spare` blocks left for each of the
        others, which is asked when somebody joins (decode_worker.room). An empty worker has room: one too small for it
        was no candidate."""
        at_s = begin_s + age_s
        here = [t for t in there if t.ended_s > at_s]
        if not here:
            return True
        full = len({name for t in (*here, one) for name in t.names})
        held = [(t, t.tokens_at(at_s)) for t in here] + [(one, one.tokens_at(one.begun_s + age_s))]
        own = sum(int(tokens) // self._size + 1 - len(t.names) for t, tokens in held)
        return full + own + spare * len(here) <= self._room.blocks and len(here) < self._room.sequences


def _begun_s(tenancy: Tenancy) -> float:
    return tenancy.begun_s
