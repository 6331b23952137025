"""Shell: settings: a YAML file, the environment and explicit overrides -> frozen dataclasses beside their owners.

    sections = gather(path, environ=os.environ, overrides={"node.device_blocks": 512})
    config = load(NodeConfig, sections.get("node", {}), path="node")

The environment's HALFMOON_<SECTION>__<KEY> (deeper levels: more `__`) beats the file; overrides beat both. Unknown
keys are refused with the nearest known name, types are checked, ranges are each dataclass's own __post_init__.
This is the only place where the environment is read.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from halfmoon.errors import ConfigError, InvalidRequest

ENV_PREFIX = "HALFMOON_"
FILE_BYTES_MAX = 1 << 20  # a configuration, not a data set: refuses a wrong path early
PLAIN_NAMES = tuple(ENV_PREFIX + word for word in ("CACHE", "TRACES", "OPERATORS", "ADDRESS", "ADMIN"))
"""Variables that are no section's key; who reads them stands below. Others with this prefix are refused."""

SECRET: dict[str, Any] = {"secret": True}
"""`field(metadata=SECRET)`: `effective` prints the field masked."""

Section = TypeVar("Section")
Tree = dict[str, Any]


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that is there twice is an error, not the later of the two."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in counts.items():
            if count > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Text(str):
    """A value from the environment: its type is decided by the field that it fills."""


def cache_directory() -> Path:
    """Where converted models, built operators and local clusters' run directories live: HALFMOON_CACHE or ~/.cache."""
    return Path(os.environ.get("HALFMOON_CACHE") or Path.home() / ".cache" / "halfmoon").expanduser()


def traces_directory() -> Path | None:
    """HALFMOON_TRACES: a folder of workload traces; None: it is not set."""
    text = os.environ.get("HALFMOON_TRACES")
    return Path(text).expanduser() if text else None


def operators_choice() -> str:
    """HALFMOON_OPERATORS: "" takes the best that works here; "torch" or "cpp" forces one."""
    return os.environ.get("HALFMOON_OPERATORS", "")


def client_address() -> str:
    """HALFMOON_ADDRESS: the client API that commands talk to; empty: it is not set."""
    return os.environ.get("HALFMOON_ADDRESS", "")


def admin_address() -> str:
    """HALFMOON_ADMIN: the admin API that commands talk to; empty: as the cluster tells it."""
    return os.environ.get("HALFMOON_ADMIN", "")


def compiler() -> str:
    """CXX, as torch's extension builder reads it, or c++."""
    return os.environ.get("CXX", "c++")


def export(**values: str) -> None:
    """Set variables for libraries that read them when they load (OpenMP), unless the operator has set them."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


def environment_of_child() -> dict[str, str]:
    """The environment without settings: a supervised process has its own from its file, and refuses others'."""
    return {name: text for name, text in os.environ.items() if not _is_setting(name)}


def _is_setting(name: str) -> bool:
    return name.startswith(ENV_PREFIX) and "__" in name


def _require_known_name(name: str, text: str) -> None:
    """One underscore too few, or a slip in a name, would otherwise go unseen."""
    if not name.startswith(ENV_PREFIX) or _is_setting(name) or name in PLAIN_NAMES:
        return
    close = difflib.get_close_matches(name, PLAIN_NAMES, n=1, cutoff=0.85)
    meant = close[0] if close else f"{ENV_PREFIX}CLUSTER__{name[len(ENV_PREFIX) :]}"
    expected = f"a known name: {', '.join(PLAIN_NAMES)}, or {ENV_PREFIX}SECTION__KEY; did you mean {meant}?"
    raise ConfigError(key=name, value=text, expected=expected)


def gather(
    path: Path | str | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Tree:
    """The merged settings as nested dicts, later sources winning: file, environment, overrides (dotted keys).

    Args:
        environ: None: the process's environment.

    Raises:
        ConfigError: a file that cannot be read as a YAML mapping, a key under a value, or a variable HALFMOON_… that
            nothing reads.
    """
    tree: Tree = {} if path is None else _read_file(Path(path))
    for name, text in sorted((os.environ if environ is None else environ).items()):
        _require_known_name(name, text)
        if _is_setting(name):
            _put(tree, [part.lower() for part in name[len(ENV_PREFIX) :].split("__")], _Text(text), name)
    for key, value in (overrides or {}).items():
        _put(tree, key.split("."), value, key)
    return tree


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """["node.threads=2"] -> {"node.threads": "2"}, to be typed by the field that each fills.

    Raises:
        ConfigError: a text without a key.
    """
    overrides = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ConfigError(key="--set", value=text, expected="section.key=value")
        overrides[key.strip()] = _Text(value)
    return overrides


def load(section_class: type[Section], mapping: Mapping[str, Any], *, path: str = "") -> Section:
    """Build the frozen dataclass `section_class` from `mapping`; absent keys take the class's defaults.

    Args:
        path: the section's name, for messages.

    Raises:
        ConfigError: an unknown, missing, ill-typed or out-of-range key.
    """
    assert dataclasses.is_dataclass(section_class)
    known = {f.name: f for f in dataclasses.fields(section_class) if f.init}
    for key in mapping:
        if key not in known:
            raise ConfigError(key=_join(path, key), value=mapping[key], expected=_nearest(str(key), known))
    hints = get_type_hints(section_class)
    values = {name: _convert(hints[name], value, _join(path, name)) for name, value in mapping.items()}
    for name, spec in known.items():
        if name not in values and spec.default is spec.default_factory is dataclasses.MISSING:
            raise ConfigError(key=_join(path, name), value=None, expected=f"a value ({_describe(hints[name])})")
    try:
        return section_class(**values)
    except ConfigError as error:  # its own __post_init__, which does not know where it stands
        own = f"{path.rpartition('.')[2]}."  # the section's own name, which its owner may have said already
        key = _join(path, error.key.removeprefix(own) if path else error.key)
        raise ConfigError(key=key, value=error.value, expected=error.expected) from error
    except InvalidRequest as error:  # a value shared with the API says what it would say to a client
        raise ConfigError(key=_join(path, error.field), value=error.value, expected=error.limit) from error


def require_known(tree: Mapping[str, Any], sections: tuple[str, ...]) -> None:
    """Refuse sections that nobody owns.

    Raises:
        ConfigError: naming the nearest known section.
    """
    for key in tree:
        if key not in sections:
            raise ConfigError(key=key, value=tree[key], expected=_nearest(key, sections))


def effective(config: Any) -> str:
    """The configuration as YAML that `load` reads back, secrets masked."""
    return yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True, width=120)


# ---- sources -------------------------------------------------------------------------------------------------------


def _read_file(path: Path) -> Tree:
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
        tree = yaml.load(data, _UniqueKeys) if len(data) <= FILE_BYTES_MAX else None
    except OSError as error:
        raise ConfigError(key="--config", value=str(path), expected=f"a readable file ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise ConfigError(key="--config", value=str(path), expected=f"YAML: {_yaml_problem(error)}") from error
    if tree is None and not data.strip():
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(key="--config", value=str(path), expected="a YAML mapping of at most 1 MiB")
    return tree


def _yaml_problem(error: yaml.YAMLError) -> str:
    """The parser's finding without its excerpt: line and column (from 1) and what was wrong."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or not problem:
        return " ".join(str(error).split())
    context = getattr(error, "context", None)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" + (f" ({context})" if context else "")


def _put(tree: Tree, parts: list[str], value: Any, name: str) -> None:
    for part in parts[:-1]:
        node = tree.setdefault(part, {})
        if node is None:
            node = tree[part] = {}
        if not isinstance(node, dict):
            raise ConfigError(key=name, value=value, expected=f"a key below a mapping, and {part!r} is a value")
        tree = node
    tree[parts[-1]] = value


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _nearest(key: str, known: Any) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"a known key; did you mean {close[0]!r}?" if close else f"a known key: {', '.join(known)}"


# ---- types ---------------------------------------------------------------------------------------------------------


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as `hint`, or ConfigError naming `path`."""
    if isinstance(value, _Text):
        value = _from_text(hint, value, path)
    hint = getattr(hint, "__supertype__", hint)
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return _convert_union(hint, value, path)
    if origin is tuple:
        return _convert_tuple(hint, value, path)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _convert_mapping(hint, value, path)
    return _convert_single(hint, value, path)


def _convert_single(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if value is None or isinstance(value, dict):
            return load(hint, value or {}, path=path)
    elif issubclass(hint, enum.Enum):
        return _convert_enum(hint, value, path)
    elif hint is Path and isinstance(value, str | Path):
        return Path(value)
    elif hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        return _convert_float(value, path)
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(key=path, value=value, expected=_describe(hint))


def _convert_float(value: float | str, path: str) -> float:
    """Text too: YAML 1.1 reads 1e-3, which has no point, as text."""
    try:
        return float(value)
    except ValueError as error:
        raise ConfigError(key=path, value=value, expected="a number") from error


def _convert_enum(hint: type[enum.Enum], value: Any, path: str) -> Any:
    for member in hint:
        if value is member or value == member.value or value == member.name:
            return member
    raise ConfigError(key=path, value=value, expected=_describe(hint))


def _convert_union(hint: Any, value: Any, path: str) -> Any:
    arms = get_args(hint)
    if value is None and NoneType in arms:
        return None
    arms = tuple(arm for arm in arms if arm is not NoneType)
    for arm in arms[:-1]:
        try:
            return _convert(arm, value, path)
        except ConfigError:
            continue
    return _convert(arms[-1], value, path)


def _convert_tuple(hint: Any, value: Any, path: str) -> tuple[Any, ...]:
    inner = get_args(hint)[0]
    if not isinstance(value, list | tuple):
        raise ConfigError(key=path, value=value, expected=_describe(hint))
    return tuple(_convert(inner, item, f"{path}[{index}]") for index, item in enumerate(value))


def _convert_mapping(hint: Any, value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(key=path, value=value, expected=_describe(hint))
    inner = get_args(hint)[1]
    return {str(key): _convert(inner, item, _join(path, key)) for key, item in value.items()}


def _from_text(hint: Any, text: str, path: str) -> Any:
    """Environment text: kept as it is where a string is wanted, read as YAML otherwise."""
    arms = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    wants_text = any(_takes_text(getattr(arm, "__supertype__", arm)) for arm in arms)
    if wants_text and not (NoneType in arms and text in ("", "null")):
        return str(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(key=path, value=str(text), expected=_describe(hint)) from error


def _takes_text(arm: Any) -> bool:
    return isinstance(arm, type) and issubclass(arm, str | Path) and not issubclass(arm, enum.Enum)


def _describe(hint: Any) -> str:
    hint = getattr(hint, "__supertype__", hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return f"one of {', '.join(str(member.value) for member in hint)}"
    words = {int: "an integer", float: "a number", str: "a string", bool: "true or false", Path: "a path"}
    if hint in words:
        return words[hint]
    if get_origin(hint) is tuple:
        return f"a list, each {_describe(get_args(hint)[0])}"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join("nothing" if arm is NoneType else _describe(arm) for arm in get_args(hint))
    return "a mapping"


# ---- printing ------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain_field(f, getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, str | Path):
        return re.sub(r"(://[^:/@]*:)[^@/]+@", r"\1***@", str(value))  # a URL's password
    return value


def _plain_field(spec: dataclasses.Field[Any], value: Any) -> Any:
    if spec.metadata.get("secret") and value not in (None, "", (), {}):
        return "***"
    return _plain(value)
