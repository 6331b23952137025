"""Pure: which shapes of a cluster to simulate next, and what their runs say: the search behind `halfmoon plan`.

All candidates serve the same arrivals, so they are ranked by how many requests finish within both limits; goodput is
that number over the time in which requests arrive. Equals are ranked by how far their 90th percentiles stay under the
limits. The search runs on one seed; its finalists are then compared over several.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from halfmoon.errors import ConfigError
from report.curves import Sketch

FINALISTS = 4
"""Candidates whose rank one seed may have decided: so many, and the best of another shape, are tried on others."""

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
    """What is simulated.

    Args:
        belief: costs are believed so many times the truth at first; None: as the seed draws it.
        seed: added to the first seed.
        load: requests come so many times as fast.
    """

    shape: Shape
    policy: str
    belief: float | None = None
    seed: int = 0
    load: float = 1.0

    @property
    def competes(self) -> bool:
        """It is as the others are; not so: it only shows how sure something is."""
        return self.belief is None and self.seed == 0 and self.load == 1.0

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


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One figure over several seeds."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Final:
    """A finalist over several seeds."""

    candidate: Candidate
    effective: Spread
    goodput_per_s: Spread
    capacity: Spread
    strain: Spread


Verdicts = Mapping[Candidate, Verdict]


def num_nodes(gpus: int, gpus_per_node: int) -> int:
    """Whole nodes.

    Raises:
        ConfigError: none, or a rest.
    """
    for key, value in (("gpus", gpus), ("gpus-per-node", gpus_per_node)):
        if value < 1:
            raise ConfigError(key=f"plan.{key}", value=value, expected="at least 1")
    if gpus % gpus_per_node:
        expected = f"a multiple of --gpus-per-node, {gpus_per_node}"
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
    """Best first; runs under another belief, seed or load are left out."""

    def order(candidate: Candidate) -> tuple[int, float, str]:
        said = verdicts[candidate]
        return (-said.effective, said.strain, str(candidate))

    return sorted((c for c in verdicts if c.competes), key=order)


def runner_up(verdicts: Verdicts) -> Candidate | None:
    """The best of another shape: another policy on the same nodes is no alternative way to buy them."""
    best, *others = ranked(verdicts)
    return next((c for c in others if c.shape != best.shape), None)


def finalists(verdicts: Verdicts) -> list[Candidate]:
    """Those to be tried on further seeds."""
    first, second = ranked(verdicts)[:FINALISTS], runner_up(verdicts)
    return first if second is None or second in first else [*first, second]


def on_seeds(candidate: Candidate, seeds: int) -> list[Candidate]:
    """The candidate on the first seed and on those after it."""
    return [replace(candidate, seed=seed) for seed in range(seeds)]


def finals(verdicts: Verdicts, candidates: Iterable[Candidate], seeds: int) -> list[Final]:
    """Best first, by their means over seeds; all of them have been simulated."""

    def final(candidate: Candidate) -> Final:
        said = [verdicts[one] for one in on_seeds(candidate, seeds)]
        return Final(
            candidate=candidate,
            effective=_spread_of([v.effective for v in said]),
            goodput_per_s=_spread_of([v.goodput_per_s for v in said]),
            capacity=_spread_of([v.capacity for v in said]),
            strain=_spread_of([v.strain for v in said]),
        )

    return sorted(
        (final(candidate) for candidate in candidates),
        key=lambda f: (-f.effective.mean, f.strain.mean, str(f.candidate)),
    )


def tied(ranking: Sequence[Final]) -> list[Final]:
    """Those whose range over seeds overlaps the best's: what these seeds cannot tell from it."""
    best, *others = ranking
    return [f for f in others if f.effective.high >= best.effective.low]


def _spread_of(values: Sequence[float]) -> Spread:
    return Spread(mean=sum(values) / len(values), low=min(values), high=max(values))


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
