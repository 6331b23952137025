"""Shell: content digests of checkpoint files, remembered by (path, size, modification time)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from halfmoon.errors import CheckpointError
from service.settings import cache_directory

CHUNK_BYTES = 1 << 22
REMEMBERED_MAX = 512  # files; a checkpoint has at most a few hundred shards
DIGEST_BYTES = 16


def content_digest(paths: Sequence[Path], meaning: str = "") -> str:
    """BLAKE2b over `meaning` and the files' names and contents, in hex.

    Reads only files that changed since they were last read.

    Modifies: the memory of digests under the cache directory. (Processes that race there lose an entry, not a
    digest: the file is read again.)

    Raises:
        CheckpointError: naming the file that cannot be read.
    """
    memory_path = cache_directory() / "digests.json"
    memory = _recall(memory_path)
    known = len(memory)
    whole = hashlib.blake2b(meaning.encode(), digest_size=DIGEST_BYTES)
    for path in sorted(paths, key=lambda p: p.name):
        whole.update(f"{path.name} {_file_digest(path, memory)}\n".encode())
    if len(memory) != known:
        _remember(memory_path, memory)
    return whole.hexdigest()


def _file_digest(path: Path, memory: dict[str, str]) -> str:
    try:
        stat = path.stat()
        key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        if key not in memory:
            memory[key] = _read_digest(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return memory[key]


def _read_digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _recall(path: Path) -> dict[str, str]:
    """Empty when there is no memory or it is damaged: it can be made again."""
    with contextlib.suppress(OSError, ValueError):
        memory = json.loads(path.read_text())
        if isinstance(memory, dict):
            return {str(k): str(v) for k, v in memory.items()}
    return {}


def _remember(path: Path, memory: dict[str, str]) -> None:
    latest = dict(list(memory.items())[-REMEMBERED_MAX:])
    with contextlib.suppress(OSError):  # a read-only or full cache directory only costs time
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(latest, file, indent=0)
        os.replace(file.name, path)
