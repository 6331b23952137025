"""Shell: a GGUF file -> a checkpoint directory in the cache: safetensors, config, tokenizer, chat template. Once.

transformers reads the GGUF format (and dequantises it); what it would silently drop is refused here by name.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoint_files import CONFIG, SINGLE
from engine.digests import content_digest
from engine.families import FAMILIES, expected_tensors, parse_config
from halfmoon.errors import CheckpointError
from service.settings import cache_directory

if TYPE_CHECKING:
    import torch

MAGIC = b"GGUF"
HEAD = struct.Struct("<4sIQQ")  # magic, version, number of tensors, number of keys
VERSIONS = (2, 3)
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
    directory = checkpoint_directory(name or f"gguf-{content_digest([path])}")
    if not (directory / CONFIG).exists():
        check_gguf(path)
        with _lock(directory.parent / f".{directory.name}.lock"):
            if not (directory / CONFIG).exists():
                _import(path, directory)
    return directory


def checkpoint_directory(name: str) -> Path:
    """Where an imported model of that name lies, or will."""
    return cache_directory() / "models" / name


def check_gguf(path: Path) -> None:
    """Refuse at once what is no GGUF file; its content is read when it is imported.

    Raises:
        CheckpointError
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD.size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(head) < HEAD.size or not head.startswith(MAGIC):
        raise CheckpointError(f"{path}: not a GGUF file: it begins with {head[: len(MAGIC)]!r}, not with {MAGIC!r}")
    _, version, num_tensors, num_keys = HEAD.unpack(head)
    if version not in VERSIONS or not num_tensors or not num_keys:
        said = f"version {version}, {num_tensors} tensors, {num_keys} keys"
        raise CheckpointError(f"{path}: GGUF of {said}; expected version 2 or 3 (little-endian) and a model")


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
    config = _read_config(path) | {"dtype": _stored_dtype(reader)}
    save_file(_read_tensors(path, reader, config), directory / SINGLE, metadata={"format": "pt"})
    _write_tokenizer(path, directory)
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _read_config(path: Path) -> dict[str, Any]:
    """config.json's content."""
    from transformers import AutoConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    stated = load_gguf_checkpoint(str(path))["config"]
    family = FAMILIES.get(str(stated.get("model_type")))
    if family is None:
        raise CheckpointError(f"{path}: model family {stated.get('model_type')!r} is not supported")
    content = AutoConfig.for_model(**stated).to_dict() | {"architectures": [family.architecture]}
    return {key: value for key, value in content.items() if key != "transformers_version"}


def _read_tensors(path: Path, reader: Any, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor that the decoder reads, dequantised, by its Hugging Face name."""
    import torch
    from gguf import MODEL_ARCH_NAMES, dequantize, get_tensor_name_map
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    architecture = reader.fields["general.architecture"].contents()
    key = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(key, config["num_hidden_layers"])
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)  # llama: rows of q and k reordered
    stored = {tensor.name: tensor for tensor in reader.tensors}
    tensors = {}
    for name in expected_tensors(parse_config(config)):
        stem, _, suffix = name.rpartition(".")
        found = stored.get(f"{names.get_name(stem)}.{suffix}")
        if found is None:
            raise CheckpointError(f"{path}: tensor {name} ({names.get_name(stem)}.{suffix}) is missing")
        wide = processor.process(weights=dequantize(found.data, found.tensor_type), name=found.name).weights
        tensors[name] = torch.tensor(wide).to(getattr(torch, config["dtype"]))
    return tensors


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
