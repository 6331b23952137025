"""Tables keep their numbers in narrow terminals; a decision record reads."""

from __future__ import annotations

import io
from dataclasses import fields, replace
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from cli.client_commands import chat
from cli.explain import explained
from cli.tables import cluster_table, longest_request, missing, requests_table, short_address, without
from halfmoon.client import Cluster, ClusterNode, Model, Result, ServerTimings, Timings, Usage
from halfmoon.errors import InvalidRequest
from halfmoon.types import RequestId
from tests.conductor_kit import Play, spec

NODE = ClusterNode(
    node_id="prefill-0",
    epoch="e",
    role="prefill",
    address="127.0.0.1:40001",
    pid=123456,
    ready=True,
    draining=False,
    outstanding_attempts=0,
    queued_attempts=12,
    running_sequences=34,
    num_device_blocks=65536,
    free_device_blocks=60000,
    evictable_device_blocks=1000,
    indexed_blocks=54321,
    index_mode="exact",
    last_heard_s=0.3,
    held_blocks=4536,
    quarantined_blocks=0,
    invariant_checks=0,
)
CLUSTER = Cluster(
    conductor_id="c", term=1, model="m", ready=False, nodes=(NODE,), requests_open=1, counters={},
    registry_reachable=True,
)  # fmt: skip


def shown(*parts: Any, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(*parts, sep="\n")
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 130])
def test_every_number_of_a_node_is_shown(width: int) -> None:
    text = shown(cluster_table(CLUSTER, width), width=width)
    for cell in ("prefill-0", "12", "34", "4536", "61.0k/65.5k", "54.3k", "0.3"):
        assert cell in text.replace("\n", " "), cell
    assert ("123456" in text) == (width == 130)


@pytest.mark.parametrize("width", [80, 130])
def test_every_number_of_a_request_is_shown(width: int) -> None:
    counts = {f.name: 0 for f in fields(Usage)} | {"prompt_tokens": 31234, "completion_tokens": 2567}
    counts |= {"prefix_hit_tokens_device": 30008, "prefix_hit_tokens_dram": 10112, "prefix_hit_tokens_remote": 20480}
    names = {"prefill_node": "prefill-0", "decode_node": "decode-0", "link": "shm", "kv_bytes_pulled": 987 << 20}
    server = ServerTimings(**dict.fromkeys((f.name for f in fields(ServerTimings)), 0.0))
    result = Result(
        request_id="r", text="", token_ids=(), prompt_token_ids=(), finish_reason="stop", tokens=(),
        usage=Usage(**counts | names),  # type: ignore[arg-type]
        timings=Timings(ttft_s=12.345, tbt_s=(1.5,), total_s=1.0, server=server),
    )  # fmt: skip
    text = shown(requests_table([("r-0123456789", result)]), width=width)
    for cell in ("31234", "2567", "12,345", "1,500", "30008", "10112", "20480", "987.0"):
        assert cell in text, cell


def test_what_is_missing_is_said() -> None:
    assert missing(CLUSTER) == "no decode worker is ready: 0 of 0 known"
    down = replace(NODE, role="coupled", ready=False)
    assert missing(replace(CLUSTER, nodes=(NODE, down))) == "no decode worker is ready: 0 of 1 known"


def test_draining_the_last_of_a_role_is_told() -> None:
    decode, coupled = replace(NODE, node_id="d", role="decode"), replace(NODE, node_id="c", role="coupled")
    pair = replace(CLUSTER, nodes=(NODE, decode))
    assert (without(pair, NODE.node_id), without(pair, "d"), without(pair, "x")) == ("prefill", "decode", "")
    assert without(replace(CLUSTER, nodes=(NODE, decode, coupled)), "d") == ""
    assert without(replace(CLUSTER, nodes=(NODE, replace(coupled, draining=True), decode)), "d") == "decode"
    assert without(replace(CLUSTER, nodes=(NODE, coupled)), "c") == "decode"


def test_the_longest_request_is_what_both_pools_and_the_context_hold() -> None:
    model = Model(name="m", context_tokens_max=8192, vocab_size=9, block_size=16, eos_token_ids=(), weights="")
    small = replace(NODE, role="decode", num_device_blocks=20)
    assert longest_request(replace(CLUSTER, nodes=(NODE, small)), model) == 320
    both = replace(NODE, role="coupled", num_device_blocks=100)
    assert longest_request(replace(CLUSTER, nodes=(NODE, small, both)), model) == 1600
    assert longest_request(replace(CLUSTER, nodes=(NODE, replace(NODE, role="decode"))), model) == 8192


def test_a_sockets_directory_is_left_out() -> None:
    assert short_address("unix:/home/somebody/.cache/halfmoon/run/default/prefill-0.sock") == "unix:…/prefill-0.sock"
    assert short_address("10.0.0.1:4000") == "10.0.0.1:4000"


def test_a_decision_record_reads() -> None:
    play = Play("p0 d0")
    play.request(spec("r"))
    record = play.machine.explain(RequestId("r"))
    assert record is not None
    text = shown(*explained(record.as_json()), width=80)
    for words in ("r: running", "p0 *", "d0 *", "= time to first token", "#1 reserve d0"):
        assert words in text, words


def test_a_bad_option_ends_a_chat_before_its_first_turn() -> None:
    result = CliRunner().invoke(chat, ["--temperature", "-1"], input="Hi\n")
    assert isinstance(result.exception, InvalidRequest)
    assert result.exception.field == "temperature"
    assert result.output == ""


def test_a_turn_that_fails_does_not_end_a_chat() -> None:
    result = CliRunner().invoke(chat, ["--address", "127.0.0.1:1"], input="Hi\nAgain\n\n")
    assert result.exit_code == 0
    assert result.output.count("Unavailable: nobody answers at 127.0.0.1:1") == 2
