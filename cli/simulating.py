"""Shell: one scenario simulated: its trace read and made ready, its run sketched and written to files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from io import BufferedWriter
from pathlib import Path

from cli.scenario import Scenario, beliefs, command
from conductor.admission_policies import ALL_NAMES
from conductor.config import ConductorConfig, Fit
from conductor.recording import ending_line
from halfmoon.errors import ConfigError
from report import files
from report.curves import Sketch, sketch
from report.html import LIBRARY, run_page
from report.notices import FIRST_SKIPPED, SKIPPED
from report.records import Run
from service.lines import create_fresh
from simulator.config import EVICTIONS, SimConfig
from simulator.faults import parse_faults
from simulator.hardware_values import Hardware
from simulator.policies import PLACEMENTS, make_conductor
from simulator.presets import load_hardware
from simulator.run import simulate
from workload.files import read_trace
from workload.trace import Trace
from workload.transforms import TICK_S

REPORT = "report.html"
TICK_SLACK_S = 0.01
"""The published ticks are off by up to 3 ms."""


@dataclass(frozen=True)
class Job:
    """A scenario for another process.

    Args:
        directory: where its files go; empty: nowhere. The plotting library lies in the folder above.
    """

    label: str
    scenario: Scenario
    directory: str = ""


class Tape:
    """A simulation's recording, as `up --record` writes it; written at once, for virtual time waits for the disk.

    Attributes:
        path: of the file; one that is there is never touched: the next free name is taken.

    Raises:
        ConfigError: the file cannot be made, or takes no more.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.path, raw = create_fresh(path)
        except OSError as error:
            raise self._refusal(error) from error
        self._file = BufferedWriter(raw)
        self._lines = 0

    def write(self, line: str) -> bool:
        """One line without its end. Always True: what cannot be written is an error."""
        try:
            self._file.write(line.encode() + b"\n")
        except OSError as error:
            raise self._refusal(error) from error
        self._lines += 1
        return True

    def close(self, why: str) -> None:
        """Say why it ends here."""
        self.write(ending_line(why, self._lines - 1))
        try:
            self._file.close()
        except OSError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: OSError) -> ConfigError:
        expected = f"a file that can be written ({error.strerror or error})"
        return ConfigError(key="simulate.record", value=str(self.path), expected=expected)


def simulate_job(job: Job, progress: Callable[[float], None]) -> Sketch:
    """Run it, write its files, and hand back what tables and pages need.

    Raises:
        HalfmoonError: the scenario, its trace or its directory is no good.
    """
    found, run = simulate_scenario(job.scenario, trace_of(job.scenario), job.label, progress)
    if job.directory:
        write(run, found, Path(job.directory), shared=f"../{LIBRARY}")
    return found


def simulate_scenario(
    asked: Scenario,
    trace: Trace,
    label: str = "",
    progress: Callable[[float], None] = lambda share: None,
    tape: Tape | None = None,
) -> tuple[Sketch, Run]:
    """Simulate `trace`, which is `trace_of(asked)`.

    Args:
        progress: told the share of requests that have ended.
        tape: takes the conductor's recording; it is not closed.
    """
    number = len(trace.requests)
    again = command(asked)
    conductor = make_conductor
    if tape is not None:
        conductor = partial(make_conductor, write=tape.write, version=version("halfmoon-server"))
    run = simulate(
        trace,
        config_of(asked, trace),
        again=again,
        conductor=conductor,
        on_progress=lambda ended: progress(ended / number),
    )
    title = f"{Path(asked.trace).name} on {asked.nodes}, {asked.policy}, {asked.speedup:g}x"
    run = replace(run, title=title, settings=_settings(run, asked, trace))
    return sketch(run, label=label or run.title, command=again), run


def _settings(run: Run, asked: Scenario, trace: Trace) -> dict[str, object]:
    """The simulator's own, with the nodes as numbers, so that a sweep over them is a sweep over numbers."""
    nodes = {"prefill": asked.prefill, "decode": asked.decode, "coupled": asked.coupled}
    said: dict[str, object] = {}
    for name, value in run.settings.items():
        said |= nodes if name == "nodes" else {name: value}
    varied = {name: getattr(asked, name) for name in ("link_scale", "mfu_scale") if getattr(asked, name) != 1.0}
    if asked.coupled:
        varied |= {"hide_weights": hardware_of(asked).mixed_hides_weights}
    said |= varied
    return said | ({SKIPPED: trace.skipped, FIRST_SKIPPED: list(trace.first_skipped)} if trace.skipped else {})


def trace_of(asked: Scenario) -> Trace:
    """As the file has it: the simulator changes speed and lengths, and spreads arrivals.

    Raises:
        NotFound, TraceError: naming the file, and where it is wrong.
    """
    return read_trace(asked.trace, asked.format, asked.skip_bad, asked.requests)


def config_of(asked: Scenario, trace: Trace | None = None) -> SimConfig:
    """What the simulator is told; without a trace, to see whether it is something that it knows.

    Raises:
        ConfigError: naming the setting, and what is known.
    """
    tick_s = TICK_S if trace is not None and ticked(trace) else 0.0
    require_policies(asked.policy, asked.placement, asked.eviction)
    return SimConfig(
        hardware=hardware_of(asked),
        prefill=asked.prefill,
        decode=asked.decode,
        coupled=asked.coupled,
        seed=asked.seed,
        speedup=asked.speedup,
        jitter_s=tick_s if asked.jitter_s is None else asked.jitter_s,
        output_factor=asked.output_scale,
        slo_ttft_s=asked.slo_ttft_s,
        slo_tbt_s=asked.slo_tbt_s,
        belief_bias=asked.belief_bias,
        belief_factors=beliefs(asked.belief),
        learn=asked.learn,
        conductor=ConductorConfig(fit=Fit(asked.fit)),
        macro=not asked.exact,
        check=asked.check,
        placement=asked.placement,
        admission=asked.policy,
        eviction=asked.eviction,
        faults=parse_faults(asked.faults),
    )


def hardware_of(asked: Scenario) -> Hardware:
    """The preset, and what the scenario changes of it.

    Raises:
        ConfigError: there is no such preset, or it cannot be changed so.
    """
    hardware = load_hardware(asked.hardware).scaled(link=asked.link_scale, prefill=asked.mfu_scale)
    if asked.hide_weights is not None:
        hardware = replace(hardware, mixed_hides_weights=asked.hide_weights)
    if asked.chunk is not None:
        hardware = hardware.with_chunk(asked.chunk, coupled=asked.coupled > 0)
    return hardware if asked.decode_room is None else hardware.with_decode_room(asked.decode_room)


def require_policies(admission: str, placement: str, eviction: str) -> None:
    """Raises ConfigError, naming the option and what there is."""
    for option, name, known in (
        ("policy", admission, admissions()),
        ("placement", placement, tuple(sorted(PLACEMENTS))),
        ("eviction", eviction, EVICTIONS),
    ):
        if name not in known:
            raise ConfigError(key=f"simulate.{option}", value=name, expected=f"one of {', '.join(known)}")


def admissions() -> tuple[str, ...]:
    """Names of the admission policies; "none" takes everything on."""
    return ALL_NAMES


def ticked(trace: Trace) -> bool:
    """Whether all arrivals lie on ticks of 3 s, as in Mooncake's chat trace: that is rounding, not a rhythm."""

    def off_s(at_s: float) -> float:
        return abs(at_s - round(at_s / TICK_S) * TICK_S)

    return len(trace.requests) > 1 and all(off_s(request.at_s) <= TICK_SLACK_S for request in trace.requests)


def write(run: Run, found: Sketch, directory: Path, *, shared: str = "") -> None:
    """`shared`: where the plotting library is, from `directory`; empty: the report holds it."""
    files.save(run, found.statistics, directory)
    write_text(directory / REPORT, run_page(found, shared))


def write_text(path: Path, text: str) -> None:
    """Raises ConfigError, naming the file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            key="simulate.out", value=str(path), expected=f"a file to write ({error.strerror})"
        ) from error
