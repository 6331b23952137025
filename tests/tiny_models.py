"""Small random checkpoints of every family in the table, and a bench that drives an engine over its pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from engine.load import load_engine
from engine.protocol import Slice
from engine.torch_engine import TorchEngine
from halfmoon.types import SamplingParams

VOCAB = 211
GREEDY = SamplingParams()

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2, MHA": ("llama", {"num_key_value_heads": 4}),
    "llama3, tied": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama, MQA, biases, linear": (
        "llama",
        {
            "num_key_value_heads": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        },
    ),
    "smollm2": ("llama", {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN_ROPE}),
    "qwen2, upper layers windowed": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen3, wide heads": ("qwen3", {"head_dim": 32}),
    "qwen3, biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "mistral, window": ("mistral", {"sliding_window": 24}),
    "mistral, no window": ("mistral", {"sliding_window": None, "head_dim": 32}),
}


def tiny_model(variant: str, seed: int = 5) -> PreTrainedModel:
    """fp32, weights large enough that logits differ clearly and every bias and norm matters."""
    model_type, overrides = VARIANTS[variant]
    config = AutoConfig.for_model(model_type, **(SHAPE | overrides))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * drawn)
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * drawn)
            else:
                parameter.copy_(drawn if "embed" in name else drawn / parameter.shape[1] ** 0.5)
    return model


def saved(model: PreTrainedModel, directory: Path, **options: Any) -> Path:
    model.save_pretrained(directory, **options)
    return directory


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(0, VOCAB, (length,), generator=generator).tolist()


@dataclass
class Bench:
    """An engine with a pool of its own, poisoned with NaN so that a block read before it is written shows."""

    engine: TorchEngine
    num_slots: int = 64

    def __post_init__(self) -> None:
        layout = self.engine.model.layout
        element = b"\xff" * layout.element_bytes  # a NaN in bf16 and in fp32
        self.pool = bytearray(element * (self.num_slots * layout.block_bytes // layout.element_bytes))
        self.engine.bind(memoryview(self.pool), self.num_slots)

    def run(self, *parts: tuple[Sequence[int], int, int, Sequence[int]]) -> Tensor:
        """One pass over (tokens of the whole sequence, start, end, slots) parts: each part's last logits."""
        return self.engine.logits(
            [Slice(token_ids=t[start:end], start=start, slots=slots, sampling=GREEDY) for t, start, end, slots in parts]
        )

    def chunked(self, tokens: Sequence[int], cuts: Sequence[int], slots: Sequence[int]) -> Tensor:
        """Logits at the end of every chunk; `cuts` are the chunks' ends."""
        starts = [0, *cuts[:-1]]
        return torch.cat([self.run((tokens, a, b, slots)) for a, b in zip(starts, cuts, strict=True)])


def bench(directory: Path | str, dtype: str, block_size: int = 16, num_slots: int = 64) -> Bench:
    engine = load_engine(str(directory), dtype=dtype, block_size=block_size, threads=1)
    assert isinstance(engine, TorchEngine)
    return Bench(engine, num_slots)
