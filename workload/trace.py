"""Pure: a workload: who arrives when, with how many tokens, sharing which blocks with whom."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TraceRequest:
    """One arrival.

    Args:
        at_s: seconds since the trace's beginning.
        input_tokens, output_tokens: at least 1 each.
        block_ids: names of the prompt's successive blocks of `Trace.block_tokens` tokens, the last one usually partial:
            two prompts share a prefix exactly as far as these agree. Empty where the format says nothing of content.
        priority: higher is more urgent; 0 where the format has none.
    """

    at_s: float
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] = ()
    priority: int = 0


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Arrivals in order of time.

    Args:
        source: where it is from, for tables and reports.
        block_tokens: tokens of one id in `block_ids`.
        skipped: malformed lines that were left out on request.
        first_skipped: where the first few of them are, and what is wrong with each; empty: there is none.
    """

    source: str
    block_tokens: int
    requests: tuple[TraceRequest, ...]
    skipped: int = 0
    first_skipped: tuple[str, ...] = ()
