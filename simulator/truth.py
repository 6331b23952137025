"""Pure: what is true in the simulated world, and believed by nobody in it: how long passes and copies take."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

from engine.protocol import Sampled, Slice
from halfmoon.types import AttemptId, NodeId, RequestId
from node.effects import Pass
from simulator.hardware_values import Hardware
from simulator.prompts import SAMPLED_STOP, STOP, Planned

DRAWN = 128
"""Noise values at once, where one is asked for."""
KEEP_MAX = 4096
"""Noise values that have been used are dropped in portions of this many."""


class Noise:
    """Factors of successive passes: lognormal, with median 1. Value i is the same whoever looked at it before."""

    def __init__(self, rng: random.Random, sigma: float) -> None:
        self._rng = rng
        self._sigma = sigma
        self._values: list[float] = []
        self._at = 0

    def next(self) -> float:
        if self._at == len(self._values):
            self.ahead(DRAWN)
        value = self._values[self._at]
        self.skip(1)
        return value

    def ahead(self, count: int) -> list[float]:
        """The next `count` values, not used up."""
        end = self._at + count
        missing = end - len(self._values)
        if missing > 0:
            gauss, sigma = self._rng.gauss, self._sigma
            self._values += [math.exp(gauss(0.0, sigma)) for _ in range(missing)] if sigma else [1.0] * missing
        return self._values[self._at : end]

    def skip(self, count: int) -> None:
        self._at += count
        if self._at > KEEP_MAX:
            del self._values[: self._at]
            self._at = 0


class TrueEngine:
    """The engine of one node (simulator.compute.SteadyEngine).

    In a pass that also holds steps the weights are read once: the larger constant counts; on hardware that hides that
    reading behind the prompts' new tokens, less what they take.
    """

    def __init__(self, hardware: Hardware, planned: Mapping[RequestId, Planned], noise: Noise) -> None:
        self._hardware = hardware
        self._planned = planned
        self._noise = noise

    # ---- single passes ----

    def begin(self, work: Pass) -> float:
        if all(map(_is_step, work.slices)):
            return self._step_s(len(work.slices), sum([part.end for part in work.slices])) * self._noise.next()
        chunks = [(a, part) for a, part in zip(work.attempts, work.slices, strict=True) if not _is_step(part)]
        steps = [part for part in work.slices if _is_step(part)]
        hardware, factor = self._hardware, self._noise.next()
        constant = max(hardware.prefill_pass_s, hardware.decode_step_s if steps else 0.0)
        if hardware.mixed_hides_weights:
            hidden_s = hardware.prefill_token_s * sum(len(part.token_ids) for _, part in chunks)
            constant = max(hardware.prefill_pass_s, constant - hidden_s)
        shares = [self._chunk_s(part) for _, part in chunks]
        reading = hardware.decode_sequence_s * len(steps) + hardware.decode_token_s * sum(part.end for part in steps)
        total = (constant + sum(shares) + reading) * factor
        for (attempt_id, _), share in zip(chunks, shares, strict=True):
            self._planned[attempt_id.request_id].prefill_s += (share + hardware.prefill_pass_s / len(chunks)) * factor
        return total

    def results(self, work: Pass) -> list[Sampled | None]:
        return [self._sample(a, part) for a, part in zip(work.attempts, work.slices, strict=True)]

    def _sample(self, attempt_id: AttemptId, part: Slice) -> Sampled | None:
        if part.sampling is None:
            return None
        planned = self._planned[attempt_id.request_id]
        return planned.token if part.end < planned.stops_after else SAMPLED_STOP

    def _chunk_s(self, part: Slice) -> float:
        new, hardware = len(part.token_ids), self._hardware
        return hardware.prefill_token_s * new + hardware.prefill_pair_s * (new * part.start + 0.5 * new * new)

    def _step_s(self, batch: int, kv_tokens: int) -> float:
        hardware = self._hardware
        return hardware.decode_step_s + hardware.decode_sequence_s * batch + hardware.decode_token_s * kv_tokens

    # ---- many steps ----

    def steady_steps(self, work: Pass) -> int:
        planned, parts = self._planned, zip(work.attempts, work.slices, strict=True)
        return min([planned[attempt_id.request_id].stops_after - part.end for attempt_id, part in parts])

    def ahead(self, work: Pass, num_steps: int) -> list[float]:
        hardware, batch = self._hardware, len(work.slices)
        constant, per_token = hardware.decode_step_s + hardware.decode_sequence_s * batch, hardware.decode_token_s
        first = sum([part.end for part in work.slices]) + batch
        kv_tokens = range(first, first + num_steps * batch, batch)
        factors = self._noise.ahead(num_steps)
        return [(constant + per_token * kv) * factor for kv, factor in zip(kv_tokens, factors, strict=True)]

    def skip(self, num_steps: int) -> None:
        self._noise.skip(num_steps)

    def tokens(self, attempt_id: AttemptId, num_steps: int) -> Sequence[int]:
        return [self._planned[attempt_id.request_id].token.token_id] * num_steps


def _is_step(part: Slice) -> bool:
    """One token that has a past, as engine.fake.Speed tells it."""
    return len(part.token_ids) == 1 and part.start > 0


class TruePhysics:
    """Messages, moves and copies (simulator.node.Physics).

    A copy needs the sender's outgoing and the receiver's incoming link, each alone and in the order of asking:
    begin = when both are free, end = begin + link_s + bytes / bandwidth.
    """

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware
        self._out_free_s: dict[NodeId, float] = {}
        self._in_free_s: dict[NodeId, float] = {}

    def message_s(self) -> float:
        return self._hardware.message_s

    def move_s(self) -> float:
        return self._hardware.move_s_per_byte * self._hardware.block_bytes

    def hash_s(self) -> float:
        return 0.0

    def copied_at_s(self, source: NodeId, target: NodeId, num_bytes: int, now_s: float) -> float:
        begin_s = max(now_s, self._out_free_s.get(source, 0.0), self._in_free_s.get(target, 0.0))
        free_s = begin_s + num_bytes / self._hardware.link_bytes_per_s
        self._out_free_s[source] = self._in_free_s[target] = free_s
        return free_s + self._hardware.link_s


assert SAMPLED_STOP.token_id == STOP
