"""Pure: a recording fed to a fresh machine: is every decision bit-equal, and if not, which is the first that is not.

Nothing here knows the time or the cluster: what the machine decides follows from its inputs alone, or it is a bug.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from conductor.admission_config import AdmissionConfig, Mode
from conductor.decisions import DecisionRecord
from conductor.desk import Layout
from conductor.effects import Effect
from conductor.machine import ConductorMachine
from conductor.recording import Call, Digest, Ending, Header, config_of, in_words, read
from conductor.view import MakeWorker, Worker
from halfmoon.errors import ConfigError, RecordingError

CUT = "it has no end: its process was killed, or goes on recording"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first call whose outcome was not the recorded one."""

    call: Call
    what: str
    recorded: tuple[str, ...]
    replayed: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What came of a replay.

    Args:
        calls, effects: how many were compared; with a difference, those before it.
        digest: of all effects of the recording, as replayed.
        records: the recorded decision records, in the order in which they were completed.
        ended: why the recording ends where it does.
    """

    header: Header
    calls: int
    effects: int
    seconds: float
    digest: str
    records: tuple[Mapping[str, Any], ...]
    ended: str
    difference: Difference | None

    @property
    def outcomes(self) -> Counter[str]:
        return Counter(record["outcome"] for record in self.records)

    @property
    def hit_tokens(self) -> Counter[str]:
        """Prompt tokens that prefill workers found instead of computing them, by where: device, dram, remote."""
        found: Counter[str] = Counter()
        for record in self.records:
            for leg, stats in record["stats"].items():
                if leg.endswith(".prefill"):
                    for place in ("device", "dram", "remote"):
                        found[place] += stats[f"hit_tokens_{place}"]
        return found


def machine_of(header: Header, shadows: Iterable[str] = (), make_worker: MakeWorker = Worker) -> ConductorMachine:
    """A machine as the recorded one was when it began.

    Args:
        shadows: admission policies that judge besides, and are not obeyed.
        make_worker: as ConductorMachine's; it is in no recording.

    Raises:
        RecordingError: settings that this version does not have, or a placement policy that they do not name.
        ConfigError: an unknown admission policy.
    """
    config = config_of(header)
    machine = ConductorMachine(
        config=replace(config, admission=_with_shadows(config.admission, shadows)),
        layout=Layout(block_size=header.block_size, block_bytes=header.block_bytes),
        conductor_id=header.conductor_id,
        fingerprint=header.fingerprint,
        make_worker=make_worker,
    )
    if machine.policy_name != header.policy:
        why = f"policy: recorded with {header.policy!r}, and its settings give {machine.policy_name!r}"
        raise RecordingError(line=1, why=why)
    return machine


def _with_shadows(config: AdmissionConfig, names: Iterable[str]) -> AdmissionConfig:
    """Those that were off judge too; those that were not do what they did."""
    known = [f.name for f in fields(config) if isinstance(getattr(config, f.name), Mode)]
    modes: dict[str, Any] = {}
    for name in names:
        if name not in known:
            raise ConfigError(key="--policy", value=name, expected=f"one of {', '.join(known)}")
        if getattr(config, name) is Mode.OFF:
            modes[name] = Mode.SHADOW
    return replace(config, **modes)


def rejudged(
    lines: Iterable[str], make: Callable[[Header], ConductorMachine] = machine_of
) -> Iterator[Header | Call | Ending]:
    """The recording's entries with the records that `make`'s machine completes in the place of the recorded ones.

    So other policies judge the very state in which the recorded ones did, as long as nothing that they say is obeyed.

    Raises:
        RecordingError: as `read`; or the machine decides otherwise than was recorded, so that its state is another.
    """
    entries = read(lines)
    header = next(entries)
    assert isinstance(header, Header)
    machine, running = make(header), Digest()
    completed: list[DecisionRecord] = []
    machine.tell_records(completed.append)
    yield header
    for entry in entries:
        if isinstance(entry, Call) and not entry.raised:
            digest = running.update(entry.n, apply(machine, entry))
            if digest != entry.digest:
                why = f"call {entry.n} is decided otherwise than was recorded: nobody can judge what follows from it"
                raise RecordingError(line=entry.line, why=why)
            records = tuple(json.loads(json.dumps([record.as_json() for record in completed])))
            completed.clear()
            yield replace(entry, records=records)
        else:
            yield entry


def replay(lines: Iterable[str], make: Callable[[Header], ConductorMachine] = machine_of) -> Replayed:
    """Feed every recorded input to the machine that `make` builds, up to the first difference.

    Raises:
        RecordingError: as `read` and `make`.
    """
    entries = read(lines)
    header = next(entries)
    assert isinstance(header, Header)
    player = _Player(make(header))
    ended = CUT
    for entry in entries:
        if isinstance(entry, Ending):
            ended = entry.why
        elif isinstance(entry, Call):
            player.play(entry)
    return Replayed(
        header=header,
        calls=player.calls,
        effects=player.effects,
        seconds=player.last_s - player.first_s,
        digest=player.digest,
        records=tuple(player.records),
        ended=ended,
        difference=player.difference,
    )


class _Player:
    """One machine and how far it agreed. After a difference the rest is read, for its records, but not played."""

    def __init__(self, machine: ConductorMachine) -> None:
        self.machine = machine
        self.calls = self.effects = 0
        self.first_s = self.last_s = 0.0
        self.digest = ""
        self.records: list[Mapping[str, Any]] = []
        self.difference: Difference | None = None
        self._completed: list[DecisionRecord] = []
        self._running = Digest()
        machine.tell_records(self._completed.append)

    def play(self, call: Call) -> None:
        self.records += call.records
        self.first_s, self.last_s = (call.at_s if call.n == 1 else self.first_s), call.at_s
        if self.difference is not None:
            return
        if call.raised:
            self.difference = Difference(call=call, what="the recorded call raised", recorded=(), replayed=())
            return
        effects = apply(self.machine, call)
        self.digest = self._running.update(call.n, effects)
        completed, self._completed[:] = [record.as_json() for record in self._completed], []
        self.difference = self._compared(call, effects, completed)
        if self.difference is None:
            self.calls += 1
            self.effects += len(effects)

    def _compared(self, call: Call, effects: list[Effect], completed: list[dict[str, object]]) -> Difference | None:
        if self.digest != call.digest:
            words = tuple(in_words(effect) for effect in effects)
            what = (
                "other effects"
                if words != call.effects
                else "effects that differ within (or an earlier line was changed)"
            )
            return Difference(call=call, what=what, recorded=call.effects, replayed=words)
        told = json.loads(json.dumps(completed))
        found = _first_difference(list(call.records), told, "records")
        if found is None:
            return None
        path, recorded, replayed = found
        return Difference(call=call, what=path, recorded=(recorded,), replayed=(replayed,))


def apply(machine: ConductorMachine, call: Call) -> list[Effect]:
    """Make the recorded call."""
    arguments = dict(call.arguments)
    keywords = {key: arguments.pop(key) for key in ("stopped", "undo", "seen") if key in arguments}
    method: Callable[..., list[Effect]] = getattr(machine, call.name)
    return method(*arguments.values(), call.at_s, **keywords)


def _first_difference(recorded: Any, replayed: Any, path: str) -> tuple[str, str, str] | None:
    """Where two JSON values differ first, and what stands there."""
    if isinstance(recorded, dict) and isinstance(replayed, dict):
        for key in [*recorded, *(k for k in replayed if k not in recorded)]:
            found = _first_difference(recorded.get(key), replayed.get(key), f"{path}.{key}")
            if found is not None:
                return found
        return None
    if isinstance(recorded, list) and isinstance(replayed, list) and len(recorded) == len(replayed):
        for index, (one, other) in enumerate(zip(recorded, replayed, strict=True)):
            found = _first_difference(one, other, f"{path}[{index}]")
            if found is not None:
                return found
        return None
    return None if recorded == replayed else (path, f"{recorded!r:.200}", f"{replayed!r:.200}")
