"""Pure: what a trace's requests say and how long they will go on: tokens and names from block ids.

Block `i` of a prompt is its id, repeated, so equal ids give equal tokens and, by the chain, equal names exactly as far
as two prompts share a prefix. Generated tokens are a token of the request's own, so that generated blocks are nobody
else's: a trace names the blocks of a chat's next turn anew, and says nothing of what was generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from core.messages import PrefillCommand, ReserveCommand
from engine.protocol import Sampled
from halfmoon.blocks import BlockChain, packed_block_hash
from halfmoon.errors import InvalidRequest
from halfmoon.types import BlockHash, RequestId
from workload.trace import Trace, TraceRequest

ID_MAX = (1 << 30) - 1
"""Of a trace's block ids; the next 2**30 tokens name blocks of which a trace says nothing, the next ones outputs."""
NAMELESS = 1 << 30
OUTPUT = 1 << 31
STOP = (1 << 32) - 1
"""The token that ends an output; no prompt holds it."""


@dataclass(kw_only=True, eq=False)
class Planned:
    """One request as the world knows it.

    Attributes:
        output_tokens: how long its output will be, the stop token included. Told to nobody.
        token_ids, hashes: forgotten when it has ended.
        prefill_s: what prefill workers have spent on it so far, all attempts together.
        stops_after: so many tokens, prompt and output, its stop token comes.
    """

    request_id: RequestId
    input_tokens: int
    output_tokens: int
    token_ids: tuple[int, ...]
    hashes: tuple[BlockHash, ...]
    token: Sampled
    prefill_s: float = 0.0
    stops_after: int = field(init=False)

    def __post_init__(self) -> None:
        self.stops_after = self.input_tokens + self.output_tokens - 1


SAMPLED_STOP = Sampled(token_id=STOP)


class Prompts:
    """Every request that has arrived.

    Args:
        block_size: tokens of one KV block; `trace.block_tokens` may be another number.
    """

    def __init__(self, trace: Trace, root: BlockHash, block_size: int) -> None:
        self._root = root
        self._block_size = block_size
        self._trace_block = trace.block_tokens
        self._nameless = NAMELESS
        self.planned: dict[RequestId, Planned] = {}

    def plan(self, request: TraceRequest, ordinal: int, output_factor: float = 1.0) -> Planned:
        """The request that arrives now.

        Raises:
            InvalidRequest: a block id out of range, or ids that do not cover the prompt.
        """
        words = self._words(request, ordinal)
        token_ids = _tokens(words)
        planned = Planned(
            request_id=RequestId(f"r{ordinal}"),
            input_tokens=request.input_tokens,
            output_tokens=max(1, round(request.output_tokens * output_factor)),
            token_ids=token_ids,
            hashes=self._names(words, token_ids),
            token=Sampled(token_id=OUTPUT + ordinal),
        )
        self.planned[planned.request_id] = planned
        return planned

    def forget(self, planned: Planned) -> None:
        """It has ended: its tokens are not needed any more."""
        planned.token_ids = planned.hashes = ()

    def name(self, command: PrefillCommand | ReserveCommand) -> BlockChain:
        """A `node.sequence.Namer` that computes no name of a prompt twice."""
        chain = BlockChain(self._root, self._block_size)
        planned = self.planned.get(command.attempt_id.request_id)
        named = 0
        if planned is not None and planned.token_ids:
            named = len(planned.hashes) * self._block_size
            chain.begin_with(planned.hashes, planned.token_ids[named:])
            named = planned.input_tokens
        if named < len(command.token_ids):
            chain.extend(command.token_ids[named:])
        return chain

    # ---- inside ----

    def _words(self, request: TraceRequest, ordinal: int) -> list[tuple[int, int]]:
        """(token, how often), in order."""
        ids, size, left = request.block_ids, self._trace_block, request.input_tokens
        if not ids:
            count = -(-left // size)
            ids = tuple(range(self._nameless, self._nameless + count))
            self._nameless += count
        elif max(ids) > ID_MAX or min(ids) < 0:
            raise InvalidRequest(field=f"request {ordinal}: block_ids", value=max(ids), limit=f"ids in [0, {ID_MAX}]")
        if len(ids) != -(-left // size):
            limit = f"{-(-left // size)} ids for {left} tokens in blocks of {size}"
            raise InvalidRequest(field=f"request {ordinal}: block_ids", value=f"{len(ids)} ids", limit=limit)
        return [(name, min(size, left - i * size)) for i, name in enumerate(ids)]

    def _names(self, words: Sequence[tuple[int, int]], token_ids: tuple[int, ...]) -> tuple[BlockHash, ...]:
        if self._block_size != self._trace_block:
            return tuple(BlockChain(self._root, self._block_size).extend(token_ids))
        parent, names = self._root, []
        for token, count in words:
            if count == self._block_size:
                parent = packed_block_hash(parent, token.to_bytes(4, "little") * count)
                names.append(parent)
        return tuple(names)


def _tokens(words: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    tokens: list[int] = []
    for token, count in words:
        tokens += [token] * count
    return tuple(tokens)
