"""Shell: the engine of a worker process: loaded, bound to its pool, warmed up before anybody waits for it."""

from __future__ import annotations

from dataclasses import fields

from engine.protocol import Engine, Slice
from halfmoon.errors import ConfigError
from halfmoon.types import SamplingParams, Tier
from node.config import NodeConfig
from node.pools import Pools

WARM_UP_TOKENS_MAX = 128  # enough to touch every weight, pack and cache; a full pass would cost seconds on a slow host


def load_engine(config: NodeConfig) -> Engine:
    """The engine that `config` names; model "fake" with `fake_pass_s` sleeps that long in each pass.

    Raises:
        CheckpointError
        ConfigError: naming the setting; node.device, when there is no such GPU or no CUDA in this torch.
    """
    from engine.load import FAKE_MODEL
    from engine.load import load_engine as load

    try:
        engine = load(
            config.model,
            dtype=config.dtype,
            block_size=config.block_size,
            device=config.device,
            threads=config.threads,
        )
    except ConfigError as error:
        raise _as_setting(error) from error
    if config.model == FAKE_MODEL and config.fake_pass_s > 0:
        from engine.fake_sleep import SleepingEngine

        return SleepingEngine(engine, pass_s=config.fake_pass_s)
    return engine


def _as_setting(error: ConfigError) -> ConfigError:
    """The engine names its argument; an operator knows it as a setting of section `node`."""
    if error.key not in {field.name for field in fields(NodeConfig)}:
        return error
    return ConfigError(key=f"node.{error.key}", value=error.value, expected=error.expected)


def warm_up(engine: Engine, pools: Pools, config: NodeConfig) -> bool:
    """Bind the pool; run a prefill pass and a decode step over it, empty as it is: packs, caches, page faults."""
    num_slots = pools.num_slots(Tier.DEVICE)
    engine.bind(pools.pool, num_slots)
    room = min(num_slots * config.block_size, engine.model.context_tokens_max)
    num_tokens = min(config.tokens_per_pass_max, WARM_UP_TOKENS_MAX, room)
    slots = tuple(range(-(-num_tokens // config.block_size)))
    if num_tokens > 1:
        engine.forward([Slice(token_ids=(0,) * (num_tokens - 1), start=0, slots=slots)])
    engine.forward([Slice(token_ids=(0,), start=num_tokens - 1, slots=slots, sampling=SamplingParams())])
    return True
