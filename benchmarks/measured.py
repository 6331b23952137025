"""Shell: what a real cluster costs, from the samples in its workers' load reports, as a recording keeps them.

Every sample counts alike: a conductor's own fit follows what is lately so, a preset says what was so on the whole.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conductor.recording import Call, read
from core.cost import CostPrior
from core.fit import non_negative
from core.messages import LoadReport, PassSample, TransferSample

PRIOR_WEIGHT = 1e-6
"""Of the prior, per sample: it decides what no sample says anything about."""

ROUNDS = 4
"""Of weighing anew: after the third nothing changes in the fourth digit."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Of one run, in order. prefill: passes that prefilled, on workers that only prefill; steps: decode steps."""

    prefill: tuple[PassSample, ...]
    steps: tuple[PassSample, ...]
    pulls: tuple[TransferSample, ...]


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Coefficients as core.cost.CostPrior's, of the mean; spread: standard deviation of ln(actual / fitted)."""

    coefficients: tuple[float, ...]
    spread: float
    samples: int

    @property
    def median(self) -> tuple[float, ...]:
        """The coefficients of the median, if the spread is lognormal, as the simulator's noise is."""
        return tuple(value * math.exp(-0.5 * self.spread**2) for value in self.coefficients)


def samples_of(recording: Path) -> Samples:
    """Raises RecordingError: it cannot be read."""
    passes: list[PassSample] = []
    pulls: list[TransferSample] = []
    with recording.open() as lines:
        for entry in read(lines):
            event = entry.arguments.get("event") if isinstance(entry, Call) else None
            if isinstance(event, LoadReport):
                passes += event.passes
                pulls += event.transfers
    return Samples(
        prefill=tuple(p for p in passes if p.new_tokens and not p.batch),
        steps=tuple(p for p in passes if not p.new_tokens),
        pulls=tuple(pulls),
    )


def joined(runs: Sequence[Samples]) -> Samples:
    """All of them."""
    return Samples(
        prefill=tuple(p for run in runs for p in run.prefill),
        steps=tuple(s for run in runs for s in run.steps),
        pulls=tuple(p for run in runs for p in run.pulls),
    )


def fitted(samples: Samples, prior: CostPrior) -> tuple[Fitted, Fitted, Fitted]:
    """Prefill passes, decode steps, pulls.

    Raises:
        ValueError: there are no samples of one of them.
    """
    prefill = [((1.0, float(s.new_tokens), float(s.pairs)), s.seconds) for s in samples.prefill]
    steps = [((1.0, float(s.batch), float(s.kv_tokens)), s.seconds) for s in samples.steps]
    pulls = [((1.0, float(s.num_bytes)), s.seconds) for s in samples.pulls]
    return fit(prefill, prior.prefill), fit(steps, prior.decode), fit(pulls, prior.transfer)


def fit(measured: Sequence[tuple[Sequence[float], float]], prior: Sequence[float]) -> Fitted:
    """Non-negative least squares, each sample's error taken relative to what the fit before gives for it: so the fit
    is of the mean, and a slow sample does not count less than a quick one. `measured`: (features, seconds).

    Raises:
        ValueError: nothing was measured.
    """
    if not measured:
        raise ValueError("nothing to fit to")
    found, scales = tuple(prior), [seconds for _, seconds in measured]
    for _ in range(ROUNDS):
        found = _weighed(measured, prior, scales)
        scales = [_at(found, features) for features, _ in measured]
    logs = [math.log(seconds / _at(found, features)) for features, seconds in measured]
    return Fitted(coefficients=found, spread=statistics.pstdev(logs), samples=len(measured))


def _at(coefficients: Sequence[float], features: Sequence[float]) -> float:
    return sum(c * x for c, x in zip(coefficients, features, strict=True))


def _weighed(
    measured: Sequence[tuple[Sequence[float], float]], prior: Sequence[float], scales: Sequence[float]
) -> tuple[float, ...]:
    """In multiples of the prior, so that all is of order one. `scales`: of each sample's error, in seconds."""
    size, lead = len(prior), PRIOR_WEIGHT * len(measured)
    rows = [
        ([p * x / scale for p, x in zip(prior, features, strict=True)], seconds / scale)
        for (features, seconds), scale in zip(measured, scales, strict=True)
    ]
    matrix = [
        [sum(row[i] * row[j] for row, _ in rows) + (lead if i == j else 0.0) for j in range(size)] for i in range(size)
    ]
    factors = non_negative(matrix, [sum(row[i] * value for row, value in rows) + lead for i in range(size)])
    return tuple(f * p for f, p in zip(factors, prior, strict=True))
