"""Shell: the prefill worker's machine, wired to its process."""

from __future__ import annotations

from node.process import Parts
from prefill_worker.machine import PrefillConfig, PrefillMachine
from service.settings import load


def make_machine(parts: Parts) -> PrefillMachine:
    """Section `prefill` of the settings; the size of a pass comes from section `node` unless it is said here.

    Raises:
        ConfigError
    """
    defaults = {
        "tokens_per_pass_max": parts.node.tokens_per_pass_max,
        "sequences_per_pass_max": parts.node.sequences_max,
    }
    return PrefillMachine(
        node_id=parts.node_id,
        cache=parts.cache,
        root=parts.root,
        block_size=parts.block_size,
        config=load(PrefillConfig, {**defaults, **parts.section}, path="prefill"),
    )
