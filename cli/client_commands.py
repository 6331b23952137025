"""Shell: commands that talk to a running cluster."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click
from rich.console import Console

from cli.tables import cluster_table, make_console, milliseconds, requests_table
from halfmoon.client import Client, Result

ADDRESS = click.option("--address", default="127.0.0.1:50051", show_default=True, help="The cluster's client API.")
ADMIN = click.option("--admin", default="127.0.0.1:50052", show_default=True, help="The cluster's admin API.")


def sampling_options(command: click.decorators.FC) -> click.decorators.FC:
    """Options left out are decided by the server: the checkpoint's generation defaults, then the API's."""
    for option in (
        click.option("--max-tokens", type=int, help="Output tokens at most."),
        click.option("--temperature", type=float, help="0 is greedy."),
        click.option("--top-p", type=float),
        click.option("--top-k", type=int),
        click.option("--seed", type=int, help="Same seed, same answer."),
        click.option("--timeout", "timeout_s", type=float, default=600.0, show_default=True, help="Seconds."),
    ):
        command = option(command)
    return command


@click.command()
@ADDRESS
@click.argument("prompt")
@click.option("--stop", multiple=True, help="End the output before this text; may be repeated.")
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
                console.print(event.text, end="", markup=False)
        if as_json:
            click.echo(json.dumps(dataclasses.asdict(stream.result)))
            return
        console.print(_rest(stream.result), markup=False)
        console.print(requests_table([(stream.result.request_id[:12], stream.result)]))


@click.command()
@ADDRESS
@click.option("--system", help="The system message.")
@sampling_options
def chat(address: str, system: str | None, **options: Any) -> None:
    """Talk to the model; an empty line or Ctrl-D ends. Earlier turns are found again as KV blocks."""
    console = make_console()
    given = {k: v for k, v in options.items() if v is not None}
    with Client(address) as client:
        session = client.chat_session([{"role": "system", "content": system}] if system else [])
        while line := _ask(console):
            stream = session.send(line, **given)
            for event in stream:
                console.print(event.text, end="", markup=False)
            console.print(_rest(stream.result), markup=False)
            console.print(f"[dim]{_summary(stream.result)}[/dim]")


@click.command()
@ADDRESS
@ADMIN
def status(address: str, admin: str) -> None:
    """The cluster as the conductor sees it."""
    console = make_console()
    with Client(address, admin_address=admin) as client:
        cluster = client.cluster()
    console.print(cluster_table(cluster))
    for name, count in sorted(cluster.counters.items()):
        console.print(f"  {name} {count}")


@click.command()
@ADMIN
@click.argument("node_id")
def drain(admin: str, node_id: str) -> None:
    """Let NODE_ID take no new requests; running ones end normally."""
    with Client(admin_address=admin) as client:
        client.drain(node_id)
    make_console().print(f"{node_id} takes no new requests; `halfmoon status` shows when nothing runs on it.")


@click.command()
@ADMIN
@click.argument("request_id")
def explain(admin: str, request_id: str) -> None:
    """Print a request's decision record: what was known, predicted, decided, and what happened."""
    with Client(admin_address=admin) as client:
        click.echo(json.dumps(client.explain(request_id), indent=1))


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
