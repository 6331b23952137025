"""Shell: a decision record as tables that a person reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

PREFILL_TERMS = ("ttft_s", "queue_s", "fetch_s", "prefill_s", "mixing_s")
DECODE_TERMS = ("tbt_s", "stall_s")


def explained(record: dict[str, Any]) -> Iterator[Table | Text]:
    """The outcome, then for each attempt its candidates (chosen one starred, times in ms), then the steps."""
    said = f": {record['error']}" if record["error"] else ""
    yield Text(f"{record['request_id']}: {record['outcome'] or 'running'}{said}")
    for choice in record["choices"]:
        yield _candidates(choice, "prefill", PREFILL_TERMS)
        yield _candidates(choice, "decode", DECODE_TERMS)
    if record["choices"]:
        yield Text(_ttft(record))
    for step in record["steps"]:
        yield Text(f"{step['at_s'] * 1e3:9,.1f} ms  #{step['number']} {step['what']} {step['node']}".rstrip())


def _candidates(choice: dict[str, Any], leg: str, terms: tuple[str, ...]) -> Table:
    scores = choice[f"{leg}_scores"]
    title = f"attempt {choice['number']} ({choice['cause']}): {leg}, {choice[f'{leg}_candidates']} candidates"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("node", overflow="fold")
    for name in (*(term.removesuffix("_s") + " ms" for term in terms), "hit blocks"):
        table.add_column(name, justify="right", no_wrap=True)
    for score in scores:
        star = " *" if score["node_id"] == choice[f"{leg}_node"] else ""
        table.add_row(score["node_id"] + star, *(_ms(score[term]) for term in terms), str(score["hit_blocks"]))
    return table


def _ttft(record: dict[str, Any]) -> str:
    last = record["choices"][-1]
    done_s = record["prefill_done_s"]
    actual = "none yet" if done_s is None else f"{_ms(done_s - last['at_s'])} ms"
    return f"time to first token of attempt {last['number']}: predicted {_ms(last['ttft_s'])} ms, actual {actual}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.1f}"
