"""Shell: can this model be served? Told in a second, without torch, before any process is started for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.checkpoint_files import CONFIG, open_checkpoint, open_config
from engine.default_model import NAME as DEFAULT_MODEL
from engine.default_model import converted_directory, wheel_file
from engine.families import DecoderConfig
from engine.gguf_import import check_gguf
from engine.load import FAKE_MODEL, describe_model, layout_of, local_model
from engine.protocol import KvLayout
from engine.shards import open_shards
from engine.tokenizer import check_tokenizer
from halfmoon.errors import CheckpointError

HUB_S_MAX = 5.0  # for the hub to say whether it has a model


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What the size of pools and requests depends on."""

    layout: KvLayout
    context_tokens_max: int


def check_model(model: str, *, dtype: str, block_size: int) -> Geometry | None:
    """Refuse what cannot be served, as far as it can be told without reading weights.

    None: it looks right, and its geometry is known only once it is converted (GGUF).

    Raises:
        CheckpointError: naming the file and what is missing, damaged or not supported.
    """
    if model == FAKE_MODEL:
        fake = describe_model(model, dtype=dtype, block_size=block_size)
        return Geometry(layout=fake.layout, context_tokens_max=fake.context_tokens_max)
    path = _default() if model == DEFAULT_MODEL else local_model(model)
    if path is None:
        return _geometry(open_config(_hub_config(model)), dtype, block_size)
    if not path.is_dir():
        check_gguf(path)
        return None
    files = open_checkpoint(path)
    open_shards(files)
    check_tokenizer(path)
    return _geometry(files.config, dtype, block_size)


def _default() -> Path:
    return converted_directory() or wheel_file()


def _geometry(config: DecoderConfig, dtype: str, block_size: int) -> Geometry:
    return Geometry(layout=layout_of(config, dtype, block_size), context_tokens_max=config.context_tokens_max)


def _hub_config(model: str) -> Path:
    """config.json of a hub's model, from what is here of it or from the hub: the one file that can refuse the rest.

    A hub that does not answer is asked once: a download's own tries would take half a minute.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import httpx

    cached = try_to_load_from_cache(model, CONFIG)
    if isinstance(cached, str):
        return Path(cached)
    try:
        get_hf_file_metadata(hf_hub_url(model, CONFIG), timeout=HUB_S_MAX)
        return Path(hf_hub_download(model, CONFIG))
    except (OSError, ValueError, httpx.HTTPError) as error:
        why = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"model {model!r}: no such directory here, and the hub does not give it: {why}"
        ) from error
