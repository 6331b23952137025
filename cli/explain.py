"""Shell: a decision record as tables that a person reads at 80 columns: outcome, terms, verdicts, candidates, steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from conductor.admission import Doubt
from conductor.admission_config import Mode
from conductor.admission_policies import NO_ADMISSION, POLICIES

MS = 1e3
PREFILL_TERMS = ("ttft_s", "queue_s", "fetch_s", "prefill_s", "mixing_s")
PREFILL_HEADS = ("TTFT", "queue", "fetch", "prefill", "mixing")
STEPS_SHOWN = 24
"""The first ones; a record may hold more, all of which --json shows."""

Record = dict[str, Any]


def explained(record: Record) -> Iterator[Table | Text]:
    """What came of it, predicted beside actual, who would have had it taken on, and, for each attempt, why there."""
    yield _outcome(record)
    if record["choices"]:
        yield _terms(record)
    if record["verdicts"]:
        yield _verdicts(record["verdicts"])
    for choice in record["choices"]:
        yield from _why(choice)
    yield from _steps(record)


# ---- what came of it ----


def _outcome(record: Record) -> Text:
    end = record["outcome"] or "running"
    took = "" if record["ended_s"] is None else f" after {_ms(record['ended_s'])} ms"
    output = record["output_tokens"]
    made = "" if output is None else f"; {output} tokens came out"
    blocks = f"{record['num_prompt_tokens']} prompt tokens ({record['num_prompt_blocks']} full blocks)"
    lines = [
        f"{record['request_id']}: {end}{took}{made}",
        f"{blocks}, at most {record['max_tokens']} out",
        f"placement {record['policy']}, admission {_admission(record['verdicts'])}; the chosen are starred",
        _limits(record),
    ]
    if record["error"]:
        lines.append(record["error"])
    return Text("\n".join(lines))


def _admission(verdicts: Sequence[Record]) -> str:
    """The policies in force, as far as this request shows them."""
    if not verdicts:
        return "not asked"
    return " and ".join(dict.fromkeys(v["policy"] for v in verdicts if v["mode"] == Mode.ENFORCE)) or NO_ADMISSION


def _limits(record: Record) -> str:
    parts = [
        f"{name} {_ms(record[key])} ms" for name, key in (("TTFT", "slo_ttft_s"), ("TBT", "slo_tbt_s")) if record[key]
    ]
    return f"its limits: {', '.join(parts)}" if parts else "no limits of its own"


# ---- predicted beside actual ----


def _terms(record: Record) -> Table:
    table = _table("predicted and actual, ms, each rounded by itself")
    table.add_column("", overflow="fold")
    for name in ("predicted", "actual", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    terms = record["terms"]
    choice = _judged(record)
    words = {
        "before_s": "before: tokenising, waiting to be placed",
        "queue_s": "queue: others' prompts, and the network",
        "fetch_s": _fetch_words(choice["prefill"]),
        "prefill_s": f"prefill of {_new_tokens(record, choice)} tokens",
        "held_s": "held until there was a second token",
        "ttft_s": "= time to first token",
        "second_gap_s": "first to second token",
        "handover_s": "  of it: the rest of the pull",
        "tbt_s": "a decode step; later gaps, their mean",
        "tbt_worst_s": "TBT: mean of the longest tenth of gaps",
        "pull_s": "the pull: alone; with waiting for blocks",
    }
    for name, text in words.items():
        predicted, actual = terms[name]["predicted_s"], terms[name]["actual_s"]
        if predicted is not None or actual is not None:
            table.add_row(
                text, _ms(predicted), _ms(actual), _difference(name, predicted, actual), end_section=name == "ttft_s"
            )
    return table


def _judged(record: Record) -> Record:
    """The choice that the terms are of."""
    done_s = record["prefill_done_s"]
    given = [c for c in record["choices"] if done_s is None or c["at_s"] <= done_s]
    choice: Record = (given or record["choices"])[-1]
    return choice


def _fetch_words(prefill: Record) -> str:
    if not prefill["fetch_blocks"]:
        return "own cached blocks, read into the device" if prefill["read_s"] else "fetch of a cached prefix: none"
    return f"fetch of {prefill['fetch_blocks']} cached blocks from {prefill['source']}"


def _new_tokens(record: Record, choice: Record) -> str:
    """What was computed, by the worker's word; before that, what is left of the prompt, as far as it is known."""
    stats = record["stats"].get(f"{choice['number']}.prefill")
    total = record["num_prompt_tokens"]
    return f"{stats['computed_tokens']} of {total}" if stats else f"what is not cached of {total}"


# ---- who would have had it ----


def _verdicts(verdicts: Sequence[Record]) -> Table:
    table = _table("admission: what the policies said")
    for name in ("policy", "mode", "says"):
        table.add_column(name, no_wrap=True)
    table.add_column("because", overflow="fold")
    for verdict in verdicts:
        says = "accept" if verdict["accept"] else "reject"
        says += "" if verdict["stage"] == "arrival" else f" at {verdict['stage']}"
        table.add_row(verdict["policy"], verdict["mode"], says, _because(verdict))
    judged = {verdict["policy"] for verdict in verdicts}
    for name in POLICIES:
        if name not in judged:
            table.add_row(name, "off", "-", "not asked")
    return table


def _because(verdict: Record) -> str:
    reason = verdict["reason"]
    parts = [_why_let_in(verdict) if verdict["accept"] else reason] if reason else []
    if verdict["limit"]:
        parts.append(_against(verdict["predicted"], verdict["limit"], verdict["unit"]))
    else:
        parts.append("no limit applies")
    if verdict["retry_after_s"] is not None:
        parts.append(f"retry in {verdict['retry_after_s']:.1f} s")
    return "; ".join(parts)


def _why_let_in(verdict: Record) -> str:
    """Over a limit, and taken on nevertheless."""
    if verdict["reason"] == Doubt.GUESS:
        return "a guess: outside what was measured"
    if verdict["reason"] == Doubt.FREE:
        return "an idle worker, whose room is all free"
    ago_s = verdict.get("probed_ago_s")
    return "a probe of an idle worker, " + ("its first" if ago_s is None else f"whose last was {ago_s:,.0f} s ago")


def _against(predicted: float, limit: float, unit: str) -> str:
    if unit == "s":
        return f"predicted {_ms(predicted)}, limit {_ms(limit)} ms"
    return f"predicted {predicted:,.0f}, limit {limit:,.0f} {unit}"


# ---- why there ----


def _why(choice: Record) -> Iterator[Table]:
    label = "rejected" if choice["cause"] == "rejected" else f"attempt {choice['number']} ({choice['cause']})"
    yield _prefill_candidates(choice, label)
    yield _decode_candidates(choice, label)


def _prefill_candidates(choice: Record, label: str) -> Table:
    table = _table(f"{label}: ms to first token, and blocks, by prefill worker{_shown(choice, 'prefill')}")
    table.add_column("worker", overflow="fold")
    for name in (*PREFILL_HEADS, "here", "fetched"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for score in choice["prefill_scores"]:
        table.add_row(
            _name(score, choice["prefill_node"]),
            *(_ms(score[term]) for term in PREFILL_TERMS),
            str(score["hit_blocks"]),
            str(score["fetch_blocks"]),
            _remarks(score),
        )
    return table


def _decode_candidates(choice: Record, label: str) -> Table:
    table = _table(f"{label}: load by decode worker, 1 is full{_shown(choice, 'decode')}")
    table.add_column("worker", overflow="fold")
    for name in ("load", "room", "step/SLO", "step ms", "stall ms", "here"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for score in choice["decode_scores"]:
        table.add_row(
            _name(score, choice["decode_node"]),
            *(f"{score[name]:.3f}" for name in ("load", "room_load", "tbt_load")),
            _ms(score["tbt_s"]),
            _ms(score["stall_s"]),
            str(score["hit_blocks"]),
            _remarks(score),
        )
    return table


def _shown(choice: Record, leg: str) -> str:
    shown, count = len(choice[f"{leg}_scores"]), choice[f"{leg}_candidates"]
    return "" if shown == count else f"; the best {shown} of {count}"


def _name(score: Record, chosen: str) -> str:
    return f"{score['node_id']} *" if score["node_id"] == chosen else str(score["node_id"])


def _remarks(score: Record) -> str:
    words = (["a guess"] if not score["in_range"] else []) + (["young"] if score["young"] else [])
    return ", ".join(words)


# ---- what happened ----


def _steps(record: Record) -> Iterator[Text]:
    steps = record["steps"]
    for step in steps[:STEPS_SHOWN]:
        yield Text(f"{step['at_s'] * MS:9,.1f} ms  #{step['number']} {step['what']} {step['node']}".rstrip())
    if len(steps) > STEPS_SHOWN:
        yield Text(f"… and {len(steps) - STEPS_SHOWN} more steps: --json shows them")


# ---- cells ----


def _table(title: str) -> Table:
    return Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", padding=(0, 1, 0, 0))


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * MS:,.1f}"


def _difference(name: str, predicted: float | None, actual: float | None) -> str:
    """None of what was over when the rest was predicted."""
    return "" if predicted is None or actual is None or name == "before_s" else f"{(actual - predicted) * MS:+,.1f}"
