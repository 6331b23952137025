"""Shell: commands that start a cluster on this host."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import click
import uvloop
from rich.console import Console
from rich.markup import escape

from cli.demo import run_demo
from cli.tables import longest_request, make_console
from cluster.local import LocalCluster
from cluster.plan import DTYPES, LINKS, ClusterConfig
from cluster.process import Progress
from conductor.admission_policies import ALL_NAMES, put_in_force
from conductor.config import PlacementName
from halfmoon._calls import ADDRESS_DEFAULT
from halfmoon.client import AsyncClient
from halfmoon.errors import ConfigError
from service.run import EXIT_HARD
from service.settings import cache_directory, effective, gather, load, require_known

PLACEMENTS = [name.value for name in PlacementName]
IN_SECTION = {"placement": "conductor.placement", "record": "conductor.record"}
"""Flags whose settings stand deeper than their names say."""

OPTIONS: tuple[Callable[[click.decorators.FC], click.decorators.FC], ...] = (
    click.option("--config", "file", type=click.Path(exists=True, dir_okay=False), help="YAML, section `cluster`."),
    click.option("--model", help="Builtin name, directory, .gguf file, hub id, or `fake`."),
    click.option("--dtype", type=click.Choice(DTYPES)),
    click.option("--prefill", type=int, help="Prefill workers."),
    click.option("--decode", type=int, help="Decode workers."),
    click.option("--coupled", type=int, help="Workers that do both."),
    click.option(
        "--device", "devices", multiple=True, help="cpu or cuda:N; repeated, dealt out to the workers in turn."
    ),
    click.option("--threads", type=int, help="Compute threads a worker."),
    click.option("--device-mib", type=int, help="KV pool of each worker, MiB."),
    click.option("--dram-mib", type=int, help="DRAM tier of each worker, MiB; -1: none."),
    click.option("--link", type=click.Choice(LINKS), help="How blocks travel between workers."),
    click.option("--placement", type=click.Choice(PLACEMENTS), help="How prefill workers are picked."),
    click.option(
        "--admission",
        type=click.Choice(ALL_NAMES),
        help="The admission policy in force; the others judge in its shadow.",
    ),
    click.option("--cost-profile", help="YAML file in which what workers cost is kept over restarts."),
    click.option("--redis", help="URL of a Redis or Valkey; left out, a private one is started."),
    click.option("--host", help="Address of the client and admin APIs."),
    click.option("--port", type=int, help="Client API."),
    click.option("--admin-port", type=int, help="Admin API."),
    click.option("--record", help="Record the conductor's inputs in this file, for `replay`."),
    click.option("--directory", help="Sockets, configs and logs; one cluster a directory."),
)


def cluster_options(command: click.decorators.FC) -> click.decorators.FC:
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def cluster_config(file: str | None, given: dict[str, object], name: str) -> ClusterConfig:
    """File, environment (HALFMOON_CLUSTER__PREFILL=2), flags: the later wins.

    `--admission` is several settings: the policies' modes, and whether they put off.
    """
    admission, given = given.get("admission"), {k: v for k, v in given.items() if k != "admission"}
    overrides = {f"cluster.{IN_SECTION.get(key, key)}": v for key, v in given.items() if v not in (None, ())}
    tree = gather(file, overrides=overrides)
    require_known(tree, ("cluster",))
    section = tree.get("cluster") or {}
    if not isinstance(section, dict):
        raise ConfigError(key="cluster", value=section, expected="a mapping")
    section.setdefault("directory", str(cache_directory() / "run" / name))
    config = load(ClusterConfig, section, path="cluster")
    if admission is None:
        return config
    conductor = config.conductor
    return replace(config, conductor=replace(conductor, admission=put_in_force(str(admission), conductor.admission)))


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
        colour = {"ready": "green", "exited": "red", "failing": "red", "waiting": "yellow"}.get(progress.state, "dim")
        line = f"  {progress.name:<12} [{colour}]{progress.state}[/{colour}] {escape(progress.detail)}"
        console.print(line.rstrip(), soft_wrap=True)

    return show


async def _up(config: ClusterConfig, console: Console) -> None:
    console.print(
        f"Starting {config.model}: {config.prefill} prefill, {config.decode} decode, {config.coupled} coupled"
    )
    cluster = LocalCluster(config, show_progress(console))
    stop = _stop_on_signals(cluster)
    if not await _unless(stop, cluster.__aenter__()):
        console.print("Stopped before it was ready.")
        sys.exit(EXIT_HARD)
    try:
        await _say_ready(cluster, console)
        await _unless(stop, cluster.wait())
        console.print(f"Draining, up to {config.drain_s:g} s; Ctrl-C again ends now.")
    finally:
        await cluster.__aexit__(None, None, None)
    for failure in cluster.failures:
        raise failure


async def _say_ready(cluster: LocalCluster, console: Console) -> None:
    address, admin = cluster.addresses["inference"], cluster.addresses["admin"]
    console.print(f"[bold green]Ready[/bold green] on {address}, admin on {admin}.")
    async with AsyncClient(address, admin_address=admin) as client:
        model, view = await client.model(), await client.cluster()
    longest = longest_request(view, model)
    console.print(f"Longest request: {longest:,} tokens, of the model's {model.context_tokens_max:,}.")
    where = "" if address == ADDRESS_DEFAULT else f" --address {address}"
    told = "" if model.admin_address else f" --admin {admin}"
    tries = (f"halfmoon chat{where}", f'halfmoon generate "…"{where}', f"halfmoon status{where}{told}")
    console.print(f"Try: {'    or    '.join(tries)}", soft_wrap=True)
    console.print(f"Logs: {cluster.directory}/*.log.  Ctrl-C drains and stops.", soft_wrap=True)


def _stop_on_signals(cluster: LocalCluster) -> asyncio.Event:
    """Set by the first signal; a second one ends every process at once."""
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            cluster.kill()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, object]) -> bool:
    """Run `work`; False, and it is cancelled and has cleaned up, if the stop comes first. Raises what it raises."""
    task, waiting = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if task.cancelled():
        return False
    task.result()
    return True
