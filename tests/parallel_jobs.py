"""Work for other processes, found there by its name."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from halfmoon.errors import InvalidRequest


def work(job: str, progress: Callable[[float], None]) -> str:
    """Ends as the job says."""
    progress(0.5)
    if job == "raise":
        raise ZeroDivisionError("a bug")
    if job == "refuse":
        raise InvalidRequest(field="speedup", value=-1, limit="above 0")
    if job == "exit":
        os._exit(7)
    if job == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return job.upper()
