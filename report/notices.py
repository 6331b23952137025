"""Pure: what must be said beside a run's figures, so that nobody takes them for more than they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

SKIPPED, FIRST_SKIPPED = "lines skipped", "first lines skipped"
"""Settings of a run whose trace had malformed lines: how many, and what is wrong with the first ones."""


def notices(settings: Mapping[str, object]) -> list[str]:
    """Sentences on one run: lines of its trace that were left out, and that it is one draw of a seed."""
    said = left_out_of([settings])
    if "seed" in settings:
        drawn = f"One seed, {settings['seed']}: another draws other noise and beliefs"
        said.append(f"{drawn}; --seeds 5 shows how far such runs differ.")
    return said


def left_out_of(runs: Iterable[Mapping[str, object]]) -> list[str]:
    """A sentence for each trace of which lines were left out, from the settings of its runs."""
    found = [s for s in runs if SKIPPED in s]
    return sorted({left_out(cast(int, s[SKIPPED]), cast(Sequence[str], s[FIRST_SKIPPED])) for s in found})


def left_out(skipped: int, first: Sequence[str]) -> str:
    """A sentence, of what `Trace` counts and tells."""
    lines = "1 malformed line was" if skipped == 1 else f"{skipped:,} malformed lines were"
    which = "" if skipped == len(first) else "; the first" if len(first) == 1 else f"; the first {len(first)}"
    return f"{lines} left out{which}: {'; '.join(first)}"
