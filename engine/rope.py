"""Shell: rotary position embedding: a RopeConfig's inverse frequencies, and cos and sin by position.

Formulas: default, Su et al. 2021 (arXiv 2104.09864); linear, Chen et al. 2023 (2306.15595); yarn, Peng et al. 2023
(2309.00071); llama3, the Llama 3.1 release. Order of operations as in transformers, so that fp32 results agree bit
for bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.rope_config import RopeConfig

PAGE = 4096  # positions computed at once: always the same shape, so a position's bits never depend on the length


class RopeTable:
    """cos and sin by position, computed a page at a time as positions are first asked for.

    Grows to context_tokens_max * dim * 4 bytes (64 MiB at 128 k positions and dim 128).
    """

    def __init__(self, config: RopeConfig, device: torch.device) -> None:
        inverse, self._scale = inverse_frequencies(config)
        self._inverse = inverse.to(device)
        self._cos = torch.empty(0, config.dim // 2, device=device)
        self._sin = torch.empty(0, config.dim // 2, device=device)

    def lookup(self, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """cos and sin, fp32 [n, dim / 2], of positions int64 [n], all of them below `end`. May grow the table."""
        while end > self._cos.shape[0]:
            self._add_page()
        return self._cos[positions], self._sin[positions]

    def _add_page(self) -> None:
        first = self._cos.shape[0]
        positions = torch.arange(first, first + PAGE, device=self._cos.device, dtype=torch.float32)
        angles = positions[:, None] * self._inverse
        self._cos = torch.cat((self._cos, angles.cos() * self._scale))
        self._sin = torch.cat((self._sin, angles.sin() * self._scale))


def inverse_frequencies(config: RopeConfig) -> tuple[Tensor, float]:
    """Inverse frequencies, fp32 [dim / 2], and the factor on cos and sin."""
    powers = config.theta ** (torch.arange(0, config.dim, 2, dtype=torch.float32) / config.dim)
    match config.kind:
        case "default":
            return 1.0 / powers, 1.0
        case "linear":
            return 1.0 / powers / config.factor, 1.0
        case "llama3":
            return _llama3(config, 1.0 / powers), 1.0
        case "yarn":
            return _yarn(config, powers), _attention_factor(config)
    raise AssertionError(f"RopeConfig.kind {config.kind!r} is not one of rope_config.KINDS")


def _llama3(config: RopeConfig, inverse: Tensor) -> Tensor:
    low_wavelength = config.original_context / config.low_freq_factor
    high_wavelength = config.original_context / config.high_freq_factor
    wavelength = 2 * math.pi / inverse
    stretched = torch.where(wavelength > low_wavelength, inverse / config.factor, inverse)
    band = config.high_freq_factor - config.low_freq_factor
    smooth = (config.original_context / wavelength - config.low_freq_factor) / band
    blended = (1 - smooth) * stretched / config.factor + smooth * stretched
    medium = ~(wavelength < high_wavelength) & ~(wavelength > low_wavelength)
    return torch.where(medium, blended, stretched)


def _yarn(config: RopeConfig, powers: Tensor) -> Tensor:
    low, high = _correction_dim(config, config.beta_fast), _correction_dim(config, config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.dim - 1)
    span = (high - low) or 0.001  # equal borders: a step
    ramp = torch.clamp((torch.arange(config.dim // 2, dtype=torch.float32) - low) / span, 0, 1)
    keep = 1 - ramp
    return 1.0 / (config.factor * powers) * (1 - keep) + 1.0 / powers * keep


def _correction_dim(config: RopeConfig, rotations: float) -> float:
    """The dimension that turns `rotations` times over the original context."""
    turns = math.log(config.original_context / (rotations * 2 * math.pi))
    return (config.dim * turns) / (2 * math.log(config.theta))


def _attention_factor(config: RopeConfig) -> float:
    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return _mscale(config.factor, config.mscale) / _mscale(config.factor, config.mscale_all_dim)
    return _mscale(config.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
