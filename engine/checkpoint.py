"""Shell: a checkpoint's weights: every tensor checked by name and shape before the first one is used."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.checkpoint_files import CheckpointFiles
from engine.shards import open_shards


def open_weights(files: CheckpointFiles, dtype: torch.dtype, device: torch.device) -> Callable[[str], Tensor]:
    """Check every expected tensor's presence and shape, then return a source of tensors by name.

    The source reads from the mapped files when called; its tensors are copies, owned by the caller.

    Raises:
        CheckpointError: (the source too) naming the file, the tensor and what is wrong.
    """
    owners = open_shards(files, "pt")

    def tensor(name: str) -> Tensor:
        assert name in owners, f"{name} is not in families.expected_tensors"
        read: Tensor = owners[name].read(name)
        return read.to(device=device, dtype=dtype)

    return tensor
