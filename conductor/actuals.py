"""Pure: what became of a request, in the terms in which it was predicted.

A client sees times at its front end; workers say what their part took. An actual that nobody has said is None: unknown,
never zero. One that is no duration (NaN, infinite, negative) is refused, and the term stays unknown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from core.messages import AttemptStats
from report.gaps import tbt_of


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One output as its front end saw it, in seconds; None: it did not come to that.

    Args:
        tokenize_s: from the request's arrival to its handing over to the machine.
        ttft_s: from its arrival to its first token, as it was shown.
        held_s: how long the first token was there and not shown, since the second was not (`HoldFirst`).
        second_gap_s: from the first token, of the prefill worker, to the second, of the decode worker, as shown.
        tbt_mean_s: the mean of the gaps after that one: what a decode step takes.
        tbt_worst_s, tbt_max_s: of all gaps: the mean of the longest tenth, which is the request's TBT; the longest.
    """

    tokenize_s: float | None = None
    ttft_s: float | None = None
    held_s: float | None = None
    second_gap_s: float | None = None
    tbt_mean_s: float | None = None
    tbt_worst_s: float | None = None
    tbt_max_s: float | None = None


def seen_of(
    tokens_s: Sequence[float], *, arrived_s: float, tokenized_s: float, first_came_s: float | None = None
) -> Seen:
    """From the moments at which an output's tokens were shown, so far, in order; all by the front end's clock.

    Args:
        first_came_s: when the first one was there; None: there is none, or it was not held.
    """
    num_gaps, tbt = len(tokens_s) - 1, tbt_of(tokens_s)
    return Seen(
        tokenize_s=tokenized_s - arrived_s,
        ttft_s=tokens_s[0] - arrived_s if tokens_s else None,
        held_s=tokens_s[0] - first_came_s if tokens_s and first_came_s is not None else None,
        second_gap_s=tokens_s[1] - tokens_s[0] if num_gaps > 0 else None,
        tbt_mean_s=(tokens_s[-1] - tokens_s[1]) / (num_gaps - 1) if num_gaps > 1 else None,
        tbt_worst_s=tbt.worst_s if tbt else None,
        tbt_max_s=tbt.max_s if tbt else None,
    )


def is_duration(value: float | None) -> bool:
    """Whether it may be kept: unknown, or a finite number of seconds, 0 or more."""
    return value is None or (math.isfinite(value) and value >= 0.0)


def checked(seen: Seen) -> tuple[Seen, int]:
    """`seen` with what is no duration made unknown, and how many such there were."""
    values = {f.name: getattr(seen, f.name) for f in fields(Seen)}
    good = {name: value for name, value in values.items() if is_duration(value)}
    return Seen(**good), len(values) - len(good)


def credible(stats: AttemptStats) -> bool:
    """Whether a worker's statement holds nothing but durations."""
    return all(is_duration(value) for value in (stats.queue_s, stats.fetch_s, stats.compute_s, stats.pull_s))
