"""Pure: how long things take: prefill, decode steps, transfers; fitted online from what workers measured.

Placement, admission and break-even gates ask the same three questions. Each answer is linear in a few features whose
coefficients are physical (seconds a pass, a token, an attended pair, a byte), so none of them may become negative.
The attention feature `new * context + new**2 / 2` is the number of attended (query, key) pairs of a causal prefill
(FAST'25, Eq. 1); it adds up over chunks, so only the constant is paid once per pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from core.messages import PassSample, TransferSample

FORGETTING = 0.97
"""Weight of a sample after one more: a model follows a change within a hundred passes, which are seconds."""

PRIOR_VARIANCE = 1e3
"""Of each coefficient, relative to its prior: the first samples outvote the prior, unseen directions keep it."""

VARIANCE_TRACE_MAX = 1e4
"""Above it forgetting pauses: samples that all look alike must not blow up what was learned before."""

SAMPLES_MIN = 8
"""Fewer than this and no answer is called confident."""

RANGE_STRETCH = 1.25
"""An input this much outside the smallest or largest one seen still counts as inside the fitted range."""

ERROR_DECAY = 0.95
"""Of the running means of residuals: about the last twenty samples."""

SOURCES_MAX = 256
"""Senders with a transfer model of their own, per receiver; further ones share the receiver's."""


class Estimate(NamedTuple):
    """A predicted duration. `in_range` False: extrapolated, or still the prior; never reject anybody by it."""

    seconds: float
    in_range: bool

    def plus(self, other: Estimate) -> Estimate:
        return Estimate(self.seconds + other.seconds, self.in_range and other.in_range)


NOTHING = Estimate(0.0, True)


@dataclass(frozen=True, kw_only=True)
class Residual:
    """How wrong the predictions were just before each sample was learned (running means).

    Args:
        bias: mean of (actual - predicted) / actual; above 0: predictions were too low.
        error: mean of |actual - predicted| / actual.
    """

    samples: int
    refused: int
    bias: float
    error: float


@dataclass(frozen=True, kw_only=True)
class CostPrior:
    """Coefficients believed before anything was measured, all above zero, in seconds.

    Args:
        prefill: per pass, per new token, per attended pair.
        decode: per step, per sequence in the batch, per token of KV read.
        transfer: per transfer, per byte.
    """

    prefill: tuple[float, float, float] = (0.01, 8e-4, 1e-7)
    decode: tuple[float, float, float] = (0.03, 3e-3, 1e-6)
    transfer: tuple[float, float] = (2e-3, 1e-9)

    def __post_init__(self) -> None:
        for value in (*self.prefill, *self.decode, *self.transfer):
            assert 0.0 < value < math.inf, f"a cost prior must be finite and above zero: {self}"


class LinearFit:
    """Recursive least squares with forgetting over relative errors, coefficients kept at or above zero.

    Works on multiples of the prior, so that everything is dimensionless and of order one: alpha starts at (1, ..., 1),
    and a sample (x, y) is the equation sum(alpha_i * prior_i * x_i / y) = 1.
    """

    def __init__(self, prior: Sequence[float]) -> None:
        self._prior = tuple(prior)
        self._alpha = [1.0] * len(prior)
        size = len(prior)
        self._variance = [[PRIOR_VARIANCE if i == j else 0.0 for j in range(size)] for i in range(size)]
        self._bias = 0.0
        self._error = 0.0
        self.samples = 0
        self.refused = 0
        self.coefficients: tuple[float, ...] = self._prior

    def predict(self, features: Sequence[float]) -> float:
        return max(0.0, sum(c * x for c, x in zip(self.coefficients, features, strict=True)))

    def observe(self, features: Sequence[float], seconds: float) -> bool:
        """Learn one measurement. False: it is no duration (NaN, infinite, not above zero); refused and counted."""
        if not (math.isfinite(seconds) and seconds > 0.0) or not all(math.isfinite(x) and x >= 0.0 for x in features):
            self.refused += 1
            return False
        self._book_residual((seconds - self.predict(features)) / seconds)
        self._update([p * x / seconds for p, x in zip(self._prior, features, strict=True)])
        self.coefficients = tuple(p * a for p, a in zip(self._prior, self._alpha, strict=True))
        self.samples += 1
        return True

    def residual(self) -> Residual:
        return Residual(samples=self.samples, refused=self.refused, bias=self._bias, error=self._error)

    def _book_residual(self, relative: float) -> None:
        decay = min(ERROR_DECAY, self.samples / (self.samples + 1))
        self._bias = decay * self._bias + (1.0 - decay) * relative
        self._error = decay * self._error + (1.0 - decay) * abs(relative)

    def _update(self, x: list[float]) -> None:
        p, size = self._variance, len(x)
        px = [sum(p[i][j] * x[j] for j in range(size)) for i in range(size)]
        gain = 1.0 / (FORGETTING + sum(x[i] * px[i] for i in range(size)))
        error = 1.0 - sum(a * v for a, v in zip(self._alpha, x, strict=True))
        self._alpha = [max(0.0, a + gain * px[i] * error) for i, a in enumerate(self._alpha)]
        trace = sum(p[i][i] for i in range(size))
        keep = FORGETTING if trace < VARIANCE_TRACE_MAX else 1.0
        self._variance = [[(p[i][j] - gain * px[i] * px[j]) / keep for j in range(size)] for i in range(size)]


class Span:
    """The range of one input that was seen, stretched a little."""

    def __init__(self) -> None:
        self._low = math.inf
        self._high = -math.inf

    def see(self, value: float) -> None:
        self._low = min(self._low, value / RANGE_STRETCH)
        self._high = max(self._high, value * RANGE_STRETCH)

    def holds(self, value: float) -> bool:
        return self._low <= value <= self._high


class _TransferFit:
    def __init__(self, prior: Sequence[float]) -> None:
        self.fit = LinearFit(prior)
        self.span = Span()

    def observe(self, num_bytes: int, seconds: float) -> None:
        if self.fit.observe((1.0, float(num_bytes)), seconds):
            self.span.see(num_bytes)

    def confident(self, num_bytes: int) -> bool:
        return self.fit.samples >= SAMPLES_MIN and self.span.holds(num_bytes)


class WorkerCost:
    """One worker's costs, learned from its own samples.

    Args:
        prior: believed until enough was measured.
        tokens_per_pass_max: a longer prefill is cut into passes of at most this many tokens.
    """

    def __init__(self, prior: CostPrior, *, tokens_per_pass_max: int) -> None:
        assert tokens_per_pass_max > 0
        self._prior = prior
        self._pass_max = tokens_per_pass_max
        self._prefill = LinearFit(prior.prefill)
        self._decode = LinearFit(prior.decode)
        self._transfer = _TransferFit(prior.transfer)
        self._by_source: dict[str, _TransferFit] = {}
        self._new, self._end = Span(), Span()
        self._batch, self._kv_tokens = Span(), Span()

    # ---- questions ----

    def prefill_s(self, new: int, context: int) -> Estimate:
        """Computing `new` tokens after `context` earlier ones, chunked, with nothing else running."""
        if new <= 0:
            return NOTHING
        a, b, c = self._prefill.coefficients
        chunk = min(new, self._pass_max)
        passes = -(-new // self._pass_max)
        seconds = a * passes + b * new + c * (new * context + 0.5 * new * new)
        known = self._prefill.samples >= SAMPLES_MIN
        return Estimate(seconds, known and self._new.holds(chunk) and self._end.holds(context + new))

    def decode_step_s(self, batch: int, kv_tokens: int) -> Estimate:
        """One step of `batch` sequences over `kv_tokens` tokens of KV in all."""
        if batch <= 0:
            return NOTHING
        a, b, c = self._decode.coefficients
        known = self._decode.samples >= SAMPLES_MIN
        in_range = known and self._batch.holds(batch) and self._kv_tokens.holds(kv_tokens)
        return Estimate(a + b * batch + c * kv_tokens, in_range)

    def transfer_s(self, num_bytes: int, source: str = "") -> Estimate:
        """Pulling `num_bytes` into this worker; by `source`'s own model once that has seen enough."""
        if num_bytes <= 0:
            return NOTHING
        own = self._by_source.get(source)
        model = own if own is not None and own.fit.samples >= SAMPLES_MIN else self._transfer
        a, b = model.fit.coefficients
        return Estimate(a + b * num_bytes, model.confident(num_bytes))

    # ---- samples ----

    def observe_pass(self, sample: PassSample) -> None:
        """Learn one engine pass. A mixed one counts for prefill, less what its decode part adds to a pass."""
        new, context, batch, kv_tokens = sample.new_tokens, sample.context_tokens, sample.batch, sample.kv_tokens
        if new > 0:
            _, per_sequence, per_token = self._decode.coefficients
            decode_part = per_sequence * batch + per_token * kv_tokens
            pairs = new * context + 0.5 * new * new
            if self._prefill.observe((1.0, float(new), pairs), sample.seconds - decode_part):
                self._new.see(new)
                self._end.see(context + new)
        elif self._decode.observe((1.0 if batch > 0 else math.nan, float(batch), float(kv_tokens)), sample.seconds):
            self._batch.see(batch)
            self._kv_tokens.see(kv_tokens)

    def observe_transfer(self, sample: TransferSample) -> None:
        """Learn one finished pull that did not wait for anything but bytes."""
        self._transfer.observe(sample.num_bytes or -1, sample.seconds)
        own = self._by_source.get(sample.source)
        if own is None and len(self._by_source) < SOURCES_MAX:
            own = self._by_source[sample.source] = _TransferFit(self._prior.transfer)
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
        floor = 1e-15  # a coefficient that was fitted to zero must still be able to rise
        prefill, decode, transfer = (
            tuple(max(c, floor) for c in fit.coefficients) for fit in (self._prefill, self._decode, self._transfer.fit)
        )
        return CostPrior(
            prefill=(prefill[0], prefill[1], prefill[2]),
            decode=(decode[0], decode[1], decode[2]),
            transfer=(transfer[0], transfer[1]),
        )
