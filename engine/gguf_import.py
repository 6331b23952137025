"""Shell: a GGUF file -> a checkpoint directory in the cache: safetensors, config, tokenizer, chat template. Once.

transformers reads the GGUF format (and dequantises it); what it would silently drop is refused here by name.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.checkpoint_files import CONFIG, SINGLE
from engine.digests import content_digest
from engine.families import FAMILIES, expected_tensors, parse_config
from halfmoon.errors import CheckpointError
from service.settings import cache_directory

IMPORT_S_MAX = 900.0  # waiting for another process that imports the same file
EXACT_IN_BF16 = frozenset({"BF16"})
WIDE_TYPES = frozenset({"F32", "F16"})  # of weight matrices: kept as fp32, since bf16 would round them


def import_gguf(path: Path, name: str | None = None) -> Path:
    """The checkpoint directory made from `path`, made now if it is not there; safe against a second process.

    Args:
        name: the directory's name under the cache's `models/`; None: from the file's content digest.

    Raises:
        CheckpointError: naming the file: damaged, cut short, or of a family or kind that is refused.
    """
    directory = cache_directory() / "models" / (name or f"gguf-{content_digest([path])}")
    if not (directory / CONFIG).exists():
        with _lock(directory.parent / f".{directory.name}.lock"):
            if not (directory / CONFIG).exists():
                _import(path, directory)
    return directory


def _import(path: Path, directory: Path) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        try:
            _write(path, temporary)
        except (ValueError, KeyError, IndexError, OSError, RuntimeError, ImportError) as error:
            raise CheckpointError(f"{path}: cannot be read as GGUF (cut short?): {error}") from error
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644)
        os.rename(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(path: Path, directory: Path) -> None:
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(str(path))
    _refuse_dropped(path, reader)
    config, tensors = _read(path, _stored_dtype(reader))
    expected = expected_tensors(parse_config(config))
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} of {len(expected)} tensors are missing: {missing[0]}")
    save_file({name: tensors[name].contiguous() for name in expected}, directory / SINGLE, metadata={"format": "pt"})
    _write_tokenizer(path, directory)
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _read(path: Path, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json's content and the tensors by their Hugging Face names."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    stated = load_gguf_checkpoint(str(path))["config"]
    family = FAMILIES.get(str(stated.get("model_type")))
    if family is None:
        raise CheckpointError(f"{path}: model family {stated.get('model_type')!r} is not supported")
    config = AutoConfig.for_model(**stated)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    tensors = load_gguf_checkpoint(
        str(path), return_tensors=True, model_to_load=skeleton, torch_dtype=getattr(torch, dtype)
    )["tensors"]
    content = config.to_dict() | {"architectures": [family.architecture], "dtype": dtype}
    return {k: v for k, v in content.items() if k != "transformers_version"}, tensors


def _stored_dtype(reader: Any) -> str:
    matrices = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    return "float32" if matrices & WIDE_TYPES else "bfloat16"


def _refuse_dropped(path: Path, reader: Any) -> None:
    """transformers' GGUF reader ignores these, and the model would be another one."""
    if any(tensor.name.startswith("rope_freqs") for tensor in reader.tensors):
        raise CheckpointError(
            f"{path}: RoPE frequency factors in GGUF are not supported; use the safetensors checkpoint"
        )
    for key, field in reader.fields.items():
        if key.endswith("rope.scaling.type") and field.contents() != "none":
            raise CheckpointError(f"{path}: RoPE scaling in GGUF is not supported; use the safetensors checkpoint")


def _write_tokenizer(path: Path, directory: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    tokenizer.save_pretrained(str(directory))


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the file lock `path`; a holder that dies lets it go.

    Raises:
        CheckpointError: after IMPORT_S_MAX.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline_s = time.monotonic() + IMPORT_S_MAX
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise CheckpointError(f"another process has held {path} for {IMPORT_S_MAX:.0f} s") from None
                time.sleep(0.1)
        yield
