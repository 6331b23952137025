"""Shell: results as tables that a person reads."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from halfmoon.client import Cluster, Result

WIDTH_OF_FILES = 130
"""Columns where the output is no terminal: the tables below fit."""


def make_console(*, stderr: bool = False) -> Console:
    """The one way output is printed: a terminal's own width, or a fixed one in files and pipes."""
    console = Console(highlight=False, stderr=stderr)
    return console if console.is_terminal else Console(highlight=False, stderr=stderr, width=WIDTH_OF_FILES)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}"


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile; 0 for no values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def requests_table(rows: Sequence[tuple[str, Result]]) -> Table:
    """One line per request. Times are the client's; device, DRAM, remote: prompt tokens by where their KV was found."""
    table = Table(box=box.SIMPLE_HEAD, title="Requests", title_justify="left")
    for name in ("request", "prefill → decode", "link"):
        table.add_column(name, no_wrap=True)
    for name in ("prompt", "output", "TTFT ms", "TBT p50", "max ms", "device", "DRAM", "remote", "MiB"):
        table.add_column(name, justify="right")
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


def cluster_table(cluster: Cluster) -> Table:
    """One line per node. In blocks: held by something that runs / room, free or evictable, of all / in the index."""
    title = f"{cluster.model} · {'ready' if cluster.ready else 'not ready'} · {cluster.requests_open} requests open"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for name in ("node", "role", "state", "pid", "address"):
        table.add_column(name, no_wrap=True)
    for name in ("queued", "running", "held", "room", "indexed", "heard s ago"):
        table.add_column(name, justify="right")
    for node in cluster.nodes:
        state = "draining" if node.draining else "ready" if node.ready else "not ready"
        room = f"{node.free_device_blocks + node.evictable_device_blocks}/{node.num_device_blocks}"
        cells = [node.node_id, node.role, state, str(node.pid), node.address]
        cells += [str(node.queued_attempts), str(node.running_sequences), str(node.held_blocks), room]
        table.add_row(*cells, f"{node.indexed_blocks} ({node.index_mode})", f"{node.last_heard_s:.1f}")
    return table
