"""Pure: when an idle worker is given a request of which its own model is sure that it will be late.

A prediction that can be vouched for refuses on an idle worker as anywhere: nobody is ahead of the request, so that it
is the model alone that says no, and the client has set the limit. But only work gives samples. A model that has gone
wrong, and sends everybody away, would never be corrected; so now and then one of those requests is let in, as a probe.
"""

from __future__ import annotations

from dataclasses import dataclass

from halfmoon.types import RequestId

LOAD_MAX = 100.0
"""Who is predicted to need more than so many times its limit is no probe. A model a hundred times too slow still lets
in everybody whose limit its worker can keep; a limit below that is nearly always one that no worker could keep (a
millisecond for a prompt of a second). A tenth would be too near: what goes wrong at all, a start on a cold machine or a
profile of another one, is often wrong by more, and then nobody would correct it."""


@dataclass(kw_only=True)
class Probes:
    """One policy's on one worker.

    Args:
        refused: that might have been one, since the last.
    """

    request_id: RequestId | None = None
    at_s: float | None = None
    refused: int = 0

    def ago_s(self, now_s: float) -> float | None:
        """Since the last; None: there was none."""
        return None if self.at_s is None else now_s - self.at_s

    def due(self, request_id: RequestId, now_s: float, probe_s: float, one_in: int) -> bool:
        """Whether this request may be the next: at most one in `probe_s`, and one of `one_in`, so that the limits of
        those that come seldom hold as well. Who is one already stays one, when it is judged once more."""
        if request_id == self.request_id:
            return True
        return self.refused + 1 >= one_in and self.due_in_s(now_s, probe_s) == 0.0

    def due_in_s(self, now_s: float, probe_s: float) -> float:
        return 0.0 if self.at_s is None else max(0.0, self.at_s + probe_s - now_s)

    def see(self, request_id: RequestId, now_s: float, *, let_in: bool) -> None:
        """One was let in, or refused."""
        if not let_in:
            self.refused += 1
        elif request_id != self.request_id:
            self.request_id, self.at_s, self.refused = request_id, now_s, 0
