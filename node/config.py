"""Pure: the settings of a worker process, whatever its role: section `node` of its configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass

from halfmoon.errors import ConfigError
from halfmoon.types import NodeId
from kv_store.eviction_policies import POLICIES

MIB = 1 << 20
DEVICE = re.compile(r"cpu|cuda:\d{1,3}")
POOL_SHARE = 8  # of what is free, by default, for each tier: four workers with two tiers each fit on a host
POOL_BYTES_MAX = 2 << 30  # and not more than this without being asked: 90,000 tokens of a 135M model in bfloat16
BLOCKS_DEFAULT_MAX = 65_536  # and not more slots than this: their books take memory and start-up time of their own
BLOCKS_MAX = 16_000_000  # ten times the largest pool designed for: a typing error, not a pool


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """One worker process.

    Args:
        node_id: unique in the cluster; a restarted process keeps it and gets a new epoch.
        model: as engine.load takes it; "fake" needs no weights.
        device: "cpu", or "cuda:N": where the engine computes and the DEVICE tier lies.
        device_blocks, device_mib: size of the DEVICE tier; blocks win; both 0: a share of what is free there.
        dram_blocks, dram_mib: the same for DRAM; dram_mib -1: no DRAM tier.
        eviction: which cached blocks leave first: "lru", "lfu", "length_aware", "s3fifo", "leased" (docs/glossary.md).
        threads: compute threads.
        cores: CPU cores that the process is pinned to; empty: not pinned.
        link: "auto", or the one link that may be used.
        registry: URL of the Redis or Valkey; empty: the node announces itself to nobody.
        cluster: names the registry's keys.
        listen: "host:port" (0: any port) or "unix:/path" for the gRPC server.
        advertise: the address that others are told; empty: `listen`, as bound.
        metrics: "host:port" of the Prometheus page; empty: none.
        tokens_per_pass_max, sequences_max: of one engine pass; also the roles' defaults.
        report_interval_s: between load reports.
        registry_ttl_s: how long the registry remembers a node that says nothing.
        drain_s: after SIGTERM running attempts have this long to end.
        fake_pass_s: with model "fake": how long each pass takes.

    Raises:
        ConfigError: a value out of range.
    """

    node_id: NodeId
    model: str = "smollm2-135m-instruct"
    dtype: str = "bfloat16"
    device: str = "cpu"
    block_size: int = 16
    device_blocks: int = 0
    device_mib: int = 0
    dram_blocks: int = 0
    dram_mib: int = 0
    eviction: str = "lru"
    threads: int = 1
    cores: tuple[int, ...] = ()
    link: str = "auto"
    registry: str = ""
    cluster: str = "default"
    listen: str = "127.0.0.1:0"
    advertise: str = ""
    metrics: str = ""
    tokens_per_pass_max: int = 512
    sequences_max: int = 32
    report_interval_s: float = 0.25
    registry_ttl_s: float = 3.0
    drain_s: float = 8.0
    fake_pass_s: float = 0.0
    log_level: str = "info"

    def __post_init__(self) -> None:
        for name in ("block_size", "threads", "tokens_per_pass_max", "sequences_max"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("device_blocks", "device_mib", "dram_blocks", "drain_s", "fake_pass_s"):
            self._require(getattr(self, name) >= 0, name, "0 or more")
        for name in ("device_blocks", "dram_blocks"):
            self._require(getattr(self, name) <= BLOCKS_MAX, name, f"at most {BLOCKS_MAX} blocks")
        self._require(self.dram_mib >= -1, "dram_mib", "-1 (no DRAM tier), 0 (default) or more")
        self._require(bool(DEVICE.fullmatch(self.device)), "device", '"cpu", or "cuda:N"')
        self._require(0 < len(self.node_id) <= 64, "node_id", "1 to 64 characters")
        self._require(0.01 <= self.report_interval_s <= 10.0, "report_interval_s", "seconds in [0.01, 10]")
        self._require(0.3 <= self.registry_ttl_s <= 60.0, "registry_ttl_s", "seconds in [0.3, 60]")
        self._require(self.eviction in POLICIES, "eviction", f"one of {', '.join(POLICIES)}")
        levels = ("debug", "info", "warning", "error")
        self._require(self.log_level in levels, "log_level", f"one of {', '.join(levels)}")
        everywhere = self.listen.startswith(("0.0.0.0:", "[::]:"))
        self._require(not everywhere or bool(self.advertise), "advertise", "an address, since `listen` is none")

    def num_blocks(self, block_bytes: int, free_bytes: int, device_free_bytes: int | None = None) -> tuple[int, int]:
        """Slots of the DEVICE and of the DRAM tier.

        Args:
            free_bytes: host memory that this process may still take.
            device_free_bytes: the same on its GPU; None: the DEVICE tier lies in host memory.
        """
        share = _share(free_bytes, block_bytes)
        device_share = share if device_free_bytes is None else _share(device_free_bytes, block_bytes)
        device = self.device_blocks or self.device_mib * MIB // block_bytes or max(1, device_share)
        if self.dram_mib < 0:
            return device, 0
        return device, self.dram_blocks or self.dram_mib * MIB // block_bytes or share

    def _require(self, ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise ConfigError(key=f"node.{name}", value=getattr(self, name), expected=expected)


def _share(free_bytes: int, block_bytes: int) -> int:
    return min(min(free_bytes // POOL_SHARE, POOL_BYTES_MAX) // block_bytes, BLOCKS_DEFAULT_MAX)
