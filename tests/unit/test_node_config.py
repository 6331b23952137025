"""A worker's settings: what is refused, what the pools' sizes become, and what the roles make of their sections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coupled_worker.worker import make_machine as make_coupled
from decode_worker.worker import make_machine as make_decode
from halfmoon.blocks import Fingerprint, root_hash
from halfmoon.errors import ConfigError
from halfmoon.types import NodeId, Role
from kv_store.tiers import KvCache
from node.config import MIB, POOL_BYTES_MAX, NodeConfig
from node.main import _settings, prepare_host
from node.process import Parts
from prefill_worker.worker import make_machine as make_prefill

ID = NodeId("n0")
BLOCK = 368_640  # the default model's, in bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threads": 0}, "config node.threads: got 0; expected at least 1"),
        ({"device_blocks": -1}, "config node.device_blocks"),
        ({"dram_mib": -2}, "config node.dram_mib"),
        ({"node_id": ""}, "config node.node_id"),
        ({"report_interval_s": 0.0}, "config node.report_interval_s"),
        ({"listen": "0.0.0.0:50000"}, "config node.advertise"),
        ({"log_level": "loud"}, "config node.log_level"),
        (
            {"eviction": "fifo"},
            "config node.eviction: got 'fifo'; expected one of lru, lfu, length_aware, s3fifo, leased",
        ),
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        NodeConfig(**{"node_id": ID, **settings})
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize(
    ("settings", "blocks"),
    [
        ({}, (8 * MIB // BLOCK, 8 * MIB // BLOCK)),
        ({"device_mib": 4, "dram_mib": -1}, (4 * MIB // BLOCK, 0)),
        ({"device_blocks": 7, "device_mib": 4, "dram_blocks": 9}, (7, 9)),
        ({"dram_mib": 1}, (8 * MIB // BLOCK, MIB // BLOCK)),
    ],
)
def test_pools_are_as_asked_or_an_eighth_of_what_is_free(settings: dict[str, Any], blocks: tuple[int, int]) -> None:
    assert NodeConfig(node_id=ID, **settings).num_blocks(BLOCK, 64 * MIB) == blocks


def test_pools_have_a_bound_that_only_an_operator_lifts() -> None:
    assert NodeConfig(node_id=ID).num_blocks(BLOCK, 1 << 40)[0] == POOL_BYTES_MAX // BLOCK
    assert NodeConfig(node_id=ID, device_mib=1 << 14).num_blocks(BLOCK, 1 << 40)[0] == (1 << 34) // BLOCK


def test_a_core_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"config node\.cores"):
        prepare_host(NodeConfig(node_id=ID, cores=(4095,)))


def test_settings_come_from_the_file_and_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "p0.yaml"
    file.write_text("node: {node_id: p0, model: fake}\nprefill: {attempts_max: 3}\n")
    config, section = _settings(Role.PREFILL, str(file), ("node.threads=2", "node.model=tiny"))
    assert config == NodeConfig(node_id=NodeId("p0"), model="tiny", threads=2)
    assert section == {"attempts_max": 3}
    with pytest.raises(ConfigError, match="a known key: node, decode"):
        _settings(Role.DECODE, str(file), ())
    with pytest.raises(ConfigError, match="did you mean 'threads'"):
        _settings(Role.PREFILL, str(file), ("node.thread=2",))
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        _settings(Role.PREFILL, str(file), ("node.threads",))


def parts(section: dict[str, Any]) -> Parts:
    fingerprint = Fingerprint(weights="w", num_layers=1, num_kv_heads=1, head_dim=8, rope="none")
    return Parts(
        node_id=ID,
        cache=KvCache(num_device_slots=8, num_dram_slots=0, block_size=16),
        root=root_hash(fingerprint),
        block_size=16,
        node=NodeConfig(node_id=ID, tokens_per_pass_max=200, sequences_max=20),
        section=section,
    )


def test_roles_take_the_size_of_a_pass_from_the_node_unless_their_section_says_it() -> None:
    prefill = make_prefill(parts({"attempts_max": 5})).config
    assert (prefill.tokens_per_pass_max, prefill.sequences_per_pass_max, prefill.attempts_max) == (200, 20, 5)
    assert make_prefill(parts({"tokens_per_pass_max": 50})).config.tokens_per_pass_max == 50
    assert make_decode(parts({})).config.sequences_max == 20
    coupled = make_coupled(parts({"decode": {"attempts_max": 30}})).config
    assert (coupled.tokens_per_pass_max, coupled.prefill.tokens_per_pass_max) == (200, 200)
    assert (coupled.decode.sequences_max, coupled.decode.attempts_max) == (20, 30)


def test_a_wrong_key_in_a_roles_section_is_named_with_its_section() -> None:
    with pytest.raises(ConfigError, match=r"config decode\.sequences_max: got 0"):
        make_decode(parts({"sequences_max": 0}))
    with pytest.raises(ConfigError, match=r"config coupled\.prefill\.nonsense"):
        make_coupled(parts({"prefill": {"nonsense": 1}}))
