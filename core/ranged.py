"""Pure: a fit, and what it answers beyond the range of what was measured.

Up to the largest inputs seen (stretched a little) the fitted coefficients hold. What a question has beyond them is
priced by peers of the same kind, who may have seen as much, and the whole is at most a factor above what they would
take: who is believed to be slow gets no work, and never shows that it is not. Where no peer has, it is the fit again,
but with each coefficient within a factor of the prior's, scaled to the level that was measured at the edge. So whatever
two noisy small measurements look like, a question a hundred times as large is never answered by their curvature alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from operator import mul, sub

from core.fit import RANGE_STRETCH, LinearFit

SLOPE_RATIO = 4.0
"""Beyond what was measured, a coefficient is at most so many times above or below the prior's, at the measured level:
kinds of hardware and models differ by less in what a token costs beside a pair, hiccups differ by more."""

PEERS_RATIO = 3.0
"""Where a worker has measured nothing, it is believed to take at most so many times what its peers take: a few prompts
that wait for them outweigh it. Too low a guess needs no bound: the first measurement corrects it."""

TEACH_FIRST = 64
TEACH_EVERY = 16
"""Peers learn each of a worker's first samples, all that widen their range, and of the others one in so many."""

ANSWERS_MAX = 1024
"""Remembered by the peers until their next sample."""

Features = tuple[float, ...]
Cap = Callable[[Features, float, float], Features]
"""(features of a question, the largest first and second input seen) -> the part of it inside that range."""


class CappedPasses:
    """Prefill: (passes, new tokens, pairs); x: new tokens of a pass, y: pairs per new token, which is their depth.

    All passes but the last are of `tokens_per_pass_max` tokens.
    """

    def __init__(self, tokens_per_pass_max: int) -> None:
        self._full = tokens_per_pass_max

    def __call__(self, features: Features, x: float, y: float) -> Features:
        passes, new, pairs = features
        last = new - (passes - 1.0) * self._full
        new = (passes - 1.0) * min(self._full, x) + min(last, x)
        return (passes, new, min(pairs, new * y))


def capped_step(features: Features, x: float, y: float) -> Features:
    """Decode: (1, sequences, tokens of KV)."""
    return (features[0], min(features[1], x), min(features[2], y))


def capped_transfer(features: Features, x: float, y: float) -> Features:
    """A pull: (1, bytes)."""
    return (features[0], min(features[1], x))


class Ranged:
    """One kind of work on one worker, or, as the `peers` of others, on all workers of a role.

    Attributes:
        x_max, y_max: the largest inputs that count as measured; a `frozen` fit is believed everywhere.
    """

    def __init__(self, prior: Sequence[float], cap: Cap, *, frozen: bool = False, peers: Ranged | None = None) -> None:
        self.fit = LinearFit(prior, frozen=frozen)
        self.x_max = self.y_max = math.inf if frozen else 0.0
        self._x_min = self._y_min = -math.inf if frozen else math.inf
        self._prior = tuple(prior)
        self._cap = cap
        self._peers = peers
        self._slopes_of: tuple[tuple[float, ...], float, float] | None = None  # what `_slopes` were reckoned from
        self._slopes: list[float] = []
        self._answers: dict[Features, float] = {}  # since the last sample

    def observe(self, features: Features, seconds: float, x: float, y: float = 0.0) -> None:
        """Learn one measurement at the inputs `x` and `y`, and let the peers learn of it. What is none is counted."""
        if not self.fit.observe(features, seconds):
            return
        self._answers.clear()
        if not (self._x_min <= x <= self.x_max and self._y_min <= y <= self.y_max):
            self._x_min, self.x_max = min(self._x_min, x / RANGE_STRETCH), max(self.x_max, x * RANGE_STRETCH)
            self._y_min, self.y_max = min(self._y_min, y / RANGE_STRETCH), max(self.y_max, y * RANGE_STRETCH)
        peers = self._peers
        if peers is not None:
            samples = self.fit.samples
            new_to_them = x > peers.x_max or y > peers.y_max
            if samples <= TEACH_FIRST or samples % TEACH_EVERY == 0 or new_to_them:
                peers.observe(features, seconds, x, y)

    def holds(self, x: float, y: float = 0.0) -> bool:
        """Whether both inputs lie inside the measured range."""
        return self._x_min <= x <= self.x_max and self._y_min <= y <= self.y_max

    def seconds(self, features: Features, *, watched: bool = False) -> float:
        """The answer. `watched`: by the last solutions, so that asking changes nothing (see LinearFit.solved)."""
        inside = self._inside(features)
        coefficients = self.fit.solved if watched else self.fit.coefficients
        seconds = _dot(coefficients, inside)
        if inside == features:
            return seconds
        if self._peers is not None:
            peers = self._peers
            ask = partial(peers.seconds, watched=True) if watched else peers.remembered
            theirs = ask(features)
            more = max(0.0, theirs - ask(inside))
            return min(seconds + more, PEERS_RATIO * theirs)
        beyond = tuple(map(sub, features, inside))
        return seconds + _dot(self._beyond(coefficients), beyond)

    def remembered(self, features: Features) -> float:
        """As `seconds`: placement asks all workers the same, and they their peers."""
        seconds = self._answers.get(features)
        if seconds is None:
            if len(self._answers) >= ANSWERS_MAX:
                self._answers.clear()
            seconds = self._answers[features] = self.seconds(features)
        return seconds

    def _inside(self, features: Features) -> Features:
        if self.fit.frozen:
            return features
        if not self.fit.samples:
            return (0.0,) * len(features)
        return self._cap(features, self.x_max, self.y_max)

    def _beyond(self, coefficients: tuple[float, ...]) -> Sequence[float]:
        """The coefficients beyond the range: within SLOPE_RATIO of the prior's at the level of the range's far end.

        Kept until a sample changes them: placement asks every worker.
        """
        state = (coefficients, self.x_max, self.y_max)
        if self._slopes_of != state:
            level = 1.0
            if self.fit.samples:
                edge = self._cap((1.0, math.inf, math.inf)[: len(self._prior)], self.x_max, self.y_max)
                level = _dot(coefficients, edge) / _dot(self._prior, edge)
            self._slopes = [
                min(max(c, p * level / SLOPE_RATIO), p * level * SLOPE_RATIO)
                for c, p in zip(coefficients, self._prior, strict=True)
            ]
            self._slopes_of = state
        return self._slopes


def _dot(coefficients: Sequence[float], features: Sequence[float]) -> float:
    seconds: float = sum(map(mul, coefficients, features))
    return seconds
