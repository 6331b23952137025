"""Pure: the conductor machine's settings, with the reason for each limit."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from conductor.admission_config import AdmissionConfig
from conductor.effects import Slo
from core.cost import CostPrior
from halfmoon.errors import ConfigError
from halfmoon.types import Role


class PlacementName(enum.StrEnum):
    """How requests are placed: `conductor.policy` has a class for each."""

    ALGORITHM1 = "algorithm1"
    MOONCAKE = "mooncake"
    LOCAL_PREFIX = "local_prefix"
    LEAST_LOADED = "least_loaded"
    ROUND_ROBIN = "round_robin"
    RANDOM = "random"


class Fit(enum.StrEnum):
    """Where costs come from."""

    ONLINE = "online"  # fitted to what workers measure, beginning with the prior
    FROZEN = "frozen"  # the prior is a profile: believed as it stands; what is measured only shows how wrong it is


@dataclass(frozen=True, kw_only=True)
class ConductorConfig:
    """Durations in seconds. Checked when built.

    Raises:
        ConfigError: naming the key, the value and what was expected.
    """

    # ---- trying ----
    attempts_max: int = 6
    """Tries of one request that began work, over all failures."""
    refusals_max: int = 16
    """Refusals by prefill workers before a request is given up: they cost a round trip, no compute."""
    decode_tries_max: int = 8
    """Decode workers asked for room in a row; after that an attempt waits until some worker has room again."""
    retry_s: float = 0.1
    """Pause before asking again when every candidate has refused."""

    # ---- waiting: every phase is bounded ----
    unavailable_grace_s: float = 15.0
    """How long a request is held while a pool is empty because its last worker is restarting."""
    resume_wait_s: float = 5.0
    """For the front end's log after an attempt was lost."""
    reserve_wait_s: float = 10.0
    """For a decode worker's Reserved or Refused."""
    seek_wait_s: float = 10.0
    """For decode room, once the prefill has begun: it holds blocks that other prompts wait for."""
    phase_wait_s: float = 60.0
    """For prefill or for joining the decode batch, beyond `phase_factor` times what was predicted."""
    phase_factor: float = 10.0
    last_token_wait_s: float = 5.0
    """For the front end to have the last token, after its worker has said that it left."""
    closed_wait_s: float = 10.0
    """For Closed after CancelCommand; a missing one is counted."""
    finish_grace_s: float = 0.25
    """For the worker's own AttemptFinished after the front end has the last token, before it is cancelled."""
    snapshot_wait_s: float = 2.0
    """For a Snapshot asked for; then asked again, and the node's index is called degraded."""

    # ---- workers ----
    suspect_s: float = 1.5
    """Several of the workers' report intervals. Silence after which nothing new is placed on a worker."""
    silent_s: float = 10.0
    """Silence after which its attempts are restarted elsewhere."""
    slow_start_s: float = 10.0
    """How long a new worker is young: its assignments are capped, rising from `young_attempts` without a cliff."""
    young_attempts: int = 2
    nodes_max: int = 1024

    # ---- placement ----
    placement: PlacementName = PlacementName.ALGORITHM1
    balancing_threshold: float = 2.0
    """Of `mooncake` (its paper names no value): a remote prefix so many times as long as the own one is fetched."""
    placement_seed: int = 1
    """Of `random`."""
    copies_share_max: float = 0.5
    """Of a worker's pool that prefixes fetched within `copies_window_s` may fill: each of them evicts something else,
    and one hot prefix after another would otherwise wash a pool out, and the links be busy with nothing else."""
    copies_window_s: float = 10.0

    # ---- admission ----
    requests_max: int = 4096
    """Requests placed or held at once; further ones are rejected (queue_full): memory and waiting are bounded."""
    slo: Slo = field(default_factory=lambda: Slo(ttft_s=30.0, tbt_s=0.2))
    """What loads are measured by, and admission when `enforce_default_slo`, for requests that bring no SLO."""
    enforce_default_slo: bool = False
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)

    # ---- records ----
    records_max: int = 1024
    record_candidates_max: int = 8
    """Best candidates kept in a record; their number is kept always."""

    record: str = ""
    """A new file for every input of the machine, for `halfmoon replay`; empty: none. Its shell writes it."""
    record_mib_max: int = 1024
    """Of that file: there the recording ends, and says so."""

    # ---- costs ----
    prior: CostPrior = field(default_factory=CostPrior)
    priors: Mapping[str, CostPrior] = field(default_factory=dict)
    """By role (prefill, decode, coupled), where their hardware differs; the others have `prior`."""
    fit: Fit = Fit.ONLINE

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "int" and value < 1:
                raise ConfigError(key=f"conductor.{f.name}", value=value, expected="at least 1")
            if f.type == "float" and not (math.isfinite(value) and value > 0.0):
                raise ConfigError(key=f"conductor.{f.name}", value=value, expected="a finite number above 0")
        for role in self.priors:
            if role not in list(Role):
                raise ConfigError(key=f"conductor.priors.{role}", value=role, expected=f"one of {', '.join(Role)}")
        if self.balancing_threshold < 1.0:
            raise ConfigError(key="conductor.balancing_threshold", value=self.balancing_threshold, expected="1 or more")
        if self.copies_share_max > 1.0:
            raise ConfigError(key="conductor.copies_share_max", value=self.copies_share_max, expected="at most 1")
        if self.silent_s <= self.suspect_s:
            raise ConfigError(
                key="conductor.silent_s", value=self.silent_s, expected=f"above suspect_s={self.suspect_s}"
            )
