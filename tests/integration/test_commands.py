"""The operator's commands against a real cluster on the fake engine, given no more than its client address."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from click.testing import CliRunner, Result

from cli.main import main
from tests.clusters import run, running, until

pytestmark = pytest.mark.cluster


async def command(*arguments: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, main, list(arguments))


def test_a_drain_is_seen_warned_of_survives_the_worker_and_is_undone() -> None:
    async def story() -> None:
        async with running(device_mib=4, dram_mib=-1) as (cluster, client):
            at = ("--address", cluster.addresses["inference"])
            drained = await command("drain", *at, "decode-0")
            assert drained.exit_code == 0, drained.output
            assert "decode-0 takes no new requests" in drained.output
            assert "No other decode worker is ready" in drained.output
            refused = await command("generate", *at, "Hi")
            assert "no decode worker is ready (1 draining)" in refused.output
            before = next(n for n in (await client.cluster()).nodes if n.node_id == "decode-0")
            os.kill(before.pid, signal.SIGKILL)
            back = await until(client, lambda v: any(n.pid != before.pid and n.draining for n in v.nodes))
            assert not back.ready
            assert (await command("undrain", *at, "decode-0")).output == "decode-0 takes new requests again.\n"
            await until(client, lambda view: view.ready and not any(n.draining for n in view.nodes))
            answer = await command("generate", *at, "Hi", "--max-tokens", "3", "--ignore-eos", "--json")
            assert '"completion_tokens": 3' in answer.output

    run(story())


def test_swapped_addresses_are_told_apart_and_the_admin_address_is_found() -> None:
    async def story() -> None:
        async with running(device_mib=4, dram_mib=-1) as (cluster, client):
            inference, admin = cluster.addresses["inference"], cluster.addresses["admin"]
            assert (await client.model()).admin_address == admin
            assert (await command("status", "--address", inference)).exit_code == 0
            for arguments in (("--address", admin), ("--address", inference, "--admin", inference)):
                swapped = await command("status", *arguments)
                assert swapped.exit_code == 1
                assert "serves another API than the one asked for" in swapped.output

    run(story())
