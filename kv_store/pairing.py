"""Shell: how two nodes agree on a link: what each says of itself, the proof of one host, the links themselves."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from halfmoon.blocks import Fingerprint
from halfmoon.errors import ConfigError
from halfmoon.types import Epoch, NodeId, Tier
from kv_store.arena import Arena
from kv_store.arena_shared import PeerArena, SharedArena
from kv_store.link import AUTO, LINKS, NCCL, SHM, TORCH, SinkLink, SourceLink, choose_link
from kv_store.link_memory import MemoryNet, MemorySink, MemorySource
from kv_store.link_shm import ShmSink
from kv_store.transfer_values import LinkTraits
from kv_store.wire import PROTOCOL, ArenaAddress, Begin, Hello, Refusal, Rendezvous, Welcome

log = logging.getLogger("kv_store.pairing")

Publish = Callable[[Rendezvous], None]
Deliver = Callable[[Rendezvous], None]


@dataclass(kw_only=True)
class SinkEnd:
    """This node's end of a pair that it pulls from; each tier of the source has its link."""

    traits: dict[Tier, LinkTraits]
    links: dict[Tier, SinkLink]
    deliver: Deliver | None = None
    mailbox: Any = None


@dataclass(kw_only=True)
class SourceEnd:
    """This node's end of a pair that pulls from it; one-sided links need nothing here."""

    links: dict[Tier, SourceLink]
    deliver: Deliver | None = None
    mailbox: Any = None


class Pairing:
    """Builds the ends of links for one node.

    Args:
        link: "auto" or a link's name.
        host: where the data connections of process groups listen.
        net: the wires of in-process links; None: there are none.
    """

    def __init__(
        self,
        *,
        node_id: NodeId,
        epoch: Epoch,
        arenas: Mapping[Tier, Arena],
        link: str,
        fingerprint: Fingerprint,
        host: str,
        net: MemoryNet | None,
    ) -> None:
        if link != AUTO and link not in LINKS:
            raise ConfigError(key="link", value=link, expected=f"{AUTO} or one of {', '.join(LINKS)}")
        if link == "memory" and net is None:
            raise ConfigError(key="link", value=link, expected="another link: this process has no in-process wires")
        self._node_id = node_id
        self._epoch = epoch
        self._arenas = dict(arenas)
        self._link = link
        self._fingerprint = fingerprint
        self._host = host
        self._net = net

    @property
    def block_bytes(self) -> int:
        return self._arenas[Tier.DEVICE].block_bytes

    # ---- greeting ----

    def hello(self, source_epoch: Epoch) -> Hello:
        return Hello(
            protocol=PROTOCOL,
            node_id=self._node_id,
            epoch=self._epoch,
            source_epoch=source_epoch,
            fingerprint=self._fingerprint,
            block_bytes=self.block_bytes,
        )

    def welcome(self) -> Welcome:
        return Welcome(
            protocol=PROTOCOL,
            node_id=self._node_id,
            epoch=self._epoch,
            fingerprint=self._fingerprint,
            block_bytes=self.block_bytes,
            arenas=tuple(arena.address for arena in self._arenas.values()),
        )

    def greet(self, hello: Hello) -> Welcome | Refusal:
        if hello.source_epoch != self._epoch:
            return Refusal(reason=f"stale epoch: {hello.source_epoch} was asked for, this is {self._epoch}")
        reason = self.mismatch(hello)
        return self.welcome() if reason is None else Refusal(reason=reason)

    def mismatch(self, peer: Hello | Welcome) -> str | None:
        """The first thing that forbids exchanging blocks with this peer, by field; None: nothing does."""
        if peer.protocol != PROTOCOL:
            return f"protocol: {PROTOCOL} here, {peer.protocol} there"
        if differences := self._fingerprint.differences(peer.fingerprint):
            return "fingerprint: " + "; ".join(differences)
        if peer.block_bytes != self.block_bytes:
            return f"block_bytes: {self.block_bytes} here, {peer.block_bytes} there"
        return None

    # ---- the sink's end ----

    def map_peer(self, welcome: Welcome) -> dict[Tier, PeerArena]:
        """The source's arenas that can be mapped here: the proof that both are on one host. May block."""
        mapped: dict[Tier, PeerArena] = {}
        for address in welcome.arenas if self._link in (AUTO, SHM.name) else ():
            try:
                if address.pid:
                    mapped[address.tier] = PeerArena(address)
            except (OSError, ValueError) as error:
                log.info("%s of %s is not on this host: %s", address.tier.name, welcome.node_id, error)
        return mapped

    def choose(self, welcome: Welcome, mapped: dict[Tier, PeerArena]) -> dict[Tier, LinkTraits]:
        """The link for each of the source's tiers.

        Raises:
            ConfigError: no link serves one of them; nothing stays mapped.
        """
        try:
            return {a.tier: self._choose(a, a.tier in mapped) for a in welcome.arenas}
        except ConfigError:
            for peer in mapped.values():
                peer.close()
            raise

    def sink_end(
        self, welcome: Welcome, traits: dict[Tier, LinkTraits], mapped: dict[Tier, PeerArena], publish: Publish
    ) -> SinkEnd:
        """Build the chosen links; takes over `mapped`."""
        made: dict[str, SinkLink] = {}
        end = SinkEnd(traits=traits, links={})
        for tier, chosen in traits.items():
            if chosen.name not in made:
                made[chosen.name] = self._sink_link(chosen, welcome, mapped, publish, end)
            end.links[tier] = made[chosen.name]
        return end

    def _choose(self, address: ArenaAddress, same_host: bool) -> LinkTraits:
        return choose_link(
            setting=self._link,
            same_host=same_host,
            source_device=address.device,
            sink_device=self._arenas[Tier.DEVICE].address.device,
        )

    def _sink_link(
        self,
        chosen: LinkTraits,
        welcome: Welcome,
        mapped: dict[Tier, PeerArena],
        publish: Publish,
        end: SinkEnd,
    ) -> SinkLink:
        target = self._arenas[Tier.DEVICE]
        if chosen is SHM:
            return ShmSink(target, mapped)
        if chosen.name == "memory":
            assert self._net is not None
            assert isinstance(target, SharedArena)
            return MemorySink(self._net, _wire_name(welcome.epoch, self._node_id, self._epoch), target)
        from kv_store.link_torch import TorchSink

        return TorchSink(mailbox=_mailbox(end, publish), host=self._host, target=target, nccl=chosen is NCCL)

    # ---- the source's end ----

    def source_end(self, hello: Hello, begin: Begin, publish: Publish) -> SourceEnd:
        """Raises ConfigError: the sink chose a link that this node does not have."""
        end = SourceEnd(links={})
        made: dict[str, SourceLink | None] = {}
        for tier, name in begin.links:
            if not self._has(tier, name):
                raise ConfigError(key="link", value=name, expected="a link and a tier of this node")
            if name not in made:
                made[name] = self._source_link(name, hello, publish, end)
            if (link := made[name]) is not None:
                end.links[tier] = link
        return end

    def _has(self, tier: Tier, name: str) -> bool:
        if name not in LINKS or tier not in self._arenas:
            return False
        if name == NCCL.name:
            return self._arenas[tier].device != "cpu"
        return name != "memory" or self._net is not None

    def _source_link(self, name: str, hello: Hello, publish: Publish, end: SourceEnd) -> SourceLink | None:
        if name == "shm":
            return None
        if name == "memory":
            assert self._net is not None
            host_arenas = {t: a for t, a in self._arenas.items() if isinstance(a, SharedArena)}
            wire = _wire_name(self._epoch, hello.node_id, hello.epoch)
            return MemorySource(self._net, wire, self._node_id, host_arenas)
        from kv_store.link_torch import TorchSource

        nccl = name == NCCL.name
        return TorchSource(mailbox=_mailbox(end, publish), host=self._host, arenas=self._arenas, nccl=nccl)


def links_of(end: SinkEnd | SourceEnd | None) -> list[SinkLink | SourceLink]:
    """Each link once: tiers share them."""
    return [] if end is None else list({id(link): link for link in end.links.values()}.values())


def close_links(end: SinkEnd | SourceEnd | None) -> None:
    for link in links_of(end):
        link.close()


def load_links(names: Iterable[str]) -> None:
    """Import what these links need: torch takes seconds, so this belongs in a thread. May block."""
    if {TORCH.name, NCCL.name} & set(names):
        importlib.import_module("kv_store.link_torch")


def _mailbox(end: SinkEnd | SourceEnd, publish: Publish) -> Any:
    """The pair's one mailbox: its links through torch meet in it, under keys of their own."""
    from kv_store.link_torch import Mailbox

    if end.mailbox is None:
        end.mailbox = Mailbox(publish)
        end.deliver = end.mailbox.deliver
    return end.mailbox


def _wire_name(source_epoch: Epoch, sink: NodeId, sink_epoch: Epoch) -> str:
    return f"{source_epoch}>{sink}@{sink_epoch}"
