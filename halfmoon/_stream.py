"""Pure: folds the events of one Generate stream into tokens and one result; shared by both clients."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise

from halfmoon.errors import Failed
from halfmoon.v1 import inference_pb2 as pb


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """One output token. `text` is what became certain with it: empty inside a character or a possible stop string.

    logprob, top_logprobs: of the unmodified distribution; only if `logprobs` was asked for.
    """

    index: int
    token_id: int
    text: str
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What the request cost; counts are over all attempts (inference.proto)."""

    prompt_tokens: int
    completion_tokens: int
    prefix_hit_tokens_device: int
    prefix_hit_tokens_dram: int
    prefix_hit_tokens_remote: int
    computed_prompt_tokens: int
    decode_prefilled_tokens: int
    kv_blocks_pulled: int
    kv_bytes_pulled: int
    link: str
    overlap: float
    attempts: int
    preemptions: int
    prefill_node: str
    decode_node: str

    @property
    def prefix_hit_tokens(self) -> int:
        return self.prefix_hit_tokens_device + self.prefix_hit_tokens_dram + self.prefix_hit_tokens_remote


@dataclass(frozen=True, kw_only=True)
class ServerTimings:
    """Seconds as the server saw them, from the request's arrival."""

    tokenize_s: float
    queue_s: float
    fetch_s: float
    prefill_s: float
    pull_s: float
    ttft_s: float
    total_s: float
    predicted_ttft_s: float | None


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds as this client saw them, from its send. `tbt_s[i]` is the gap between tokens i and i + 1."""

    ttft_s: float
    tbt_s: tuple[float, ...]
    total_s: float
    server: ServerTimings


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished request. `finish_reason`: "stop" (end of sequence, stop token or string) or "length"."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: str
    usage: Usage
    timings: Timings
    tokens: tuple[TokenEvent, ...]


class StreamFold:
    """Fed with every event of one stream, in order, with the time of its arrival.

    Owns the tokens so far; `result` is None until the terminal event.
    """

    def __init__(self, sent_s: float) -> None:
        self._sent_s = sent_s
        self._request_id = ""
        self._prompt_token_ids: tuple[int, ...] = ()
        self._tokens: list[TokenEvent] = []
        self._arrivals_s: list[float] = []
        self.result: Result | None = None

    def feed(self, event: pb.GenerateEvent, now_s: float) -> TokenEvent | None:
        """The token that this event carries, if it carries one. Modifies self.

        Raises:
            Failed: on a repeat, a gap, or anything after the terminal event (the server's bug, never passed on).
        """
        if self.result is not None:
            raise Failed("the server sent an event after the terminal one")
        kind = event.WhichOneof("kind")
        if kind == "token":
            return self._token(event.token, now_s)
        if kind == "started":
            self._request_id = event.started.request_id
            self._prompt_token_ids = tuple(event.started.prompt_token_ids)
        elif kind == "finished":
            self.result = self._finish(event.finished, now_s)
        return None

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def finished(self) -> Result:
        """The result, when the stream has ended without an error.

        Raises:
            Failed: if it ended without its terminal event.
        """
        if self.result is None:
            raise Failed(f"the stream ended after {len(self._tokens)} tokens without a terminal event")
        return self.result

    def _token(self, token: pb.TokenEvent, now_s: float) -> TokenEvent:
        if token.index != len(self._tokens):
            raise Failed(f"token {token.index} arrived where {len(self._tokens)} was expected")
        event = TokenEvent(
            index=token.index,
            token_id=token.token_id,
            text=token.text,
            logprob=token.logprob if token.HasField("logprob") else None,
            top_logprobs=tuple((t.token_id, t.logprob) for t in token.top_logprobs),
        )
        self._tokens.append(event)
        self._arrivals_s.append(now_s)
        return event

    def _finish(self, finished: pb.Finished, now_s: float) -> Result:
        arrivals = self._arrivals_s
        timings = Timings(
            ttft_s=(arrivals[0] if arrivals else now_s) - self._sent_s,
            tbt_s=tuple(later - earlier for earlier, later in pairwise(arrivals)),
            total_s=now_s - self._sent_s,
            server=_server_timings(finished.timings),
        )
        return Result(
            request_id=self._request_id,
            text="".join(t.text for t in self._tokens) + finished.text,
            token_ids=tuple(t.token_id for t in self._tokens),
            prompt_token_ids=self._prompt_token_ids,
            finish_reason=finished.finish_reason,
            usage=Usage(**{f.name: getattr(finished.usage, f.name) for f in fields(Usage)}),
            timings=timings,
            tokens=tuple(self._tokens),
        )


def _server_timings(timings: pb.Timings) -> ServerTimings:
    values = {f.name: getattr(timings, f.name) for f in fields(ServerTimings)}
    if not timings.HasField("predicted_ttft_s"):
        values["predicted_ttft_s"] = None
    return ServerTimings(**values)
