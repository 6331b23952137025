"""Shell: commands that start a cluster on this host."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import click
import uvloop
from rich.console import Console

from cli.demo import run_demo
from cli.tables import make_console
from cluster.local import LocalCluster
from cluster.plan import ClusterConfig
from cluster.process import Progress
from service.settings import cache_directory, effective, gather, load

OPTIONS: tuple[Callable[[click.decorators.FC], click.decorators.FC], ...] = (
    click.option("--config", "file", type=click.Path(exists=True, dir_okay=False), help="YAML, section `cluster`."),
    click.option("--model", help="Builtin name, directory, .gguf file, hub id, or `fake`."),
    click.option("--dtype", type=click.Choice(["bfloat16", "float32"])),
    click.option("--prefill", type=int, help="Prefill workers."),
    click.option("--decode", type=int, help="Decode workers."),
    click.option("--coupled", type=int, help="Workers that do both."),
    click.option(
        "--device", "devices", multiple=True, help="cpu or cuda:N; repeated, dealt out to the workers in turn."
    ),
    click.option("--threads", type=int, help="Compute threads a worker."),
    click.option("--device-mib", type=int, help="KV pool of each worker, MiB."),
    click.option("--dram-mib", type=int, help="DRAM tier of each worker, MiB; -1: none."),
    click.option("--link", type=click.Choice(["auto", "shm", "torch"]), help="How blocks travel between workers."),
    click.option("--redis", help="URL of a Redis or Valkey; left out, a private one is started."),
    click.option("--host", help="Address of the client and admin APIs."),
    click.option("--port", type=int, help="Client API."),
    click.option("--admin-port", type=int, help="Admin API."),
    click.option("--directory", help="Sockets, configs and logs; one cluster a directory."),
)


def cluster_options(command: click.decorators.FC) -> click.decorators.FC:
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def cluster_config(file: str | None, given: dict[str, object], name: str) -> ClusterConfig:
    """File, environment (HALFMOON_CLUSTER__PREFILL=2), flags: the later wins."""
    overrides = {f"cluster.{key}": value for key, value in given.items() if value not in (None, ())}
    section = gather(file, overrides=overrides).get("cluster", {})
    section.setdefault("directory", str(cache_directory() / "run" / name))
    return load(ClusterConfig, section, path="cluster")


@click.command()
@cluster_options
def up(file: str | None, **given: object) -> None:
    """Start a cluster in the foreground; Ctrl-C drains it."""
    config = cluster_config(file, given, "default")
    uvloop.run(_up(config, make_console()))


@click.command()
@cluster_options
@click.option("--timeout", type=float, default=600.0, show_default=True, help="Seconds for the whole demo.")
def demo(file: str | None, timeout: float, **given: object) -> None:
    """Start a cluster, answer several prompts on it, print what happened, stop it."""
    given = {"port": 0, "admin_port": 0} | {k: v for k, v in given.items() if v not in (None, ())}
    config = cluster_config(file, given, "demo")
    uvloop.run(run_demo(config, make_console(), show_progress, timeout))


@click.command()
@cluster_options
def config(file: str | None, **given: object) -> None:
    """Print the effective configuration that `up` would use."""
    click.echo(effective({"cluster": cluster_config(file, given, "default")}))


def show_progress(console: Console) -> Callable[[Progress], None]:
    def show(progress: Progress) -> None:
        colour = {"ready": "green", "exited": "red"}.get(progress.state, "dim")
        console.print(f"  {progress.name:<12} [{colour}]{progress.state}[/{colour}] {progress.detail}", markup=True)

    return show


async def _up(config: ClusterConfig, console: Console) -> None:
    console.print(
        f"Starting {config.model}: {config.prefill} prefill, {config.decode} decode, {config.coupled} coupled"
    )
    async with LocalCluster(config, show_progress(console)) as cluster:
        address = cluster.addresses["inference"]
        console.print(f"[bold green]Ready[/bold green] on {address}, admin on {cluster.addresses['admin']}.")
        console.print(f'Try: halfmoon chat --address {address}    or    halfmoon generate "…" --address {address}')
        console.print(f"Logs: {Path(config.directory)}/*.log.  Ctrl-C drains and stops.")
        await _until_signal_or(cluster.wait())
        console.print("Draining …")
    for failure in cluster.failures:
        raise failure


async def _until_signal_or(work: Awaitable[None]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    waits = {asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())}
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
