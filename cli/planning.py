"""Pure: which shapes of a cluster to simulate next, and what their runs say: the search behind `halfmoon plan`.

All candidates serve the same arrivals, so they are ranked by how many requests finish within both limits; goodput is
that number over the time in which requests arrive. Equals are ranked by how far their 90th percentiles stay under the
limits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from halfmoon.errors import ConfigError
from report.curves import Sketch

SHAPES_AT_ONCE = 15
"""Ratios tried in one round: all of a cluster of 16 nodes; larger ones are narrowed down from so many."""


@dataclass(frozen=True, order=True)
class Shape:
    """How nodes are dealt out."""

    prefill: int
    decode: int
    coupled: int = 0

    def __str__(self) -> str:
        return f"{self.coupled}C" if self.coupled else f"{self.prefill}P+{self.decode}D"


@dataclass(frozen=True)
class Candidate:
    """What is simulated. `belief`: costs are believed so many times the truth at first; None: as the seed draws it."""

    shape: Shape
    policy: str
    belief: float | None = None

    def __str__(self) -> str:
        return f"{self.shape}, {self.policy}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one candidate's simulation came to.

    Args:
        strain: the larger of TTFT p90 / limit and TBT p90 / limit; 0 where neither was seen.
    """

    effective: int
    goodput_per_s: float
    capacity: float
    served_kv_tokens: int
    strain: float


Verdicts = Mapping[Candidate, Verdict]


def num_nodes(gpus: int, gpus_per_node: int) -> int:
    """Whole nodes.

    Raises:
        ConfigError: none, or a rest.
    """
    for key, value in (("gpus", gpus), ("gpus_per_node", gpus_per_node)):
        if value < 1:
            raise ConfigError(key=f"plan.{key}", value=value, expected="at least 1")
    if gpus % gpus_per_node:
        expected = f"a multiple of gpus_per_node, {gpus_per_node}"
        raise ConfigError(key="plan.gpus", value=gpus, expected=expected)
    return gpus // gpus_per_node


def verdict(found: Sketch, arrivals_s: float, slo_ttft_s: float, slo_tbt_s: float) -> Verdict:
    """arrivals_s: from the first arrival to the last, the same for all candidates."""
    figures = found.statistics
    strains = [
        seen.p90 / limit
        for seen, limit in ((figures.ttft, slo_ttft_s), (figures.tbt_worst, slo_tbt_s))
        if seen is not None
    ]
    return Verdict(
        effective=figures.effective,
        goodput_per_s=figures.effective / arrivals_s if arrivals_s > 0 else 0.0,
        capacity=figures.capacity or 0.0,
        served_kv_tokens=figures.served_kv_tokens,
        strain=max(strains, default=0.0),
    )


def first_round(nodes: int, policy: str) -> list[Candidate]:
    """Ratios from one end to the other, evenly spaced where there are too many, and all nodes coupled."""
    prefill = _spread(1, nodes - 1)
    apart = [Candidate(Shape(p, nodes - p), policy) for p in prefill]
    return [*apart, Candidate(Shape(0, 0, nodes), policy)]


def next_round(verdicts: Verdicts, policies: Sequence[str]) -> list[Candidate]:
    """What must still be known before the best may be called the best; empty: nothing.

    First the ratios between the best and its neighbours seen so far, then the other policies for the best and one
    step either side, and the coupled cluster; a winner among those begins anew.
    """
    best = ranked(verdicts)[0]
    wanted = _between(best, verdicts)
    if not wanted:
        shapes = [best.shape, *neighbours(best.shape), *(c.shape for c in verdicts if c.shape.coupled)]
        wanted = [Candidate(shape, policy) for shape in shapes for policy in policies]
    return [c for c in dict.fromkeys(wanted) if c not in verdicts]


def neighbours(shape: Shape) -> list[Shape]:
    """One node moved from one pool to the other; a coupled cluster has none."""
    if shape.coupled:
        return []
    moved = [Shape(shape.prefill + step, shape.decode - step) for step in (-1, 1)]
    return [near for near in moved if near.prefill and near.decode]


def ranked(verdicts: Verdicts) -> list[Candidate]:
    """Best first; the runs under another belief are left out."""

    def order(candidate: Candidate) -> tuple[int, float, str]:
        said = verdicts[candidate]
        return (-said.effective, said.strain, str(candidate))

    return sorted((c for c in verdicts if c.belief is None), key=order)


def runner_up(verdicts: Verdicts) -> Candidate | None:
    """The best of another shape: another policy on the same nodes is no alternative way to buy them."""
    best, *others = ranked(verdicts)
    return next((c for c in others if c.shape != best.shape), None)


def indistinct(verdicts: Verdicts) -> int:
    """How many shapes serve as many requests within both limits as the best does."""
    most = max(said.effective for said in verdicts.values())
    return len({c.shape for c, said in verdicts.items() if c.belief is None and said.effective == most})


def best_per_shape(verdicts: Verdicts) -> list[Candidate]:
    """In the order of the shapes, coupled last."""
    best: dict[Shape, Candidate] = {}
    for candidate in ranked(verdicts):
        best.setdefault(candidate.shape, candidate)
    return sorted(best.values(), key=lambda c: (c.shape.coupled, c.shape))


def _between(best: Candidate, verdicts: Iterable[Candidate]) -> list[Candidate]:
    """Unseen ratios, of the best's policy, between the best and the nearest seen on either side."""
    if best.shape.coupled:
        return []
    nodes = best.shape.prefill + best.shape.decode
    seen = {c.shape.prefill for c in verdicts if c.policy == best.policy and not c.shape.coupled} | {0, nodes}
    low = max(p for p in seen if p < best.shape.prefill)
    high = min(p for p in seen if p > best.shape.prefill)
    unseen = [*_spread(low + 1, best.shape.prefill - 1), *_spread(best.shape.prefill + 1, high - 1)]
    return [Candidate(Shape(p, nodes - p), best.policy) for p in unseen]


def _spread(first: int, last: int) -> list[int]:
    """At most SHAPES_AT_ONCE integers from `first` to `last`, both included; none where there is nothing between."""
    number = min(SHAPES_AT_ONCE, last - first + 1)
    if number <= 1:
        return [first] * max(0, number)
    return [first + (last - first) * i // (number - 1) for i in range(number)]
