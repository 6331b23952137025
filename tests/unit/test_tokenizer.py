"""The tokenizer against transformers' own on a small BPE: ids, text, streams, chat templates, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from engine.tokenizer import open_tokenizer
from halfmoon.errors import CheckpointError, InvalidRequest

TEMPLATE = """{%- for message in messages %}
    {%- if message.role == "tool" %}{{ raise_exception("no tools here") }}{% endif %}
    {{- "<s>" + message["role"] + "\\n" + message["content"] | trim + eos_token }}
{%- endfor %}
{% generation %}{% if add_generation_prompt %}<s>assistant
{% endif %}{% endgeneration %}{{ {"a": "<&é>"} | tojson }}"""
EOS = {"__type": "AddedToken", "content": "</s>", "special": True}
TEXTS = ["Hello, world!", "naïve café — 東京 🎌🏯", "", "  two  spaces\n\ttab", "a<s>b</s>"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    fast.train_from_iterator(["the quick brown fox", "hello world", "two spaces and the tab"], trainer)
    fast.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": EOS}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    generation = {"eos_token_id": [1, 7], "do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 99}
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_transformers_own(directory: Path, text: str) -> None:
    ours, theirs = open_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.vocab_size == len(theirs)


def test_what_the_checkpoint_says_about_generation(directory: Path) -> None:
    tokenizer = open_tokenizer(directory)
    assert tokenizer.eos_token_ids == (1, 7)
    assert tokenizer.generation_defaults == {"temperature": 0.6, "top_p": 0.9}


def test_chats_render_as_transformers_renders_them(directory: Path) -> None:
    messages = [{"role": "system", "content": " be brief "}, {"role": "user", "content": "hé <b>"}]
    theirs = AutoTokenizer.from_pretrained(directory)
    for prompt in (True, False):
        rendered = open_tokenizer(directory).render_chat(messages, add_generation_prompt=prompt)
        assert rendered == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert "<s>system\nbe brief</s>" in rendered


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "1 to"),
        ([{"role": "user"}], "role and content"),
        ([{"role": "user", "content": 3}], "role and content"),
        ([{"role": "tool", "content": "x"}], "no tools here"),
    ],
)
def test_malformed_chats_are_the_callers_fault(directory: Path, messages: list[dict[str, str]], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        open_tokenizer(directory).render_chat(messages)


def with_template(directory: Path, tmp_path: Path, template: str | None) -> Path:
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    if template is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return tmp_path


def test_no_template_and_hostile_templates(directory: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    with pytest.raises(InvalidRequest, match="no chat template"):
        open_tokenizer(with_template(directory, tmp_path, None)).render_chat(chat)
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(InvalidRequest, match="a chat that the template takes"):
        open_tokenizer(with_template(directory, tmp_path, escape)).render_chat(chat)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 99999 }}{% endfor %}{% endfor %}"
    with pytest.raises(InvalidRequest, match="characters"):
        open_tokenizer(with_template(directory, tmp_path, endless)).render_chat(chat)
    with pytest.raises(CheckpointError, match="does not compile"):
        open_tokenizer(with_template(directory, tmp_path, "{% for %}"))


@pytest.mark.parametrize("text", TEXTS[:-1])
def test_a_stream_gives_the_whole_text_in_whole_characters(directory: Path, text: str) -> None:
    tokenizer = open_tokenizer(directory)
    stream = tokenizer.stream()
    parts = [stream.push(i) for i in tokenizer.encode(text)]
    assert "".join(parts) + stream.finish() == text
    assert all("\ufffd" not in part for part in parts)


def test_a_stream_that_ends_inside_a_character_says_so_once(directory: Path) -> None:
    tokenizer = open_tokenizer(directory)
    stream = tokenizer.stream()
    ids = tokenizer.encode("a🎌")[:-1]
    assert "".join(stream.push(i) for i in ids) == "a"
    assert set(stream.finish()) == {"\ufffd"}
    assert stream.finish() == ""


def test_a_stream_skips_special_tokens_and_does_not_repeat_its_context(directory: Path) -> None:
    tokenizer = open_tokenizer(directory)
    stream = tokenizer.stream(tokenizer.encode("hello"))
    assert "".join(stream.push(i) for i in [*tokenizer.encode(" world"), 1]) + stream.finish() == " world"


def test_damaged_files_are_named(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes((directory / "tokenizer.json").read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=r"tokenizer.json: not valid JSON"):
        open_tokenizer(tmp_path)
    path.write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: not a tokenizer"):
        open_tokenizer(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer: neither tokenizer.json nor"):
        open_tokenizer(tmp_path)


def test_importing_it_brings_neither_torch_nor_transformers() -> None:
    code = "import sys, engine.tokenizer, engine.load; print({'torch', 'transformers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "set()"
