"""Pure: workloads made up from published statistics, so that nothing needs a download.

An arrival process says when somebody arrives; sessions say who. Whoever's think time has passed comes back with its
next turn; if nobody's has, a new session begins: a shared system prompt, drawn by Zipf's law, then a first question of
its own. A next turn's prompt is the last prompt, the answer, and a new question, so a session's full blocks are reused
while its last, partial one is not. Lengths and think times are lognormal, numbers of turns geometric.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from itertools import accumulate, count, islice
from random import Random

from halfmoon.errors import InvalidRequest
from workload.arrivals import arrival_times
from workload.formats import BLOCK_TOKENS
from workload.trace import Trace, TraceRequest


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A lognormal distribution, cut off: what is larger than `most` is `most`, what is smaller than 1 is 1."""

    median: float
    sigma: float
    most: float = math.inf

    def draw(self, rng: Random) -> float:
        return min(self.most, max(1.0, rng.lognormvariate(math.log(self.median), self.sigma)))


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a workload is made of.

    Args:
        rate_per_s: arrivals.
        system_prompts: how many there are to share.
        zipf: exponent of their popularity.
        system_blocks: their lengths in blocks go from 1 to this, in order of popularity, over and over.
        turns_mean: of a session.
        first, question, output: tokens of a session's first question, of a later one, of an answer.
        think_s: from a turn's arrival to the next's.
        input_tokens_max: a session ends rather than exceed it.
    """

    name: str
    rate_per_s: float
    system_prompts: int
    zipf: float
    system_blocks: int
    turns_mean: float
    first: Spread
    question: Spread
    output: Spread
    think_s: Spread
    input_tokens_max: int = 128_000


PROFILES: dict[str, Profile] = {
    made_of.name: made_of
    for made_of in (
        Profile(
            name="conversation",
            rate_per_s=12_031 / 3_537,
            system_prompts=64,
            zipf=1.2,
            system_blocks=4,
            turns_mean=1.67,
            first=Spread(median=5_100, sigma=1.25),
            question=Spread(median=200, sigma=1.5),
            output=Spread(median=235, sigma=0.9, most=2_000),
            think_s=Spread(median=110, sigma=1.1, most=3_000),
        ),
        Profile(
            name="toolagent",
            rate_per_s=23_608 / 3_537,
            system_prompts=64,
            zipf=1.1,
            system_blocks=32,
            turns_mean=1.4,
            first=Spread(median=2_300, sigma=1.1),
            question=Spread(median=300, sigma=1.2),
            output=Spread(median=82, sigma=1.3, most=2_000),
            think_s=Spread(median=30, sigma=1.2, most=1_500),
        ),
        Profile(
            name="synthetic",
            rate_per_s=1.0,
            system_prompts=20,
            zipf=1.0,
            system_blocks=4,
            turns_mean=3.1,
            first=Spread(median=5_700, sigma=1.0),
            question=Spread(median=800, sigma=1.5),
            output=Spread(median=95, sigma=1.0, most=1_000),
            think_s=Spread(median=60, sigma=1.0, most=1_500),
        ),
    )
}
"""By name, fitted to the mean lengths and hit rates that FAST'25 publishes of three traces (its Table 2), and to the
median gap between a chat's turns, two minutes, in the published conversation trace; the other think times and the rate
of "synthetic" are not published, and are ours."""


@dataclass(kw_only=True)
class _Session:
    """A chat between two turns."""

    full_ids: list[int]  # names of the full blocks of the last prompt
    input_tokens: int
    output_tokens: int
    turns_left: int


def profile(name: str) -> Profile:
    """Raises InvalidRequest: no such profile."""
    if name not in PROFILES:
        raise InvalidRequest(field="profile", value=name, limit=", ".join(PROFILES))
    return PROFILES[name]


def generate(made_of: Profile, num_requests: int, rng: Random, arrivals: str = "poisson") -> Trace:
    """A trace of `num_requests`; the same generator state gives the same trace.

    Raises:
        InvalidRequest: less than one request, or an unknown arrival process.
    """
    if num_requests < 1:
        raise InvalidRequest(field="num_requests", value=num_requests, limit="at least 1")
    times_s = arrival_times(arrivals, made_of.rate_per_s, rng)
    crowd = _Crowd(made_of, rng)
    requests = tuple(crowd.serve(at_s) for at_s in islice(times_s, num_requests))
    return Trace(source=f"synthetic {made_of.name}, {arrivals}", block_tokens=BLOCK_TOKENS, requests=requests)


class _Crowd:
    """The sessions that may come back, ordered by when they are due."""

    def __init__(self, made_of: Profile, rng: Random) -> None:
        self._made_of = made_of
        self._rng = rng
        self._ids = count()
        self._due: list[tuple[float, int, _Session]] = []  # (due time, serial, session)
        self._serials = count()
        self._system_prompts = [self._fresh(1 + rank % made_of.system_blocks) for rank in range(made_of.system_prompts)]
        self._weights = list(accumulate((rank + 1) ** -made_of.zipf for rank in range(made_of.system_prompts)))

    def serve(self, at_s: float) -> TraceRequest:
        """The request that arrives now: the longest overdue session's next turn, or a new session's first."""
        while self._due and self._due[0][0] <= at_s:
            session = heapq.heappop(self._due)[2]
            prompt = session.input_tokens + session.output_tokens + round(self._made_of.question.draw(self._rng))
            if prompt <= self._made_of.input_tokens_max:
                return self._turn(session, prompt, at_s)
        return self._turn(*self._begin(), at_s)

    def _begin(self) -> tuple[_Session, int]:
        """A new session, and the tokens of its first prompt."""
        made_of, rng = self._made_of, self._rng
        system_ids = rng.choices(self._system_prompts, cum_weights=self._weights)[0]
        system_tokens = len(system_ids) * BLOCK_TOKENS
        first = min(round(made_of.first.draw(rng)), made_of.input_tokens_max - system_tokens)
        session = _Session(
            full_ids=list(system_ids), input_tokens=0, output_tokens=0, turns_left=_geometric(rng, made_of.turns_mean)
        )
        return session, system_tokens + first

    def _turn(self, session: _Session, input_tokens: int, at_s: float) -> TraceRequest:
        """One prompt of the session: its full blocks are named once, a partial last one anew each time."""
        full, rest = divmod(input_tokens, BLOCK_TOKENS)
        session.full_ids += self._fresh(full - len(session.full_ids))
        session.input_tokens = input_tokens
        session.output_tokens = round(self._made_of.output.draw(self._rng))
        session.turns_left -= 1
        if session.turns_left > 0:
            due_s = at_s + self._made_of.think_s.draw(self._rng)
            heapq.heappush(self._due, (due_s, next(self._serials), session))
        return TraceRequest(
            at_s=at_s,
            input_tokens=input_tokens,
            output_tokens=session.output_tokens,
            block_ids=(*session.full_ids, *self._fresh(1 if rest else 0)),
        )

    def _fresh(self, num_ids: int) -> list[int]:
        return list(islice(self._ids, num_ids))


def _geometric(rng: Random, mean: float) -> int:
    """1, 2, ... with this mean, which is at least 1."""
    return 1 if mean == 1.0 else 1 + int(math.log(1.0 - rng.random()) / math.log(1.0 - 1.0 / mean))
