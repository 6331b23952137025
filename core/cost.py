"""Pure: how long things take: prefill, decode steps, transfers; fitted online from what workers measured.

Placement, admission and break-even gates ask the same three questions. Each answer is linear in a few features whose
coefficients are physical (seconds a pass, a token, an attended pair, a byte), so none of them may become negative.
The attention feature `new * context + new**2 / 2` is the number of attended (query, key) pairs of a causal prefill
(FAST'25, Eq. 1); it adds up over chunks, so only the constant is paid once per pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from core.fit import SAMPLES_MIN, LinearFit, Residual, Span
from core.messages import PassSample, TransferSample
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


class _TransferFit:
    def __init__(self, prior: Sequence[float], *, frozen: bool) -> None:
        self.fit = LinearFit(prior, frozen=frozen)
        self.span = Span()

    def observe(self, num_bytes: int, seconds: float) -> None:
        if self.fit.observe((1.0, float(num_bytes)), seconds):
            self.span.see(num_bytes)

    def confident(self, num_bytes: float) -> bool:
        in_range = self.fit.frozen or self.span.holds(num_bytes)
        return in_range and self.fit.trusted((1.0, float(num_bytes)))


class WorkerCost:
    """One worker's costs, learned from its own samples.

    Args:
        prior: believed until enough was measured.
        tokens_per_pass_max: a longer prefill is cut into passes of at most this many tokens.
        frozen: the prior is a profile, believed everywhere and for good; samples only show how wrong it is.
    """

    def __init__(self, prior: CostPrior, *, tokens_per_pass_max: int, frozen: bool = False) -> None:
        assert tokens_per_pass_max > 0
        self._prior = prior
        self._pass_max = tokens_per_pass_max
        self._frozen = frozen
        self._prefill = LinearFit(prior.prefill, frozen=frozen)
        self._decode = LinearFit(prior.decode, frozen=frozen)
        self._transfer = _TransferFit(prior.transfer, frozen=frozen)
        self._by_source: dict[str, _TransferFit] = {}
        self._new, self._depth = Span(), Span()
        self._batch, self._kv_tokens = Span(), Span()

    # ---- questions ----

    def prefill_s(self, new: int, context: int) -> Estimate:
        """Computing `new` tokens after `context` earlier ones, chunked, with nothing else running."""
        return Estimate(self.prefill_seconds(new, context), self.prefill_known(new, context))

    def prefill_seconds(self, new: int, context: int) -> float:
        """`prefill_s` alone: placement asks every worker how long, and only those that it keeps how sure."""
        if new <= 0:
            return 0.0
        a, b, c = self._prefill.coefficients
        passes = -(-new // self._pass_max)
        return a * passes + b * new + c * (new * context + 0.5 * new * new)

    def prefill_known(self, new: int, context: int) -> bool:
        if new <= 0:
            return True
        chunk = min(new, self._pass_max)
        depth = context + new - 0.5 * chunk  # of the last pass, the deepest
        in_range = self._frozen or (self._new.holds(chunk) and self._depth.holds(depth))
        return in_range and self._prefill.trusted((1.0, float(chunk), chunk * depth))

    def decode_step_s(self, batch: int, kv_tokens: int) -> Estimate:
        """One step of `batch` sequences over `kv_tokens` tokens of KV in all."""
        return Estimate(self.decode_seconds(batch, kv_tokens), self.decode_known(batch, kv_tokens))

    def decode_seconds(self, batch: int, kv_tokens: int) -> float:
        if batch <= 0:
            return 0.0
        a, b, c = self._decode.coefficients
        return a + b * batch + c * kv_tokens

    def decode_seconds_watched(self, batch: int, kv_tokens: int) -> float:
        """The same by the last solution: for metrics and samples, which must not change a decision by asking."""
        a, b, c = self._decode.solved
        return a + b * batch + c * kv_tokens if batch > 0 else 0.0

    def decode_known(self, batch: int, kv_tokens: int) -> bool:
        if batch <= 0:
            return True
        in_range = self._frozen or (self._batch.holds(batch) and self._kv_tokens.holds(kv_tokens))
        return in_range and self._decode.trusted((1.0, float(batch), float(kv_tokens)))

    def transfer_s(self, num_bytes: float, source: str = "") -> Estimate:
        """Pulling `num_bytes` into this worker; by `source`'s own model once that has seen enough."""
        return Estimate(self.transfer_seconds(num_bytes, source), self.transfer_known(num_bytes, source))

    def transfer_seconds(self, num_bytes: float, source: str = "") -> float:
        if num_bytes <= 0:
            return 0.0
        a, b = self._transfer_model(source).fit.coefficients
        return a + b * num_bytes

    def transfer_known(self, num_bytes: float, source: str = "") -> bool:
        return num_bytes <= 0 or self._transfer_model(source).confident(num_bytes)

    def _transfer_model(self, source: str) -> _TransferFit:
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
            _, per_sequence, per_token = self._decode.coefficients
            self._observe_prefill(sample, sample.seconds - (per_sequence * batch + per_token * kv_tokens))
        elif self._decode.observe((1.0 if batch > 0 else math.nan, float(batch), float(kv_tokens)), sample.seconds):
            self._batch.see(batch)
            self._kv_tokens.see(kv_tokens)

    def _observe_prefill(self, sample: PassSample, seconds: float) -> None:
        new = sample.new_tokens
        pairs = sample.pairs or new * sample.context_tokens + 0.5 * new * new
        left = seconds if seconds >= PREFILL_SHARE_MIN * sample.seconds else math.nan
        if self._prefill.observe((1.0, float(new), float(pairs)), left):
            self._new.see(new)
            self._depth.see(pairs / new)

    def observe_transfer(self, sample: TransferSample) -> None:
        """Learn one finished pull that did not wait for anything but bytes."""
        self._transfer.observe(sample.num_bytes or -1, sample.seconds)
        own = self._by_source.get(sample.source)
        if own is None and len(self._by_source) < SOURCES_MAX:
            own = self._by_source[sample.source] = _TransferFit(self._prior.transfer, frozen=self._frozen)
        if own is not None:
            own.observe(sample.num_bytes or -1, sample.seconds)

    # ---- what was learned ----

    @property
    def samples(self) -> int:
        return self._prefill.samples + self._decode.samples

    def residuals(self) -> dict[str, Residual]:
        """By model: prefill, decode, transfer."""
        return {
            "prefill": self._prefill.residual(),
            "decode": self._decode.residual(),
            "transfer": self._transfer.fit.residual(),
        }

    def learned(self) -> CostPrior:
        """The coefficients now, as a prior for a worker of the same kind of which nothing is known yet."""
        prefill, decode, transfer = (
            tuple(max(c, LEARNED_FLOOR * p, LEARNED_MIN) for c, p in zip(fit.coefficients, prior, strict=True))
            for fit, prior in (
                (self._prefill, self._prior.prefill),
                (self._decode, self._prior.decode),
                (self._transfer.fit, self._prior.transfer),
            )
        )
        return replace(
            self._prior,
            prefill=(prefill[0], prefill[1], prefill[2]),
            decode=(decode[0], decode[1], decode[2]),
            transfer=(transfer[0], transfer[1]),
        )
