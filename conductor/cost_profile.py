"""Shell: what workers were found to cost, kept in a YAML file over restarts, so that a new conductor need not guess.

    prefill: {prefill: [0.01, 0.0008, 1.0e-07], decode: […], transfer: […], read_dram: […], read_ssd: […]}
    decode: …

By role; the coefficients are CostPrior's. It may be written by hand, or by a run on the same hardware.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import yaml

from conductor.config import ConductorConfig
from core.cost import CostPrior
from service import settings


@dataclass(frozen=True, kw_only=True)
class _Profile:
    profile: Mapping[str, CostPrior] = field(default_factory=dict)


def with_profile(config: ConductorConfig, path: Path) -> ConductorConfig:
    """The config with the file's priors, which those that stand in the config itself overrule. No file: no change.

    Raises:
        ConfigError: naming the file and the key in it.
    """
    if not path.exists():
        return config
    kept = settings.load(_Profile, {"profile": settings.gather(path, environ={})}, path=str(path)).profile
    return replace(config, priors={**kept, **config.priors})


def write_profile(path: Path, costs: Mapping[str, CostPrior]) -> None:
    """Replace the file in one step."""
    tree = {role: {name: list(values) for name, values in asdict(prior).items()} for role, prior in costs.items()}
    beside = path.with_name(path.name + ".new")
    beside.write_text(
        "# Seconds: per pass, per token, … (core/cost.py's CostPrior), by role. Learned.\n" + yaml.safe_dump(tree)
    )
    beside.replace(path)
