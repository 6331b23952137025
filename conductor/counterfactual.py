"""Pure: a recorded run judged anew: which verdicts were wrong, by policy, and which term misled them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from conductor.admission_config import Mode
from conductor.blame import Blame, blame
from conductor.hindsight import Hindsight, Sureness, Truth
from conductor.past import Recorded


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One policy's verdicts against what happened, or would have.

    Args:
        false_rejections: of `rejected`, those that would have kept their limits.
        false_acceptances: of `accepted`, those that missed them.
        open_rejections, open_acceptances: of which nobody can say (too close to a limit; the client left).
    """

    policy: str
    mode: Mode
    accepted: int
    rejected: int
    false_acceptances: int
    false_rejections: int
    open_acceptances: int
    open_rejections: int


@dataclass(frozen=True, kw_only=True)
class Counterfactual:
    """`false_rejected`: ids of requests that the recorded run rejected and that would have kept their limits."""

    policies: tuple[Judged, ...]
    sureness: Sureness
    blame: Blame
    judged: int
    unjudged: int
    false_rejected: tuple[str, ...]


def counterfactual(run: Recorded, policies: Iterable[str] = ()) -> Counterfactual:
    """Judge a run's verdicts.

    A policy that was only recorded in shadow is judged by the load that the enforced one left it: what it accepts
    besides would have been load as well.

    Args:
        policies: names; none: all that have verdicts.
    """
    hindsight = Hindsight(run)
    truths = {past.request_id: hindsight.truth(past) for past in run.pasts}
    wanted = tuple(policies) or tuple(dict.fromkeys(v.policy for past in run.pasts for v in past.verdicts))
    return Counterfactual(
        policies=tuple(judged for name in wanted if (judged := _judged(name, run, truths)) is not None),
        sureness=hindsight.sureness,
        blame=blame(run),
        judged=len(run.pasts),
        unjudged=run.unjudged,
        false_rejected=tuple(p.request_id for p in run.pasts if p.rejected and truths[p.request_id].met),
    )


def _judged(name: str, run: Recorded, truths: dict[str, Truth]) -> Judged | None:
    """One policy; None: the run has no verdict of it. Who is refused at any stage is rejected."""
    mode = Mode.OFF
    accepted: list[bool | None] = []
    rejected: list[bool | None] = []
    for past in run.pasts:
        verdicts = [verdict for verdict in past.verdicts if verdict.policy == name]
        if verdicts:
            mode = verdicts[-1].mode
            told = accepted if all(verdict.accept for verdict in verdicts) else rejected
            told.append(truths[past.request_id].met)
    if not accepted and not rejected:
        return None
    return Judged(
        policy=name,
        mode=mode,
        accepted=len(accepted),
        rejected=len(rejected),
        false_acceptances=accepted.count(False),
        false_rejections=rejected.count(True),
        open_acceptances=accepted.count(None),
        open_rejections=rejected.count(None),
    )
