"""Shell: completed decision records go to a file of JSON Lines and to a Redis stream, where settings say so.

Both are copies for others to read: what cannot be taken at once is dropped and counted, and no request waits for it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter, deque
from pathlib import Path

from conductor.decisions import DecisionRecord
from conductor.settings import RecordsConfig
from halfmoon.errors import Unavailable
from service.lines import LineWriter
from service.registry import Registry

log = logging.getLogger("conductor.export")

BATCH_MAX = 64  # records a call: with 8 candidates each about 0.3 MB
RETRY_S = 0.5  # after the registry did not answer
MIB = 1 << 20


class RecordExport:
    """One owner: the conductor's process. `offer` is the machine's `tell_records`; `run` feeds the stream.

    Raises:
        ConfigError: the file cannot be made.
    """

    def __init__(self, config: RecordsConfig, registry: Registry) -> None:
        self._config = config
        self._registry = registry
        self._file: LineWriter | None = None
        if config.file:
            size = config.file_mib_max * MIB
            self._file = LineWriter(
                Path(config.file), bytes_max=size, files_max=config.files_max, setting="records.file"
            )
        self._waiting: deque[str] = deque()
        self._more = asyncio.Event()
        self._counts: Counter[str] = Counter()

    @property
    def wanted(self) -> bool:
        return self._file is not None or bool(self._config.stream)

    @property
    def counters(self) -> dict[str, int]:
        refused = self._file.refused if self._file is not None else 0
        return {**self._counts, "records_dropped_by_file": refused} if self.wanted else {}

    def offer(self, record: DecisionRecord) -> None:
        line = json.dumps(record.as_json(), separators=(",", ":"))
        if self._file is not None:
            self._file.offer(line)
        if self._config.stream:
            if len(self._waiting) < self._config.waiting_max:
                self._waiting.append(line)
                self._more.set()
            else:
                self._counts["records_dropped_by_stream"] += 1

    async def run(self) -> None:
        """Until cancelled. A registry that is away loses what does not fit into `waiting_max`, and no more."""
        while True:
            await self._more.wait()
            batch = [self._waiting.popleft() for _ in range(min(BATCH_MAX, len(self._waiting)))]
            try:
                await self._registry.append(self._config.stream, batch, self._config.stream_length_max)
            except Unavailable as error:
                self._counts["records_dropped_by_stream"] += len(batch)  # it may have taken them: none comes twice
                log.warning("%d decision records were not exported: %s", len(batch), error)
                await asyncio.sleep(RETRY_S)
            else:
                self._counts["records_streamed"] += len(batch)
            if not self._waiting:
                self._more.clear()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
