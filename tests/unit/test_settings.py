"""Settings: file, environment and overrides become one frozen dataclass, or an error that names the key."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from halfmoon.errors import ConfigError
from halfmoon.types import NodeId, Role
from service.settings import SECRET, effective, gather, load, require_known


@dataclass(frozen=True, kw_only=True)
class Inner:
    depth: int = 1
    ratio: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Section:
    name: NodeId
    role: Role = Role.PREFILL
    cores: tuple[int, ...] = ()
    gib: float | None = None
    pin: bool = False
    inner: Inner = Inner()
    key: str = field(default="", metadata=SECRET)
    registry: str = ""
    weights: dict[str, float] = field(default_factory=dict)
    path: Path = Path("/tmp")

    def __post_init__(self) -> None:
        if self.gib is not None and self.gib <= 0:
            raise ConfigError(key="gib", value=self.gib, expected="more than 0")


def build(mapping: dict[str, object]) -> Section:
    return load(Section, mapping, path="node")


def test_later_sources_win_and_every_type_arrives(tmp_path: Path) -> None:
    file = tmp_path / "halfmoon.yaml"
    file.write_text("node: {name: a, cores: [0, 1], inner: {depth: 2}, gib: 1, pin: no}\nother: {}\n")
    environ = {
        "HALFMOON_NODE__NAME": "123",
        "HALFMOON_NODE__INNER__RATIO": "1e-1",
        "HALFMOON_NODE__ROLE": "decode",
        "HALFMOON_CACHE": "/not/a/setting",
        "HOME": "/root",
    }
    tree = gather(file, environ=environ, overrides={"node.pin": True, "node.cores": (3,)})
    config = load(Section, tree["node"], path="node")
    assert config == Section(
        name=NodeId("123"), role=Role.DECODE, cores=(3,), gib=1.0, pin=True, inner=Inner(depth=2, ratio=0.1)
    )


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"nam": "a"}, "config node.nam: got 'a'; expected a known key; did you mean 'name'?"),
        ({}, "config node.name: got None; expected a value (a string)"),
        ({"name": 5}, "config node.name: got 5; expected a string"),
        ({"name": "a", "pin": 1}, "config node.pin: got 1; expected true or false"),
        ({"name": "a", "role": "cook"}, "config node.role: got 'cook'; expected one of prefill, decode, coupled"),
        ({"name": "a", "cores": [0, "x"]}, "config node.cores[1]: got 'x'; expected an integer"),
        ({"name": "a", "cores": 3}, "config node.cores: got 3; expected a list, each an integer"),
        ({"name": "a", "inner": {"depth": True}}, "config node.inner.depth: got True; expected an integer"),
        ({"name": "a", "inner": {"deep": 1}}, "config node.inner.deep: got 1; expected a known key; did you mean"),
        ({"name": "a", "gib": -1}, "config node.gib: got -1.0; expected more than 0"),
        ({"name": "a", "weights": {"x": "y"}}, "config node.weights.x: got 'y'; expected a number"),
    ],
)
def test_wrong_settings_are_refused_by_name(mapping: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        build(mapping)
    assert str(refusal.value).startswith(message)


def test_effective_reads_back_and_shows_no_secret() -> None:
    config = build({"name": "a", "key": "hunter2", "registry": "redis://u:hunter2@host:6379/0", "weights": {"x": 1}})
    text = effective(config)
    assert "hunter2" not in text
    assert "redis://u:***@host:6379/0" in text
    mapping = yaml.safe_load(text)
    assert build({**mapping, "key": "hunter2", "registry": config.registry}) == config


def test_unknown_sections_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'node'"):
        require_known({"noed": {}}, ("node", "prefill"))


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1", "x" * (2 << 20)])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match="config --config"):
        gather(file, environ={})
    with pytest.raises(ConfigError, match="a readable file"):
        gather(tmp_path / "absent.yaml", environ={})


def test_a_key_below_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="HALFMOON_NODE__NAME__X"):
        gather(environ={"HALFMOON_NODE__NAME": "a", "HALFMOON_NODE__NAME__X": "b"})
    file = tmp_path / "empty.yaml"
    file.write_text("\n")
    assert gather(file, environ={}) == {}


def test_a_variable_that_nothing_reads_is_refused_with_a_hint() -> None:
    with pytest.raises(
        ConfigError, match=r"config HALFMOON_PREFILL: got '3'; expected .*did you mean HALFMOON_CLUSTER__PREFILL"
    ):
        gather(environ={"HALFMOON_PREFILL": "3"})
    with pytest.raises(ConfigError, match="did you mean HALFMOON_CACHE"):
        gather(environ={"HALFMOON_CACH": "/tmp"})
    assert gather(environ={"HALFMOON_ADDRESS": "h:1", "HALFMOON_CACHE": "/tmp", "HALFMOONS": "2"}) == {}


def test_bad_yaml_is_told_by_line_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "up.yaml"
    path.write_text("cluster:\n  prefill: [1\n  decode: 2\n")
    with pytest.raises(ConfigError) as refusal:
        gather(path)
    assert str(refusal.value) == (
        f"config --config: got {str(path)!r}; expected YAML: line 3, column 9: expected ',' or ']', but got ':' "
        "(while parsing a flow sequence)"
    )
