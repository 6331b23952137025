"""Shell: the safetensors files of a checkpoint: every tensor checked by name, shape and type, without torch."""

from __future__ import annotations

from typing import Any

from safetensors import SafetensorError, safe_open

from engine.checkpoint_files import CheckpointFiles
from engine.families import expected_tensors
from halfmoon.errors import CheckpointError

NAMES_SHOWN_MAX = 5  # of missing tensors, in one message
DTYPES = ("BF16", "F16", "F32")


class Shard:
    """One mapped safetensors file, whole by its header's account.

    Args:
        framework: "np" reads names, shapes and types; "pt" tensors too (and loads torch).

    Raises:
        CheckpointError: not a safetensors file, or cut short.
    """

    def __init__(self, path: str, framework: str) -> None:
        self._path = path
        try:
            self._file = safe_open(path, framework=framework)
            self.names = list(self._file.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from error

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises: CheckpointError: another shape or type than the model reads."""
        header = self._file.get_slice(name)
        found = tuple(header.get_shape())
        if found != shape:
            raise CheckpointError(f"{self._path}: tensor {name} has shape {found}; the config says {shape}")
        if header.get_dtype() not in DTYPES:
            raise CheckpointError(f"{self._path}: tensor {name} is {header.get_dtype()}; expected BF16, F16 or F32")

    def read(self, name: str) -> Any:
        """The tensor, of the framework's own kind. Raises: CheckpointError."""
        try:
            return self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._path}: tensor {name} cannot be read: {error}") from error


def open_shards(files: CheckpointFiles, framework: str = "np") -> dict[str, Shard]:
    """The shard of every tensor, by the tensor's name; each that the model reads is there and fits.

    Raises:
        CheckpointError: naming the file, the tensor and what is wrong.
    """
    expected = expected_tensors(files.config)
    owners = {name: shard for path in files.shards for shard in [Shard(str(path), framework)] for name in shard.names}
    missing = [name for name in expected if name not in owners]
    if missing:
        shown = ", ".join(missing[:NAMES_SHOWN_MAX]) + (", …" if len(missing) > NAMES_SHOWN_MAX else "")
        raise CheckpointError(f"{files.directory}: {len(missing)} of {len(expected)} tensors are missing: {shown}")
    for name, shape in expected.items():
        owners[name].check(name, shape)
    return owners
