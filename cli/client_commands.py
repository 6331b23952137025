"""Shell: commands that talk to a running cluster."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from cli.explain import explained
from cli.replay_commands import lines_of
from cli.tables import cluster_table, make_console, milliseconds, requests_table, without
from conductor.kept import find
from halfmoon._calls import ADDRESS_DEFAULT
from halfmoon._request import timeout_of
from halfmoon.client import Client, Generation, Result
from halfmoon.errors import HalfmoonError
from halfmoon.types import SamplingParams
from service.settings import admin_address, client_address

ADDRESS = click.option(
    "--address",
    default=lambda: client_address() or ADDRESS_DEFAULT,
    show_default=f"HALFMOON_ADDRESS, or {ADDRESS_DEFAULT}",
    help="The cluster's client API.",
)
ADMIN = click.option(
    "--admin",
    default=lambda: admin_address(),
    show_default="HALFMOON_ADMIN, or as the cluster tells it to its own host",
    help="The cluster's admin API.",
)


def sampling_options(command: click.decorators.FC) -> click.decorators.FC:
    """Options left out are decided by the server: the checkpoint's generation defaults, then the API's."""
    for option in (
        click.option("--max-tokens", type=int, help="Output tokens at most."),
        click.option("--temperature", type=float, help="0 is greedy."),
        click.option("--top-p", type=float, help="Nucleus mass in (0, 1]; 1 is off."),
        click.option("--top-k", type=int, help="Candidates kept; 0 is off."),
        click.option("--seed", type=int, help="Same seed, same answer."),
        click.option(
            "--timeout",
            "timeout_s",
            type=float,
            default=600.0,
            show_default=True,
            help="Seconds until the whole answer must be there.",
        ),
    ):
        command = option(command)
    return command


@click.command()
@ADDRESS
@click.argument("prompt")
@click.option("--stop", multiple=True, help="End the output before this text; may be repeated.")
@click.option("--ignore-eos", is_flag=True, default=None, help="Go on to --max-tokens, whatever the model says.")
@click.option("--logprobs", type=int, help="With --json: this many alternatives beside each token's log probability.")
@click.option(
    "--slo-ttft",
    "slo_ttft_s",
    type=float,
    help="Refuse at once if the first token is predicted, by what was measured, to take more than these seconds.",
)
@click.option(
    "--slo-tbt",
    "slo_tbt_s",
    type=float,
    help="Refuse at once if a decode step is predicted, by what was measured, to take more than these seconds.",
)
@click.option("--priority", type=int, help="-100 to 100; higher goes first.")
@click.option("--raw", is_flag=True, help="Complete PROMPT as it is, without the chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON when it is complete.")
@sampling_options
def generate(address: str, prompt: str, raw: bool, as_json: bool, stop: tuple[str, ...], **options: Any) -> None:
    """Answer one PROMPT, streaming."""
    console = make_console()
    given = {k: v for k, v in options.items() if v is not None} | ({"stop": stop} if stop else {})
    with Client(address) as client:
        start = client.generate if raw else lambda p, **o: client.chat([{"role": "user", "content": p}], **o)
        stream = start(prompt, **given)
        for event in stream:
            if not as_json:
                console.print(event.text, end="", markup=False, soft_wrap=True)
        if as_json:
            click.echo(json.dumps(dataclasses.asdict(stream.result)))
            return
        console.print(_rest(stream.result), markup=False, soft_wrap=True)
        console.print(requests_table([(stream.result.request_id[:12], stream.result)]))
        console.print(f"request id: {stream.result.request_id}", soft_wrap=True)


@click.command()
@ADDRESS
@click.option("--system", help="The system message.")
@sampling_options
def chat(address: str, system: str | None, **options: Any) -> None:
    """Talk to the model; an empty line or Ctrl-D ends. Earlier turns are found again as KV blocks."""
    console = make_console()
    given = {k: v for k, v in options.items() if v is not None}
    SamplingParams(**{k: v for k, v in given.items() if k != "timeout_s"})  # refused now, not at the first turn
    timeout_of({"timeout_s": given["timeout_s"]}, given["timeout_s"])
    with Client(address) as client:
        session = client.chat_session([{"role": "system", "content": system}] if system else [])
        while line := _ask(console):
            turns = len(session.messages)
            try:
                _turn(console, session.send(line, **given))
            except HalfmoonError as error:
                del session.messages[turns:]  # a turn without an answer is as if it had not been said
                console.print(f"[red]{type(error).__name__}[/red]: {escape(str(error))}", soft_wrap=True)


def _turn(console: Console, stream: Generation) -> None:
    for event in stream:
        console.print(event.text, end="", markup=False, soft_wrap=True)
    console.print(_rest(stream.result), markup=False, soft_wrap=True)
    console.print(f"[dim]{_summary(stream.result)}[/dim]")


@click.command()
@ADDRESS
@ADMIN
def status(address: str, admin: str) -> None:
    """The cluster as the conductor sees it."""
    console = make_console()
    with Client(address, admin_address=admin) as client:
        cluster = client.cluster()
    console.print(cluster_table(cluster, console.width))
    for name, count in sorted(cluster.counters.items()):
        console.print(f"  {name} {count}")


@click.command()
@ADDRESS
@ADMIN
@click.argument("node_id")
def drain(address: str, admin: str, node_id: str) -> None:
    """Let NODE_ID take no new requests, also when it restarts; running ones end normally. `undrain` takes it back."""
    with Client(address, admin_address=admin) as client:
        client.drain(node_id)
        cluster = client.cluster()
    console = make_console()
    console.print(f"{node_id} takes no new requests; `halfmoon status` shows when nothing runs on it.")
    if role := without(cluster, node_id):
        console.print(f"[yellow]No other {role} worker is ready: new requests are refused until one is.[/yellow]")


@click.command()
@ADDRESS
@ADMIN
@click.argument("node_id")
def undrain(address: str, admin: str, node_id: str) -> None:
    """Let NODE_ID, which was drained, take new requests again."""
    with Client(address, admin_address=admin) as client:
        client.drain(node_id, undo=True)
    make_console().print(f"{node_id} takes new requests again.")


@click.command()
@ADDRESS
@ADMIN
@click.argument("request_id")
@click.option(
    "--file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Look in this file, and ask no cluster: a recording (--record), or what `records.file` has kept.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the whole record as JSON.")
def explain(address: str, admin: str, request_id: str, file: Path | None, as_json: bool) -> None:
    """Why REQUEST_ID (or the beginning of one) went where it went: candidates, predictions, and what happened."""
    if file is not None:
        record = find(lines_of(file), request_id)
    else:
        with Client(address, admin_address=admin) as client:
            record = client.explain(request_id)
    if as_json:
        click.echo(json.dumps(record, indent=1))
    else:
        make_console().print(*explained(record), sep="\n")


def _ask(console: Console) -> str:
    try:
        return console.input("[bold]> [/bold]").strip()
    except EOFError:
        return ""


def _rest(result: Result) -> str:
    """Text that was held back until the end was known."""
    return result.text[sum(len(t.text) for t in result.tokens) :]


def _summary(result: Result) -> str:
    usage = result.usage
    return (
        f"{usage.completion_tokens} tokens, TTFT {milliseconds(result.timings.ttft_s)} ms, "
        f"{usage.prefix_hit_tokens} of {usage.prompt_tokens} prompt tokens found in the cache"
    )
