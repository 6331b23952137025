"""Pure: what one node of a kind can do, as coefficients; checked when built. Presets: simulator/hardware/*.yaml."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from core.cost import CostPrior
from halfmoon.errors import ConfigError

COEFFICIENT_MIN = 1e-12
"""Seconds: a prior is above zero, also where the truth is zero."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One node. Durations in seconds.

    Args:
        source: of the figures, for reports.
        prefill_pass_s, prefill_token_s, prefill_pair_s: a prefill pass; each new token; each attended (query, key)
            pair: new * context + new**2 / 2.
        decode_step_s, decode_sequence_s, decode_token_s: a decode step; each sequence; each token of KV read.
        kv_token_bytes: K and V of one token over all layers.
        link_s, link_bytes_per_s: a copy between nodes; both ends have one link in each direction.
        move_s_per_byte: between the tiers of a node.
        message_s: one message between processes.
        block_tokens: tokens of a block.
        prefill_blocks, decode_blocks: slots of the DEVICE tier by role; a coupled worker has `prefill_blocks`.
        prefill_dram_blocks, decode_dram_blocks: slots of the DRAM tier.
        tokens_per_pass_max, prompts_per_pass_max: of one prefill pass.
        sequences_max: of one decode step.
        batch_blocks: blocks moved under one GO credit of the pull protocol.
        mixed_hides_weights: a coupled pass reads the weights while it computes its prompts' new tokens, so that only
            the longer of the two counts; else both do.

    Raises:
        ConfigError: naming the value.
    """

    name: str
    source: str
    prefill_pass_s: float
    prefill_token_s: float
    prefill_pair_s: float
    decode_step_s: float
    decode_sequence_s: float
    decode_token_s: float
    kv_token_bytes: int
    link_s: float
    link_bytes_per_s: float
    move_s_per_byte: float
    message_s: float
    block_tokens: int
    prefill_blocks: int
    decode_blocks: int
    prefill_dram_blocks: int = 0
    decode_dram_blocks: int = 0
    tokens_per_pass_max: int
    prompts_per_pass_max: int
    sequences_max: int
    batch_blocks: int
    mixed_hides_weights: bool = False

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if spec.type in ("int", "float"):
                if spec.type == "int" and isinstance(value, float):
                    raise ConfigError(key=f"hardware.{spec.name}", value=value, expected="an integer")
                least = 0 if spec.name.endswith("dram_blocks") or spec.type == "float" else 1
                if not (math.isfinite(value) and value >= least):
                    expected = f"a finite number, {least} or more"
                    raise ConfigError(key=f"hardware.{spec.name}", value=value, expected=expected)
        for name in ("link_bytes_per_s", "prefill_token_s", "decode_step_s"):
            if getattr(self, name) <= 0.0:
                raise ConfigError(key=f"hardware.{name}", value=getattr(self, name), expected="a number above 0")

    @property
    def block_bytes(self) -> int:
        return self.block_tokens * self.kv_token_bytes

    def with_chunk(self, tokens: int, *, coupled: bool) -> Hardware:
        """Passes of at most so many tokens.

        Args:
            coupled: nodes do both: prompts share a pass, and at most half of its tokens are steps of sequences.
        """
        hardware = replace(self, tokens_per_pass_max=tokens)
        most = min(self.sequences_max, tokens // 2)
        return replace(hardware, prompts_per_pass_max=most, sequences_max=most) if coupled else hardware

    def with_decode_room(self, tokens: int) -> Hardware:
        """Whole blocks of so many tokens of KV on a decode node.

        Raises:
            ConfigError: less than one.
        """
        if tokens < self.block_tokens:
            raise ConfigError(
                key="decode-room", value=tokens, expected=f"a block, {self.block_tokens} tokens, at least"
            )
        return replace(self, decode_blocks=tokens // self.block_tokens)

    def scaled(self, *, link: float = 1.0, prefill: float = 1.0) -> Hardware:
        """Links and prefill passes of so many times the speed. MFU stands under prefill's costs alone."""
        return replace(
            self,
            link_bytes_per_s=self.link_bytes_per_s * link,
            prefill_pass_s=self.prefill_pass_s / prefill,
            prefill_token_s=self.prefill_token_s / prefill,
            prefill_pair_s=self.prefill_pair_s / prefill,
        )

    def prior(self, factors: Mapping[str, float]) -> CostPrior:
        """What is believed of this hardware before anything was measured: the truth times each term's factor.

        Args:
            factors: by term: prefill, decode, transfer, read (DRAM to DEVICE); those that are missing are 1.
        """

        def believed(term: str, *truth: float) -> list[float]:
            return [max(COEFFICIENT_MIN, factors.get(term, 1.0) * value) for value in truth]

        a, b, c = believed("prefill", self.prefill_pass_s, self.prefill_token_s, self.prefill_pair_s)
        d, e, f = believed("decode", self.decode_step_s, self.decode_sequence_s, self.decode_token_s)
        g, h = believed("transfer", self.link_s, 1.0 / self.link_bytes_per_s)
        i, j = believed("read", 0.0, self.move_s_per_byte)
        return CostPrior(prefill=(a, b, c), decode=(d, e, f), transfer=(g, h), read_dram=(i, j))
