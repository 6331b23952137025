"""Pure: the settings of a conductor process around its machine (whose own are conductor/config.py's).

A file has five sections: `server`, `front_end`, `nodes`, `records` (here) and `conductor` (the machine).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from halfmoon.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The process: what it serves, where it listens, where it meets the others.

    Args:
        model, dtype, block_size: must be those of the workers; a worker with another fingerprint is not used.
        address, admin_address: "host:port" (port 0: any) or "unix:/path"; loopback unless said otherwise.
        metrics_address: "host:port" of the Prometheus page; empty: none.
        registry: URL of the Redis or Valkey in which nodes and conductors meet.
        cluster: names the registry's keys.
        conductor_id: empty: made up from host and process.
        tick_s: how often deadlines are looked at.
        drain_s: how long running requests may go on after SIGTERM.
        cost_profile: a YAML file with what workers cost (conductor/cost_profile.py), read at the start if it is there
            and written at the end with what was learned; empty: none.
        canary_timeout_s: a canary request that takes longer has failed.
    """

    model: str = "smollm2-135m-instruct"
    dtype: str = "bfloat16"
    block_size: int = 16
    address: str = "127.0.0.1:50051"
    admin_address: str = "127.0.0.1:50052"
    metrics_address: str = ""
    registry: str = "redis://127.0.0.1:6379/0"
    cluster: str = "default"
    conductor_id: str = ""
    log_level: str = "info"
    cost_profile: str = ""
    tick_s: float = 0.05
    drain_s: float = 30.0
    canary_timeout_s: float = 30.0
    canary_interval_s: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("server", self)


@dataclass(frozen=True, kw_only=True)
class FrontEndConfig:
    """Limits on what clients can make grow.

    Args:
        streams_max: requests open at once, those being tokenised included; more are rejected.
        unread_events_max: events that a slow reader may leave waiting before its request is cancelled.
        reader_stall_s: how long a reader with events waiting may take none.
        hole_s: how long a missing token is waited for before its attempt counts as lost.
        timeout_s_default, timeout_s_max: of requests without a deadline / the longest one kept.
        tokenizer_threads: beside the loop; tokenising a long prompt takes milliseconds.
    """

    streams_max: int = 4096
    unread_events_max: int = 4096
    reader_stall_s: float = 30.0
    hole_s: float = 2.0
    timeout_s_default: float = 600.0
    timeout_s_max: float = 3600.0
    tokenizer_threads: int = 1

    def __post_init__(self) -> None:
        _check_positive("front_end", self)


@dataclass(frozen=True, kw_only=True)
class NodesConfig:
    """How workers are dialled and watched.

    Args:
        node_silence_s: without a load report for so long, a node is lost (its stream may still look alive; a process
            that died breaks it at once). A host that is oversubscribed four times was seen silent for 2 s.
        attach_s: for connecting, attaching and the first snapshot.
        backoff_s, backoff_s_max: pause before dialling again, doubled each time.
        commands_max: commands waiting for one node's stream; a node that lets so many wait is lost.
    """

    node_silence_s: float = 5.0
    attach_s: float = 5.0
    backoff_s: float = 0.1
    backoff_s_max: float = 1.0
    commands_max: int = 8192

    def __post_init__(self) -> None:
        _check_positive("nodes", self)


@dataclass(frozen=True, kw_only=True)
class RecordsConfig:
    """Where completed decision records go, beside the conductor's own memory. What cannot be taken is dropped, counted.

    Args:
        file: JSON Lines, one record a line; empty: none.
        file_mib_max, files_max: at that size it becomes FILE.1, that one FILE.2, …: so many files in all.
        stream: a Redis (Valkey) stream of the registry, halfmoon:<cluster>:stream:<stream>; empty: none.
        stream_length_max: about so many of its last entries are kept.
        waiting_max: records that may wait while the registry is slow or away.
    """

    file: str = ""
    file_mib_max: int = 64
    files_max: int = 4
    stream: str = ""
    stream_length_max: int = 10_000
    waiting_max: int = 1024

    def __post_init__(self) -> None:
        _check_positive("records", self)
        if self.files_max < 2:
            raise ConfigError(key="records.files_max", value=self.files_max, expected="2 or more: one is written to")


def _check_positive(section: str, config: Any) -> None:
    for spec in fields(config):
        value = getattr(config, spec.name)
        if isinstance(value, int | float) and not (math.isfinite(value) and value > 0):
            raise ConfigError(key=f"{section}.{spec.name}", value=value, expected="a finite number above 0")
