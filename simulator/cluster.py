"""Pure: a conductor over simulated nodes: its machine, its streams with each node, its front end.

Each node's epoch has three streams with the conductor: commands down, events up, tokens up. A control stream that
breaks loses what is on its way in both directions, and comes back with a snapshot; a token stream that breaks loses
tokens; a node that dies takes some or all of what it had said last with it; a conductor that dies knew everything and
leaves nothing. Played here is what conductor/driver.py, nodes.py and frontend.py do in a real process.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from conductor.actuals import Seen, seen_of
from conductor.effects import Begin, Effect, End, HoldFirst, RequestSpec, Resume, Send
from conductor.machine import ConductorMachine
from core.messages import Command, Snapshot, Token, WorkerEvent
from halfmoon.errors import HalfmoonError, Unavailable
from halfmoon.types import AttemptId, NodeId, Outcome, RequestId
from node.effects import Pass
from simulator.audit import Audit, DecisionLog
from simulator.clients import Client, Clients
from simulator.exchange import Peers, Physics
from simulator.node import TICK_S as NODE_TICK_S
from simulator.node import Node, Parts
from simulator.prompts import Planned
from simulator.wire import Weather
from simulator.world import World

TICK_S = 0.1
"""Of the conductor's process: deadlines are kept to this."""
HOLE_S = 2.0
"""As conductor.settings.FrontEndConfig.hole_s."""
SILENCE_S = 5.0
"""As conductor.settings.NodesConfig.node_silence_s."""
REDIAL_S = 1.0
"""As conductor.settings.NodesConfig.backoff_s_max, and to notice that a dial has failed."""


@dataclass(kw_only=True, eq=False)
class Link:
    """The conductor's streams with one incarnation of a node.

    up: its snapshot has come since the last break. generation: of the control stream, and of the tokens' stream.
    """

    node: Node
    up: bool = False
    tokens_up: bool = True
    generation: int = 0
    heard_s: float = 0.0


OnEnd = Callable[[Client, Outcome, HalfmoonError | None], None]


class Cluster:
    """A conductor's world (simulator.node.Conductor).

    Args:
        make_machine: a conductor that knows nothing.
        planned: every request that has ever come.
        rng: of faults.
        weather_calm: nothing may befall single messages now.
        on_end: told of each request's terminal event, before it is forgotten.
        audit: checks every event.
    """

    def __init__(
        self,
        world: World,
        physics: Physics,
        make_machine: Callable[[], ConductorMachine],
        planned: Mapping[RequestId, Planned],
        rng: random.Random,
        on_end: OnEnd,
        *,
        weather: Weather | None = None,
        weather_calm: Callable[[], bool] = lambda: True,
        audit: Audit | None = None,
    ) -> None:
        self.world, self.physics, self.rng = world, physics, rng
        self.peers = Peers(weather)
        self.clients = Clients(self._finished, self._hole, self._held)
        self.log = DecisionLog()
        self.counters: Counter[str] = Counter()
        self.links: dict[NodeId, Link] = {}
        self._weather_calm = weather_calm
        self._odd: set[RequestId] = set()  # open requests, of whose current attempt a token is missing or was late
        self._make_machine = make_machine
        self._planned = planned
        self._on_end = on_end
        self._audit = audit
        self.machine = make_machine()
        self._tick()
        self._tick_nodes()

    # ---- what drivers do ----

    def add(self, parts: Parts) -> Node:
        """Start a node, or its next incarnation, and dial it."""
        node = Node(self.world, self.peers, self.physics, self, parts)
        self._dial(node)
        return node

    def submit(self, spec: RequestSpec, planned: Planned) -> Client:
        client = Client(spec=spec, planned=planned, arrived_s=self.world.now_s)
        self.clients.open[spec.request_id] = client
        if self._audit is not None:
            self._audit.arrived(spec.request_id)
        self._perform(self.machine.on_request(spec, self.world.now_s))
        return client

    def cancel(self, client: Client, reason: str) -> None:
        """The client is gone, or an operator says so."""
        request_id = client.spec.request_id
        if self.clients.open.get(request_id) is client:
            self.settle()
            self._end(client, Outcome.CANCELLED, None)
            self._perform(self.machine.on_cancel(request_id, reason, self.world.now_s, seen=_seen(client)))

    @property
    def at_rest(self) -> bool:
        """Nothing is open, nothing is held, and the conductor knows."""
        if self.clients.open or not all(node.at_rest for node in self.peers.nodes.values() if node.alive):
            return False
        status = self.machine.status()
        return not status.requests_open and all(node.books.empty for node in status.nodes)

    def settle(self) -> None:
        """Bring every node's books up to now."""
        for node in self.peers.nodes.values():
            node.settle()

    def calm(self, work: Pass) -> bool:
        return self._weather_calm() and not (
            self._odd and any(attempt_id.request_id in self._odd for attempt_id in work.attempts)
        )

    def change(self, act: Callable[[], None]) -> None:
        """Something changes under running steps: settle those that ended before it, and think anew of the others."""
        self.settle()
        act()
        for node in self.peers.nodes.values():
            if node.alive:
                node.compute.replan()

    # ---- faults ----

    def break_link(self, node: Node) -> None:
        """The control stream breaks, and with it the channel; both sides live on."""
        link = self.links[node.node_id]
        if link.node is node and link.up:
            self._lost(link, "the stream broke")
            self._redial(node)

    def break_tokens(self, node: Node) -> None:
        """The token stream breaks alone, and is open again a moment later."""
        link = self.links[node.node_id]
        if link.node is node and link.up and link.tokens_up:
            node.settle()
            link.tokens_up = False
            self.world.after(self.rng.uniform(0.005, 0.1), partial(self._reopen_tokens, link))

    def kill(self, node: Node) -> None:
        """kill -9. What it had written to a stream may or may not have left."""
        link = self.links[node.node_id]
        node.kill()
        link.tokens_up = self.rng.random() < 0.5
        if self.rng.random() < 0.5:
            link.generation += 1
            link.up = False
        self.world.after(self.rng.uniform(0.02, 0.5), partial(self._lost, link, "killed"))

    def restart(self) -> None:
        """This conductor is gone; every client sees its stream end; another one begins with nothing."""
        self.settle()
        for client in list(self.clients.open.values()):
            self._end(client, Outcome.FAILED, Unavailable("the conductor was lost"))
        self.machine = self._make_machine()
        for link in self.links.values():
            link.up = False
            link.generation += 1
            if link.node.alive:
                self.world.after(self.rng.uniform(0.05, 0.3), partial(self._dial, link.node))

    # ---- links ----

    def _dial(self, node: Node) -> None:
        """Attach: a snapshot is asked for, and nothing counts until it has come."""
        if not node.alive or self.peers.nodes[node.node_id] is not node:
            return
        if self.peers.parted(node.node_id, node.node_id):
            self.world.after(REDIAL_S, partial(self._dial, node))
            return
        link = self.links.get(node.node_id)
        if link is None or link.node is not node:
            link = self.links[node.node_id] = Link(node=node)
        if not link.up:
            self._open_tokens(link)
            node.events.send(partial(self._attached, link, link.generation, node.snapshot()))
            self.world.after(REDIAL_S, partial(self._dial, node))  # if that did not come

    def _attached(self, link: Link, generation: int, snapshot: Snapshot) -> None:
        if generation == link.generation and link.node.alive:
            info, now_s = snapshot.info, self.world.now_s
            link.up, link.heard_s = True, now_s
            self._perform(self.machine.on_node_joined(info, now_s))
            self._perform(self.machine.on_worker_event(info.node_id, info.epoch, snapshot, now_s))

    def _lost(self, link: Link, reason: str) -> None:
        self.settle()
        link.up = False
        link.generation += 1
        self._perform(self.machine.on_node_lost(link.node.node_id, link.node.epoch, reason, self.world.now_s))

    def _redial(self, node: Node) -> None:
        self.world.after(self.rng.uniform(0.05, 0.3), partial(self._dial, node))

    def _reopen_tokens(self, link: Link) -> None:
        if link.up and not link.tokens_up and link.node.alive:
            self._open_tokens(link)
            self._perform(self.machine.on_tokens_lost(link.node.node_id, link.node.epoch, self.world.now_s))

    def _open_tokens(self, link: Link) -> None:
        """Tokens come again. Those whose earlier ones were lost are taken one by one from now on."""
        link.node.settle()
        link.tokens_up = True
        link.node.compute.replan()

    # ---- from nodes ----

    def on_event(self, node: Node, event: WorkerEvent) -> None:
        link = self.links.get(node.node_id)
        if link is not None and link.node is node and link.up:
            link.heard_s = self.world.now_s
            self._perform(self.machine.on_worker_event(node.node_id, node.epoch, event, self.world.now_s))

    def on_tokens(self, node: Node, tokens: Sequence[Token]) -> None:
        link = self.links.get(node.node_id)
        if link is None or link.node is not node or not link.tokens_up:
            self.counters["tokens_lost"] += len(tokens)
            self.on_odd(tokens)
            return
        for token in tokens:
            self.clients.offer(token, self.world.now_s)

    def on_odd(self, tokens: Sequence[Token]) -> None:
        """Later tokens of these, over this stream or another, may come before them, and then wait in the log."""
        self._mark(token.attempt_id for token in tokens)

    def _mark(self, attempts: Iterable[AttemptId]) -> None:
        for attempt_id in attempts:
            client = self.clients.open.get(attempt_id.request_id)
            if client is not None and client.log.attempt == attempt_id:
                self._odd.add(attempt_id.request_id)

    def on_steps(self, node: Node, work: Pass, ids: Sequence[Sequence[int]], due_s: Sequence[float]) -> None:
        """Those that have come by now have come at their moment; the others are still on their way."""
        come = bisect_right(due_s, self.world.now_s)
        link = self.links.get(node.node_id)
        up = link is not None and link.node is node and link.tokens_up
        firsts = [
            part.end - self._planned[attempt_id.request_id].input_tokens
            for attempt_id, part in zip(work.attempts, work.slices, strict=True)
        ]
        if not up:
            self.counters["tokens_lost"] += come * len(ids)
            self._mark(work.attempts if come else ())
        elif come:
            times_s = due_s[:come]
            for attempt_id, first, some in zip(work.attempts, firsts, ids, strict=True):
                self.clients.offer_run(attempt_id, first, some[:come], times_s)
        for i in range(come, len(due_s)):
            tokens = [
                Token(attempt_id=attempt_id, index=first + i, token_id=some[i])
                for attempt_id, first, some in zip(work.attempts, firsts, ids, strict=True)
            ]
            self.world.at(due_s[i], partial(self.on_tokens, node, tokens))

    # ---- the front end ----

    def _tick(self) -> None:
        now_s = self.world.now_s
        self._perform(self.machine.on_tick(now_s))
        if self._audit is not None:
            self.machine.check_invariants()
        for client in self.clients.holes(now_s - HOLE_S):
            self._hole(client)
        for link in self.links.values():
            if link.up and now_s - link.heard_s > SILENCE_S:
                self._lost(link, f"silent for {SILENCE_S} s")
                self._redial(link.node)
        self.world.after(TICK_S, self._tick)

    def _tick_nodes(self) -> None:
        for node in self.peers.nodes.values():
            node.tick()
        self.world.after(NODE_TICK_S, self._tick_nodes)

    def _hole(self, client: Client) -> None:
        self.counters["holes"] += 1
        client.log.suspend()
        self._perform(self.machine.on_gap(client.spec.request_id, "a token is missing", self.world.now_s))

    def _finished(self, client: Client) -> None:
        self._end(client, Outcome.FINISHED, None)
        request_id, now_s = client.spec.request_id, self.world.now_s
        self._perform(self.machine.on_stream_finished(request_id, now_s, seen=_seen(client)))

    def _end(self, client: Client, outcome: Outcome, error: HalfmoonError | None) -> None:
        """The request's one terminal event."""
        request_id = client.spec.request_id
        client.log.close()
        client.show(self.world.now_s)
        if self._audit is not None:
            self._audit.ended(request_id, outcome.value)
        self.log.note(self.world.now_s, outcome.value, request_id, client.log.num_tokens, error or "")
        self._on_end(client, outcome, error)
        self._odd.discard(request_id)
        self.clients.close(client)

    # ---- effects ----

    def _perform(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send():
                    self._send(effect)
                case Begin():
                    self._begin(effect)
                case HoldFirst():
                    self._hold_first(effect)
                case Resume():
                    self._resume(effect)
                case End():
                    self._on_machine_ends(effect)

    def _begin(self, begin: Begin) -> None:
        request_id = begin.attempt_id.request_id
        record = self.machine.explain(request_id)
        assert record is not None
        chosen = record.choices[-1]
        self.log.note(
            self.world.now_s, "place", begin.attempt_id, chosen.prefill_node, chosen.decode_node,
            chosen.hit_blocks, chosen.fetch_blocks, chosen.fetch_source, chosen.ttft_s, chosen.tbt_s,
        )  # fmt: skip
        client = self.clients.open.get(request_id)
        if client is not None:
            client.log.begin(begin.attempt_id)
            self._odd.discard(request_id)

    def _hold_first(self, hold: HoldFirst) -> None:
        client = self.clients.open.get(hold.request_id)
        if client is not None:
            client.log.hold_first(self.world.now_s + hold.hold_s)

    def _held(self, client: Client) -> None:
        until_s = client.log.hold_until_s
        self.world.at(until_s, lambda: client.show(until_s))

    def _resume(self, resume: Resume) -> None:
        """Answer with the log, in which every token is that has come by now."""
        self.settle()
        self.counters["resumes"] += 1
        client = self.clients.open.get(resume.request_id)
        if client is not None:
            self._perform(self.machine.on_resume(resume.request_id, client.log.suspend(), self.world.now_s))

    def _on_machine_ends(self, end: End) -> None:
        client = self.clients.open.get(end.request_id)
        if client is not None:
            if client.log.num_tokens:
                self.settle()
            self._end(client, end.outcome, end.error)
        else:
            assert self._audit is None, f"{end.request_id} is ended a second time: {end.outcome}"

    def _send(self, send: Send) -> None:
        link = self.links.get(send.node_id)
        if link is not None and link.up and link.node.epoch == send.epoch:
            link.node.commands.send(partial(self._command, link, link.generation, send.command))
        else:
            self.counters["commands_dropped"] += 1

    def _command(self, link: Link, generation: int, command: Command) -> None:
        if generation == link.generation and link.node.alive:
            link.node.command(command)


def _seen(client: Client) -> Seen:
    times_s = {"arrived_s": client.arrived_s, "tokenized_s": client.arrived_s}
    return seen_of(client.tokens_s, **times_s, first_came_s=client.log.first_came_s)
