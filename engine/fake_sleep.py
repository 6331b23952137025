"""Shell: a fake engine that takes its time, for real processes under load."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from engine.protocol import Engine, ModelInfo, Pool, Sampled, Slice


class SleepingEngine:
    """An `engine.protocol.Engine`: each pass of `engine` lasts at least as long as it is said to.

    Args:
        pass_s: seconds, the same for every pass.
        pass_seconds: in its place: seconds by the pass, such as `FakeEngine.pass_seconds`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        pass_s: float = 0.0,
        pass_seconds: Callable[[Sequence[Slice]], float] | None = None,
    ) -> None:
        self.model: ModelInfo = engine.model
        self._engine = engine
        self._pass_seconds = pass_seconds or (lambda _: pass_s)

    def bind(self, pool: Pool, num_slots: int) -> None:
        self._engine.bind(pool, num_slots)

    def forward(self, slices: Sequence[Slice]) -> list[Sampled | None]:
        """Raises: IntegrityError, at once."""
        begun_s = time.monotonic()
        results = self._engine.forward(slices)
        time.sleep(max(0.0, self._pass_seconds(slices) - (time.monotonic() - begun_s)))
        return results

    def close(self) -> None:
        self._engine.close()
