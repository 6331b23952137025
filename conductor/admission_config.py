"""Pure: the settings of admission: which policies judge, which are obeyed, and what they may put off."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, fields

from halfmoon.errors import ConfigError


class Mode(enum.StrEnum):
    OFF = "off"
    SHADOW = "shadow"  # judged and recorded, never obeyed
    ENFORCE = "enforce"


class Reserve(enum.StrEnum):
    """When decode room is asked for."""

    POLICY = "policy"  # as the enforced policy says; of several, the earliest
    BEFORE = "before"  # the prefill is not commanded before the room is there
    WITH = "with"  # both are commanded at once; before, where room is short
    DURING = "during"  # with the prefill where there is room, else towards its end
    AFTER = "after"  # when the prefill has ended: the decode side is judged only then


@dataclass(frozen=True, kw_only=True)
class AdmissionConfig:
    """Checked when built. Durations in seconds.

    Args:
        baseline, early, predictive, forecast: the policies of `conductor.admission_policies`. `predictive` looks at
            every open request each time it judges.
        reserve: when decode room is asked for.
        defer: a request that is refused waits instead, and is judged again as room is freed, for as long as it can
            still meet its TTFT.
        slack_share: of the TTFT limit, within which a deferred request must be able to have its first token.
        hold_first_share: of the TTFT limit; until then the front end may keep a first token until the second is there.
            It does so for requests with limits on both, where the second may be late: decode room was refused, or is
            asked for only towards the end of the prefill or after it, or the hand-over takes more than half of the TBT
            limit, as predicted, or as one of the last 32 did. 0: first tokens are shown as they come.
        defer_s_max: how long a request without a TTFT limit is deferred.
        deferred_max: requests deferred at once; further ones are refused as they come.
        backfill: how many more are tried each time, when one whose turn it is does not fit.
        size_fairness: how chances are dealt out to requests of different size (conductor.shares): at 1 every request
            has the same, at 0.5 every token of KV, at 0 large ones have less.
        patience_s: who has been deferred for so long goes before all who have not: nobody starves.
        priority_step_s: one step of priority makes a deferred request this much older.
        class_headroom: of every limit, kept free from requests of each priority below 0; at most half of it in all.
            Waiting `priority_step_s` lifts a request by one step.
        probe_s: an idle worker that is sure to be late is given a request all the same, at most once in so long, so
            that a cost model that has gone wrong is corrected.
        probe_one_in: and at most one of so many that it would be late with.
        sigmas: `forecast` keeps so many standard deviations of the KV it expects free.
        horizon_s: `forecast` counts on no more of the room that running requests will leave than what they leave in
            this time.

    Raises:
        ConfigError: naming the key, the value and what was expected.
    """

    baseline: Mode = Mode.SHADOW
    early: Mode = Mode.SHADOW
    predictive: Mode = Mode.OFF
    forecast: Mode = Mode.ENFORCE
    reserve: Reserve = Reserve.POLICY
    defer: bool = True
    slack_share: float = 0.8
    hold_first_share: float = 0.95
    defer_s_max: float = 600.0
    deferred_max: int = 1024
    backfill: int = 8
    size_fairness: float = 0.22
    patience_s: float = 30.0
    priority_step_s: float = 10.0
    class_headroom: float = 0.05
    probe_s: float = 10.0
    probe_one_in: int = 10
    sigmas: float = 0.5
    horizon_s: float = 4.0

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "float" and not (math.isfinite(value) and value >= 0.0):
                self._refuse(f.name, "a finite number, 0 or more")
        for name in ("slack_share", "hold_first_share", "class_headroom", "size_fairness"):
            if getattr(self, name) > 1.0:
                self._refuse(name, "a share, at most 1")
        for name in ("priority_step_s", "defer_s_max"):
            if getattr(self, name) == 0.0:
                self._refuse(name, "above 0")
        for name in ("deferred_max", "backfill"):
            if getattr(self, name) < 0:
                self._refuse(name, "0 or more")
        if self.probe_one_in < 1:
            self._refuse("probe_one_in", "1 or more")

    def _refuse(self, name: str, expected: str) -> None:
        raise ConfigError(key=name, value=getattr(self, name), expected=expected)
