"""A node in another process: `python -m tests.kv_child source|sink LINK[@DEVICE] FOLDER EPOCH [ADDRESS]`.

For tests to kill and to stop. DEVICE: the pool is a tensor there.

source: holds blocks 0 to 63 and says "ready ADDRESS". sink: pulls them, waiting for a tail that never comes, and says
"arrived" and "ended KIND".
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from halfmoon.types import AttemptId, Epoch, NodeId, RequestId, TransferId
from kv_store.pairing import load_links
from kv_store.values import PullSpec, Want
from tests.kv_nodes import PROCESS_LIMITS, name_of, running_node

NUM_BLOCKS = 64


async def source(link: str, pool: str, folder: Path, epoch: str) -> None:
    async with running_node(
        "p", folder, link=link, pool=pool, epoch=epoch, num_slots=64, limits=PROCESS_LIMITS
    ) as node:
        for number in range(NUM_BLOCKS):
            node.put(number, number)
        say(f"ready {node.address}")
        await asyncio.sleep(60.0)


async def sink(link: str, pool: str, folder: Path, epoch: str, address: str) -> None:
    async with running_node(
        "d", folder, link=link, pool=pool, epoch=epoch, num_slots=65, limits=PROCESS_LIMITS
    ) as node:
        say(f"ready {node.address}")
        node.store.start_pull(endless(address, epoch))
        while not node.ended:
            if node.arrived:
                say("arrived")
                node.arrived.clear()
            await asyncio.sleep(0.002)
        say(f"ended {type(node.ended[0].error).__name__}")


def endless(address: str, name: str) -> PullSpec:
    """A pull of everything that a source child has, and of a tail that it never gets."""
    wants = [Want(index=i, block_hash=name_of(i), num_tokens=16, slot=i) for i in range(NUM_BLOCKS)]
    wants.append(Want(index=NUM_BLOCKS, block_hash=None, num_tokens=1, slot=NUM_BLOCKS))
    return PullSpec(
        transfer_id=TransferId(name),
        attempt_id=AttemptId(RequestId(name), 1),
        source=NodeId("p"),
        source_epoch=Epoch("e1"),
        source_address=address,
        wants=tuple(wants),
        wait=True,
        deadline_s=30.0,
    )


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    link, _, device = sys.argv[2].partition("@")
    load_links([link])
    if sys.argv[1] == "source":
        asyncio.run(source(link, device or "shared", Path(sys.argv[3]), sys.argv[4]))
    else:
        asyncio.run(sink(link, device or "shared", Path(sys.argv[3]), sys.argv[4], sys.argv[5]))
