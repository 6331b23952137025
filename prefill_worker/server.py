"""Shell: the prefill worker's process: `python -m prefill_worker.server --config FILE`."""

from __future__ import annotations

from halfmoon.types import Role
from node.main import serve
from prefill_worker.worker import make_machine

if __name__ == "__main__":
    serve(Role.PREFILL, make_machine)
