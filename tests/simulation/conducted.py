"""The mini cluster under the real conductor's machine and the real stream logs, with streams that break.

Each node has three streams with the conductor: commands down, events up, tokens up. A control link that breaks loses
what is on its way in both directions and comes back with a snapshot; a token stream that breaks loses tokens; a node
that dies takes some or all of what it had said last with it; a conductor that restarts knows nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial

from conductor.config import ConductorConfig
from conductor.desk import Layout
from conductor.effects import Begin, Effect, End, RequestSpec, Resume, Send
from conductor.machine import ConductorMachine
from conductor.streams import StreamLog
from core.messages import Command, DrainCommand, NodeInfo, Snapshot, SnapshotCommand, Token, WorkerEvent
from engine.fake import fake_tokens
from halfmoon.blocks import BlockChain, root_hash
from halfmoon.types import BlockHash, NodeId, RequestId, Role, SamplingParams, Tier
from tests.simulation.world import SIZE, Node, World

REPORT_S = 0.25
HOLE_S = 2.0
TICK_S = 0.1


@dataclass(kw_only=True, eq=False)
class Client:
    """One request as its client sees it. `ends`: its terminal events, of which there must be one."""

    spec: RequestSpec
    log: StreamLog = field(default_factory=StreamLog)
    ends: list[str] = field(default_factory=list)
    ended_s: float = 0.0

    @property
    def oracle(self) -> list[int]:
        sampling = self.spec.sampling
        tokens = fake_tokens(self.spec.token_ids, sampling.max_tokens, sampling)
        stops = [i for i, token in enumerate(tokens) if token in sampling.stop_token_ids]
        return tokens[: stops[0] + 1] if stops else tokens


@dataclass(kw_only=True, eq=False)
class Link:
    """The conductor's streams with one node's epoch. `up`: its snapshot has come since the last break."""

    node: Node
    up: bool = False
    tokens_up: bool = True
    generation: int = 0


class Conducted:
    """A conductor for a world: its machine, its front end, its links.

    Attributes:
        clients: by request id, of this conductor's life and earlier ones.
        settings: of every machine that is started.
    """

    def __init__(self, world: World, **settings: float) -> None:
        self.world = world
        self.settings = settings
        self.clients: dict[RequestId, Client] = {}
        self.links: dict[NodeId, Link] = {}
        self.counters: Counter[str] = Counter()
        world.on_event = self._on_event
        world.on_token = self._on_token
        self.machine = self._new_machine()
        self._tick()

    # ---- what tests do ----

    def add(self, name: str, role: Role, **settings: object) -> Node:
        """Start a node, or its next incarnation, and dial it."""
        node = self.world.add(name, role, **settings)
        self._report(node)
        self._dial(node)
        return node

    def submit(
        self, name: str, prompt: tuple[int, ...], sampling: SamplingParams, *, deadline_s: float = 60.0
    ) -> Client:
        spec = RequestSpec(
            request_id=RequestId(name),
            token_ids=prompt,
            block_hashes=self._names(prompt),
            sampling=sampling,
            front_end="f",
            deadline_s=deadline_s,
        )
        client = self.clients[spec.request_id] = Client(spec=spec)
        self._perform(self.machine.on_request(spec, self.world.now_s))
        return client

    def cancel(self, client: Client) -> None:
        if not client.ends:
            self._end(client, "cancelled")
            self._perform(self.machine.on_cancel(client.spec.request_id, "client gone", self.world.now_s))

    def break_link(self, node: Node) -> None:
        """The control stream breaks, and with it the channel; both sides live on."""
        link = self.links[node.node_id]
        if link.node is node and link.up:
            self._lost(link, "the stream broke")
            self.world.after(self.world.rng.uniform(0.05, 0.3), partial(self._dial, node))

    def break_tokens(self, node: Node) -> None:
        """The token stream breaks alone, and is open again a moment later."""
        link = self.links[node.node_id]
        if link.node is node and link.up and link.tokens_up:
            link.tokens_up = False
            self.world.after(self.world.rng.uniform(0.005, 0.1), partial(self._reopen_tokens, link))

    def kill(self, node: Node) -> None:
        """kill -9. What it had written to a stream may or may not have left."""
        link = self.links[node.node_id]
        node.kill()
        link.tokens_up = self.world.rng.random() < 0.5
        if self.world.rng.random() < 0.5:
            link.generation += 1
            link.up = False
        self.world.after(self.world.rng.uniform(0.02, 0.5), partial(self._lost, link, "killed"))

    def restart(self) -> None:
        """This conductor is gone; every client sees its stream end; another one begins with nothing."""
        for client in self.clients.values():
            if not client.ends:
                self._end(client, "conductor lost")
        self.machine = self._new_machine()
        for link in self.links.values():
            link.up = False
            link.generation += 1
            if link.node.alive:
                self.world.after(self.world.rng.uniform(0.05, 0.3), partial(self._dial, link.node))

    def run(self, limit_s: float = 200.0) -> None:
        """Until every request has ended and every node is at rest; then check everything."""
        self.world.run(lambda: all(c.ends for c in self.clients.values()) and self.world.at_rest, limit_s)
        end_s = self.world.now_s + 1.0
        self.world.run(lambda: self.world.now_s >= end_s)
        for client in self.clients.values():
            assert len(client.ends) == 1, client
            expected, got = client.oracle, list(client.log.token_ids)
            assert got == (expected if client.ends == ["finished"] else expected[: len(got)]), client
        status = self.machine.status()
        assert (status.requests_open, [n.info.node_id for n in status.nodes if not n.books.empty]) == (0, [])
        for node in self.world.nodes.values():
            node.check()
            assert not node.alive or node.at_rest, str(node)

    # ---- links ----

    def _dial(self, node: Node) -> None:
        """Attach: a snapshot is asked for, and nothing counts until it has come."""
        link = self.links.get(node.node_id)
        if not node.alive or self.world.nodes[node.node_id] is not node:
            return
        if link is None or link.node is not node:
            link = self.links[node.node_id] = Link(node=node)
        link.tokens_up = True
        self.world.deliver((node, "events"), partial(self._attached, link, link.generation, _snapshot(node)))

    def _attached(self, link: Link, generation: int, snapshot: Snapshot) -> None:
        if generation == link.generation and link.node.alive:
            link.up = True
            info, now_s = snapshot.info, self.world.now_s
            self._perform(self.machine.on_node_joined(info, now_s))
            self._perform(self.machine.on_worker_event(info.node_id, info.epoch, snapshot, now_s))

    def _lost(self, link: Link, reason: str) -> None:
        link.up = False
        link.generation += 1
        self._perform(self.machine.on_node_lost(link.node.node_id, link.node.epoch, reason, self.world.now_s))

    def _reopen_tokens(self, link: Link) -> None:
        if link.up and not link.tokens_up and link.node.alive:
            link.tokens_up = True
            self._perform(self.machine.on_tokens_lost(link.node.node_id, link.node.epoch, self.world.now_s))

    def _report(self, node: Node) -> None:
        if node.alive:
            self.world.deliver((node, "events"), partial(self._on_event, node, node.machine.load()))
            self.world.after(REPORT_S, partial(self._report, node))

    # ---- from nodes ----

    def _on_event(self, node: Node, event: WorkerEvent) -> None:
        link = self.links.get(node.node_id)
        if link is not None and link.node is node and link.up:
            self._perform(self.machine.on_worker_event(node.node_id, node.epoch, event, self.world.now_s))

    def _on_token(self, node: Node, token: Token) -> None:
        link = self.links.get(node.node_id)
        client = self.clients[token.attempt_id.request_id]
        if link is None or link.node is not node or not link.tokens_up or client.ends:
            return
        client.log.offer(token, self.world.now_s)
        if client.log.finish_reason is not None:
            self._end(client, "finished")
            self._perform(self.machine.on_stream_finished(client.spec.request_id, self.world.now_s))

    # ---- the front end ----

    def _tick(self) -> None:
        now_s = self.world.now_s
        self._perform(self.machine.on_tick(now_s))
        for client in list(self.clients.values()):
            hole_s = client.log.hole_since_s
            if not client.ends and hole_s is not None and now_s - hole_s > HOLE_S:
                client.log.suspend()
                self._perform(self.machine.on_gap(client.spec.request_id, "a hole", now_s))
        self.world.after(TICK_S, self._tick)

    def _end(self, client: Client, how: str) -> None:
        client.ends.append(how)
        client.ended_s = self.world.now_s
        client.log.close()

    # ---- effects ----

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send():
                    self._send(effect)
                case Begin():
                    self.clients[effect.attempt_id.request_id].log.begin(effect.attempt_id)
                case Resume():
                    emitted = self.clients[effect.request_id].log.suspend()
                    self.counters[effect.reason] += 1
                    self._perform(self.machine.on_resume(effect.request_id, emitted, self.world.now_s))
                case End():
                    self._end(self.clients[effect.request_id], f"{effect.outcome}: {effect.error}")

    def _send(self, send: Send) -> None:
        link = self.links[send.node_id]
        if link.up and link.node.epoch == send.epoch:
            arrive = partial(self._command, link, link.generation, send.command)
            self.world.deliver((link.node, "commands"), arrive)

    def _command(self, link: Link, generation: int, command: Command) -> None:
        if generation != link.generation or not link.node.alive:
            return
        if isinstance(command, SnapshotCommand):
            self.world.deliver((link.node, "events"), partial(self._on_event, link.node, _snapshot(link.node)))
        elif isinstance(command, DrainCommand):
            link.node.machine.drain()
        else:
            link.node.call("on_command", command)

    # ---- making ----

    def _new_machine(self) -> ConductorMachine:
        layout = Layout(block_size=SIZE, block_bytes=512)
        settings = {"suspect_s": 1.5, **self.settings}
        config = ConductorConfig(**settings)  # type: ignore[arg-type]
        return ConductorMachine(config=config, layout=layout, conductor_id="c")

    def _names(self, token_ids: tuple[int, ...]) -> tuple[BlockHash, ...]:
        node = next(iter(self.world.nodes.values()))
        return tuple(BlockChain(root_hash(node.engine.model.fingerprint), SIZE).extend(token_ids))


def _info(node: Node) -> NodeInfo:
    return NodeInfo(
        node_id=node.node_id,
        epoch=node.epoch,
        role=node.role,
        address=str(node.node_id),
        fingerprint=node.engine.model.fingerprint,
        num_device_blocks=sum(node.cache.counts(Tier.DEVICE).values()),
        num_dram_blocks=sum(node.cache.counts(Tier.DRAM).values()),
        block_bytes=node.block_bytes,
        tokens_per_pass_max=16,
        sequences_max=64,
    )


def _snapshot(node: Node) -> Snapshot:
    return Snapshot(
        info=_info(node),
        last_event_id=node.cache.last_event_id,
        blocks=node.cache.snapshot(),
        attempts=node.machine.attempts(),
    )
