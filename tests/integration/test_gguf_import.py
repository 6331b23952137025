"""The real GGUF file: imported once, the same by two processes, and the same numbers as transformers' own loading."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from engine.checkpoint_files import open_checkpoint
from engine.default_model import default_model_directory, wheel_file
from engine.gguf_import import import_gguf
from engine.load import describe_model
from engine.tokenizer import open_tokenizer


@pytest.mark.model
def test_the_default_model_is_a_whole_checkpoint() -> None:
    directory = default_model_directory()
    config = open_checkpoint(directory).config
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert (config.tied, config.vocab_size, config.context_tokens_max) == (True, 49152, 8192)
    assert (config.rope.kind, config.rope.theta) == ("default", 1e5)
    assert describe_model("smollm2-135m-instruct").layout.token_bytes == 23_040
    tokenizer = open_tokenizer(directory)
    assert tokenizer.eos_token_ids == (2,)
    chat = tokenizer.render_chat([{"role": "user", "content": "Hi"}])
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode("<|im_start|>user\nHi<|im_end|>")[:2] == [1, 4093]


def imported(cache: str, results: multiprocessing.Queue[str]) -> None:
    import os

    os.environ["HALFMOON_CACHE"] = cache
    results.put(str(import_gguf(wheel_file())))


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_import_once_and_get_transformers_own_weights(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[str] = context.Queue()
    processes = [context.Process(target=imported, args=(str(tmp_path), results)) for _ in range(2)]
    for process in processes:
        process.start()
    directories = {results.get(timeout=800) for _ in processes}
    for process in processes:
        process.join(timeout=30)
    assert len(directories) == 1
    directory = Path(directories.pop())
    assert [p.name for p in directory.parent.iterdir() if p.is_dir()] == [directory.name], "nothing half-made is left"
    assert json.loads((directory / "config.json").read_text())["dtype"] == "bfloat16"
    ours = load_file(directory / "model.safetensors")
    theirs = transformers_tensors(wheel_file())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def transformers_tensors(path: Path) -> dict[str, torch.Tensor]:
    """By transformers' own way from GGUF names to Hugging Face names, which needs a model to ask."""
    config = AutoConfig.for_model(**load_gguf_checkpoint(str(path))["config"])
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    loaded = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=skeleton, torch_dtype=torch.bfloat16)
    tensors: dict[str, torch.Tensor] = loaded["tensors"]
    return tensors
