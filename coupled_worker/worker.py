"""Shell: the coupled worker's machine, wired to its process."""

from __future__ import annotations

from typing import Any

from coupled_worker.machine import CoupledConfig, CoupledMachine
from node.process import Parts
from service.settings import load


def make_machine(parts: Parts) -> CoupledMachine:
    """Section `coupled` of the settings; sizes of a pass come from section `node` unless they are said here.

    Raises:
        ConfigError
    """
    tokens, sequences = parts.node.tokens_per_pass_max, parts.node.sequences_max
    defaults: dict[str, Any] = {
        "tokens_per_pass_max": tokens,
        "prefill": {"tokens_per_pass_max": tokens, "sequences_per_pass_max": sequences},
        "decode": {"sequences_max": sequences},
    }
    for name, value in parts.section.items():
        defaults[name] = {**defaults[name], **value} if isinstance(value, dict) and name in defaults else value
    return CoupledMachine(
        node_id=parts.node_id,
        cache=parts.cache,
        root=parts.root,
        block_size=parts.block_size,
        config=load(CoupledConfig, defaults, path="coupled"),
    )
