"""Shell: the decode worker's process: `python -m decode_worker.server --config FILE`."""

from __future__ import annotations

from decode_worker.worker import make_machine
from halfmoon.types import Role
from node.main import serve

if __name__ == "__main__":
    serve(Role.DECODE, make_machine)
