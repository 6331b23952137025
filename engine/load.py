"""Shell: from a model's name to its description, tokenizer and engine.

A name is a built-in ("smollm2-135m-instruct", "fake"), a checkpoint directory, a .gguf file, or a hub id
(organisation/model). Descriptions and tokenizers are read without torch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from engine.checkpoint_files import CheckpointFiles, open_checkpoint
from engine.default_model import NAME as DEFAULT_MODEL
from engine.default_model import default_model_directory
from engine.families import DecoderConfig
from engine.protocol import Engine, KvLayout, ModelInfo, Tokenizer
from halfmoon.blocks import Fingerprint
from halfmoon.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

FAKE_MODEL = "fake"
ELEMENT_BYTES = {"bfloat16": 2, "float32": 4}
HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
LOCAL = ("/", "./", "../", "~")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


def describe_model(model: str, *, dtype: str = "bfloat16", block_size: int = 16) -> ModelInfo:
    """Geometry and fingerprint, without loading weights (their files are read once, for the digest).

    Raises:
        CheckpointError: an unknown or unusable model.
        ConfigError: dtype or block_size.
    """
    _check(dtype, block_size)
    if model == FAKE_MODEL:
        from engine.fake import FakeEngine

        return FakeEngine(block_size=block_size).model
    return _info(model, open_checkpoint(model_directory(model)), dtype, block_size)


def load_tokenizer(model: str) -> Tokenizer:
    """Raises: CheckpointError."""
    if model == FAKE_MODEL:
        from engine.fake_tokenizer import FakeTokenizer

        return FakeTokenizer()
    from engine.tokenizer import open_tokenizer

    return open_tokenizer(model_directory(model))


def load_engine(
    model: str, *, dtype: str = "bfloat16", block_size: int = 16, device: str = "cpu", threads: int = 1
) -> Engine:
    """Load the weights and pack them for `device`. Sets torch's thread count for the whole process.

    Raises:
        CheckpointError: an unknown or unusable model, a missing, misshapen or unreadable tensor.
        ConfigError: dtype, block_size, device or threads.
    """
    _check(dtype, block_size)
    if model == FAKE_MODEL:
        from engine.fake import FakeEngine

        if device != "cpu":
            raise ConfigError(key="device", value=device, expected='"cpu", with the fake model')
        return FakeEngine(block_size=block_size)
    import torch

    from engine.checkpoint import open_weights
    from engine.decoder import Decoder
    from engine.operators import select_operators
    from engine.torch_engine import TorchEngine

    if threads < 1:
        raise ConfigError(key="threads", value=threads, expected="at least 1")
    torch.set_num_threads(threads)
    place = _device(device)
    files = open_checkpoint(model_directory(model))
    compute = getattr(torch, dtype)
    decoder = Decoder(files.config, open_weights(files, compute, place), select_operators(device, compute))
    return TorchEngine(_info(model, files, dtype, block_size), decoder, compute, place)


def model_directory(model: str) -> Path:
    """The checkpoint directory behind a name: converted, downloaded or as given.

    Raises:
        CheckpointError: saying what is possible.
    """
    if model == DEFAULT_MODEL:
        return default_model_directory()
    path = local_model(model)
    if path is None:
        return _download(model)
    if path.is_dir():
        return path
    from engine.gguf_import import import_gguf

    return import_gguf(path)


def local_model(model: str) -> Path | None:
    """The directory or .gguf file that is meant; None: a hub id. What looks like a path is never asked of a hub.

    Raises:
        CheckpointError: neither, or a path where nothing of the kind is.
    """
    path = Path(model).expanduser()
    if model and (path.is_dir() or (path.is_file() and path.suffix == ".gguf")):
        return path
    if path.is_file():
        raise CheckpointError(f"model {model!r}: a file, and not a .gguf one; expected its directory")
    if model.startswith(LOCAL) or path.suffix == ".gguf":
        raise CheckpointError(f"model {model!r}: no such file or directory")
    if HUB_ID.fullmatch(model):
        return None
    raise CheckpointError(
        f"model {model!r}: unknown; expected {DEFAULT_MODEL!r}, {FAKE_MODEL!r}, a checkpoint directory, "
        "a .gguf file, or a hub id (organisation/model)"
    )


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise CheckpointError(
            f"model {model!r}: no such directory here, and the hub does not give it: {error}"
        ) from error


def layout_of(config: DecoderConfig, dtype: str, block_size: int) -> KvLayout:
    return KvLayout(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=block_size,
        element_bytes=ELEMENT_BYTES[dtype],
    )


def _info(model: str, files: CheckpointFiles, dtype: str, block_size: int) -> ModelInfo:
    config = files.config
    return ModelInfo(
        name=model,
        fingerprint=Fingerprint(
            weights=files.weights_digest(),
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rope=config.rope.canonical(),
            compute_dtype=dtype,
            block_size=block_size,
        ),
        layout=layout_of(config, dtype, block_size),
        vocab_size=config.vocab_size,
        context_tokens_max=config.context_tokens_max,
    )


def _check(dtype: str, block_size: int) -> None:
    if dtype not in ELEMENT_BYTES:
        raise ConfigError(key="dtype", value=dtype, expected=" or ".join(ELEMENT_BYTES))
    if block_size < 1:
        raise ConfigError(key="block_size", value=block_size, expected="at least 1")


def _device(device: str) -> torch.device:
    import torch

    kind, _, number = device.partition(":")
    if device == "cpu":
        return torch.device(device)
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind != "cuda" or not number.isdecimal() or int(number) >= found:
        build = f"this torch ({torch.__version__}) finds {found} GPUs"
        some = f'"cpu", or "cuda:N" with N below {found}' if found else '"cpu"'
        raise ConfigError(key="device", value=device, expected=f"{some}: {build}")
    return torch.device(device)
