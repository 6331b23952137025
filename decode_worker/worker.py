"""Shell: the decode worker's machine, wired to its process."""

from __future__ import annotations

from decode_worker.machine import DecodeConfig, DecodeMachine
from node.process import Parts
from service.settings import load


def make_machine(parts: Parts) -> DecodeMachine:
    """Section `decode` of the settings; the size of a step comes from section `node` unless it is said here.

    Raises:
        ConfigError
    """
    defaults = {"sequences_max": parts.node.sequences_max}
    return DecodeMachine(
        node_id=parts.node_id,
        cache=parts.cache,
        root=parts.root,
        block_size=parts.block_size,
        config=load(DecodeConfig, {**defaults, **parts.section}, path="decode"),
    )
