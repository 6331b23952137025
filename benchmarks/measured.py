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


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Of one run, in order. prefill: passes that prefilled, on workers that only prefill; steps: decode steps."""

    prefill: tuple[PassSample, ...]
    steps: tuple[PassSample, ...]
    pulls: tuple[TransferSample, ...]


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Coefficients as core.cost.CostPrior's; spread: standard deviation of ln(actual / fitted)."""

    coefficients: tuple[float, ...]
    spread: float
    samples: int


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
    """Non-negative least squares over relative errors. `measured`: (features, seconds), the first feature constant.

    Raises:
        ValueError: nothing was measured.
    """
    if not measured:
        raise ValueError("nothing to fit to")
    size, lead = len(prior), PRIOR_WEIGHT * len(measured)
    rows = [[p * x / seconds for p, x in zip(prior, features, strict=True)] for features, seconds in measured]
    matrix = [
        [sum(row[i] * row[j] for row in rows) + (lead if i == j else 0.0) for j in range(size)] for i in range(size)
    ]
    factors = non_negative(matrix, [sum(row[i] for row in rows) + lead for i in range(size)])
    found = tuple(f * p for f, p in zip(factors, prior, strict=True))
    logs = [-math.log(sum(f * x for f, x in zip(factors, row, strict=True))) for row in rows]
    return Fitted(coefficients=found, spread=statistics.pstdev(logs), samples=len(measured))
