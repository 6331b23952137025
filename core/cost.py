"""Pure: how long things take: prefill, decode steps, transfers; fitted online from what workers measured.

Placement, admission and break-even gates ask the same three questions. Each answer is linear in a few features whose
coefficients are physical (seconds a pass, a token, an attended pair, a byte), so none of them may become negative.
The attention feature `new * context + new**2 / 2` is the number of attended (query, key) pairs of a causal prefill
(FAST'25, Eq. 1); it adds up over chunks, so only the constant is paid once per pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from core.fit import SAMPLES_MIN, Residual
from core.messages import PassSample, TransferSample
from core.ranged import CappedPasses, Ranged, capped_step, capped_transfer
from halfmoon.errors import ConfigError
from halfmoon.types import Tier

PREFILL_SHARE_MIN = 0.25
"""Of a mixed pass's seconds: where less is left after its decode part, the rest says nothing about prefill."""

LEARNED_FLOOR = 1e-3
"""Of the prior: a coefficient that was fitted to zero is handed on as this much, or it could not rise again."""

LEARNED_MIN = 1e-18
"""Seconds: however often what was learned becomes a prior again, it stays above zero."""

SOURCES_MAX = 256
"""Senders with a transfer model of their own, per receiver; further ones share the receiver's."""


class Estimate(NamedTuple):
    """A predicted duration.

    `in_range` False: extrapolated, still the prior, or lately contradicted by measurements; never reject by it.
    """

    seconds: float
    in_range: bool


NOTHING = Estimate(0.0, True)


@dataclass(frozen=True, kw_only=True)
class CostPrior:
    """Coefficients believed before anything was measured, all above zero, in seconds.

    Args:
        prefill: per pass, per new token, per attended pair.
        decode: per step, per sequence in the batch, per token of KV read.
        transfer: per transfer, per byte.
        read_dram, read_ssd: moving cached blocks from that tier into DEVICE: per move, per byte. Not learned.
    """

    prefill: tuple[float, float, float] = (0.01, 8e-4, 1e-7)
    decode: tuple[float, float, float] = (0.03, 3e-3, 1e-6)
    transfer: tuple[float, float] = (2e-3, 1e-9)
    read_dram: tuple[float, float] = (2e-4, 1e-10)
    read_ssd: tuple[float, float] = (1e-3, 5e-10)

    def __post_init__(self) -> None:
        for f in fields(self):
            values, wanted = getattr(self, f.name), len(f.default)  # type: ignore[arg-type]
            if len(values) != wanted or not all(0.0 < value < math.inf for value in values):
                raise ConfigError(key=f.name, value=values, expected=f"{wanted} finite numbers above 0")


class RoleCost:
    """What all workers of a role have shown together: how long one is believed to take what it has not done itself."""

    def __init__(self, prior: CostPrior, *, tokens_per_pass_max: int) -> None:
        self.prefill = Ranged(prior.prefill, CappedPasses(tokens_per_pass_max))
        self.decode = Ranged(prior.decode, capped_step)


class WorkerCost:
    """One worker's costs, learned from its own samples.

    Args:
        prior: believed until enough was measured.
        tokens_per_pass_max: a longer prefill is cut into passes of at most this many tokens.
        frozen: the prior is a profile, believed everywhere and for good; samples only show how wrong it is.
        role: shared by the workers of a role; taught by this one, asked where this one has measured nothing.
    """

    def __init__(
        self, prior: CostPrior, *, tokens_per_pass_max: int, frozen: bool = False, role: RoleCost | None = None
    ) -> None:
        assert tokens_per_pass_max > 0
        self._prior = prior
        self._pass_max = tokens_per_pass_max
        self._frozen = frozen
        pool, steps = (role.prefill, role.decode) if role is not None and not frozen else (None, None)
        self._prefill = Ranged(prior.prefill, CappedPasses(tokens_per_pass_max), frozen=frozen, peers=pool)
        self._decode = Ranged(prior.decode, capped_step, frozen=frozen, peers=steps)
        self._transfer = Ranged(prior.transfer, capped_transfer, frozen=frozen)
        self._by_source: dict[str, Ranged] = {}

    # ---- questions ----

    def prefill_s(self, new: int, context: int) -> Estimate:
        """Computing `new` tokens after `context` earlier ones, chunked, with nothing else running."""
        return Estimate(self.prefill_seconds(new, context), self.prefill_known(new, context))

    def prefill_seconds(self, new: int, context: int) -> float:
        """`prefill_s` alone: placement asks every worker how long, and only those that it keeps how sure."""
        if new <= 0:
            return 0.0
        passes, pairs, model = -(-new // self._pass_max), new * context + 0.5 * new * new, self._prefill
        if min(new, self._pass_max) <= model.x_max and pairs <= new * model.y_max:
            a, b, c = model.fit.coefficients
            return a * passes + b * new + c * pairs
        return model.seconds((float(passes), float(new), float(pairs)))

    def prefill_known(self, new: int, context: int) -> bool:
        if new <= 0:
            return True
        chunk = min(new, self._pass_max)
        depth = context + new - 0.5 * chunk  # of the last pass, the deepest
        return self._prefill.holds(chunk, depth) and self._prefill.fit.trusted((1.0, float(chunk), chunk * depth))

    def decode_step_s(self, batch: int, kv_tokens: int) -> Estimate:
        """One step of `batch` sequences over `kv_tokens` tokens of KV in all."""
        return Estimate(self.decode_seconds(batch, kv_tokens), self.decode_known(batch, kv_tokens))

    def decode_seconds(self, batch: int, kv_tokens: int) -> float:
        if batch <= 0:
            return 0.0
        model = self._decode
        if batch <= model.x_max and kv_tokens <= model.y_max:
            a, b, c = model.fit.coefficients
            return a + b * batch + c * kv_tokens
        return model.seconds((1.0, float(batch), float(kv_tokens)))

    def decode_seconds_watched(self, batch: int, kv_tokens: int) -> float:
        """The same by the last solution: for metrics and samples, which must not change a decision by asking."""
        return self._decode.seconds((1.0, float(batch), float(kv_tokens)), watched=True) if batch > 0 else 0.0

    def decode_known(self, batch: int, kv_tokens: int) -> bool:
        if batch <= 0:
            return True
        in_range = self._decode.holds(batch, kv_tokens)
        return in_range and self._decode.fit.trusted((1.0, float(batch), float(kv_tokens)))

    def transfer_s(self, num_bytes: float, source: str = "") -> Estimate:
        """Pulling `num_bytes` into this worker; by `source`'s own model once that has seen enough."""
        return Estimate(self.transfer_seconds(num_bytes, source), self.transfer_known(num_bytes, source))

    def transfer_seconds(self, num_bytes: float, source: str = "") -> float:
        if num_bytes <= 0:
            return 0.0
        model = self._transfer_model(source)
        if num_bytes <= model.x_max:
            a, b = model.fit.coefficients
            return a + b * num_bytes
        return model.seconds((1.0, float(num_bytes)))

    def transfer_known(self, num_bytes: float, source: str = "") -> bool:
        model = self._transfer_model(source)
        return num_bytes <= 0 or (model.holds(num_bytes) and model.fit.trusted((1.0, float(num_bytes))))

    def _transfer_model(self, source: str) -> Ranged:
        own = self._by_source.get(source)
        return own if own is not None and own.fit.samples >= SAMPLES_MIN else self._transfer

    def read_s(self, num_bytes: int, tier: Tier) -> float:
        """Moving cached blocks of this worker from `tier` into DEVICE. From the profile: workers do not report it."""
        if num_bytes <= 0 or tier is Tier.DEVICE:
            return 0.0
        a, b = self._prior.read_dram if tier is Tier.DRAM else self._prior.read_ssd
        return a + b * num_bytes

    # ---- samples ----

    def observe_pass(self, sample: PassSample) -> None:
        """Learn one engine pass. A mixed one counts for prefill, less what its decode part adds to a pass."""
        batch, kv_tokens = sample.batch, sample.kv_tokens
        if sample.new_tokens > 0:
            _, per_sequence, per_token = self._decode.fit.coefficients
            self._observe_prefill(sample, sample.seconds - (per_sequence * batch + per_token * kv_tokens))
        else:
            features = (1.0 if batch > 0 else math.nan, float(batch), float(kv_tokens))
            self._decode.observe(features, sample.seconds, batch, kv_tokens)

    def _observe_prefill(self, sample: PassSample, seconds: float) -> None:
        new = sample.new_tokens
        pairs = sample.pairs or new * sample.context_tokens + 0.5 * new * new
        left = seconds if seconds >= PREFILL_SHARE_MIN * sample.seconds else math.nan
        self._prefill.observe((1.0, float(new), float(pairs)), left, new, pairs / new)

    def observe_transfer(self, sample: TransferSample) -> None:
        """Learn one finished pull that did not wait for anything but bytes."""
        features = (1.0, float(sample.num_bytes or -1))
        self._transfer.observe(features, sample.seconds, sample.num_bytes)
        own = self._by_source.get(sample.source)
        if own is None and len(self._by_source) < SOURCES_MAX:
            own = self._by_source[sample.source] = Ranged(self._prior.transfer, capped_transfer, frozen=self._frozen)
        if own is not None:
            own.observe(features, sample.seconds, sample.num_bytes)

    # ---- what was learned ----

    @property
    def samples(self) -> int:
        return self._prefill.fit.samples + self._decode.fit.samples

    def residuals(self) -> dict[str, Residual]:
        """By model: prefill, decode, transfer."""
        return {
            "prefill": self._prefill.fit.residual(),
            "decode": self._decode.fit.residual(),
            "transfer": self._transfer.fit.residual(),
        }

    def learned(self) -> CostPrior:
        """The coefficients now, as a prior for a worker of the same kind of which nothing is known yet."""
        prefill, decode, transfer = (
            tuple(max(c, LEARNED_FLOOR * p, LEARNED_MIN) for c, p in zip(model.fit.coefficients, prior, strict=True))
            for model, prior in (
                (self._prefill, self._prior.prefill),
                (self._decode, self._prior.decode),
                (self._transfer, self._prior.transfer),
            )
        )
        return replace(
            self._prior,
            prefill=(prefill[0], prefill[1], prefill[2]),
            decode=(decode[0], decode[1], decode[2]),
            transfer=(transfer[0], transfer[1]),
        )
