"""The mini cluster under the simulator's conductor: the real machine and stream logs, with streams that break."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from conductor.config import ConductorConfig
from conductor.desk import Layout
from conductor.effects import RequestSpec
from conductor.machine import ConductorMachine
from engine.fake import fake_tokens
from engine.protocol import Sampled
from halfmoon.blocks import BlockChain, root_hash
from halfmoon.errors import HalfmoonError
from halfmoon.types import Outcome, RequestId, Role, SamplingParams
from simulator.clients import Client
from simulator.cluster import Cluster
from simulator.node import Node
from simulator.prompts import Planned
from tests.simulation.world import SIZE, World


@dataclass(kw_only=True, eq=False)
class Story:
    """One request as its client saw it. `ends`: its terminal events, of which there must be one."""

    client: Client
    ends: list[str] = field(default_factory=list)
    ended_s: float = 0.0

    @property
    def oracle(self) -> list[int]:
        spec = self.client.spec
        tokens = fake_tokens(spec.token_ids, spec.sampling.max_tokens, spec.sampling)
        stops = [i for i, token in enumerate(tokens) if token in spec.sampling.stop_token_ids]
        return tokens[: stops[0] + 1] if stops else tokens


class Conducted(Cluster):
    """A conductor for a world.

    Attributes:
        stories: by request id, of this conductor's life and earlier ones.
    """

    def __init__(self, world: World, **settings: float) -> None:
        self.stories: dict[RequestId, Story] = {}
        self.mini = world
        config = ConductorConfig(**{"suspect_s": 1.5, **settings})  # type: ignore[arg-type]
        layout = Layout(block_size=SIZE, block_bytes=512)
        super().__init__(
            world,
            world.chance,
            lambda: ConductorMachine(config=config, layout=layout, conductor_id="c"),
            {},
            world.rng,
            self._note_end,
            audit=world.audit,
        )
        world.peers = self.peers

    def start(self, name: str, role: Role, **settings: Any) -> Node:
        """Start a node, or its next incarnation, and dial it."""
        return self.add(self.mini.parts(name, role, **settings))

    def ask(self, name: str, prompt: tuple[int, ...], sampling: SamplingParams, *, deadline_s: float = 60.0) -> Story:
        root = root_hash(next(iter(self.mini.nodes.values())).info.fingerprint)
        hashes = tuple(BlockChain(root, SIZE).extend(prompt))
        spec = RequestSpec(
            request_id=RequestId(name),
            token_ids=prompt,
            block_hashes=hashes,
            sampling=sampling,
            front_end="f",
            deadline_s=deadline_s,
        )
        planned = Planned(
            request_id=spec.request_id,
            input_tokens=len(prompt),
            output_tokens=sampling.max_tokens,
            token_ids=prompt,
            hashes=hashes,
            token=Sampled(token_id=0),
        )
        story = self.stories[spec.request_id] = Story(client=Client(spec=spec, planned=planned, arrived_s=0.0))
        story.client = self.submit(spec, planned)
        return story

    def drop(self, story: Story) -> None:
        """The client goes away."""
        self.cancel(story.client, "client gone")

    def run(self, limit_s: float = 200.0) -> None:
        """Until every request has ended and nothing is held; then check everything."""
        self.mini.run(lambda: all(s.ends for s in self.stories.values()) and self.at_rest, limit_s)
        end_s = self.world.now_s + 1.0
        self.mini.run(lambda: self.world.now_s >= end_s)
        for story in self.stories.values():
            assert len(story.ends) == 1, story
            expected, got = story.oracle, list(story.client.log.token_ids)
            assert got == (expected if story.ends == ["finished"] else expected[: len(got)]), story
        status = self.machine.status()
        assert (status.requests_open, [n.info.node_id for n in status.nodes if not n.books.empty]) == (0, [])
        for node in self.mini.nodes.values():
            node.check()
            assert not node.alive or node.at_rest, str(node)

    def _note_end(self, client: Client, outcome: Outcome, error: HalfmoonError | None) -> None:
        story = self.stories[client.spec.request_id]
        story.ends.append(outcome.value if error is None else f"{outcome}: {error}")
        story.ended_s = self.world.now_s
