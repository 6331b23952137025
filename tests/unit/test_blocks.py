"""Block names: golden vectors that may never change under one hash version, and what a name must distinguish."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.blocks import BlockChain, Fingerprint, root_hash

GOLDEN = Fingerprint(weights="golden", num_layers=2, num_kv_heads=3, head_dim=64, rope="default theta=10000")


def names(tokens: list[int], **kwargs: object) -> list[str]:
    chain = BlockChain(root_hash(GOLDEN), 4, **kwargs)  # type: ignore[arg-type]
    return [h.hex() for h in chain.extend(tokens)]


def test_golden_vectors() -> None:
    assert root_hash(GOLDEN).hex() == "67782b075a5732b9686b76f7e6bf2c19"
    plain = ["d806b1b80a04ba9c2748482aee787f17", "18d1189dc3f804b1fb30f0275cfe4e44", "5e01282be920774ed86fe2cb8dd87a7a"]
    assert names(list(range(12))) == plain
    salted = [
        "27fd0f5d4056a664cb44dc79262fc4dd",
        "93ac0fcba3513ca8445bac0523e482c0",
        "2bcba42684d337dd4a0673d9cdf6747e",
    ]
    assert names(list(range(12)), salt=b"tenant-a") == salted
    shared_head = [plain[0], "a038b1f9086e2e994502406c6c654d8c", "3ea7dc9ee85faab1c6e76c98d1db9cb1"]
    assert names(list(range(12)), salt=b"tenant-a", public_tokens=5) == shared_head


def test_the_first_block_by_hand() -> None:
    root = hashlib.blake2b(b"halfmoon-root-1\n" + GOLDEN.canonical(), digest_size=16).digest()
    first = hashlib.blake2b(root + struct.pack("<4I", 0, 1, 2, 3), digest_size=16).hexdigest()
    assert names([0, 1, 2, 3, 4]) == [first]


def test_names_do_not_depend_on_the_process() -> None:
    code = "from tests.unit.test_blocks import names; print(names(list(range(8))))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


@given(st.lists(st.integers(0, 2**32 - 1), max_size=60), st.data())
def test_however_it_is_fed_a_chain_gives_the_same_names(tokens: list[int], data: st.DataObject) -> None:
    chain = BlockChain(root_hash(GOLDEN), 4)
    position = 0
    while position < len(tokens):
        step = data.draw(st.integers(1, 9))
        chain.extend(tokens[position : position + step])
        position += step
    assert [h.hex() for h in chain.hashes] == names(tokens)
    assert chain.num_tokens == len(tokens)
    assert len(chain.hashes) == len(tokens) // 4


@given(st.lists(st.integers(0, 500), max_size=40), st.integers(0, 10))
def test_a_chain_that_begins_with_known_names_goes_on_as_if_it_had_made_them(tokens: list[int], known: int) -> None:
    whole = BlockChain(root_hash(GOLDEN), 4)
    whole.extend(tokens)
    known = min(known, len(whole.hashes))
    chain = BlockChain(root_hash(GOLDEN), 4)
    chain.begin_with(whole.hashes[:known], tokens[4 * known : 4 * known + 1])
    chain.extend(tokens[4 * known + 1 :])
    assert (chain.hashes, chain.num_tokens) == (whole.hashes, len(tokens))


def test_a_token_that_is_no_u32_is_refused() -> None:
    with pytest.raises(struct.error):
        names([0, 1, 2, -1])


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Fingerprint)])
def test_every_field_of_the_fingerprint_changes_every_name(field: str) -> None:
    old = getattr(GOLDEN, field)
    other = dataclasses.replace(GOLDEN, **{field: old + 1 if isinstance(old, int) else old + "x"})
    assert root_hash(other) != root_hash(GOLDEN)
    assert [d.split(":")[0] for d in GOLDEN.differences(other)] == [field]
