"""Shell: commands that read a recorded run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click
from rich.console import Console

from cli.judged import judged
from cli.tables import counted, make_console
from conductor.admission_policies import name_of
from conductor.counterfactual import counterfactual as counterfactual_of
from conductor.past import gather
from conductor.recording import config_of, read
from conductor.replay import Difference, Replayed, machine_of, rejudged
from conductor.replay import replay as replayed_from
from halfmoon.errors import RecordingError

EFFECTS_SHOWN = 8


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--counterfactual", is_flag=True, help="Judge its verdicts and predictions by what happened.")
@click.option("--policy", "policies", multiple=True, help="With --counterfactual: this admission policy; repeated.")
def replay(file: Path, counterfactual: bool, policies: tuple[str, ...]) -> None:
    """Feed a recorded run's inputs to a fresh conductor, and say whether it decides the same, bit by bit.

    FILE is what `halfmoon up --record FILE` wrote. Exit code 1: a decision differs.
    """
    if policies and not counterfactual:
        raise click.UsageError("--policy goes with --counterfactual")
    console = make_console()
    if counterfactual:
        run = gather(read(lines_of(file)))
        known = {verdict.policy for past in run.pasts for verdict in past.verdicts}
        if missing := [name for name in policies if name not in known]:
            run = gather(rejudged(lines_of(file), partial(machine_of, shadows=missing)))
        console.print(*judged(counterfactual_of(run, policies)), sep="\n")
        return
    result = replayed_from(lines_of(file))
    _say_run(console, file, result)
    if result.difference is None:
        calls, effects = counted(result.calls, "call"), counted(result.effects, "effect")
        console.print(f"Every decision is bit-equal: {calls}, {effects}, digest {result.digest}.", soft_wrap=True)
        return
    _say_difference(console, result.difference)
    sys.exit(1)


def lines_of(path: Path) -> Iterator[str]:
    """The file's lines. Raises: RecordingError: bytes that are no text."""
    number = 0
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):  # noqa: B007  (for the error below)
                yield line
    except UnicodeDecodeError as error:
        raise RecordingError(line=number + 1, why=f"it is no text ({error.reason})") from error


def _say_run(console: Console, file: Path, result: Replayed) -> None:
    requests = sum(result.outcomes.values())
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(result.outcomes.items()))
    console.print(
        f"{file}: {result.seconds:,.1f} s, {counted(requests, 'request')} ({outcomes or 'none ended'}), "
        f"placement {result.header.policy}, admission {name_of(config_of(result.header).admission)}, "
        f"recorded by halfmoon {result.header.halfmoon}",
        soft_wrap=True,
    )
    hits = result.hit_tokens
    if total := sum(hits.values()):
        where = ", ".join(f"{100 * count / total:.0f} % {place}" for place, count in hits.items() if count)
        console.print(f"Prompt tokens found in caches: {total:,} ({where}).", soft_wrap=True)
    console.print(f"It ends because: {result.ended}.", soft_wrap=True)


def _say_difference(console: Console, difference: Difference) -> None:
    call = difference.call
    place = f"line {call.line}, call {call.n}, {call.name} at {call.at_s:.6f} s"
    console.print(f"[red]The first difference[/red] is at {place}: {difference.what}", soft_wrap=True)
    for name, words in (("recorded", difference.recorded), ("replayed", difference.replayed)):
        console.print(f"  {name}:", markup=False)
        for word in words[:EFFECTS_SHOWN] or ("nothing",):
            console.print(f"    {word}", markup=False, soft_wrap=True)
        if len(words) > EFFECTS_SHOWN:
            console.print(f"    … and {len(words) - EFFECTS_SHOWN} more")
