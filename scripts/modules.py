"""Shell: which modules there are, and which are pure: `python -m scripts.modules` prints the pure ones."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = (
    "benchmarks", "cli", "cluster", "conductor", "core", "coupled_worker", "decode_worker", "engine", "halfmoon",
    "kv_store", "node", "prefill_worker", "report", "scripts", "service", "simulator", "workload",
)  # fmt: skip


def modules() -> list[Path]:
    """Every module of ours, generated stubs and empty package files left out."""
    paths = (path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")))
    return [p for p in paths if "v1" not in p.parts and p.stat().st_size > 0]


def first_line(path: Path) -> str:
    """The first line of the module's docstring; empty if there is none."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]


def is_pure(path: Path) -> bool:
    return first_line(path).startswith("Pure:")


if __name__ == "__main__":
    print("\n".join(str(p.relative_to(ROOT)) for p in modules() if is_pure(p)))
