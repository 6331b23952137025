"""Shell: the decoder's operators in C++ for CPUs, and the choice between them and their torch twins."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from engine import build, prepacked
from engine.prepacked import PrepackedLinear
from engine.twins import Operators, PackedLinear, TorchOperators
from halfmoon.errors import ConfigError
from service.settings import operators_choice

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PanelLinear(PackedLinear):
    """A weight in panels of columns, in its own dtype (engine/tile.h); bias in fp32."""

    panels: Tensor
    bias: Tensor | None


class CpuOperators:
    """Implements `Operators` in C++ (engine/*.cpp). Batch-invariant: see engine/tile.h and engine/prepacked.py.

    Args:
        onednn: pack linears by oneDNN where their rows keep their bits; the panels take the rest.

    Raises:
        build.BuildError: where the operators can be neither built nor loaded, or fail their probe.
    """

    def __init__(self, *, onednn: bool = False) -> None:
        build.load_library()
        self.name = "cpp+onednn" if onednn else "cpp"
        self._onednn = onednn
        ops = torch.ops.halfmoon
        self._pack, self._linear = ops.pack.default, ops.linear.default
        # Bound once: the decoder calls them hundreds of times in a step.
        self.rms_norm = ops.rms_norm.default
        self.add_rms_norm = ops.add_rms_norm.default
        self.silu_mul = ops.silu_mul.default
        self.rope_ = ops.rope_.default
        self.write_kv = ops.write_kv.default
        self.paged_attention = ops.paged_attention.default
        self._probe()

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        if self._onednn and (packed := prepacked.prepack(weight, bias)):
            return packed
        return PanelLinear(
            in_features=weight.shape[1],
            out_features=weight.shape[0],
            panels=self._pack(weight.contiguous()),
            bias=None if bias is None else bias.float().contiguous(),
        )

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        if isinstance(packed, PrepackedLinear):
            return prepacked.linear(x, packed)
        assert isinstance(packed, PanelLinear)
        return self._linear(x, packed.panels, packed.bias, packed.out_features)

    def _probe(self) -> None:
        """The compiler must have kept the contract: the same bits of a row at every number of rows. Milliseconds."""
        weight = torch.randn(65, 97, generator=torch.Generator().manual_seed(1))
        panels = self._pack(weight)
        if prepacked.invariant_rows(lambda x: self._linear(x, panels, None, 65), 97, weight.dtype) != (1, 512):
            raise build.BuildError("the compiled product is not batch-invariant on this machine")


def select_operators(device: str, dtype: torch.dtype) -> Operators:
    """The fastest operators that run on `device`; $HALFMOON_OPERATORS (cpp or torch) overrides.

    Raises:
        ConfigError: an unknown choice, or cpp where it cannot run.
    """
    choice = operators_choice()
    if choice not in ("", "cpp", "torch"):
        raise ConfigError(key="HALFMOON_OPERATORS", value=choice, expected="cpp, torch, or nothing")
    if choice == "torch" or (not choice and torch.device(device).type != "cpu"):
        return TorchOperators()
    if not choice:
        return _cpp_or_twin(prepacked.runs_here(dtype))
    try:
        return CpuOperators(onednn=prepacked.runs_here(dtype))
    except build.BuildError as error:
        expected = f"a machine that builds it: {error}"
        raise ConfigError(key="HALFMOON_OPERATORS", value=choice, expected=expected) from error


@functools.cache  # a machine without a compiler is told once
def _cpp_or_twin(onednn: bool) -> Operators:
    try:
        return CpuOperators(onednn=onednn)
    except build.BuildError as error:
        log.warning("the C++ operators cannot run here, torch's own will (several times slower): %s", error)
        return TorchOperators()
