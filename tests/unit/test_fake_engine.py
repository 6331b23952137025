"""The fake engine: the same tokens however the work is cut, and no wrong byte goes unnoticed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from engine.fake import EOS_TOKEN_ID, LETTERS, FakeEngine, Speed, fake_tokens
from engine.fake_sleep import SleepingEngine
from engine.fake_tokenizer import FakeTokenizer
from engine.protocol import Slice
from halfmoon.errors import IntegrityError, InvalidRequest
from halfmoon.types import SamplingParams

GREEDY = SamplingParams()
BLOCK = 4
PROMPT = [104, 97, 108, 102, 109, 111, 111, 110, 33, 10]  # two and a half blocks
TABLE = (5, 2, 7)


class Bench:
    """An engine over a pool that was not zeroed, and its bytes."""

    def __init__(self, num_slots: int = 8) -> None:
        self.engine = FakeEngine(block_size=BLOCK)
        self.block_bytes = self.engine.model.layout.block_bytes
        self.pool = bytearray(b"\xa5" * (num_slots * self.block_bytes))
        self.engine.bind(memoryview(self.pool), num_slots)

    def prefill(self, tokens: Sequence[int], table: Sequence[int], chunk: int = 1000) -> int:
        """The token after `tokens`, computed in chunks."""
        for start in range(0, len(tokens), chunk):
            part = Slice(token_ids=tokens[start : start + chunk], start=start, slots=table, sampling=GREEDY)
            [sampled] = self.engine.forward([part])
        assert sampled is not None
        return sampled.token_id

    def decode(self, token_id: int, start: int, table: Sequence[int]) -> int:
        [sampled] = self.engine.forward([Slice(token_ids=[token_id], start=start, slots=table, sampling=GREEDY)])
        assert sampled is not None
        return sampled.token_id

    def block(self, slot: int) -> bytes:
        return bytes(self.pool[slot * self.block_bytes : (slot + 1) * self.block_bytes])

    def put(self, slot: int, block: bytes) -> None:
        self.pool[slot * self.block_bytes : (slot + 1) * self.block_bytes] = block


def test_the_layout_is_that_of_a_one_layer_model() -> None:
    model = FakeEngine().model
    assert (model.name, model.layout.block_bytes, model.layout.token_bytes) == ("fake", 512, 32)
    assert model.fingerprint.weights == "fake-1"
    assert model.fingerprint.block_size == 16


def test_the_oracle_foretells_prefill_and_decode() -> None:
    bench = Bench()
    expected = fake_tokens(PROMPT, 3, GREEDY)
    first = bench.prefill(PROMPT, TABLE)
    second = bench.decode(first, 10, TABLE)
    third = bench.decode(second, 11, TABLE)
    assert [first, second, third] == expected
    assert fake_tokens([*PROMPT, first], 2, GREEDY) == expected[1:]
    assert all(token in LETTERS for token in expected)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 9, 10])
def test_chunks_change_neither_token_nor_bytes(chunk: int) -> None:
    whole, cut = Bench(), Bench()
    assert whole.prefill(PROMPT, TABLE) == cut.prefill(PROMPT, TABLE, chunk)
    assert whole.pool == cut.pool


def test_company_changes_nothing() -> None:
    bench = Bench()
    alone = Bench().prefill(PROMPT, TABLE)
    other = Slice(token_ids=[1, 2, 3], start=0, slots=(0,), sampling=None)
    mine = Slice(token_ids=PROMPT, start=0, slots=TABLE, sampling=GREEDY)
    nothing, sampled = bench.engine.forward([other, mine])
    assert nothing is None
    assert sampled is not None
    assert sampled.token_id == alone


def test_a_shared_prefix_is_read_from_its_own_slots() -> None:
    bench = Bench()
    bench.prefill(PROMPT, TABLE)
    fork = [*PROMPT[:8], 65, 66]
    [sampled] = bench.engine.forward([Slice(token_ids=[65, 66], start=8, slots=(5, 2, 1), sampling=GREEDY)])
    assert sampled is not None
    assert [sampled.token_id] == fake_tokens(fork, 1, GREEDY)


def test_noise_is_a_function_of_seed_and_position_only() -> None:
    warm = [SamplingParams(temperature=t, seed=s) for t, s in ((1.0, 1), (0.5, 1), (1.0, 2))]
    first, same, other = (fake_tokens(PROMPT, 30, sampling) for sampling in warm)
    assert first == same
    assert first != other
    assert fake_tokens(PROMPT, 30, SamplingParams(seed=1)) == fake_tokens(PROMPT, 30, SamplingParams(seed=2))


def test_a_block_of_another_sequence_is_found() -> None:
    bench = Bench()
    bench.prefill(PROMPT, TABLE)
    bench.prefill([9] * 8, (0, 1))
    bench.put(2, bench.block(1))
    with pytest.raises(IntegrityError, match="slot 2 at position 4: the record is not of this sequence"):
        bench.decode(65, 10, TABLE)


def test_two_blocks_in_the_wrong_order_are_found() -> None:
    bench = Bench()
    bench.prefill(PROMPT, TABLE)
    with pytest.raises(IntegrityError, match="slot 2 at position 0: the record is of position 4"):
        bench.decode(65, 10, (2, 5, 7))


def test_a_stale_block_is_found() -> None:
    """The slot was given to another sequence, whose block has the same place in it, before this one was done."""
    bench = Bench()
    bench.prefill(PROMPT, TABLE)
    bench.prefill([*PROMPT[:4], 1, 2, 3, 4], (0, 2))
    with pytest.raises(IntegrityError, match="slot 7 at position 8"):
        bench.decode(65, 10, TABLE)


@pytest.mark.parametrize("bit", [0, 127, 8 * 63 + 7, 8 * 64, 8 * 68 + 3, 8 * 75, 8 * 127 + 7])
def test_a_flipped_bit_is_found(bit: int) -> None:
    bench = Bench()
    bench.prefill(PROMPT, TABLE)
    bench.decode(65, 10, TABLE)  # what was checked once is checked again
    bench.pool[2 * bench.block_bytes + bit // 8] ^= 1 << bit % 8
    with pytest.raises(IntegrityError, match="slot 2 at position"):
        bench.decode(65, 10, TABLE)


def test_a_context_that_was_never_computed_is_found() -> None:
    bench = Bench()
    bench.prefill(PROMPT[:9], TABLE)
    before = bytes(bench.pool)
    with pytest.raises(IntegrityError, match="slot 7 at position 9"):
        bench.decode(65, 10, TABLE)
    assert bench.pool == before


def test_a_truncated_context_gives_other_tokens() -> None:
    """Nothing is wrong with a shorter context but its tokens, and those the oracle knows."""
    bench = Bench()
    bench.prefill(PROMPT, TABLE)
    assert bench.decode(PROMPT[9], 8, TABLE) != fake_tokens(PROMPT, 1, GREEDY)[0]


def test_log_probabilities_are_ordered_and_begin_with_the_sample() -> None:
    bench = Bench()
    sampling = SamplingParams(logprobs=3)
    [sampled] = bench.engine.forward([Slice(token_ids=PROMPT, start=0, slots=TABLE, sampling=sampling)])
    assert sampled is not None
    assert sampled.top[0] == (sampled.token_id, sampled.logprob)
    assert [round(logprob, 3) for _, logprob in sampled.top] == [-0.693, -1.386, -2.079]
    assert len({token for token, _ in sampled.top}) == 3


def test_an_end_comes_as_often_as_asked() -> None:
    tokens = fake_tokens(PROMPT, 2000, GREEDY, eos_every=10)
    assert 150 < tokens.count(EOS_TOKEN_ID) < 250
    assert EOS_TOKEN_ID not in fake_tokens(PROMPT, 2000, GREEDY)


def test_a_pass_costs_what_the_table_says() -> None:
    speed = Speed(pass_s=1.0, prefill_token_s=0.1, context_token_s=0.01, decode_sequence_s=0.5, kv_token_s=0.001)
    engine = FakeEngine(block_size=BLOCK, speed=speed)
    chunk = Slice(token_ids=[1, 2], start=4, slots=(0, 1))
    step = Slice(token_ids=[1], start=9, slots=(0, 1, 2))
    assert engine.pass_seconds([]) == 1.0
    assert engine.pass_seconds([chunk]) == pytest.approx(1.24)
    assert engine.pass_seconds([chunk, step]) == pytest.approx(1.75)


def test_a_sleeping_engine_computes_the_same() -> None:
    bench = Bench()
    slow = SleepingEngine(bench.engine, pass_seconds=lambda slices: 0.001 * len(slices))
    [sampled] = slow.forward([Slice(token_ids=PROMPT, start=0, slots=TABLE, sampling=GREEDY)])
    assert sampled is not None
    assert [sampled.token_id] == fake_tokens(PROMPT, 1, GREEDY)


def test_text_survives_the_tokenizer_and_comes_out_token_by_token() -> None:
    tokenizer = FakeTokenizer()
    text = "Mondkuchen, 月餅 — ½"
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids[12:18]] == ["", "", "月", "", "", "餅"]
    later = tokenizer.stream(context=ids[:3])
    assert "".join(later.push(i) for i in ids[3:]) == text[3:]
    assert tokenizer.decode(fake_tokens(PROMPT, 40, GREEDY)).isprintable()


def test_half_a_character_ends_as_a_replacement() -> None:
    stream = FakeTokenizer().stream()
    assert stream.push(0xE6) == ""
    assert stream.push(EOS_TOKEN_ID) == ""
    assert stream.finish() == "�"


def test_chats_are_rendered_with_special_ids() -> None:
    tokenizer = FakeTokenizer()
    text = tokenizer.render_chat([{"role": "user", "content": "hi"}])
    assert text == "<|user|>hi<|end|><|assistant|>"
    assert tokenizer.encode(text) == [258, 104, 105, EOS_TOKEN_ID, 259]
    assert tokenizer.decode([258, 104, 105, EOS_TOKEN_ID]) == "hi"
    assert not tokenizer.render_chat([{"role": "user", "content": "hi"}], add_generation_prompt=False).endswith("ant|>")


@pytest.mark.parametrize(
    ("messages", "field"),
    [([], "messages"), ([{"role": "tool", "content": ""}], "messages\\[0\\].role"), ([{"role": "user"}], "content")],
)
def test_malformed_chats_are_named(messages: list[dict[str, str]], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        FakeTokenizer().render_chat(messages)
