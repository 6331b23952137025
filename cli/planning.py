"""Pure: which shapes of a cluster to simulate next, and what their runs say: the search behind `halfmoon plan`.

All candidates serve the same arrivals, so they are ranked by how many requests finish within both limits; goodput is
that number over the time in which requests arrive. Equals are ranked by how far their 90th percentiles stay under the
limits. The search runs on one seed; its finalists are then compared over several.

The tokens of one pass are searched as nodes are: from one size in the middle to its neighbours on a ladder of halves,
for the best cluster of either kind alone, not for every ratio.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from cli.scenario import CHUNK_MIN, TOKENS_MAX, Scenario
from halfmoon.errors import ConfigError
from halfmoon.types import Outcome
from report.curves import Sketch

FINALISTS = 4
"""Candidates whose rank one seed may have decided: so many, and the best of another shape, are tried on others."""

FIFTHS = (0.8, 1.2)
"""Of the sensitivity. (Costs believed are so at first: told of no measurement, the conductor rejects by none of its
estimates, and a belief that stayed wrong would show what measuring is worth, not what a fifth is.)"""

GIVEN = {
    "speedup": "load",
    "slo_ttft_s": "TTFT limit",
    "slo_tbt_s": "TBT limit",
    "link_scale": "link speed",
    "mfu_scale": "MFU of prefill",
    "output_scale": "output length",
}
"""What a forecast of the traffic, or a data sheet, may well be off by: the scenario's field, and its name."""

NEAREST = 3
"""Shapes that are shown where none keeps the limits."""

SHAPES_AT_ONCE = 15
"""Ratios tried in one round: all of a cluster of 16 nodes; larger ones are narrowed down from so many."""


HALVES = 5
"""Of the preset's pass, down to the smallest chunk that is tried: 8,192, 4,096, … 256 tokens."""

CHUNK_LEAST = 64
"""A chunk is halved to no fewer tokens."""

START_COUPLED, START_APART = 1, -3
"""Where on the ladder the search begins: 512 and 2,048 of a preset of 8,192."""


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
        chunk: tokens of one pass of its prefill or coupled nodes.
        seed: added to the first seed.
        changes: fields of the scenario that are not as asked, and their values.
    """

    shape: Shape
    policy: str
    chunk: int
    seed: int = 0
    changes: tuple[tuple[str, object], ...] = ()

    @property
    def competes(self) -> bool:
        """It is as the others are; not so: it only shows how sure something is."""
        return self.seed == 0 and not self.changes

    @property
    def coupled(self) -> bool:
        """Its nodes do both, for which another chunk is best."""
        return self.shape.coupled > 0

    def __str__(self) -> str:
        return f"{self.shape}, {self.policy}, chunks of {self.chunk:,}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one candidate's simulation came to.

    Args:
        strain: the larger of TTFT p90 / limit and TBT p90 / limit; infinite where no request got a first token.
        served: share of all requests that finished, within their limits or not.
        ttft_p90_s, tbt_p90_s: of those that got a first token, a second one; None: nobody did.
    """

    effective: int
    goodput_per_s: float
    capacity: float
    strain: float
    served: float = 0.0
    ttft_p90_s: float | None = None
    tbt_p90_s: float | None = None


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
Change = tuple[str, str, Candidate]


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


def ladder(preset: int, asked: str = "") -> list[int]:
    """Chunks to choose from, ascending: those in `asked` ("256,2048"), or the preset's pass and its halves.

    Raises:
        ConfigError: one that is no number of tokens.
    """
    if not asked:
        halves = [preset >> step for step in range(HALVES + 1)]
        return sorted({preset, *(chunk for chunk in halves if chunk >= CHUNK_LEAST)})
    words = [word.strip() for word in asked.split(",")]
    for word in words:
        if not (word.isdecimal() and CHUNK_MIN <= int(word) <= TOKENS_MAX):
            expected = f"numbers of tokens, {CHUNK_MIN} to {TOKENS_MAX:,}, as in 256,2048"
            raise ConfigError(key="plan.chunks", value=asked, expected=expected)
    return sorted({int(word) for word in words})


def start(chunks: Sequence[int], *, coupled: bool) -> int:
    """The chunk that the search begins with."""
    place = START_COUPLED if coupled else len(chunks) + START_APART
    return chunks[min(max(0, place), len(chunks) - 1)]


def near(chunk: int, chunks: Sequence[int]) -> list[int]:
    """One step on the ladder either side."""
    at = chunks.index(chunk)
    return [*chunks[max(0, at - 1) : at], *chunks[at + 1 : at + 2]]


def verdict(found: Sketch, arrivals_s: float, slo_ttft_s: float, slo_tbt_s: float) -> Verdict:
    """arrivals_s: from the first arrival to the last, the same for all candidates."""
    figures = found.statistics
    seen = ((figures.ttft, slo_ttft_s), (figures.tbt_worst, slo_tbt_s))
    strains = [distribution.p90 / limit for distribution, limit in seen if distribution is not None]
    return Verdict(
        effective=figures.effective,
        goodput_per_s=figures.effective / arrivals_s if arrivals_s > 0 else 0.0,
        capacity=figures.capacity or 0.0,
        strain=max(strains) if figures.ttft is not None else math.inf,
        served=figures.outcomes[Outcome.FINISHED.value] / max(1, figures.requests),
        ttft_p90_s=None if figures.ttft is None else figures.ttft.p90,
        tbt_p90_s=None if figures.tbt_worst is None else figures.tbt_worst.p90,
    )


def first_round(nodes: int, policy: str, chunks: Sequence[int]) -> list[Candidate]:
    """Ratios from one end to the other, evenly spaced where there are too many, and all nodes coupled."""
    prefill = _spread(1, nodes - 1)
    apart = [Candidate(Shape(p, nodes - p), policy, start(chunks, coupled=False)) for p in prefill]
    return [*apart, Candidate(Shape(0, 0, nodes), policy, start(chunks, coupled=True))]


def next_round(verdicts: Verdicts, policies: Sequence[str], chunks: Sequence[int]) -> list[Candidate]:
    """What must still be known before the best may be called the best; empty: nothing.

    First the ratios between the best and its neighbours seen so far, then one step of chunk either side for the best
    of each kind, then the other policies for those and the best's neighbours; a winner among any begins anew.
    """
    rounds = (_between, partial(_chunks, chunks=chunks), partial(_policies, policies=policies))
    for wanted in rounds:
        if new := [c for c in dict.fromkeys(wanted(verdicts)) if c not in verdicts]:
            return new
    return []


def best_of_kinds(verdicts: Verdicts) -> list[Candidate]:
    """The best, and the best of the other kind if there is one: nodes of their own for prefill, or coupled ones."""
    order = ranked(verdicts)
    return [order[0], *[c for c in order if c.coupled != order[0].coupled][:1]]


def _chunks(verdicts: Verdicts, chunks: Sequence[int]) -> list[Candidate]:
    return [replace(best, chunk=size) for best in best_of_kinds(verdicts) for size in near(best.chunk, chunks)]


def _policies(verdicts: Verdicts, policies: Sequence[str]) -> list[Candidate]:
    first, *other = best_of_kinds(verdicts)
    beside = [replace(first, shape=shape) for shape in neighbours(first.shape)]
    tried = [first, *beside, *(c for c in other if c.coupled)]
    return [replace(candidate, policy=policy) for candidate in tried for policy in policies]


def neighbours(shape: Shape) -> list[Shape]:
    """One node moved from one pool to the other; a coupled cluster has none."""
    if shape.coupled:
        return []
    moved = [Shape(shape.prefill + step, shape.decode - step) for step in (-1, 1)]
    return [other for other in moved if other.prefill and other.decode]


def ranked(verdicts: Verdicts) -> list[Candidate]:
    """Best first; runs under another seed, or with something changed, are left out."""

    def order(candidate: Candidate) -> tuple[int, float, str]:
        said = verdicts[candidate]
        return (-said.effective, said.strain, str(candidate))

    return sorted((c for c in verdicts if c.competes), key=order)


def runner_up(verdicts: Verdicts) -> Candidate | None:
    """The best of another shape: another policy on the same nodes is no alternative way to buy them."""
    best, *others = ranked(verdicts)
    return next((c for c in others if c.shape != best.shape), None)


def finalists(verdicts: Verdicts) -> list[Candidate]:
    """Those to be tried on further seeds: of a shape and policy only the best chunk, or chunks take all places."""
    best: dict[tuple[Shape, str], Candidate] = {}
    for candidate in ranked(verdicts):
        best.setdefault((candidate.shape, candidate.policy), candidate)
    first, second = list(best.values())[:FINALISTS], runner_up(verdicts)
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


def nearest(verdicts: Verdicts) -> list[Candidate]:
    """The best of each of the best few shapes, best first."""
    one_each = {candidate.shape: candidate for candidate in reversed(ranked(verdicts))}
    return [c for c in ranked(verdicts) if one_each[c.shape] == c][:NEAREST]


def changed(candidate: Candidate, **values: object) -> Candidate:
    """The candidate in another scenario, which does not compete."""
    return replace(candidate, changes=tuple(values.items()))


def changes_of(
    best: Candidate,
    kinds: Sequence[Candidate],
    policies: Sequence[str],
    chunks: Sequence[int],
    base: Scenario,
    hides: bool,
) -> list[Change]:
    """(what, why, candidate): one step of all that was searched, and a fifth more or less of what was taken for given.

    Args:
        kinds: the best of each kind: how weights are read matters to coupled nodes alone, be they the best or not.
        hides: how the hardware reads them (Hardware.mixed_hides_weights).
    """
    changes: list[Change] = [
        (str(shape), "one node moved", replace(best, shape=shape)) for shape in neighbours(best.shape)
    ]
    changes += [(f"{chunk:,}", "another chunk", replace(best, chunk=chunk)) for chunk in near(best.chunk, chunks)]
    changes += [(name, "another policy", replace(best, policy=name)) for name in policies if name != best.policy]
    changes += [(f"{b - 1:+.0%} at first", "costs believed", changed(best, belief=f"{b:g}")) for b in FIFTHS]
    for name, why in GIVEN.items():
        value = getattr(base, name)
        changes += [(f"{factor - 1:+.0%}", why, changed(best, **{name: value * factor})) for factor in FIFTHS]
    other = "besides" if hides else "behind prompts"
    changes += [
        (f"{other}, {c.shape}", "weights of mixed passes", changed(c, hide_weights=not hides))
        for c in kinds
        if c.coupled
    ]
    return changes


def best_per_shape(verdicts: Verdicts) -> list[Candidate]:
    """In the order of the shapes, coupled last."""
    best: dict[Shape, Candidate] = {}
    for candidate in ranked(verdicts):
        best.setdefault(candidate.shape, candidate)
    return sorted(best.values(), key=lambda c: (c.shape.coupled, c.shape))


def _between(verdicts: Verdicts) -> list[Candidate]:
    """Unseen ratios between the best and the nearest seen on either side, as the best is otherwise."""
    best = ranked(verdicts)[0]
    if best.shape.coupled:
        return []
    nodes = best.shape.prefill + best.shape.decode
    seen = {c.shape.prefill for c in verdicts if c.competes and not c.shape.coupled} | {0, nodes}
    low = max(p for p in seen if p < best.shape.prefill)
    high = min(p for p in seen if p > best.shape.prefill)
    unseen = [*_spread(low + 1, best.shape.prefill - 1), *_spread(best.shape.prefill + 1, high - 1)]
    return [replace(best, shape=Shape(p, nodes - p)) for p in unseen]


def _spread(first: int, last: int) -> list[int]:
    """At most SHAPES_AT_ONCE integers from `first` to `last`, both included; none where there is nothing between."""
    number = min(SHAPES_AT_ONCE, last - first + 1)
    if number <= 1:
        return [first] * max(0, number)
    return [first + (last - first) * i // (number - 1) for i in range(number)]
