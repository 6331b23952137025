"""Nodes in other processes, as tests hold them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Child:
    """A node in another process; see kv_child.py."""

    def __init__(self, *args: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.kv_child", *args], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )

    async def line(self, start: str, timeout_s: float = 30.0) -> str:
        """The rest of the next line that begins so."""
        assert self.process.stdout is not None
        async with asyncio.timeout(timeout_s):
            while True:
                line = await asyncio.to_thread(self.process.stdout.readline)
                assert line, "the child has ended"
                if line.startswith(start):
                    return line.removeprefix(start).strip()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
