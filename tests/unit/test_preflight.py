"""What `halfmoon up` refuses before it starts anything: the model by its file, the setting by its name and limit."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import preflight as module
from cluster.plan import ClusterConfig
from cluster.preflight import gpus_seen, preflight
from conductor.config import ConductorConfig
from conductor.settings import RecordsConfig
from engine.preflight import check_model
from halfmoon.errors import CheckpointError, ConfigError, Conflict
from tests.tiny_models import saved, tiny_model

TOKENIZER = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = saved(tiny_model("llama2, MHA"), tmp_path_factory.mktemp("pristine"))
    (directory / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return directory


@pytest.fixture
def directory(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def refused(model: str | Path) -> str:
    with pytest.raises(CheckpointError) as refusal:
        check_model(str(model), dtype="float32", block_size=16)
    return str(refusal.value)


def test_a_whole_checkpoint_tells_its_geometry(directory: Path) -> None:
    geometry = check_model(str(directory), dtype="float32", block_size=16)
    assert geometry is not None
    stated = json.loads((directory / "config.json").read_text())
    assert geometry.context_tokens_max == stated["max_position_embeddings"]
    heads = stated["num_key_value_heads"] * stated["num_hidden_layers"]
    assert geometry.layout.block_bytes == heads * 2 * 16 * stated["head_dim"] * 4


def test_it_needs_no_torch(directory: Path) -> None:
    check = "import sys; from engine.preflight import check_model as c; import cluster.preflight\n"
    check += f"c({str(directory)!r}, dtype='float32', block_size=16); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def cut(directory: Path) -> None:
    weights = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def emptied(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"")


def half_written(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "lla')


def of_another_family(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "mamba"}')


def without_a_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


def with_a_broken_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut, "model.safetensors: not a whole safetensors file"),
        (emptied, "model.safetensors: not a whole safetensors file"),
        (half_written, "config.json: not valid JSON (half-written?)"),
        (of_another_family, "config.json: model family 'mamba' is not supported; supported: llama, "),
        (without_a_tokenizer, "no tokenizer: neither tokenizer.json nor tokenizer.model nor vocab.json"),
        (with_a_broken_tokenizer, "tokenizer.json: not a tokenizer"),
    ],
)
def test_a_damaged_checkpoint_is_named_in_one_line(directory: Path, spoil: Callable[[Path], None], said: str) -> None:
    spoil(directory)
    message = refused(directory)
    assert message.startswith(str(directory))
    assert said in message
    assert "\n" not in message


def test_an_empty_directory_has_no_config(tmp_path: Path) -> None:
    assert refused(tmp_path) == f"{tmp_path}/config.json: cannot be read: No such file or directory"


def test_a_gguf_file_is_known_by_its_head(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"\x00" * 100)
    assert refused(path) == f"{path}: not a GGUF file: it begins with {bytes(4)!r}, not with b'GGUF'"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 9, 1, 1))
    assert "version 9, 1 tensors, 1 keys; expected version 2 or 3" in refused(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1))
    assert check_model(str(path), dtype="float32", block_size=16) is None


@pytest.mark.parametrize("model", ["./no/such", "/no/such", "~/no/such", "../such", "no/such.gguf", "such.gguf"])
def test_what_looks_like_a_path_is_never_asked_of_a_hub(model: str) -> None:
    assert refused(model) == f"model {model!r}: no such file or directory"


@pytest.mark.parametrize("model", ["", "such", "a/b/c"])
def test_what_is_no_name_at_all_is_told_what_would_be(model: str) -> None:
    assert refused(model).startswith(f"model {model!r}: unknown; expected 'smollm2-135m-instruct', 'fake', ")


def fake(**settings: object) -> ClusterConfig:
    return ClusterConfig(**({"model": "fake", "port": 0, "admin_port": 0} | settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["port", "admin_port"])
def test_a_port_in_use_is_named(name: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Conflict, match=f"address 127.0.0.1:{port} is in use"):
            preflight(fake(**{name: port}))
    preflight(fake(**{name: port}))


@pytest.mark.parametrize(
    ("settings", "key", "expected"),
    [
        ({"threads": 3}, "cluster.threads", "at most the 2 cores that may be used"),
        ({"devices": ("cuda:0",)}, "cluster.devices", "cpu, with the fake model"),
        ({"model": "m", "devices": ("cpu", "cuda:0")}, "cluster.devices", "cpu; this host has no CUDA device"),
        ({"block_size": 65536, "device_mib": 1}, "cluster.device_mib", "at least 32: 16 blocks of 2,097,152 bytes"),
        ({"device_mib": 3, "dram_mib": 2}, "cluster.device_mib", "less: the pools of all workers take 10 MiB, 9 are"),
        ({"device_mib": 2, "dram_mib": 3}, "cluster.dram_mib", "less: the pools of all workers take 10 MiB, 9 are"),
    ],
)
def test_what_this_host_cannot_fulfil_is_named_with_its_limit(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], key: str, expected: str
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 5})
    monkeypatch.setattr(module, "gpus_seen", lambda: False)
    monkeypatch.setattr(module, "memory_free_bytes", lambda: 9 << 20)
    with pytest.raises(ConfigError) as refusal:
        preflight(fake(**settings))
    assert refusal.value.key == key
    assert refusal.value.expected.startswith(expected)


def test_files_that_could_not_be_written_are_named_by_their_setting(tmp_path: Path) -> None:
    away = str(tmp_path / "no" / "run.jsonl")
    with pytest.raises(ConfigError, match=r"cluster\.conductor\.record: got '.*'; expected a file that can be made: "):
        preflight(fake(conductor=ConductorConfig(record=away)))
    with pytest.raises(ConfigError, match=r"cluster\.records\.file: got '.*'; expected a file; this is a folder"):
        preflight(fake(records=RecordsConfig(file=str(tmp_path))))
    preflight(fake(conductor=ConductorConfig(record=str(tmp_path / "run.jsonl"))))


def test_a_host_shows_its_gpus_as_devices(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidiactl").touch()
    assert not gpus_seen(tmp_path)
    (tmp_path / "dev" / "nvidia0").touch()
    assert gpus_seen(tmp_path)
