"""The operators are built once: whoever comes second waits, within a deadline, and loads what the first built."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from engine import build


def test_a_second_builder_gives_up_at_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "BUILD_S_MAX", 0.2)
    with (tmp_path / "x.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(build.BuildError, match="another process has held"), build._lock(tmp_path / "x.lock"):
            pytest.fail("two holders")
    with build._lock(tmp_path / "x.lock"):  # a closed file, as a dead process leaves it, holds nothing
        pass


def test_the_second_builder_finds_what_the_first_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFMOON_CACHE", str(tmp_path))
    library = build._library_path()
    built: list[Path] = []

    def build_once(path: Path) -> None:
        built.append(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not a library")

    monkeypatch.setattr(build, "_build", build_once)
    for _ in range(2):
        with pytest.raises(build.BuildError, match="does not load"):
            build.load_library()
    assert built == [library]


def test_the_name_changes_with_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = build._key()
    monkeypatch.setattr(build, "cpu_flags", lambda: "sse2")
    build._key.cache_clear()
    try:
        assert build._key() != ours
    finally:
        build._key.cache_clear()


def test_every_source_in_the_folder_is_part_of_the_name() -> None:
    folder = Path(build.__file__).parent
    assert {path.name for path in folder.glob("*.cpp")} == set(build.SOURCES)
    assert {path.name for path in folder.glob("*.h")} == set(build.HEADERS)
