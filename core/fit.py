"""Pure: a line through what was measured, that noise, hiccups, and a thousand samples all alike cannot lead astray.

Samples fall into cells, one per power of two of each input. A cell forgets only when it is measured anew, so a thousand
small passes neither wipe out nor blow up what one large pass has shown; a cell that contradicts fresh ones fades.

When everything becomes slower or faster at once (a neighbour on the host, a throttled clock), samples of several kinds
in a row miss their own cells' means to the same side. Then the level has changed: what was measured lately begins anew,
and all else is multiplied by as much as the samples have missed by, but not trusted before it is measured again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CELL_SAMPLES = 20
"""A cell's mean is of about its last so many: a change is followed within some hundred samples of its kind."""

FADING = 0.95
"""Weight of a cell in the fit after a sample of another kind: what is measured now outvotes what was long ago."""

FADED_WEIGHT = 1e-5
"""To which it fades and no further: where nothing new is measured, what was measured once stays true."""

PRIOR_WEIGHT = 1e-7
"""Of the prior in the fit: it decides only what no sample, fresh or faded, says anything about."""

OUTLIER_RATIO = 4.0
"""A sample this many times above or below the mean of its like (within a factor of two) is not learned ..."""

OUTLIERS_MAX = 8
"""... unless so many came in a row, or as many as the mean is made of: then the mean is wrong, and begins anew."""

EXPONENT_MAX = 40
"""Of two, in a cell's key: inputs above share cells, so that a fit has at most 41 * 41 of them (in use: some 30)."""

DOUBT_MAX = 0.5
"""Of the recent errors: predictions that are twice or half the truth on average are not to be relied on."""

DOUBT_DECAY = 0.8
"""Of one cell's recent error: four samples that contradict the fit put its neighbourhood out of range."""

LEVEL_RATIO = 1.5
"""A sample this many times above or below its cell's mean speaks for a change of level ..."""

LEVEL_SAMPLES = 12
"""... if so many in a row do, all to the same side, as noise and hiccups do not ..."""

LEVEL_CELLS = 2
"""... and they are of so many kinds: one kind alone says nothing about the others."""

LEVEL_KNOWN = 4
"""Samples that a cell needs for its mean to be contradicted."""

UNPROVEN = 0.6
"""The doubt about a cell that was moved with the level: above DOUBT_MAX until one sample of its own agrees."""

SECONDS_MIN = 1e-9
"""No pass or transfer takes less than a nanosecond; relative to less, the sums would overflow."""

SOLVE_EVERY = 16
"""Samples that may share one solution, when nobody asks in between; the first few get one each."""

SHARE_NEW = 1 / 64
"""Of all samples: so few new ones change the solution so little that it is not worth making anew when somebody asks."""

DIAGONAL_STRETCH = 1.0 + 1e-12
"""Keeps the normal equations definite beyond rounding, whatever the scale of the prior."""

SAMPLES_MIN = 8
"""Fewer than this and no answer is called confident."""

RANGE_STRETCH = 1.25
"""An input this much outside the smallest or largest one seen still counts as inside the fitted range."""

ERROR_DECAY = 0.95
"""Of the running means of residuals: about the last twenty samples."""


@dataclass(frozen=True, kw_only=True)
class Residual:
    """How wrong the predictions were just before each sample was learned (running means).

    Args:
        bias: mean of (actual - predicted) / actual; above 0: predictions were too low.
        error: mean of |actual - predicted| / actual.
        levels: how often everything was found to have become slower or faster at once.
    """

    samples: int
    refused: int
    bias: float
    error: float
    levels: int = 0


class Cell:
    """The mean of the samples of about one size; `doubt`: how wrong the fit was about the last few of them (0..1)."""

    __slots__ = ("doubt", "features", "samples", "seconds", "seen_at", "streak", "terms")

    def __init__(self) -> None:
        self.features: tuple[float, ...] = ()
        self.seconds = 0.0
        self.samples = 0
        self.streak = 0
        self.seen_at = 0
        self.doubt = 0.0
        self.terms: list[float] = []

    def learn(self, features: tuple[float, ...], seconds: float) -> None:
        """Move the mean, leave an outlier out, or begin anew when there were too many in a row."""
        if self.samples and not self.seconds / OUTLIER_RATIO <= seconds <= self.seconds * OUTLIER_RATIO:
            self.streak += 1
            if self.streak < min(self.samples, OUTLIERS_MAX):
                return
            self.samples = 0
        self.streak = 0
        decay = min(self.samples, CELL_SAMPLES - 1) / min(self.samples + 1, CELL_SAMPLES)
        self.samples += 1
        self.seconds = decay * self.seconds + (1.0 - decay) * seconds
        self.features = (
            tuple([decay * mean + (1.0 - decay) * x for mean, x in zip(self.features, features, strict=True)])
            if self.features
            else features
        )

    def move(self, ratio: float) -> None:
        """Everything takes `ratio` times as long, as far as is known."""
        self.seconds *= ratio
        self.samples = min(self.samples, LEVEL_KNOWN)
        self.streak = 0
        self.doubt = max(self.doubt, UNPROVEN)

    def weigh(self, prior: Sequence[float]) -> None:
        """Set `terms`: what this mean adds to the normal equations, matrix by row, then vector."""
        scale = 1.0 / self.seconds
        row = [p * x * scale for p, x in zip(prior, self.features, strict=True)]
        self.terms = [x * y for x in row for y in row] + row


class LinearFit:
    """Non-negative least squares over relative errors, through the cells' means. It minimises

        sum over cells of weight * (prediction / seconds - 1)**2  +  PRIOR_WEIGHT * sum((coefficient / prior - 1)**2)

    and is solved anew from the cells each time: nothing accumulates, so neither rounding nor variance can wind up.
    The first feature is the constant. A `frozen` one keeps the prior, trusts it, and only books residuals.
    """

    def __init__(self, prior: Sequence[float], *, frozen: bool = False) -> None:
        self.frozen = frozen
        self._prior = tuple(prior)
        self._cells: dict[tuple[int, ...], Cell] = {}
        self._bias = 0.0
        self._error = 0.0
        self._doubt = 0.0
        self.samples = 0
        self.refused = 0
        self.levels = 0
        self._strays: list[tuple[tuple[int, ...], tuple[float, ...], float, float]] = []  # key, features, s, ratio
        self._coefficients = self._prior
        self._unsolved = 0

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Of all samples so far; each at or above zero."""
        if self._unsolved > SHARE_NEW * self.samples:
            self._solve()
        return self._coefficients

    @property
    def solved(self) -> tuple[float, ...]:
        """The last solution, for those who only watch: `coefficients` may solve, and so change what is said next."""
        return self._coefficients

    def predict(self, features: Sequence[float]) -> float:
        return sum([c * x for c, x in zip(self.coefficients, features, strict=True)])

    def observe(self, features: tuple[float, ...], seconds: float) -> bool:
        """Learn one measurement. False: it is no duration (NaN, infinite, not above zero); refused and counted."""
        if not SECONDS_MIN <= seconds < math.inf or not all(math.isfinite(x) and x >= 0.0 for x in features):
            self.refused += 1
            return False
        cell = self._cells.get(key := _key(features))
        if cell is None:
            cell = self._cells[key] = Cell()
        predicted = sum([c * x for c, x in zip(self._coefficients, features, strict=True)])
        self._book_residual(cell, predicted, seconds)
        self.samples += 1
        if self.frozen:
            return True
        cell.seen_at = self.samples
        self._unsolved += 1
        if self._strayed(cell, key, features, seconds):
            self._change_level()
        else:
            cell.learn(features, seconds)
            cell.weigh(self._prior)
        if self.samples <= SAMPLES_MIN or self._unsolved >= SOLVE_EVERY:
            self._solve()
        return True

    def trusted(self, features: Sequence[float]) -> bool:
        """Whether enough was measured, and what was measured lately, above all near `features`, was as predicted."""
        if self.frozen:
            return True
        if self.samples < SAMPLES_MIN or self._doubt > DOUBT_MAX:
            return False
        cell = self._cells.get(_key(features))
        return cell is None or cell.doubt <= DOUBT_MAX

    def residual(self) -> Residual:
        return Residual(
            samples=self.samples, refused=self.refused, bias=self._bias, error=self._error, levels=self.levels
        )

    def _book_residual(self, cell: Cell, predicted: float, seconds: float) -> None:
        relative = (seconds - predicted) / seconds
        wrong = abs(seconds - predicted) / max(seconds, predicted)
        decay = min(ERROR_DECAY, self.samples / (self.samples + 1))
        self._bias = decay * self._bias + (1.0 - decay) * relative
        self._error = decay * self._error + (1.0 - decay) * abs(relative)
        self._doubt = decay * self._doubt + (1.0 - decay) * wrong
        decay = min(DOUBT_DECAY, cell.samples / (cell.samples + 1))
        cell.doubt = decay * cell.doubt + (1.0 - decay) * wrong

    def _strayed(self, cell: Cell, key: tuple[int, ...], features: tuple[float, ...], seconds: float) -> bool:
        """Note whether this sample is far from its cell's mean. True: it completes a row that shows another level."""
        if cell.samples < LEVEL_KNOWN:
            return False
        ratio = seconds / cell.seconds
        if 1.0 / LEVEL_RATIO < ratio < LEVEL_RATIO:
            self._strays.clear()
            return False
        if self._strays and (ratio > 1.0) != (self._strays[-1][3] > 1.0):
            self._strays.clear()
        self._strays.append((key, features, seconds, ratio))
        del self._strays[:-LEVEL_SAMPLES]
        return len(self._strays) == LEVEL_SAMPLES and len({stray[0] for stray in self._strays}) >= LEVEL_CELLS

    def _change_level(self) -> None:
        self.levels += 1
        ratios = sorted(stray[3] for stray in self._strays)
        ratio, fresh = ratios[len(ratios) // 2], {stray[0] for stray in self._strays}
        for key, cell in self._cells.items():
            cell.move(ratio)
            if key in fresh:
                cell.samples, cell.doubt = 0, 0.0
        for key, features, seconds, _ in self._strays:
            self._cells[key].learn(features, seconds)
        for cell in self._cells.values():
            cell.weigh(self._prior)
        self._strays.clear()
        self._doubt = 0.0
        self._solve()

    def _solve(self) -> None:
        """The normal equations, in multiples of the prior, so that all is of order one."""
        size, now = len(self._prior), self.samples
        sums = [0.0] * (size * (size + 1))
        for cell in self._cells.values():
            weight = min(cell.samples, CELL_SAMPLES) * max(FADED_WEIGHT, FADING ** (now - cell.seen_at))
            sums = [total + weight * term for total, term in zip(sums, cell.terms, strict=True)]
        matrix = [sums[i * size : (i + 1) * size] for i in range(size)]
        for i in range(size):
            matrix[i][i] = matrix[i][i] * DIAGONAL_STRETCH + PRIOR_WEIGHT
        alpha = non_negative(matrix, [v + PRIOR_WEIGHT for v in sums[size * size :]])
        self._coefficients = tuple([p * a for p, a in zip(self._prior, alpha, strict=True)])
        self._unsolved = 0


def _key(features: Sequence[float]) -> tuple[int, ...]:
    if len(features) == 3:  # the common case, written out: placement asks it dozens of times a request
        return (_exponent(features[1]), _exponent(features[2]))
    return tuple([_exponent(x) for x in features[1:]])


def _exponent(x: float) -> int:
    exponent = math.frexp(x)[1]
    return 0 if exponent < 0 else min(EXPONENT_MAX, exponent)


def non_negative(matrix: Sequence[Sequence[float]], vector: Sequence[float]) -> list[float]:
    """The x >= 0 with the smallest x·Mx/2 - v·x, for a small symmetric positive definite M.

    The best of every choice of unknowns held at zero (at most 7 small systems), so it is exact and cannot cycle.
    """
    size = len(vector)
    whole = _gauss(matrix, vector)
    if min(whole) >= 0.0:
        return whole
    best, best_gain = [0.0] * size, 0.0
    for choice in range(1, 2**size - 1):
        free = [i for i in range(size) if choice >> i & 1]
        some = _gauss([[matrix[i][j] for j in free] for i in free], [vector[i] for i in free])
        gain = sum(vector[i] * x for i, x in zip(free, some, strict=True))  # at a face's optimum: -2 * objective
        if min(some) >= 0.0 and gain > best_gain:
            best, best_gain = [0.0] * size, gain
            for i, x in zip(free, some, strict=True):
                best[i] = x
    return best


def _gauss(matrix: Sequence[Sequence[float]], vector: Sequence[float]) -> list[float]:
    """Solve M x = v without pivoting, which a positive definite M does not need."""
    size = len(vector)
    rows = [[*line, value] for line, value in zip(matrix, vector, strict=True)]
    for i, pivot in enumerate(rows):
        for row in rows[i + 1 :]:
            factor = row[i] / pivot[i]
            for j in range(i + 1, size + 1):
                row[j] -= factor * pivot[j]
    x = [0.0] * size
    for i in reversed(range(size)):
        x[i] = (rows[i][size] - sum([rows[i][j] * x[j] for j in range(i + 1, size)])) / rows[i][i]
    return x
