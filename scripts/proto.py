"""Generate halfmoon/v1 from proto/, so that the SDK installs beside protobuf 5, 6 and 7; `--check` proves it fresh.

protoc's Python output pins the runtime's major version by a check at import; the code itself needs no more than the
descriptor pool and the builder, which have been stable since protobuf 4.21. So the check lines are removed. The same
goes for grpcio's version check in the service stubs, and for its newer way to register methods.
"""

from __future__ import annotations

import re
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("halfmoon/v1")


def generate(out: Path) -> dict[str, str]:
    """File name -> content of every stub that proto/ gives."""
    sources = sorted(str(p) for p in (ROOT / "proto" / PACKAGE).glob("*.proto"))
    args = [
        "protoc",
        f"-I{ROOT / 'proto'}",
        f"-I{files('grpc_tools') / '_proto'}",
        f"--python_out={out}",
        f"--pyi_out={out}",
        f"--grpc_python_out={out}",
        *sources,
    ]
    if protoc.main(args) != 0:
        raise SystemExit("protoc failed")
    stubs = {}
    for path in sorted((out / PACKAGE).iterdir()):
        text = unpin(path.read_text()) if path.suffix == ".py" else path.read_text()
        if path.name.endswith("_pb2_grpc.py") and "class " not in text:
            continue  # a file of messages only needs no service stub
        stubs[path.name] = text
    stubs["__init__.py"] = '"""Generated from proto/halfmoon/v1 by `make proto`; do not edit."""\n'
    return stubs


def unpin(text: str) -> str:
    text = re.sub(r"^from google\.protobuf import runtime_version as .*\n", "", text, flags=re.M)
    text = re.sub(r"^_runtime_version\.ValidateProtobufRuntimeVersion\((?:.|\n)*?^\)\n", "", text, flags=re.M)
    text = re.sub(r"^# Protobuf Python Version: .*\n", "", text, flags=re.M)
    text = re.sub(r"^GRPC_GENERATED_VERSION = (?:.|\n)*?(?=^class |^def )", "", text, flags=re.M)
    text = text.replace(",\n                _registered_method=True)", ")")  # unknown to grpcio before 1.63
    text = re.sub(r"^            _registered_method=True\)\n", "            )\n", text, flags=re.M)
    text = re.sub(r"^    server\.add_registered_method_handlers\(.*\n", "", text, flags=re.M)
    return text.replace("import warnings\n", "")


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        stubs = generate(Path(scratch))
    target = ROOT / PACKAGE
    if "--check" in sys.argv[1:]:
        committed = {p.name: p.read_text() for p in target.iterdir() if p.is_file()}
        stale = sorted(name for name in stubs.keys() | committed.keys() if stubs.get(name) != committed.get(name))
        if stale:
            raise SystemExit(f"stubs differ from proto/ (run `make proto`): {', '.join(stale)}")
        return
    for old in target.iterdir():
        if old.is_file():
            old.unlink()
    for name, text in stubs.items():
        (target / name).write_text(text)


if __name__ == "__main__":
    main()
