"""Pure: from one cluster config to the processes that make it up."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from conductor.config import ConductorConfig
from conductor.settings import RecordsConfig
from core.plain import plain
from halfmoon.errors import ConfigError
from halfmoon.types import Role

WORKERS_MAX = 64  # of one host; a Ray or Kubernetes cluster has its own launcher
THREADS_MAX = 1024  # more cores than any host has: a typing error
LINKS = ("auto", "shm", "torch", "nccl")
DTYPES = ("bfloat16", "float32")
DEVICE = re.compile(r"cpu|cuda:\d{1,3}")
SOCKET_PATH_MAX = 100  # bytes; Linux allows 107 in sockaddr_un


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """What `halfmoon up` starts on one host.

    Args:
        model: builtin name, directory, .gguf file, hub id, or "fake".
        directory: where the sockets, configs and logs of this cluster live; one cluster a directory.
        device_mib, dram_mib: KV pool sizes of each worker; 0 takes a default from what is free.
        devices: where the workers compute, "cpu" or "cuda:N", dealt out round robin, prefill workers first.
        threads: compute threads a worker; the workers' threads are pinned to cores, round robin, when `pin`.
        fake_pass_s: with model "fake": seconds that each pass takes.
        conductor: how requests are judged and placed: the settings of its machine.
        cost_profile: a YAML file in which what workers cost is kept over restarts; empty: nowhere.
        redis: URL of a Redis or Valkey to use; empty starts a private Valkey on a unix socket.
        records: where decision records go.
    """

    model: str = "smollm2-135m-instruct"
    dtype: str = "bfloat16"
    block_size: int = 16
    prefill: int = 1
    decode: int = 1
    coupled: int = 0
    devices: tuple[str, ...] = ("cpu",)
    threads: int = 1
    pin: bool = True
    device_mib: int = 0
    dram_mib: int = 0
    tokens_per_pass_max: int = 512
    sequences_max: int = 32
    link: str = "auto"
    host: str = "127.0.0.1"
    port: int = 50051
    admin_port: int = 50052
    cost_profile: str = ""
    redis: str = ""
    directory: str = ""
    fake_pass_s: float = 0.0
    start_s_max: float = 300.0
    drain_s: float = 30.0
    conductor: ConductorConfig = field(default_factory=ConductorConfig)
    records: RecordsConfig = field(default_factory=RecordsConfig)

    def __post_init__(self) -> None:
        _require(self.prefill >= 0, "prefill", self.prefill, "0 or more")
        _require(self.decode >= 0, "decode", self.decode, "0 or more")
        _require(self.coupled >= 0, "coupled", self.coupled, "0 or more")
        serves = self.coupled > 0 or (self.prefill > 0 and self.decode > 0)
        counts = f"{self.prefill} prefill, {self.decode} decode, {self.coupled} coupled"
        _require(serves, "prefill/decode/coupled", counts, "at least one of each half, or a coupled worker")
        total = self.prefill + self.decode + self.coupled
        _require(total <= WORKERS_MAX, "prefill+decode+coupled", total, f"at most {WORKERS_MAX} workers on one host")
        self._check_numbers()
        self._check_words()
        same = self.port != 0 and self.port == self.admin_port
        _require(not same, "admin_port", self.admin_port, "another port than the client API's")

    def _check_numbers(self) -> None:
        for name in ("block_size", "tokens_per_pass_max", "sequences_max"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("drain_s", "start_s_max", "fake_pass_s"):
            seconds = getattr(self, name)
            _require(math.isfinite(seconds) and seconds >= 0, name, seconds, "a finite number of seconds, 0 or more")
        for name in ("port", "admin_port"):
            _require(0 <= getattr(self, name) < 65536, name, getattr(self, name), "0 (any) to 65535")
        _require(1 <= self.threads <= THREADS_MAX, "threads", self.threads, f"1 to {THREADS_MAX}")
        _require(self.device_mib >= 0, "device_mib", self.device_mib, "0 (default) or more")
        _require(self.dram_mib >= -1, "dram_mib", self.dram_mib, "-1 (no DRAM tier), 0 (default) or more")

    def _check_words(self) -> None:
        _require(self.link in LINKS, "link", self.link, f"one of {', '.join(LINKS)}")
        _require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        _require(len(self.devices) > 0, "devices", self.devices, "at least one")
        for device in self.devices:
            _require(DEVICE.fullmatch(device) is not None, "devices", device, '"cpu" or "cuda:N"')
        hosts = [device for device in self.devices if device == "cpu"]
        joins_gpus = f"{', '.join(LINKS[:-1])}; nccl needs cuda devices, and `devices` has cpu"
        _require(self.link != "nccl" or not hosts, "link", self.link, joins_gpus)


@dataclass(frozen=True, kw_only=True)
class ProcessSpec:
    """One process: `python -m module --config FILE`, the file holding `settings`."""

    name: str
    module: str
    settings: dict[str, dict[str, object]] = field(default_factory=dict)


def worker_specs(config: ClusterConfig, directory: str, registry: str, cores: Sequence[int]) -> list[ProcessSpec]:
    """The workers' processes, prefill first. Each listens on a unix socket in `directory`.

    Raises:
        ConfigError: a directory whose path is too long for a socket.
    """
    return [
        ProcessSpec(
            name=name,
            module=f"{role}_worker.server",
            settings={
                "node": {
                    "node_id": name,
                    **_shared(config),
                    "device": config.devices[index % len(config.devices)],
                    "device_mib": config.device_mib,
                    "dram_mib": config.dram_mib,
                    "threads": config.threads,
                    "cores": cores_of(index, config.threads, cores) if config.pin else [],
                    "link": config.link,
                    "registry": registry,
                    "listen": f"unix:{socket_path(directory, name)}",
                    "tokens_per_pass_max": config.tokens_per_pass_max,
                    "sequences_max": config.sequences_max,
                    "fake_pass_s": config.fake_pass_s,
                }
            },
        )
        for index, (name, role) in enumerate(worker_roles(config))
    ]


def conductor_spec(config: ClusterConfig, registry: str) -> ProcessSpec:
    """The conductor's process, with the client and the admin API on TCP."""
    server = {
        **_shared(config),
        "address": f"{config.host}:{config.port}",
        "admin_address": f"{config.host}:{config.admin_port}",
        "registry": registry,
        "drain_s": config.drain_s,
        "cost_profile": config.cost_profile,
    }
    settings = {"server": server, "records": plain(config.records), "conductor": plain(config.conductor)}
    return ProcessSpec(name="conductor", module="conductor.server", settings=settings)


def _shared(config: ClusterConfig) -> dict[str, object]:
    return {"model": config.model, "dtype": config.dtype, "block_size": config.block_size}


def worker_roles(config: ClusterConfig) -> list[tuple[str, Role]]:
    """Names and roles, prefill workers first: prefill-0, prefill-1, decode-0, …"""
    counts = ((Role.PREFILL, config.prefill), (Role.DECODE, config.decode), (Role.COUPLED, config.coupled))
    return [(f"{role}-{i}", role) for role, count in counts for i in range(count)]


def cores_of(index: int, threads: int, cores: Sequence[int]) -> list[int]:
    """The cores of the worker with this index: `threads` of them, round robin over `cores`.

    With fewer cores than threads in all, workers share.
    """
    first = index * threads
    return sorted({cores[(first + i) % len(cores)] for i in range(threads)})


def socket_path(directory: str, name: str) -> str:
    """Raises ConfigError where the path is too long for a unix socket."""
    path = str(PurePath(directory) / f"{name}.sock")
    length = len(path.encode())
    _require(length <= SOCKET_PATH_MAX, "directory", directory, f"{SOCKET_PATH_MAX} bytes with the socket's name")
    return path


def _require(ok: bool, key: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(key=key, value=value, expected=expected)
