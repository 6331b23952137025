"""Shell: a checkpoint's weights: every tensor checked by name and shape before the first one is used."""

from __future__ import annotations

from collections.abc import Callable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.checkpoint_files import CheckpointFiles
from engine.families import expected_tensors
from halfmoon.errors import CheckpointError

NAMES_SHOWN_MAX = 5  # of missing tensors, in one message


def open_weights(files: CheckpointFiles, dtype: torch.dtype, device: torch.device) -> Callable[[str], Tensor]:
    """Check every expected tensor's presence and shape, then return a source of tensors by name.

    The source reads from the mapped files when called; its tensors are copies, owned by the caller.

    Raises:
        CheckpointError: (the source too) naming the file, the tensor and what is wrong.
    """
    expected = expected_tensors(files.config)
    owners = {name: shard for path in files.shards for shard in [_Shard(str(path))] for name in shard.names}
    missing = [name for name in expected if name not in owners]
    if missing:
        shown = ", ".join(missing[:NAMES_SHOWN_MAX]) + (", …" if len(missing) > NAMES_SHOWN_MAX else "")
        raise CheckpointError(f"{files.directory}: {len(missing)} of {len(expected)} tensors are missing: {shown}")
    for name, shape in expected.items():
        owners[name].check(name, shape)

    def tensor(name: str) -> Tensor:
        assert name in expected, f"{name} is not in families.expected_tensors"
        return owners[name].read(name).to(device=device, dtype=dtype)

    return tensor


class _Shard:
    """One mapped safetensors file."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._file = safe_open(path, framework="pt")
            self.names = list(self._file.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from error

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        header = self._file.get_slice(name)
        found = tuple(header.get_shape())
        if found != shape:
            raise CheckpointError(f"{self._path}: tensor {name} has shape {found}; the config says {shape}")
        if header.get_dtype() not in ("BF16", "F16", "F32"):
            raise CheckpointError(f"{self._path}: tensor {name} is {header.get_dtype()}; expected BF16, F16 or F32")

    def read(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._path}: tensor {name} cannot be read: {error}") from error
        return tensor
