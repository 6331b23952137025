"""Pure: what a user asks to simulate, the command line that asks it again, and sweeps over several of them.

An option's limits are checked here, under the option's own name, before any file is read; names of policies, hardware
and faults are checked by those who know them.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from typing import Any

from conductor.config import Fit
from halfmoon.errors import ConfigError
from service.settings import load, parse_overrides
from simulator.config import BELIEFS, TERMS, SimConfig

COMBINATIONS_MAX = 1000
"""Of one sweep: at a few seconds each, an hour on one core, and as many lines in a table as anybody reads."""

NODES_MAX = 1000  # of one role: ten times the clusters that the conductor is built for
SCALE_MAX = 1e6  # of speed and output lengths: beyond it times no longer differ
CHUNK_MIN = 16  # tokens: below it a coupled node's pass has hardly room for a prompt beside its sequences
TOKENS_MAX = 1_000_000_000

SHOWN_AS = {"slo_ttft_s": "slo_ttft", "slo_tbt_s": "slo_tbt", "jitter_s": "jitter"}
"""Field -> option: an option's unit stands in its help."""


FITS = tuple(fit.value for fit in Fit)


def shown(name: str) -> str:
    """A field as its option is written, without the dashes before it."""
    return SHOWN_AS.get(name, name).replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One simulation.

    Args:
        trace: a file, or the name of one where traces are kept.
        format: of the trace; "auto": told by its first line.
        requests: simulate the first so many; None: all.
        jitter_s: spread arrivals over this long; None: over 3 s where the trace has them in ticks of 3 s, else not.
        hardware: a preset's name or a YAML file.
        policy: of admission; "none" takes everything on.
        eviction: which cached blocks leave first.
        chunk: tokens of one pass of prefill and coupled nodes, as Hardware.with_chunk; None: as the preset has it.
        decode_room: KV tokens of one decode node; None: as the preset has it.
        link_scale, mfu_scale: links, and prefill passes, are so many times as fast as the preset's.
        hide_weights: Hardware.mixed_hides_weights of coupled nodes; None: as the preset has it.
        faults: as simulator.faults reads them: "crash=2,storm".
        belief_bias: each cost term is believed this share too high or too low, by a draw of the seed.
        belief: instead of that draw: every cost is believed this many times what it is ("1.2"); or the terms that are
            named ("prefill=10,queue=2"), the others being drawn. "queue" is the books of a prefill worker's queue.
        learn: the conductor is told what workers measure.
        fit: "online": beliefs are corrected by that. "frozen": they are a profile, trusted as they stand, for good.
        check: verify every invariant after every event.
        exact: take every decode step by itself, instead of many that change nothing at once.

    Raises:
        ConfigError: naming the option and its limit.
    """

    trace: str
    format: str = "auto"
    skip_bad: bool = False
    requests: int | None = None
    jitter_s: float | None = None
    speedup: float = 1.0
    output_scale: float = 1.0
    prefill: int = SimConfig.prefill
    decode: int = SimConfig.decode
    coupled: int = SimConfig.coupled
    hardware: str = "a800-llama-70b"
    chunk: int | None = None
    decode_room: int | None = None
    link_scale: float = 1.0
    mfu_scale: float = 1.0
    hide_weights: bool | None = None
    policy: str = SimConfig.admission
    placement: str = SimConfig.placement
    eviction: str = SimConfig.eviction
    slo_ttft_s: float = 30.0
    slo_tbt_s: float = 0.1
    faults: str = ""
    belief_bias: float = SimConfig.belief_bias
    belief: str = ""
    learn: bool = True
    fit: str = Fit.ONLINE.value
    seed: int = SimConfig.seed
    check: bool = False
    exact: bool = False

    def __post_init__(self) -> None:
        for name in ("speedup", "output_scale"):
            value = getattr(self, name)
            _require(0 < value <= SCALE_MAX, name, value, f"a number above 0, at most {SCALE_MAX:g}")
        for name in ("link_scale", "mfu_scale"):
            value = getattr(self, name)
            _require(0.001 <= value <= 1000, name, value, "0.001 to 1000 times the preset's")
        for name, least in (("chunk", CHUNK_MIN), ("decode_room", 1)):
            value = getattr(self, name)
            _require(value is None or least <= value <= TOKENS_MAX, name, value, f"{least} to {TOKENS_MAX:,} tokens")
        _require(
            self.decode_room is None or self.decode > 0, "decode_room", self.decode_room, "a decode node to have it"
        )
        for name in ("slo_ttft_s", "slo_tbt_s"):
            _require(0 < getattr(self, name) <= 1e6, name, getattr(self, name), "seconds, above 0 and at most 1e6")
        for name in ("prefill", "decode", "coupled"):
            _require(0 <= getattr(self, name) <= NODES_MAX, name, getattr(self, name), f"0 to {NODES_MAX} nodes")
        both = self.coupled or (self.prefill and self.decode)
        nodes = f"{self.prefill}P+{self.decode}D+{self.coupled}C"
        _require(bool(both), "prefill", nodes, "a prefill and a decode node, or a coupled one, at least")
        _require(self.requests is None or self.requests >= 1, "requests", self.requests, "at least 1, or all")
        _require(self.jitter_s is None or 0 <= self.jitter_s <= 3600, "jitter_s", self.jitter_s, "0 (off) to 3600 s")
        _require(0 <= self.belief_bias < 1, "belief_bias", self.belief_bias, "a share in [0, 1)")
        _require(self.fit in FITS, "fit", self.fit, f"one of {', '.join(FITS)}")
        beliefs(self.belief)
        _require(0 <= self.seed < 2**63, "seed", self.seed, "an integer in [0, 2^63)")

    @property
    def nodes(self) -> str:
        """As "8P+8D", "16C", "4P+4D+2C"."""
        counts = ((self.prefill, "P"), (self.decode, "D"), (self.coupled, "C"))
        return "+".join(f"{number}{letter}" for number, letter in counts if number)


def beliefs(text: str) -> dict[str, float]:
    """ "1.2" -> of every cost; "prefill=10,queue=2" -> of those terms; "" -> of none.

    Raises:
        ConfigError: a term that there is not, or twice; a factor that is none.
    """
    found: dict[str, float] = {}
    for part in text.split(",") if text else ():
        term, equals, number = part.partition("=") if "=" in part else ("", "", part)
        terms = (term.strip(),) if equals else TERMS
        factor = _number(number)
        known = f"0.01 to 100 times the truth, of all costs or by term ({', '.join(BELIEFS)}): 1.2, prefill=10,queue=2"
        _require(set(terms) <= set(BELIEFS) and found.keys().isdisjoint(terms), "belief", text, known)
        _require(0.01 <= factor <= 100, "belief", text, known)
        found |= dict.fromkeys(terms, factor)
    return found


def _number(text: str) -> float:
    """NaN: it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def command(scenario: Scenario, sweeps: Sequence[str] = ()) -> str:
    """The one line that runs it again: the nodes, policy and seed, and whatever else is not the default or swept."""
    always = ("trace", "prefill", "decode", "coupled", "speedup", "policy", "seed")
    words = ["halfmoon", "simulate"]
    varied = swept(sweeps)
    for spec in fields(scenario):
        value = getattr(scenario, spec.name)
        if spec.name in varied or (value == spec.default and spec.name not in always):
            continue
        option = shown(spec.name)
        words.append(f"--no-{option}" if value is False else f"--{option}")
        if not isinstance(value, bool):
            words.append(_text(value))
    return shlex.join([*words, *(word for text in sweeps for word in ("--sweep", text))])


def swept(texts: Sequence[str]) -> set[str]:
    """The fields that a sweep's texts vary. Raises ConfigError as `sweep` does."""
    return {name for name, _ in map(_axis, texts)}


def sweep(base: Scenario, texts: Sequence[str]) -> list[tuple[str, Scenario]]:
    """(label, scenario) for every combination of "name=value,value" over `base`; the last name varies fastest.

    Raises:
        ConfigError: a name that is no option, a value that it does not take, a name twice, too many combinations.
    """
    axes = [_axis(text) for text in texts]
    names = [name for name, _ in axes]
    for name in names:
        _require(names.count(name) == 1, "sweep", name, "every option in one --sweep only")
    number = 1
    for _, values in axes:
        number *= len(values)
    _require(number <= COMBINATIONS_MAX, "sweep", f"{number} combinations", f"at most {COMBINATIONS_MAX}")
    return [_combined(base, dict(zip(names, values, strict=True))) for values in product(*(v for _, v in axes))]


def slug(number: int, label: str) -> str:
    """A folder's name for the combination: told apart by its number, recognised by its label."""
    return f"{number:03d}-" + re.sub(r"[^\w.+-]+", "-", label)[:80].strip("-")


def scenario(given: Mapping[str, Any], asked_by: str = "simulate") -> Scenario:
    """From a command's options; those that are None take their defaults.

    Raises:
        ConfigError: naming the option and its limit.
    """
    return _loaded({k: v for k, v in given.items() if v is not None}, asked_by)


def _loaded(fields_: Mapping[str, Any], asked_by: str) -> Scenario:
    try:
        return load(Scenario, fields_, path=asked_by)
    except ConfigError as error:
        name = error.key.removeprefix(f"{asked_by}.")
        raise ConfigError(key=f"{asked_by}.{shown(name)}", value=error.value, expected=error.expected) from error


def _axis(text: str) -> tuple[str, list[str]]:
    name, equals, listed = text.partition("=")
    values = [value.strip() for value in listed.split(",")]
    good = bool(equals) and all(values)
    _require(good, "sweep", text, 'an option and its values, as in "policy=early,predictive"')
    _require(len(set(values)) == len(values), "sweep", text, "every value once")
    return _field(name.strip()), values


def _field(name: str) -> str:
    """The Scenario's name of an option."""
    plain = name.removeprefix("--").replace("-", "_")
    known = {SHOWN_AS.get(spec.name, spec.name): spec.name for spec in fields(Scenario)}
    if plain not in known and plain not in known.values():
        options = ", ".join(shown(option) for option in known)
        raise ConfigError(key="simulate.sweep", value=name, expected=f"one of {options}")
    return known.get(plain, plain)


def _combined(base: Scenario, values: Mapping[str, str]) -> tuple[str, Scenario]:
    typed = parse_overrides(f"{name}={value}" for name, value in values.items())
    label = ", ".join(f"{shown(name)} {value}" for name, value in values.items())
    return label, _loaded(asdict(base) | typed, "simulate")


def without_seed(label: str) -> str:
    """A sweep's label with its seed left out: what the runs of several seeds have in common."""
    return ", ".join(part for part in label.split(", ") if not part.startswith("seed "))


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _require(ok: bool, key: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(key=shown(key), value=value, expected=expected)
