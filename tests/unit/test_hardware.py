"""Hardware presets: the papers' formulas, and files that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from halfmoon.errors import ConfigError
from simulator.presets import FOLDER, hardware_of, load_hardware, presets
from simulator.truth import TruePhysics

MEASURED = {
    "prefill_pass_s": 0.01,
    "prefill_token_s": 1e-3,
    "prefill_pair_s": 1e-7,
    "decode_step_s": 0.02,
    "decode_sequence_s": 1e-3,
    "decode_token_s": 1e-6,
}
REST = {
    "source": "a test",
    "link_s": 1e-3,
    "link_bytes_per_s": 1e9,
    "move_s_per_byte": 1e-9,
    "message_s": 1e-3,
    "block_tokens": 16,
    "prefill_blocks": 100,
    "decode_blocks": 100,
    "tokens_per_pass_max": 512,
    "prompts_per_pass_max": 8,
    "sequences_max": 32,
    "batch_blocks": 8,
}


def test_the_papers_node_computes_what_equation_1_says() -> None:
    node = load_hardware("a800-llama-70b")

    def flops(n: int) -> float:
        return 80 * (4 * n**2 * 8192 + 22 * n * 8192**2)

    per_s = 8 * 312e12 * 0.5
    for cached, new in ((0, 12_000), (8_192, 4_000)):
        pairs = new * cached + 0.5 * new**2
        seconds = node.prefill_token_s * new + node.prefill_pair_s * pairs
        assert seconds == pytest.approx((flops(cached + new) - flops(cached)) / per_s)
    assert node.decode_step_s + node.decode_token_s * 400_000 == pytest.approx(0.012 + 320e3 * 400_000 / (16e12 * 0.6))
    assert (node.block_bytes, node.prefill_blocks, node.link_bytes_per_s) == (512 * 320_000, 5859, 12.5e9)


def test_every_preset_can_be_read_and_believed() -> None:
    assert "a800-llama-70b" in presets()
    for name in presets():
        node = load_hardware(name)
        prior = node.prior({"prefill": 2.0, "read": 0.5})
        assert prior.prefill[1] == pytest.approx(2.0 * node.prefill_token_s)
        assert prior.decode[0] == pytest.approx(node.decode_step_s)
        true_s = TruePhysics(node).move_s()
        assert prior.read_dram[0] + prior.read_dram[1] * node.block_bytes == pytest.approx(0.5 * true_s, abs=1e-6)


def test_a_chunk_is_shared_by_prompts_and_steps_on_coupled_nodes() -> None:
    preset = load_hardware("a800-llama-70b")
    apart, coupled = (preset.with_chunk(256, coupled=both) for both in (False, True))
    assert (apart.tokens_per_pass_max, apart.prompts_per_pass_max, apart.sequences_max) == (256, 1, 256)
    assert (coupled.tokens_per_pass_max, coupled.prompts_per_pass_max, coupled.sequences_max) == (256, 128, 128)
    large = preset.with_chunk(8192, coupled=True)
    assert (large.prompts_per_pass_max, large.sequences_max) == (256, 256), "no more than the preset has"


def test_decode_room_is_whole_blocks() -> None:
    preset = load_hardware("a800-llama-70b")
    assert preset.with_decode_room(400_000).decode_blocks == 781
    assert preset.with_decode_room(400_000).prefill_blocks == preset.prefill_blocks
    with pytest.raises(ConfigError) as caught:
        preset.with_decode_room(511)
    assert caught.value.key == "decode-room"


def test_links_and_prefill_are_scaled_and_decode_is_not() -> None:
    preset = load_hardware("cpu-smollm2-135m")
    scaled = preset.scaled(link=2.0, prefill=0.5)
    assert scaled.link_bytes_per_s == 2 * preset.link_bytes_per_s
    for name in ("prefill_pass_s", "prefill_token_s", "prefill_pair_s"):
        assert getattr(scaled, name) == 2 * getattr(preset, name)
    assert scaled.decode_step_s == preset.decode_step_s
    assert preset.scaled() == preset


def test_measured_coefficients_are_taken_as_they_are() -> None:
    node = hardware_of({**REST, "kv_token_bytes": 1000, "measured": MEASURED}, name="cpu")
    assert (node.name, node.prefill_token_s, node.decode_sequence_s, node.block_bytes) == ("cpu", 1e-3, 1e-3, 16_000)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"measured": None}, "hardware"),
        ({"measured": {**MEASURED, "magic": 1.0}}, "hardware.measured.magic"),
        ({"measured": {"prefill_pass_s": 0.01}}, "hardware.measured.prefill_token_s"),
        ({"measured": {**MEASURED, "decode_step_s": "fast"}}, "hardware.measured.decode_step_s"),
        ({"color": "red"}, "hardware.color"),
        ({"block_tokens": 0}, "hardware.block_tokens"),
        ({"block_tokens": 16.5}, "hardware.block_tokens"),
        ({"prefill_token_s": 1.0}, "hardware.prefill_token_s"),
        ({"link_bytes_per_s": 0.0}, "hardware.link_bytes_per_s"),
        ({"link_s": "quick"}, "hardware.link_s"),
        ({"link_s": float("nan")}, "hardware.link_s"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        hardware_of({**REST, "kv_token_bytes": 1000, "measured": MEASURED, **change}, name="x")
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("mfu: .nan", "hardware.transformer.mfu: got nan; expected a share in (0, 1]"),
        ("mfu: 50", "hardware.transformer.mfu: got 50; expected a share in (0, 1]"),
        ("memory_efficiency: 0", "hardware.transformer.memory_efficiency: got 0; expected a share"),
        ("layers: -80", "hardware.transformer.layers: got -80; expected a finite number above 0"),
        ("hidden: wide", "hardware.transformer.hidden: got 'wide'; expected a number"),
        ("hiden: 8192", "hardware.transformer.hiden: got 8192; expected a known key; did you mean hidden?"),
    ],
)
def test_a_file_is_refused_in_its_own_words(line: str, said: str, tmp_path: Path) -> None:
    text = (FOLDER / "a800-llama-70b.yaml").read_text()
    key = line.split(":", 1)[0]
    path = tmp_path / "mine.yaml"
    lines = [f"  {line}" if old.split(":")[0].strip() == key else old for old in text.splitlines()]
    path.write_text("\n".join(lines if key != "hiden" else [*lines[:5], f"transformer: {{{line}}}"]))
    with pytest.raises(ConfigError) as caught:
        load_hardware(str(path))
    assert said in str(caught.value)


def test_a_number_may_be_written_without_its_sign(tmp_path: Path) -> None:
    text = (FOLDER / "a800-llama-70b.yaml").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("12.5e+9", "12.5e9"))
    assert load_hardware(str(path)).link_bytes_per_s == 12.5e9


def test_missing_values_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hardware.source: .* the key is missing"):
        hardware_of({"kv_token_bytes": 1000, "measured": MEASURED}, name="x")
    with pytest.raises(ConfigError, match=r"hardware.linc_s: .* did you mean link_s\?"):
        hardware_of({**REST, "linc_s": 1.0, "kv_token_bytes": 1000, "measured": MEASURED}, name="x")
    with pytest.raises(ConfigError, match="no such file"):
        load_hardware(str(tmp_path / "absent.yaml"))
    with pytest.raises(ConfigError, match="a800-llama-70b"):
        load_hardware("a900")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [")
    with pytest.raises(ConfigError, match="YAML"):
        load_hardware(str(bad))
