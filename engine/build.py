"""Shell: compiles the C++ operators once per (source, CPU, torch) and loads them.

`python -m engine.build` builds ahead of the first engine and prints which operators will run.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from service.settings import cache_directory, compiler

log = logging.getLogger(__name__)

SOURCES = ("ops.cpp", "linear.cpp", "attention.cpp", "elementwise.cpp", "roofline.cpp")
HEADERS = ("kernels.h", "tile.h", "simd.h")
CFLAGS = ("-O3", "-march=native", "-Wall", "-Wextra", "-Wno-unknown-pragmas")
BUILD_S_MAX = 600.0  # a cold build takes about 30 s on one free core; another process may be at it on a busy one


class BuildError(RuntimeError):
    """The operators cannot be compiled or loaded here; the message says why."""


def load_library() -> Path:
    """Load `torch.ops.halfmoon` into this process, building it first if no process has yet. Returns the library.

    Raises:
        BuildError: no compiler, or a compilation or load that failed.
    """
    library = _library_path()
    if not library.exists():
        with _lock(library.parent.with_suffix(".lock")):
            if not library.exists():
                _build(library)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise BuildError(f"{library} does not load: {error}") from error
    return library


def _library_path() -> Path:
    return cache_directory() / "ops" / _key() / "halfmoon_ops.so"


@functools.cache
def _key() -> str:
    """Changes with the sources, torch and the CPU; not with the compiler, which may be gone when the library runs."""
    digest = hashlib.blake2b(digest_size=12)
    here = Path(__file__).parent
    for name in SOURCES + HEADERS:
        digest.update((here / name).read_bytes())
    for part in (torch.__version__, " ".join(CFLAGS), cpu_flags()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


@functools.cache
def cpu_flags() -> str:
    """The instruction sets of this CPU, as Linux names them; elsewhere the architecture and processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line.partition(":")[2].strip()
    return f"{platform.machine()} {platform.processor()}"


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the file lock `path`; a holder that dies lets it go. Raises BuildError after BUILD_S_MAX."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline_s = time.monotonic() + BUILD_S_MAX
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise BuildError(f"another process has held {path} for {BUILD_S_MAX:.0f} s") from None
                time.sleep(0.1)
        yield


def _build(library: Path) -> None:
    """Compile into a directory of our own beside `library`, then move the result into place."""
    from torch.utils import cpp_extension  # slow to import, and needed here alone

    if shutil.which(compiler()) is None:
        raise BuildError(f"no C++ compiler: {compiler()} is not on the PATH")
    began_s = time.monotonic()
    library.parent.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory(dir=library.parent) as directory:
        try:
            cpp_extension.load(
                name="halfmoon_ops",
                sources=[str(here / name) for name in SOURCES],
                extra_cflags=list(CFLAGS),
                extra_include_paths=[str(here)],
                build_directory=directory,
                is_python_module=False,
                is_standalone=False,
            )
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            raise BuildError(f"the operators do not compile: {error}") from error
        os.replace(Path(directory) / library.name, library)
    log.info("built the C++ operators in %.0f s: %s", time.monotonic() - began_s, library)


def main() -> None:
    """Build, and print what an engine on this machine's CPU will run."""
    from engine.operators import select_operators  # imports this module

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(f"operators on cpu: {select_operators('cpu', torch.bfloat16).name}")


if __name__ == "__main__":
    main()
