"""Shell: who is there, and who leads: leased facts in Redis or Valkey, all of them rebuildable.

    halfmoon:<cluster>:nodes    sorted set, node id -> when its entry ends, by the registry's own clock
    halfmoon:<cluster>:info     hash, node id -> NodeInfo as JSON (protobuf's)
    halfmoon:<cluster>:lease:X  hash owner, term; ends with its time to live
    halfmoon:<cluster>:term:X   the last term given
    halfmoon:<cluster>:stream:X decision records, exported: entries with one field, record

Expiry is judged by the registry's clock alone, so that nodes' clocks need not agree. When the registry is away
nothing ends: `reachable` says so, heartbeats and watchers go on trying, and heal by themselves.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import redis.asyncio
from google.protobuf import json_format
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from core.messages import NodeInfo
from halfmoon.errors import ConfigError, Conflict, InvalidRequest, Unavailable
from halfmoon.types import Epoch, NodeId
from halfmoon.v1 import worker_pb2
from service import codec

log = logging.getLogger("service.registry")

CALL_S_MAX = 1.0  # a call takes 1 ms; a heartbeat every third of a 3 s lease must not wait longer than this
NODES_MAX = 1000  # ten times the cluster designed for; beyond it the registry is somebody else's
WATCH_INTERVAL_S = 0.5  # joining takes that long to be seen; leaving is seen sooner, by the broken stream
LEASE_TTL_S = 3.0

_NOW = "local t = redis.call('TIME'); local now = t[1] * 1000 + math.floor(t[2] / 1000)\n"

# KEYS nodes, info; ARGV id, epoch, info, ttl_ms, take_over -> 1, or 0 when another epoch holds the id.
_ANNOUNCE = (
    _NOW
    + """
local ends = redis.call('ZSCORE', KEYS[1], ARGV[1])
if ends and tonumber(ends) > now and ARGV[5] == '0' then
  local epoch = cjson.decode(redis.call('HGET', KEYS[2], ARGV[1]) or '{}')['epoch']
  if epoch and epoch ~= ARGV[2] then return 0 end
end
redis.call('ZADD', KEYS[1], now + ARGV[4], ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
return 1
"""
)

# KEYS nodes, info; ARGV id, epoch: leave, unless a later epoch has the id.
_WITHDRAW = """
local info = redis.call('HGET', KEYS[2], ARGV[1])
if info and cjson.decode(info)['epoch'] == ARGV[2] then
  redis.call('ZREM', KEYS[1], ARGV[1]); redis.call('HDEL', KEYS[2], ARGV[1]); return 1
end
return 0
"""

# KEYS nodes, info; ARGV limit -> the live nodes' infos; the dead are removed.
_LIST = (
    _NOW
    + """
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now)) do
  redis.call('ZREM', KEYS[1], id); redis.call('HDEL', KEYS[2], id)
end
local ids = redis.call('ZRANGE', KEYS[1], 0, ARGV[1] - 1)
if #ids == 0 then return {} end
return redis.call('HMGET', KEYS[2], unpack(ids))
"""
)

# KEYS lease, term; ARGV owner, ttl_ms, term_min -> {term, owner}. term 0: `owner` holds it.
_ACQUIRE = """
local owner = redis.call('HGET', KEYS[1], 'owner')
if owner and owner ~= ARGV[1] then return {0, owner} end
local term = tonumber(redis.call('HGET', KEYS[1], 'term') or '0')
if term <= tonumber(ARGV[3]) then
  term = math.max(tonumber(redis.call('GET', KEYS[2]) or '0'), tonumber(ARGV[3])) + 1
  redis.call('SET', KEYS[2], term)
end
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'term', term)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {term, ARGV[1]}
"""

# KEYS lease; ARGV owner, term, ttl_ms (0: release) -> 1, or 0 when it is not (or no longer) ours.
_RENEW = """
if redis.call('HGET', KEYS[1], 'owner') ~= ARGV[1] or redis.call('HGET', KEYS[1], 'term') ~= ARGV[2] then return 0 end
if ARGV[3] == '0' then redis.call('DEL', KEYS[1]) else redis.call('PEXPIRE', KEYS[1], ARGV[3]) end
return 1
"""


# KEYS stream; ARGV length_max, entries...: append, and let go of the oldest beyond about length_max.
_APPEND = """
for i = 2, #ARGV do redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', 'record', ARGV[i]) end
return #ARGV - 1
"""


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A node is there; also when it comes back under a new epoch (without a `Left` of the old one)."""

    info: NodeInfo


@dataclass(frozen=True, kw_only=True)
class Left:
    node_id: NodeId
    epoch: Epoch


class Registry:
    """A client of one cluster's registry.

    Args:
        url: "unix:///path", "redis://host:port/0", "rediss://..." .
        cluster: names the keys, so that clusters may share a server.

    Every method ends within `CALL_S_MAX`, with `Unavailable` if the registry does not answer.
    """

    def __init__(self, url: str, *, cluster: str = "default") -> None:
        self._url = url.split("@")[-1]  # for messages: without the password
        self._prefix = f"halfmoon:{cluster}:"
        self.reachable = False
        try:
            self._redis = redis.asyncio.Redis.from_url(
                _with_path(url),
                socket_timeout=CALL_S_MAX,
                socket_connect_timeout=CALL_S_MAX,
                retry=Retry(NoBackoff(), 0),
                max_connections=8,  # a heartbeat, a watch, a lease and what an operator asks
                decode_responses=True,
            )
        except ValueError as error:
            raise ConfigError(key="registry", value=self._url, expected=f"a Redis URL ({error})") from error

    async def close(self) -> None:
        await self._redis.aclose()

    # ---- membership ----

    async def put(self, info: NodeInfo, ttl_s: float, *, take_over: bool = True) -> None:
        """Enter or renew `info` for `ttl_s`.

        Args:
            take_over: replace a live entry of another epoch (a restart); False: that is a Conflict.
        """
        text = json_format.MessageToJson(codec.encode(info), preserving_proto_field_name=True, indent=None)
        args = (info.node_id, info.epoch, text, int(ttl_s * 1000), int(take_over))
        if not await self._run(_ANNOUNCE, ("nodes", "info"), args):
            raise Conflict(f"node id {info.node_id} has been taken over by a later process")

    async def withdraw(self, node_id: NodeId, epoch: Epoch) -> None:
        """Remove the node's entry, unless a later epoch has it."""
        await self._run(_WITHDRAW, ("nodes", "info"), (node_id, epoch))

    async def nodes(self) -> dict[NodeId, NodeInfo]:
        """The live nodes. Entries that this version cannot read are left out, and logged."""
        texts = await self._run(_LIST, ("nodes", "info"), (NODES_MAX,))
        infos = [info for text in texts if text and (info := _parse_info(text))]
        return {info.node_id: info for info in infos}

    async def announce(
        self, info: NodeInfo, ttl_s: float = LEASE_TTL_S, *, on_first: Callable[[], None] | None = None
    ) -> None:
        """Keep `info` in the registry, three heartbeats per `ttl_s`, until cancelled; then withdraw it.

        An outage is logged once and survived: the next heartbeat that gets through enters the node again.

        Raises:
            Conflict: a later process has this node's id. Nothing else.
        """
        entered = False
        try:
            while True:
                if await self._reaches(self.put(info, ttl_s, take_over=not entered)) and not entered:
                    entered = True
                    if on_first is not None:
                        on_first()
                await asyncio.sleep(ttl_s / 3)
        finally:
            await self._reaches(self.withdraw(info.node_id, info.epoch))

    async def watch(
        self, *, interval_s: float = WATCH_INTERVAL_S, grace_s: float = LEASE_TTL_S
    ) -> AsyncIterator[Joined | Left]:
        """What joins and leaves, from nothing known, by reconciling lists; endless, raises nothing.

        While the registry is away nobody leaves. When it comes back (perhaps empty) nodes have `grace_s` to enter
        again before they count as gone.
        """
        loop = asyncio.get_running_loop()
        known: dict[NodeId, NodeInfo] = {}
        leave_from_s = 0.0
        while True:
            try:
                found = await self.nodes()
            except Unavailable:
                leave_from_s = loop.time() + grace_s
            else:
                for event in _changes(known, found, may_leave=loop.time() >= leave_from_s):
                    yield event
            await asyncio.sleep(interval_s)

    # ---- leases ----

    async def acquire_lease(self, name: str, owner: str, ttl_s: float = LEASE_TTL_S, *, term_min: int = 0) -> int:
        """Take (or, as its owner, keep) a lease; its term is above every term given before and above `term_min`.

        Args:
            term_min: the highest term that the caller has ever seen; the registry may have lost its memory.

        Raises:
            Conflict: another owner holds it.
            Unavailable: the registry does not answer.
        """
        args = (owner, int(ttl_s * 1000), term_min)
        term, holder = await self._run(_ACQUIRE, (f"lease:{name}", f"term:{name}"), args)
        if not int(term):
            raise Conflict(f"lease {name} is held by {holder}")
        return int(term)

    async def renew_lease(self, name: str, owner: str, term: int, ttl_s: float = LEASE_TTL_S) -> bool:
        """Hold the lease for `ttl_s` more; False: it is not ours any more (acquire anew, for a new term)."""
        return bool(await self._run(_RENEW, (f"lease:{name}",), (owner, term, int(ttl_s * 1000))))

    async def release_lease(self, name: str, owner: str, term: int) -> bool:
        """Give the lease up; False: it was not ours."""
        return bool(await self._run(_RENEW, (f"lease:{name}",), (owner, term, 0)))

    # ---- exports ----

    async def append(self, stream: str, entries: Sequence[str], length_max: int) -> None:
        """Add to a stream that keeps about its last `length_max` entries."""
        await self._run(_APPEND, (f"stream:{stream}",), (length_max, *entries))

    # ---- calls ----

    async def _run(self, script: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run `script`.

        Raises:
            Unavailable: no answer in time, or an error from the server. Sets `reachable`.
        """
        names = [self._prefix + key for key in keys]
        try:
            async with asyncio.timeout(CALL_S_MAX):
                answer = await self._redis.execute_command("EVAL", script, len(names), *names, *args)
        except (RedisError, OSError, TimeoutError) as error:
            _heed_cancel()
            self._note(reachable=False, why=str(error))
            raise Unavailable(f"registry {self._url}: {error or 'no answer in time'}") from error
        _heed_cancel()
        self._note(reachable=True)
        return answer

    async def _reaches(self, call: Awaitable[None]) -> bool:
        """True if `call` got through; an outage is no error here."""
        try:
            await call
        except Unavailable:
            return False
        return True

    def _note(self, *, reachable: bool, why: str = "") -> None:
        if reachable != self.reachable:
            self.reachable = reachable
            log.log(
                logging.INFO if reachable else logging.WARNING,
                "registry %s is %s",
                self._url,
                "reachable" if reachable else f"away ({why}); running on without it",
            )


def _heed_cancel() -> None:
    """The client library sometimes swallows a cancel (it polls its sockets under timeouts of zero): deliver it."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _changes(known: dict[NodeId, NodeInfo], found: dict[NodeId, NodeInfo], *, may_leave: bool) -> list[Joined | Left]:
    """What turns `known` into `found`; modifies `known`."""
    events: list[Joined | Left] = []
    for node_id in [node_id for node_id in known if node_id not in found] if may_leave else []:
        events.append(Left(node_id=node_id, epoch=known.pop(node_id).epoch))
    for node_id, info in found.items():
        if known.get(node_id) != info:
            known[node_id] = info
            events.append(Joined(info=info))
    return events


def _parse_info(text: str) -> NodeInfo | None:
    try:
        message = json_format.Parse(text, worker_pb2.NodeInfo(), ignore_unknown_fields=True)
        return cast(NodeInfo, codec.decode(message))
    except (json_format.ParseError, InvalidRequest) as error:
        log.warning("a registry entry is unreadable: %s", error)
        return None


def _with_path(url: str) -> str:
    """redis-py wants unix:///path; unix:/path, gRPC's form, is taken too."""
    if url.startswith("unix:/") and not url.startswith("unix://"):
        return "unix://" + url.removeprefix("unix:")
    return url
