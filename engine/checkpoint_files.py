"""Shell: a checkpoint directory as Hugging Face lays it out: which files it is made of, read without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.digests import content_digest
from engine.families import DecoderConfig, parse_config
from halfmoon.errors import CheckpointError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
JSON_BYTES_MAX = 1 << 28  # a large tokenizer.json is some 20 MB; a weight file by mistake is more


@dataclass(frozen=True, kw_only=True)
class CheckpointFiles:
    """Args:
    shards: the safetensors files, by name.
    """

    directory: Path
    config: DecoderConfig
    shards: tuple[Path, ...]

    def weights_digest(self) -> str:
        """Content digest of the weight files and of what the config means (not of its text, which tools rewrite)."""
        return content_digest(self.shards, repr(self.config))


def open_checkpoint(directory: Path) -> CheckpointFiles:
    """Read config.json and the shard index; no weights.

    Raises:
        CheckpointError: naming the file and what is missing, damaged or not supported.
    """
    config = open_config(directory / CONFIG)
    return CheckpointFiles(directory=directory, config=config, shards=_shard_paths(directory))


def open_config(path: Path) -> DecoderConfig:
    """Raises: CheckpointError: naming the file, and the family or key that is refused."""
    raw = read_json(path)
    try:
        return parse_config(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: naming the file: absent, unreadable, half-written, or not an object.
    """
    try:
        if path.stat().st_size > JSON_BYTES_MAX:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes; expected a JSON file")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON (half-written?): {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def optional_json(path: Path) -> dict[str, Any]:
    """As `read_json`, but an absent file is an empty object."""
    return read_json(path) if path.exists() else {}


def _shard_paths(directory: Path) -> tuple[Path, ...]:
    if (directory / INDEX).exists():
        return _indexed_shards(directory)
    if (directory / SINGLE).exists():
        return (directory / SINGLE,)
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern))
    if pickles:
        raise CheckpointError(f"{directory}: {pickles[0]} is a pickle, which is never loaded; convert to safetensors")
    raise CheckpointError(f"{directory}: no weights: neither {SINGLE} nor {INDEX}")


def _indexed_shards(directory: Path) -> tuple[Path, ...]:
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{directory / INDEX}: no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{directory / INDEX}: a shard's name leads out of the directory")
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        raise CheckpointError(f"{directory / missing[0]}: missing ({len(missing)} of {len(names)} shards are)")
    return tuple(directory / name for name in names)
