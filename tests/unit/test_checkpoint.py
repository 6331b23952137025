"""Checkpoints that cannot be used are refused with the file and the tensor; digests name content, not dates."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import open_weights
from engine.checkpoint_files import open_checkpoint
from engine.default_model import NAME, default_model_directory
from engine.families import EMBEDDING
from engine.load import describe_model, load_engine
from halfmoon.errors import CheckpointError, ConfigError
from tests.tiny_models import saved, tiny_model

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_model("llama2, MHA"), tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def directory(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALFMOON_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def open_all(directory: Path) -> None:
    open_weights(open_checkpoint(directory), torch.float32, torch.device("cpu"))


def rewrite(directory: Path, **tensors: torch.Tensor | None) -> None:
    """Replace or remove (None) tensors of the only shard."""
    path = directory / "model.safetensors"
    content = {**load_file(path), **{name.replace("__", "."): t for name, t in tensors.items()}}
    save_file({name: t for name, t in content.items() if t is not None}, path)


def test_a_whole_checkpoint_opens_and_gives_copies_in_the_asked_dtype(directory: Path) -> None:
    tensor = open_weights(open_checkpoint(directory), torch.bfloat16, torch.device("cpu"))
    embedding = tensor(EMBEDDING)
    assert embedding.dtype == torch.bfloat16
    assert torch.equal(embedding, load_file(directory / "model.safetensors")[EMBEDDING].bfloat16())


def test_a_missing_tensor_is_named(directory: Path) -> None:
    rewrite(directory, **{DOWN: None})
    with pytest.raises(CheckpointError, match=f"1 of 30 tensors are missing: {DOWN}"):
        open_all(directory)


def test_a_wrong_shape_is_named_with_both_shapes(directory: Path) -> None:
    rewrite(directory, **{DOWN: torch.zeros(64, 95)})
    with pytest.raises(CheckpointError, match=rf"model.safetensors: tensor {DOWN} has shape \(64, 95\).*\(64, 96\)"):
        open_all(directory)


def test_quantised_integers_are_not_taken_for_weights(directory: Path) -> None:
    rewrite(directory, **{DOWN: torch.zeros(64, 96, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=f"tensor {DOWN} is I8"):
        open_all(directory)


@pytest.mark.parametrize("kept", [0, 5, 1000, -100])
def test_a_half_written_weight_file_is_named(directory: Path, kept: int) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a whole safetensors file"):
        open_all(directory)


def test_a_half_written_config_is_named(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(CheckpointError, match=r"config.json: not valid JSON \(half-written\?\)"):
        open_checkpoint(directory)


def test_a_refused_family_names_the_file_too(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(CheckpointError, match=r"config.json: model family 'mamba' is not supported"):
        open_checkpoint(directory)


def test_no_weights_and_pickled_weights_are_told_apart(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights: neither model.safetensors nor"):
        open_checkpoint(directory)
    (directory / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle"):
        open_checkpoint(directory)


def test_a_shard_that_did_not_arrive_is_named(directory: Path) -> None:
    names = {DOWN: "model-00001-of-00002.safetensors", EMBEDDING: "model-00002-of-00002.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    os.rename(directory / "model.safetensors", directory / names[DOWN])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors: missing \(1 of 2 shards are\)"):
        open_checkpoint(directory)


def test_an_index_that_leads_out_of_the_directory_is_refused(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with pytest.raises(CheckpointError, match="leads out of the directory"):
        open_checkpoint(directory)


def test_the_fingerprint_names_content(directory: Path) -> None:
    def digest() -> str:
        return describe_model(str(directory), dtype="float32", block_size=16).fingerprint.weights

    first = digest()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"transformers_version": "9"}))
    os.utime(directory / "model.safetensors", ns=(1, 1))
    assert digest() == first, "another date, another config text, the same meaning"
    (directory / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert digest() != first, "another meaning"
    (directory / "config.json").write_text(json.dumps(config))
    rewrite(directory, **{DOWN: torch.zeros(64, 96)})
    assert digest() != first, "other weights"


def test_describing_needs_no_weights_in_memory_and_is_what_the_engine_says(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFMOON_OPERATORS", "torch")  # the empty cache holds no built ones
    model = describe_model(str(directory), dtype="bfloat16", block_size=8)
    assert (model.vocab_size, model.context_tokens_max) == (211, 512)
    assert model.layout.block_bytes == 4 * 3 * 2 * 8 * 16 * 2
    assert load_engine(str(directory), dtype="bfloat16", block_size=8).model == model


def test_unknown_names_say_what_is_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="'smollm2-135m-instruct', 'fake', a checkpoint directory"):
        describe_model("gpt-5", dtype="bfloat16", block_size=16)
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read: No such file"):
        describe_model(str(tmp_path), dtype="bfloat16", block_size=16)
    with pytest.raises(ConfigError, match="dtype: got 'int4'"):
        describe_model("fake", dtype="int4", block_size=16)


def test_a_hub_that_cannot_be_reached_is_said_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"'nobody/no-such-model': no such directory here, and the hub"):
        describe_model("nobody/no-such-model", dtype="bfloat16", block_size=16)


def test_a_damaged_gguf_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFMOON_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "broken.gguf"
    for content in (b"", b"not a GGUF file, but long enough to have a header", b"GGUF\x03\0\0\0" + b"\x01" * 60):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"broken.gguf: (not a GGUF file|cannot be read as GGUF)"):
            describe_model(str(path), dtype="bfloat16", block_size=16)
    assert not [p for p in (tmp_path / "cache" / "models").iterdir() if p.is_dir()], "nothing half-made is left"


def test_the_builtin_model_samples_as_its_card_says_also_in_an_older_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFMOON_CACHE", str(tmp_path))
    directory = tmp_path / "models" / NAME
    directory.mkdir(parents=True)
    (directory / "config.json").write_text('{"eos_token_id": 2}')
    assert default_model_directory() == directory
    stated = json.loads((directory / "generation_config.json").read_text())
    assert stated == {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "eos_token_id": 2}
    (directory / "generation_config.json").write_text("{}")  # an operator's own is left alone
    default_model_directory()
    assert sorted(p.name for p in directory.iterdir()) == ["config.json", "generation_config.json"]
    assert (directory / "generation_config.json").read_text() == "{}"
