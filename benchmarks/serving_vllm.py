"""Shell: vLLM's CPU build as 1P1D over NIXL, in turn with our 1P1D and our coupled worker: one request alone.

    python -m benchmarks.serving_vllm [--pairs 30] [--peer-every 3] [--size 128 --size 512]

vLLM runs in the environment of benchmarks.engine (.venv-bench, made on first use): a prefill and a decode server, one
thread and one core each, KV through the host's memory. Its proxy is this client, with two POSTs: the prefill server
computes the prompt and answers what the decode server needs to pull the blocks; the decode server streams. There the
first token that a client sees is the decode server's, here it is the prefill worker's.
All clusters are up at once and idle but for the one that is asked.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import click
import uvloop
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.engine import MODEL, VLLM_VENV, install_vllm
from benchmarks.record import interval, save
from benchmarks.serving import SIZES, cluster, first_two, ms, prompt
from engine.load import model_directory

HOST = "127.0.0.1"
START_S_MAX = 400.0  # 48 s on a quiet machine
ANSWER_S_MAX = 600.0  # a prompt of 2,000 tokens on a machine that is shared
END_S = 15.0  # from SIGTERM to SIGKILL
KV_CONFIG = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
WANTED = {"do_remote_decode": True, "do_remote_prefill": False}
NIXL = (("nixl-cu12==1.5.1",), ("--no-deps", "nixl==1.5.2"))
PEER = "vLLM 1P1D"
console = Console(width=120)

Sample = tuple[float, float]
"""TTFT and the gap from the first to the second token, seconds."""


class Server:
    """One vLLM API server and the engine process under it, on one core; `end` leaves neither."""

    def __init__(self, core: int, directory: Path) -> None:
        self.port = free_port()
        self._log = directory / f"vllm-{core}.log"
        settings = {
            "OMP_NUM_THREADS": 1,
            "VLLM_CPU_KVCACHE_SPACE": 1,
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": free_port(),
        }
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    "env", *(f"{name}={value}" for name, value in settings.items()),
                    "taskset", "--cpu-list", str(core), str(VLLM_VENV / "bin" / "python"),
                    "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_directory(MODEL)),
                    "--served-model-name", MODEL, "--dtype", "bfloat16", "--max-model-len", "4096",
                    "--enforce-eager", "--host", HOST, "--port", str(self.port),
                    "--kv-transfer-config", json.dumps(KV_CONFIG),
                ],
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def wait_ready(self) -> None:
        """Raises RuntimeError, with the end of its log, when it ends or does not answer within START_S_MAX."""
        deadline_s = time.monotonic() + START_S_MAX
        while time.monotonic() < deadline_s and self._process.poll() is None:
            try:
                with asking(self.port, "GET", "/health"):
                    return
            except (OSError, RuntimeError):
                time.sleep(0.5)
        raise RuntimeError(f"vLLM did not start: {self._log.read_text(errors='replace')[-3000:]}")

    def end(self) -> None:
        """The server leads a session of its own: its group holds all that it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(END_S)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue


class Pair:
    """A prefill and a decode server, and the proxy between them."""

    def __init__(self, prefill: Server, decode: Server) -> None:
        self._prefill, self._decode = prefill, decode

    def first_two(self, tokens: list[int]) -> Sample:
        request = {"model": MODEL, "prompt": tokens, "temperature": 0.0, "ignore_eos": True}
        begin_s = time.monotonic()
        with asking(
            self._prefill.port, "POST", "/v1/completions", {**request, "max_tokens": 1, "kv_transfer_params": WANTED}
        ) as answer:
            pull = json.load(answer)["kv_transfer_params"]
        assert pull["do_remote_prefill"], f"the prefill server kept nothing: {pull}"
        decode = {**request, "max_tokens": 8, "stream": True, "return_token_ids": True, "kv_transfer_params": pull}
        with asking(self._decode.port, "POST", "/v1/completions", decode) as answer:
            at_s = list(token_times(answer))
        assert len(at_s) == 8, f"{len(at_s)} tokens of 8"
        return at_s[0] - begin_s, at_s[1] - at_s[0]


def token_times(answer: http.client.HTTPResponse) -> Iterator[float]:
    """When each token of a stream came."""
    for line in answer:
        now_s = time.monotonic()
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        for choice in json.loads(line[len(b"data: ") :])["choices"]:
            yield from [now_s] * len(choice["token_ids"] or ())


@contextmanager
def asking(port: int, method: str, path: str, body: dict[str, Any] | None = None) -> Iterator[http.client.HTTPResponse]:
    """The answer to one HTTP exchange, on a connection of its own.

    Raises:
        RuntimeError: a status other than 200, with the body.
        OSError: no connection, or no bytes for ANSWER_S_MAX.
    """
    connection = http.client.HTTPConnection(HOST, port, timeout=ANSWER_S_MAX)
    try:
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {answer.read(1000).decode(errors='replace')}")
        yield answer
    finally:
        connection.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def vllm_pair() -> AsyncIterator[Pair]:
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="vllm-") as directory:
        servers: list[Server] = []
        try:
            for index in range(2):
                servers.append(Server(cores[index % len(cores)], Path(directory)))
            for server in servers:
                await asyncio.to_thread(server.wait_ready)
            yield Pair(*servers)
        finally:
            for server in servers:
                server.end()


async def measure(sizes: tuple[int, ...], pairs: int, peer_every: int) -> dict[str, dict[str, list[Sample]]]:
    """{prompt size: {cluster: samples}}; in a turn every cluster serves one prompt, vLLM in every `peer_every`-th.

    What was measured is saved after every turn: on a busy machine the long prompts take half an hour.
    """
    rng = random.Random(1)
    rows: dict[str, dict[str, list[Sample]]] = {}
    async with (
        vllm_pair() as peer,
        cluster(prefill=1, decode=1) as split,
        cluster(prefill=0, decode=0, coupled=1) as coupled,
    ):
        ask: dict[str, Callable[[list[int]], Coroutine[Any, Any, Sample]]] = {
            "1P1D": lambda tokens: first_two(split, tokens),
            "coupled": lambda tokens: first_two(coupled, tokens),
            PEER: lambda tokens: asyncio.to_thread(peer.first_two, tokens),
        }
        for size in sizes:
            samples = rows[str(size)] = {name: [] for name in ask}
            for number in range(-2, pairs):  # two turns warm up
                turn = [name for name in ask if name != PEER or number < 0 or number % peer_every == 0]
                rng.shuffle(turn)
                for name in turn:
                    measured = await ask[name](prompt(rng, size))
                    if number >= 0:
                        samples[name].append(measured)
                path = save("-".join(["serving-vllm", *map(str, sizes)]), {"command": sys.argv[1:], "seconds": rows})
            console.print(f"[dim]{size} tokens done, load {os.getloadavg()[0]:.1f}, raw: {path}[/dim]")
    return rows


def show(rows: dict[str, dict[str, list[Sample]]]) -> None:
    title = "One request alone, one thread a worker: ms, medians [95 %]"
    table = Table(box=box.SIMPLE_HEAD, title=title)
    for name in ("prompt", "cluster", "n", "TTFT", "gap first to second token"):
        table.add_column(name, justify="right")
    for size, samples in rows.items():
        for name, measured in samples.items():
            table.add_row(
                size, name, str(len(measured)), *(with_interval(column) for column in zip(*measured, strict=True))
            )
    console.print(table)


def with_interval(seconds: tuple[float, ...]) -> str:
    low, high = interval(seconds)
    return f"{ms(statistics.median(seconds))} [{ms(low)}, {ms(high)}]"


def install() -> None:
    """vLLM's environment, with NIXL in it."""
    python = VLLM_VENV / "bin" / "python"
    if not (VLLM_VENV / ".ready").exists():
        install_vllm(python)
    for packages in NIXL:
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True, timeout=3600)


@click.command()
@click.option("--pairs", default=30, show_default=True, help="Turns for each size of prompt.")
@click.option("--peer-every", default=3, show_default=True, help="vLLM takes part in every n-th turn.")
@click.option("--size", "sizes", multiple=True, default=SIZES, show_default=True, help="Tokens of a prompt.")
def main(pairs: int, peer_every: int, sizes: tuple[int, ...]) -> None:
    """TTFT and the first gap, ours and vLLM's."""
    install()
    show(uvloop.run(measure(sizes, pairs, peer_every)))


if __name__ == "__main__":
    main()
