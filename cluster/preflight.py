"""Shell: what can be known before a process is started: ports, the model, devices, cores and room for the pools."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.plan import ClusterConfig, worker_roles
from engine.load import FAKE_MODEL
from engine.preflight import Geometry, check_model
from halfmoon.errors import ConfigError
from kv_store.arena_shared import memory_free_bytes
from node.config import MIB
from service.channel import require_bindable

POOL_BLOCKS_MIN = 16  # of a DEVICE tier: fewer serve a sentence at a time, and mostly are a wrong unit


def preflight(config: ClusterConfig) -> None:
    """Refuse what the processes would refuse one by one, and later. Starts and holds nothing; takes about a second.

    Raises:
        Conflict: a port is in use.
        CheckpointError: the model cannot be served.
        ConfigError: naming the setting and what this host has.
    """
    for port in (config.port, config.admin_port):
        if port:
            require_bindable(f"{config.host}:{port}")
    _check_files(config)
    _check_cores(config.threads, len(os.sched_getaffinity(0)))
    _check_devices(config, gpus_seen())
    geometry = check_model(config.model, dtype=config.dtype, block_size=config.block_size)
    _check_pools(config, geometry, memory_free_bytes())


def gpus_seen(root: Path = Path("/")) -> bool:
    """Whether this host shows any NVIDIA GPU: without torch, so neither which nor how many this process may use."""
    return any((root / "dev").glob("nvidia[0-9]*")) or (root / "dev" / "dxg").exists()


def _check_files(config: ClusterConfig) -> None:
    """Those that are written while it serves, where they are wanted."""
    for key, file in (("conductor.record", config.conductor.record), ("records.file", config.records.file)):
        folder = Path(file).parent
        if file and not (folder.is_dir() and os.access(folder, os.W_OK)):
            expected = f"a file that can be made: {folder} is no folder that may be written to"
            raise ConfigError(key=f"cluster.{key}", value=file, expected=expected)
        if file and Path(file).is_dir():
            raise ConfigError(key=f"cluster.{key}", value=file, expected="a file; this is a folder")


def _check_cores(threads: int, cores: int) -> None:
    if threads > cores:
        raise ConfigError(key="cluster.threads", value=threads, expected=f"at most the {cores} cores that may be used")


def _check_devices(config: ClusterConfig, gpus: bool) -> None:
    for device in config.devices:
        if device == "cpu":
            continue
        if config.model == FAKE_MODEL:
            raise ConfigError(key="cluster.devices", value=device, expected="cpu, with the fake model")
        if not gpus:
            raise ConfigError(key="cluster.devices", value=device, expected="cpu; this host has no CUDA device")


def _check_pools(config: ClusterConfig, geometry: Geometry | None, free_bytes: int) -> None:
    if config.device_mib and geometry is not None:
        size = geometry.layout.block_bytes
        least = -(-POOL_BLOCKS_MIN * size // MIB)
        if config.device_mib * MIB < POOL_BLOCKS_MIN * size:
            expected = f"at least {least}: {POOL_BLOCKS_MIN} blocks of {size:,} bytes"
            raise ConfigError(key="cluster.device_mib", value=config.device_mib, expected=expected)
    workers = len(worker_roles(config))
    on_host = sum(config.devices[i % len(config.devices)] == "cpu" for i in range(workers))
    asked = {"device_mib": config.device_mib * on_host, "dram_mib": max(0, config.dram_mib) * workers}
    if sum(asked.values()) * MIB > free_bytes:
        key = max(asked, key=lambda name: asked[name])
        expected = f"less: the pools of all workers take {sum(asked.values()):,} MiB, {free_bytes // MIB:,} are free"
        raise ConfigError(key=f"cluster.{key}", value=getattr(config, key), expected=expected)
