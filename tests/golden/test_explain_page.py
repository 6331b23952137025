"""docs/explain-and-replay.md shows what its four runs give today; its commands are run, and every figure is compared.

When a change of decisions is meant: python -m tests.golden.test_explain_page --rewrite
"""

from __future__ import annotations

import re
import shlex
import sys
import tempfile
from contextlib import chdir
from pathlib import Path

from click.testing import CliRunner

from cli.main import main

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "explain-and-replay.md"
TERMS = ("queue", "prefill", "transfer", "decode")


def told(text: str) -> dict[str, str]:
    """What the page's commands print, by the term that is believed wrongly."""
    listed = re.search(r"^for wrong in (.*?); do\n  halfmoon (.*?)\n  halfmoon (.*?)\ndone$", text, re.M | re.S)
    assert listed is not None, "the page has no such loop"
    wrongs, *commands = listed.groups()
    printed = {}
    with tempfile.TemporaryDirectory() as folder, chdir(ROOT):
        for wrong in wrongs.split():
            for command in commands:
                words = [
                    word.replace("$wrong.jsonl", f"{folder}/{wrong}.jsonl").replace("$wrong", wrong)
                    for word in shlex.split(command.replace("\\\n", " "))
                ]
                where = ["--out", f"{folder}/{wrong}"] if words[0] == "simulate" else []
                done = CliRunner().invoke(main, [*words, *where])
                assert done.exit_code == 0, done.output
            printed[wrong] = "".join(f"{line.rstrip()}\n" for line in done.output.splitlines())
    return printed


def refreshed(text: str, printed: dict[str, str]) -> str:
    """The page with those figures in it."""
    first, blamed = next(iter(printed.values())), "".join(said.splitlines(True)[-1] for said in printed.values())
    rows = "".join(row(wrong, said) for wrong, said in printed.items())
    for place, new in (
        (r"(\nThe first:\n\n```\n).*?(```\n)", first),
        (r"(\nThe last lines of all four[^\n]*\n\n```\n).*?(```\n)", blamed),
        (r"(\n\| over-estimated \| queue [^\n]*\n\|[-|]*\|\n)(?:\|[^\n]*\n)+(\n)", rows),
    ):
        text, count = re.subn(place, lambda found, new=new: f"{found[1]}{new}{found[2]}", text, flags=re.S)  # type: ignore[misc]
        assert count == 1, f"the page has {count} places like {place}"
    return text


def row(wrong: str, said: str) -> str:
    """Of the page's table: net factors by term, and `baseline`'s rejections."""
    factors = []
    for term in TERMS:
        found = re.search(rf"^ {term}(?: \*)? .* (\S+)$", said, re.M)
        assert found is not None, said
        factors.append(f"**{found[1]}**" if term == wrong else found[1])
    verdicts = re.search(
        r"^ baseline +enforce +\d+ +\d+(?: \(.*?\))? +\d+ +(\d+) +(\d+)(?: \(.*?\))? +(\d+)$", said, re.M
    )
    assert verdicts is not None, said
    return f"| {' | '.join([wrong, *factors, *verdicts.groups()])} |\n"


def test_the_page_shows_what_its_commands_give() -> None:
    text = PAGE.read_text()
    assert refreshed(text, told(text)) == text


if __name__ == "__main__" and "--rewrite" in sys.argv:
    PAGE.write_text(refreshed(PAGE.read_text(), told(PAGE.read_text())))
