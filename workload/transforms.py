"""Pure: a trace made faster, shorter, smoother or heavier. Each returns a new trace and says so in its source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby
from random import Random

from halfmoon.errors import InvalidRequest
from workload.trace import Trace, TraceRequest

TICK_S = 3.0
"""Mooncake's published arrivals are rounded to this."""


def speedup(trace: Trace, factor: float) -> Trace:
    """The same requests, `factor` times as fast; 0.5: half as fast.

    Raises:
        InvalidRequest: the factor is not a finite number above 0.
    """
    _require(_is_positive(factor), "speedup", factor, "a finite number above 0")
    requests = tuple(replace(request, at_s=request.at_s / factor) for request in trace.requests)
    return _derived(trace, requests, f"x{factor:g}")


def jitter(trace: Trace, rng: Random, tick_s: float = TICK_S) -> Trace:
    """Spread arrivals that were rounded down to ticks: uniform over the tick that each begins.

    Requests of one tick keep their order (the drawn times are sorted), so that a chat's next turn does not overtake
    the one before it. To be applied before `speedup`, which shortens the ticks too.

    Raises:
        InvalidRequest: the tick is not a finite number above 0.
    """
    _require(_is_positive(tick_s), "tick_s", tick_s, "seconds, a finite number above 0")
    requests: list[TraceRequest] = []
    for at_s, group in groupby(trace.requests, key=lambda request: request.at_s):
        members = list(group)
        delays = sorted(rng.random() * tick_s for _ in members)
        requests.extend(replace(request, at_s=at_s + delay) for request, delay in zip(members, delays, strict=True))
    requests.sort(key=lambda request: request.at_s)
    return _derived(trace, tuple(requests), f"jittered over {tick_s:g} s")


def head(trace: Trace, num_requests: int) -> Trace:
    """The first `num_requests`, or all.

    Raises:
        InvalidRequest: less than 1.
    """
    _require(num_requests >= 1, "num_requests", num_requests, "at least 1")
    return _derived(trace, trace.requests[:num_requests], f"first {num_requests}")


def window(trace: Trace, start_s: float, end_s: float) -> Trace:
    """The arrivals in [start_s, end_s), counted from start_s.

    Raises:
        InvalidRequest: the window is empty, or nobody arrives in it.
    """
    _require(start_s < end_s, "end_s", end_s, f"more than start_s, {start_s:g}")
    requests = tuple(replace(r, at_s=r.at_s - start_s) for r in trace.requests if start_s <= r.at_s < end_s)
    _require(bool(requests), "start_s", start_s, "a window in which somebody arrives")
    return _derived(trace, requests, f"from {start_s:g} to {end_s:g} s")


def scale_outputs(trace: Trace, factor: float) -> Trace:
    """Output lengths times `factor`, rounded, at least 1.

    Raises:
        InvalidRequest: the factor is not a finite number above 0.
    """
    _require(_is_positive(factor), "output_scale", factor, "a finite number above 0")
    requests = tuple(replace(r, output_tokens=max(1, round(r.output_tokens * factor))) for r in trace.requests)
    return _derived(trace, requests, f"outputs x{factor:g}")


def shrink(trace: Trace, factor: int) -> Trace:
    """Prompts and blocks `factor` times as short, for a model and a host that are so much smaller; outputs as they are.

    Who shares what with whom stays: a prompt's names cover it as before, block by block.

    Raises:
        InvalidRequest: the factor is less than 1, or does not divide the trace's block.
    """
    fits = factor >= 1 and trace.block_tokens % factor == 0
    _require(fits, "shrink", factor, f"a divisor of {trace.block_tokens}, the tokens of a block")
    requests = tuple(replace(r, input_tokens=-(-r.input_tokens // factor)) for r in trace.requests)
    return replace(_derived(trace, requests, f"prompts /{factor}"), block_tokens=trace.block_tokens // factor)


def assign_priorities(trace: Trace, rng: Random, shares: Mapping[int, float]) -> Trace:
    """Give each request a priority by chance: {0: 3, 1: 1} gives a quarter of them priority 1.

    Raises:
        InvalidRequest: no shares, or one that is negative or not finite, or all are 0.
    """
    good = all(math.isfinite(share) and share >= 0 for share in shares.values()) and sum(shares.values()) > 0
    _require(good, "shares", dict(shares), "finite shares, 0 or more, one above 0")
    classes = sorted(shares)
    drawn = rng.choices(classes, weights=[shares[priority] for priority in classes], k=len(trace.requests))
    requests = tuple(replace(r, priority=priority) for r, priority in zip(trace.requests, drawn, strict=True))
    return _derived(trace, requests, "priorities drawn")


def _derived(trace: Trace, requests: tuple[TraceRequest, ...], what: str) -> Trace:
    return replace(trace, requests=requests, source=f"{trace.source}, {what}")


def _is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _require(ok: bool, field: str, value: object, limit: str) -> None:
    if not ok:
        raise InvalidRequest(field=field, value=value, limit=limit)
