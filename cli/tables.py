"""Shell: results as tables that a person reads."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from halfmoon.client import Cluster, Model, Result

WIDTH_OF_FILES = 130
"""Columns where the output is no terminal: the tables below fit."""

WIDE = 120
"""Columns from which on a node's process and address are shown as well."""


def make_console(*, stderr: bool = False) -> Console:
    """The one way output is printed: a terminal's own width, or a fixed one in files and pipes."""
    console = Console(highlight=False, stderr=stderr)
    return console if console.is_terminal else Console(highlight=False, stderr=stderr, width=WIDTH_OF_FILES)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}"


def counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile; 0 for no values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def requests_table(rows: Sequence[tuple[str, Result]]) -> Table:
    """One line per request. Times are the client's; device, DRAM, remote: prompt tokens by where their KV was found."""
    table = Table(box=box.SIMPLE_HEAD, title="Requests", title_justify="left", padding=0)
    for name in ("request", "prefill → decode", "link"):
        table.add_column(name, overflow="fold")
    for name in ("prompt", "output", "TTFT ms", "TBT p50", "max ms", "device", "DRAM", "remote", "MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, result in rows:
        table.add_row(name, *_request_cells(result))
    return table


def _request_cells(result: Result) -> list[str]:
    usage, timings = result.usage, result.timings
    path = f"{usage.prefill_node} → {usage.decode_node or 'same'}"
    return [
        path,
        usage.link or "-",
        str(usage.prompt_tokens),
        str(usage.completion_tokens),
        milliseconds(timings.ttft_s),
        milliseconds(percentile(timings.tbt_s, 0.5)),
        milliseconds(max(timings.tbt_s, default=0.0)),
        str(usage.prefix_hit_tokens_device),
        str(usage.prefix_hit_tokens_dram),
        str(usage.prefix_hit_tokens_remote),
        f"{usage.kv_bytes_pulled / 2**20:.1f}",
    ]


def short(count: int) -> str:
    """Four digits at most: 65536 is 65.5k."""
    if count < 10_000:
        return str(count)
    return f"{count / 1e3:.1f}k" if count < 1_000_000 else f"{count / 1e6:.1f}M"


def missing(cluster: Cluster) -> str:
    """Which pools have no ready worker, in words; empty if each has one."""
    said = []
    for role in ("prefill", "decode"):
        pool = [node for node in cluster.nodes if node.role in (role, "coupled")]
        if not any(node.ready for node in pool):
            said.append(f"no {role} worker is ready: 0 of {len(pool)} known")
    return "; ".join(said)


def short_address(address: str) -> str:
    """A socket's file without its directory, which is the same for all of a host's nodes."""
    kind, colon, path = address.partition(":")
    return f"{kind}:…/{path.rpartition('/')[2]}" if kind == "unix" and colon and "/" in path else address


def longest_request(cluster: Cluster, model: Model) -> int:
    """Tokens, prompt and output together, that the pools that are there can hold, and the model's context."""
    blocks = {
        role: max((n.num_device_blocks for n in cluster.nodes if n.role in (role, "coupled")), default=0)
        for role in ("prefill", "decode")
    }
    return min(model.context_tokens_max, min(blocks.values()) * model.block_size)


def without(cluster: Cluster, node_id: str) -> str:
    """Of which role no other worker than this one is ready; "" if there are others for all that it does."""
    role = next((node.role for node in cluster.nodes if node.node_id == node_id), "")
    others = {node.role for node in cluster.nodes if node.ready and not node.draining and node.node_id != node_id}
    needed = ("prefill", "decode") if role == "coupled" else (role,)
    return next((name for name in needed if name and not others & {name, "coupled"}), "")


def cluster_table(cluster: Cluster, width: int = WIDTH_OF_FILES) -> Table:
    """One line per node. In blocks: held by something that runs / room, free or evictable, of all / in the index.

    width: columns to fill; where they are few, process and address are left out, never a number of the load.
    """
    state = "ready" if cluster.ready else f"not ready ({missing(cluster) or 'no canary has come through yet'})"
    title = f"{cluster.model} · {state} · {cluster.requests_open} requests open"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1 if width >= WIDE else 0))
    wide = ("pid", "address") if width >= WIDE else ()
    for name in ("node", "role", "state", *wide):
        table.add_column(name, overflow="fold")
    for name in ("queued", "running", "held", "room", "indexed", "heard s"):
        table.add_column(name, justify="right", no_wrap=True)
    for node in cluster.nodes:
        state = "draining" if node.draining else "ready" if node.ready else "not ready"
        room = f"{short(node.free_device_blocks + node.evictable_device_blocks)}/{short(node.num_device_blocks)}"
        indexed = short(node.indexed_blocks) + ("" if node.index_mode == "exact" else f" {node.index_mode}")
        cells = [node.node_id, node.role, state, *([str(node.pid), short_address(node.address)] if wide else [])]
        cells += [str(node.queued_attempts), str(node.running_sequences), short(node.held_blocks), room]
        table.add_row(*cells, indexed, f"{node.last_heard_s:.1f}")
    return table
