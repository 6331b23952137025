"""Shell: the coupled worker's process: `python -m coupled_worker.server --config FILE`."""

from __future__ import annotations

from coupled_worker.worker import make_machine
from halfmoon.types import Role
from node.main import serve

if __name__ == "__main__":
    serve(Role.COUPLED, make_machine)
