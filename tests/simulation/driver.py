"""A front end and the least possible conductor for the mini cluster: random placement, retries, and the books.

It keeps each request's log of tokens, checks their indices as they come, and counts how every attempt ended on every
node that was told of it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from core.messages import (
    AttemptFailed,
    AttemptFinished,
    AttemptStats,
    CancelCommand,
    Closed,
    DecodeJoined,
    Fetch,
    PrefillCommand,
    PrefillDone,
    Refused,
    ReserveCommand,
    StartCommand,
    Token,
    WorkerEvent,
)
from engine.fake import fake_tokens
from halfmoon.types import AttemptId, Epoch, FinishReason, RequestId, Role, SamplingParams
from simulator.node import Node
from tests.simulation.world import SIZE, World

ATTEMPTS_MAX = 60
END = Refused | AttemptFailed | AttemptFinished | Closed


@dataclass(kw_only=True, eq=False)
class Request:
    """`log`: tokens emitted, in order. `outcome`: None while it is open."""

    name: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    deadline_s: float = 60.0
    priority: int = 0
    number: int = 0
    legs: tuple[Node, ...] = ()
    log: list[int] = field(default_factory=list)
    outcome: str | None = None
    failures: list[WorkerEvent] = field(default_factory=list)

    @property
    def attempt_id(self) -> AttemptId:
        return AttemptId(RequestId(self.name), self.number)

    @property
    def oracle(self) -> list[int]:
        """What an undisturbed engine would say, up to the stop token or the limit."""
        tokens = fake_tokens(self.prompt, self.sampling.max_tokens, self.sampling)
        stops = [i for i, token in enumerate(tokens) if token in self.sampling.stop_token_ids]
        return tokens[: stops[0] + 1] if stops else tokens


class Driver:
    """Places requests on the world's nodes and sees them through.

    Attributes:
        ends: how each attempt ended, by (node's epoch, attempt).
        stats: of every AttemptFinished.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.requests: dict[RequestId, Request] = {}
        self.told: dict[tuple[Epoch, AttemptId], Node] = {}
        self.ends: dict[tuple[Epoch, AttemptId], list[WorkerEvent]] = defaultdict(list)
        self.prefilled: set[tuple[Epoch, AttemptId]] = set()
        self.joined: set[AttemptId] = set()
        self.stats: list[AttemptStats] = []
        world.on_event = self._on_event
        world.on_token = self._on_token

    # ---- what tests do ----

    def submit(self, request: Request, after_s: float = 0.0) -> Request:
        self.requests[RequestId(request.name)] = request
        self.world.after(after_s, lambda: self._place(request))
        return request

    def cancel(self, request: Request) -> None:
        if request.outcome is None:
            request.outcome = "cancelled"
            self._cancel_legs(request)

    def kill(self, node: Node) -> None:
        """The process dies; half a second later everybody knows."""
        node.kill()
        self.world.after(0.5, lambda: self._on_death(node))

    def run(self, limit_s: float = 120.0) -> None:
        """Until every request has ended and every node is at rest; then check everything."""
        self.world.run(lambda: self._done() and self.world.at_rest, limit_s)
        self.world.run(lambda end_s=self.world.now_s + 0.5: self.world.now_s >= end_s)  # what is on its way arrives
        self.check()

    def check(self) -> None:
        for request in self.requests.values():
            expected = request.oracle
            if request.outcome == "finished":
                assert request.log == expected, request.name
            assert request.log == expected[: len(request.log)], request.name
        for (epoch, attempt_id), node in self.told.items():
            if node.alive:
                self._check_end(epoch, attempt_id, node)
        for node in self.world.nodes.values():
            node.check()
            if node.alive:
                assert node.at_rest, str(node)

    def _check_end(self, epoch: Epoch, attempt_id: AttemptId, node: Node) -> None:
        """Exactly one end; a prefill that was done may have ended in silence."""
        ends = self.ends[epoch, attempt_id]
        silent = node.role is not Role.DECODE and (epoch, attempt_id) in self.prefilled
        assert len(ends) == 1 or (silent and not ends), f"{attempt_id} at {epoch}: {ends}"

    def _done(self) -> bool:
        return all(request.outcome is not None for request in self.requests.values())

    # ---- placing ----

    def _place(self, request: Request) -> None:
        if request.outcome is not None:
            return
        request.number += 1
        assert request.number <= ATTEMPTS_MAX, f"{request.name}: {request.failures[-5:]}"
        alive = [node for node in self.world.nodes.values() if node.alive]
        prefill = self.world.rng.choice([n for n in alive if n.role.prefills])
        decoders = [n for n in alive if n.role is Role.DECODE]
        if prefill.role is Role.COUPLED or not decoders:
            request.legs = (prefill,)
        else:
            request.legs = (self.world.rng.choice(decoders), prefill)
            self.world.tell(request.legs[0], self._reserve(request, prefill))
        self.world.tell(prefill, self._prefill(request, alive))
        for node in request.legs:
            self.told[node.epoch, request.attempt_id] = node

    def _prefill(self, request: Request, alive: list[Node]) -> PrefillCommand:
        source = self.world.rng.choice(alive)
        num_blocks = (len(request.prompt) + len(request.log)) // SIZE
        fetch = Fetch(
            source=source.node_id,
            source_epoch=source.epoch,
            source_address="",
            first_block=0,
            num_blocks=self.world.rng.randint(0, num_blocks),
        )
        return PrefillCommand(
            attempt_id=request.attempt_id,
            token_ids=request.prompt + tuple(request.log),
            num_prompt_tokens=len(request.prompt),
            sampling=request.sampling,
            front_end="f",
            deadline_s=request.deadline_s,
            fetches=(fetch,) if fetch.num_blocks else (),
            decode_here=len(request.legs) == 1,
            priority=request.priority,
        )

    def _reserve(self, request: Request, source: Node) -> ReserveCommand:
        return ReserveCommand(
            attempt_id=request.attempt_id,
            token_ids=request.prompt + tuple(request.log),
            num_prompt_tokens=len(request.prompt),
            sampling=request.sampling,
            front_end="f",
            source=source.node_id,
            source_epoch=source.epoch,
            source_address="",
            deadline_s=request.deadline_s,
            priority=request.priority,
        )

    def _cancel_legs(self, request: Request) -> None:
        for node in request.legs:
            self.world.tell(node, CancelCommand(attempt_id=request.attempt_id, reason="the driver says so"))

    def _again(self, request: Request) -> None:
        """A new attempt, which gets what was emitted; whatever the old one still emits is dropped."""
        self._cancel_legs(request)
        request.legs = ()
        self.world.after(self.world.rng.uniform(0.05, 0.5), lambda: self._place(request))

    # ---- listening ----

    def _on_event(self, node: Node, event: WorkerEvent) -> None:
        attempt_id = getattr(event, "attempt_id", None)
        if attempt_id is None:
            return
        if isinstance(event, END):
            self.ends[node.epoch, attempt_id].append(event)
        if isinstance(event, PrefillDone):
            self.prefilled.add((node.epoch, attempt_id))
        if isinstance(event, DecodeJoined):
            self.joined.add(attempt_id)
        if isinstance(event, AttemptFinished):
            self.stats.append(event.stats)
        request = self.requests[attempt_id.request_id]
        if request.attempt_id == attempt_id and request.outcome is None and node in request.legs:
            self._on_current(request, event)

    def _on_current(self, request: Request, event: WorkerEvent) -> None:
        if isinstance(event, Refused | AttemptFailed):
            request.failures.append(event)
            self._again(request)
        elif isinstance(event, PrefillDone) and len(request.legs) == 2:
            decoder = request.legs[0]
            if event.finish_reason is None:
                start = StartCommand(attempt_id=request.attempt_id, first_token_id=event.first_token_id)
                self.world.tell(decoder, start)
            else:
                cancel = CancelCommand(attempt_id=request.attempt_id, reason="finished at the first token")
                self.world.tell(decoder, cancel)

    def _on_token(self, node: Node, token: Token) -> None:
        request = self.requests[token.attempt_id.request_id]
        if request.attempt_id != token.attempt_id or request.outcome is not None or node not in request.legs:
            return
        assert token.index == len(request.log), f"{token.attempt_id}: {token.index} after {len(request.log)} tokens"
        request.log.append(token.token_id)
        if token.finish_reason is not None:
            stopped = token.token_id in request.sampling.stop_token_ids
            assert token.finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
            assert token.stats is not None
            request.outcome = "finished"

    def _on_death(self, node: Node) -> None:
        for request in self.requests.values():
            if request.outcome is None and node in request.legs:
                request.legs = tuple(leg for leg in request.legs if leg is not node)
                self._again(request)
