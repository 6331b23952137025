"""Shell: lines into a file of bounded size, written by a thread: a slow or full disk never stalls the loop.

With `files_max` 1 a file that is full takes no further line: a recording, which has no holes. With more, the file
becomes PATH.1, that one PATH.2, and the oldest is dropped: a log, which goes on after whatever happened.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO

from halfmoon.errors import ConfigError

log = logging.getLogger("service.lines")

WAITING_MAX = 4096
"""Lines that may wait for the disk; beyond them lines are refused: memory is bounded."""

CLOSE_S_MAX = 5.0


class LineWriter:
    """One owner offers lines; one thread writes them.

    Args:
        fresh: never touch a file that is there: the next free name (run.jsonl, run.2.jsonl, …) is taken.
        setting: that names the path, for the error.
        farewell: of (why, lines before it): the last line of a recording that ends early.

    Attributes:
        refused: lines that were not taken, or that the disk did not take.
        failure: why a recording ended early; empty: it did not.

    Raises:
        ConfigError: the file cannot be made.
    """

    def __init__(
        self,
        path: Path,
        *,
        bytes_max: int,
        files_max: int = 1,
        waiting_max: int = WAITING_MAX,
        fresh: bool = False,
        setting: str = "file",
        farewell: Callable[[str, int], str] | None = None,
    ) -> None:
        self.refused = 0
        self.failure = ""
        self._bytes_max = bytes_max
        self._files_max = files_max
        self._farewell = farewell
        self._lines = 0
        self._waiting: queue.Queue[bytes | None] = queue.Queue(waiting_max)
        try:
            self.path, self._file = create_fresh(path) if fresh else (path, _opened(path))
        except OSError as error:
            expected = f"a file that can be written ({error.strerror or error})"
            raise ConfigError(key=setting, value=str(path), expected=expected) from error
        self._size = self._file.tell()
        self._torn = False  # the last line may be there in part
        self._thread = threading.Thread(target=self._run, name=f"lines {path.name}", daemon=True)
        self._thread.start()

    def offer(self, line: str) -> bool:
        """Take one line (without its end), without waiting. False: it is lost, and counted."""
        if not self.failure:
            try:
                self._waiting.put_nowait(line.encode() + b"\n")
            except queue.Full:
                self._lost("the disk is too slow")
            else:
                return True
        self.refused += 1
        return False

    def close(self) -> None:
        """Write what waits, within a bound. Idempotent."""
        if self._thread.is_alive():
            try:
                self._waiting.put(None, timeout=CLOSE_S_MAX)
            except queue.Full:
                log.error("%s: the disk did not take the last lines", self.path)
                return
            self._thread.join(CLOSE_S_MAX)

    # ---- the thread ----

    def _run(self) -> None:
        while (data := self._waiting.get()) is not None:
            if self.failure:
                self.refused += 1
                continue
            try:
                self._write(data)
            except OSError as error:
                self.refused += 1
                self._torn = True
                self._lost(error.strerror or str(error))
        self._say_farewell()
        self._file.close()

    def _write(self, data: bytes) -> None:
        if self._size + len(data) > self._bytes_max:
            if self._files_max == 1:
                self.refused += 1
                self._lost(f"it is full, at {self._bytes_max} bytes")
                return
            self._rotate()
        if self._torn:
            self._size += self._file.write(b"\n")
            self._torn = False
        written = self._file.write(data)
        self._size += written
        if written < len(data):
            raise OSError("the disk took a part of a line only")
        self._lines += 1

    def _say_farewell(self) -> None:
        """A little beyond `bytes_max`, if need be; not after half a line."""
        if self._farewell is not None and self.failure and not self._torn:
            with suppress(OSError):
                self._file.write(self._farewell(self.failure, self._lines).encode() + b"\n")

    def _rotate(self) -> None:
        self._file.close()
        for index in reversed(range(1, self._files_max - 1)):
            older = _numbered(self.path, index)
            if older.exists():
                older.replace(_numbered(self.path, index + 1))
        self.path.replace(_numbered(self.path, 1))
        self._file = _opened(self.path)
        self._size, self._torn = 0, False

    def _lost(self, why: str) -> None:
        """A recording ends at its first lost line; a log goes on."""
        log.error("%s: %s", self.path, why)
        if self._files_max == 1:
            self.failure = why


def create_fresh(path: Path) -> tuple[Path, BinaryIO]:
    """A file that was not there: `path`, or the next free name beside it (run.2.jsonl, …). Raises OSError."""
    for index in count(1):
        free = path if index == 1 else path.with_stem(f"{path.stem}.{index}")
        with suppress(FileExistsError):
            return free, free.open("xb", buffering=0)
    raise AssertionError("count() ends")


def _opened(path: Path) -> BinaryIO:
    return path.open("ab", buffering=0)


def _numbered(path: Path, index: int) -> Path:
    return path.with_name(f"{path.name}.{index}")
