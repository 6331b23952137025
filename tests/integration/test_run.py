"""Lifetimes of real processes: what `run` makes of signals, faults and refusals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

pytestmark = pytest.mark.cluster

HEAD = """
import asyncio, sys, time, threading
from halfmoon.errors import ConfigError
from service.logs import configure
from service.run import run
configure("n0")
async def tick():
    while True:
        await asyncio.sleep(0.01)
async def serve(stop):
    print("up", flush=True)
    await stop.wait()
    print("drained", stop.reason, flush=True)
"""


def process(body: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HEAD + textwrap.dedent(body)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_up(child: subprocess.Popen[str]) -> None:
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"


def end(child: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = child.communicate(timeout=20)
    return child.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_the_exit_is_clean(number: signal.Signals) -> None:
    child = process("""
        async def main(stop):
            stop.spawn_essential(tick(), name="tick")
            await serve(stop)
        run(main)
    """)
    wait_up(child)
    child.send_signal(number)
    code, out, err = end(child)
    assert (code, out) == (0, f"drained {number.name}\n")
    assert f"stopping: {number.name}" in err


def test_a_second_sigint_ends_a_drain_that_hangs() -> None:
    child = process("""
        async def main(stop):
            await serve(stop)
            await asyncio.sleep(100)
        run(main)
    """)
    wait_up(child)
    child.send_signal(signal.SIGINT)
    assert child.stdout is not None
    assert child.stdout.readline() == "drained SIGINT\n"
    child.send_signal(signal.SIGINT)
    assert end(child)[0] == 130


def test_a_drain_has_an_end_and_says_what_it_waited_for() -> None:
    child = process("""
        async def forever():
            await asyncio.sleep(100)
        async def main(stop):
            await serve(stop)
            await forever()
        run(main, drain_s_max=0.2)
    """)
    wait_up(child)
    child.send_signal(signal.SIGTERM)
    code, _, err = end(child)
    assert code == 3
    assert "forever  <string>" in err
    assert "draining took longer than 0.2 s" in err


@pytest.mark.parametrize(
    ("work", "said"),
    [("raise RuntimeError('lost the pool')", "lost the pool"), ("return", "returned before the process was asked")],
)
def test_an_essential_task_that_ends_ends_the_process(work: str, said: str) -> None:
    child = process(f"""
        async def fragile():
            await asyncio.sleep(0.05)
            {work}
        async def main(stop):
            stop.spawn_essential(fragile(), name="fragile")
            try:
                await serve(stop)
            finally:
                print("cleaned up", flush=True)
        run(main)
    """)
    code, out, err = end(child)
    assert code == 1
    assert out == "up\ncleaned up\n"
    assert "level=critical" in err
    assert said in err


def test_a_spared_task_may_die() -> None:
    child = process("""
        async def fragile():
            raise RuntimeError("never mind")
        async def main(stop):
            stop.spawn(fragile(), name="fragile")
            await asyncio.sleep(0.1)
            await serve(stop)
        run(main)
    """)
    wait_up(child)
    child.terminate()
    code, _, err = end(child)
    assert code == 0
    assert "never mind" in err


def test_a_refusal_to_start_is_one_line_and_its_own_exit_code() -> None:
    child = process("""
        async def main(stop):
            raise ConfigError(key="node.threads", value=0, expected="at least 1")
        run(main)
    """)
    code, _, err = end(child)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "config node.threads: got 0; expected at least 1" in err


def test_sigusr1_shows_threads_tasks_and_registered_dumps_and_nothing_ends() -> None:
    child = process("""
        def stuck_in_a_device():
            time.sleep(100)
        threading.Thread(target=stuck_in_a_device, daemon=True).start()
        async def waits_for_godot():
            await asyncio.sleep(100)
        async def main(stop):
            stop.spawn(waits_for_godot(), name="godot")
            stop.add_dump("pins", lambda: "block 7 held by r#1")
            stop.add_dump("broken", lambda: 1 / 0)
            await serve(stop)
        run(main)
    """)
    wait_up(child)
    os.kill(child.pid, signal.SIGUSR1)
    time.sleep(0.5)
    child.terminate()
    code, _, err = end(child)
    assert code == 0
    for expected in ("stuck_in_a_device", "waits_for_godot", "block 7 held by r#1", "ZeroDivisionError"):
        assert expected in err
