"""Pure: a node's engine under the virtual clock: one pass is out at a time; steps that change nothing go many at once.

A macro-step. While the batch of a decode worker stays as it is, the ends of its next steps are computed ahead, each by
the very additions that single steps would make, and one wake-up is planned for the last of them. Whatever reaches the
node earlier first settles the steps that have ended by then; the step in progress goes on to its end, and how far the
batch now goes unchanged is asked anew. So k steps cost one, and nothing that anybody can see differs from k steps.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Protocol

from engine.protocol import Sampled
from halfmoon.types import AttemptId
from node.effects import Pass, WorkerMachine
from simulator.world import World


class EngineModel(Protocol):
    """What computing is modelled by."""

    def begin(self, work: Pass) -> float:
        """A pass begins; the seconds that it takes."""
        ...

    def results(self, work: Pass) -> Sequence[Sampled | None]:
        """What it gives, at its end."""
        ...


class SteadyEngine(EngineModel, Protocol):
    """One that knows the next steps of an unchanging batch beforehand."""

    def steady_steps(self, work: Pass) -> int:
        """How many steps, from this one on, end nobody's output."""
        ...

    def ahead(self, work: Pass, num_steps: int) -> list[float]:
        """Seconds of the next `num_steps` steps of this batch after the one that is out. Changes nothing."""
        ...

    def skip(self, num_steps: int) -> None:
        """So many of them have begun."""
        ...

    def tokens(self, attempt_id: AttemptId, num_steps: int) -> Sequence[int]:
        """What one of the sequences gives in these steps."""
        ...


class SteadyMachine(WorkerMachine, Protocol):
    """A machine that books many plain steps at once (decode_worker.machine.DecodeMachine)."""

    def plain_steps(self) -> int: ...

    def account_plain(self, done: Pass, results: Sequence[Sequence[int]], seconds: Sequence[float]) -> Pass: ...


OnSteps = Callable[[Pass, Sequence[Sequence[int]], Sequence[float]], None]
"""(the first step's pass, the tokens of each of its sequences, when each step ended): what plain steps gave."""


class Compute:
    """One pass at a time.

    Args:
        rank: of this node among things that happen at one moment.
        on_end: called at the end of a pass that has to be accounted as usual: (pass, seconds).
    """

    def __init__(self, world: World, engine: EngineModel, rank: int, on_end: Callable[[Pass, float], None]) -> None:
        self.work: Pass | None = None
        self.engine = engine
        self.num_passes = 0
        self._world = world
        self._rank = rank
        self._on_end = on_end
        self._ends: list[float] = []  # of the step that is out, and of those planned after it
        self._seconds: list[float] = []
        self._plan = 0

    def begin(self, work: Pass) -> None:
        assert self.work is None, "one pass at a time"
        seconds = self.engine.begin(work)
        self.work = work
        self._ends, self._seconds = [self._world.now_s + seconds], [seconds]
        self._look_ahead()
        self._wake()

    def stop(self) -> None:
        """The process is gone."""
        self.work = None
        self._plan += 1

    def settle(self) -> None:
        """Nothing is ever behind."""

    def replan(self) -> None:
        """Nothing is ever ahead."""

    def _look_ahead(self) -> None:
        """Plan further steps. Modifies the plan only."""

    def _wake(self) -> None:
        self._plan += 1
        self._world.at(self._ends[-1], partial(self._woken, self._plan), self._rank)

    def _woken(self, plan: int) -> None:
        if plan != self._plan:
            return
        self.settle()
        work, seconds = self.work, self._seconds[0]
        assert work is not None
        self.work = None
        self.num_passes += 1
        self._on_end(work, seconds)


class Cruise(Compute):
    """Many plain steps at a time.

    Args:
        machine: whose steps they are.
        on_steps: told of the tokens, when steps are settled.
        calm: whether this batch's tokens simply come, each at its usual time after the one before it.
    """

    engine: SteadyEngine

    def __init__(
        self,
        world: World,
        engine: SteadyEngine,
        rank: int,
        on_end: Callable[[Pass, float], None],
        machine: SteadyMachine,
        on_steps: OnSteps,
        calm: Callable[[Pass], bool],
    ) -> None:
        super().__init__(world, engine, rank, on_end)
        self._machine = machine
        self._on_steps = on_steps
        self._calm = calm

    def settle(self) -> None:
        """Account the plain steps that have ended by now; the last one planned comes with its own wake-up."""
        work = self.work
        if work is None or len(self._ends) == 1 or self._ends[0] > self._world.now_s:
            return
        num = min(bisect_right(self._ends, self._world.now_s), len(self._ends) - 1)
        ends, seconds = self._ends[:num], self._seconds[:num]
        del self._ends[:num], self._seconds[:num]
        tokens = [self.engine.tokens(attempt_id, num) for attempt_id in work.attempts]
        self.work = self._machine.account_plain(work, tokens, seconds)
        self.num_passes += num
        self.engine.skip(num)
        self._on_steps(work, tokens, ends)

    def replan(self) -> None:
        """Something has happened here: how far does the batch go on unchanged now?"""
        if self.work is not None:
            num = self._num_steady(self.work)
            if num != len(self._ends) - 1:
                self._plan_steps(self.work, num)
                self._wake()

    def _look_ahead(self) -> None:
        assert self.work is not None
        self._plan_steps(self.work, self._num_steady(self.work))

    def _plan_steps(self, work: Pass, num: int) -> None:
        """As far as the plan went before and still goes, it stays."""
        known = len(self._ends) - 1
        if num <= known:
            del self._ends[num + 1 :], self._seconds[num + 1 :]
            return
        seconds = self.engine.ahead(work, num)[known:]
        self._seconds += seconds
        self._ends += accumulate(seconds, initial=self._ends.pop())

    def _num_steady(self, work: Pass) -> int:
        return min(self._machine.plain_steps(), self.engine.steady_steps(work)) if self._calm(work) else 0
