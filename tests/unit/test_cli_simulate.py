"""The commands on a small trace: what they print, what they leave, and what they say of bad input."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest
from click.testing import CliRunner, Result

from cli.main import main
from cli.scenario import Scenario, command, sweep
from cli.simulate import default_name, with_seeds
from cli.simulating import config_of, simulate_scenario, ticked, trace_of
from halfmoon.errors import Failed
from report.files import load
from report.html import library
from report.statistics import statistics
from simulator.simulation import Simulation
from tests.traces import FIXTURE
from workload.trace import Trace, TraceRequest

SMALL = ("--trace", str(FIXTURE), "--requests", "40", "--prefill", "2", "--decode", "1", "--policy", "baseline")
FAST = ("--speedup", "8", "--slo-ttft", "3")


def halfmoon(*words: str) -> Result:
    return CliRunner().invoke(main, words)


@pytest.fixture
def done(tmp_path: Path) -> tuple[Result, Path]:
    result = halfmoon("simulate", *SMALL, *FAST, "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    return result, tmp_path / "out"


def test_a_simulation_prints_what_it_leaves_in_files(done: tuple[Result, Path]) -> None:
    result, directory = done
    run = load(directory)
    figures = statistics(run)
    assert figures.requests == 40
    assert re.fullmatch(r"[0-9a-f]{32,64}", run.digest)
    assert f"digest: {run.digest}" in result.output
    assert f"{figures.served_kv_tokens:,}" in result.output
    assert f"Report: {directory / 'report.html'}" in result.output
    assert "One seed, 1: another draws other noise and beliefs" in result.output
    page = (directory / "report.html").read_text()
    assert run.digest in page
    assert "One seed, 1: another draws other noise and beliefs" in page
    assert f"<td>{figures.served_kv_tokens:,}</td>" in page


def test_the_printed_command_repeats_the_decisions(done: tuple[Result, Path]) -> None:
    _, directory = done
    page = (directory / "report.html").read_text()
    again = re.search(r"<pre>halfmoon (simulate .*?)</pre>", page)
    assert again is not None
    repeated = halfmoon(*again.group(1).split(), "--out", str(directory / "again"))
    assert repeated.exit_code == 0, repeated.output
    assert load(directory / "again").digest == load(directory).digest
    assert load(directory / "again").requests == load(directory).requests


def test_another_seed_is_another_run(done: tuple[Result, Path], tmp_path: Path) -> None:
    halfmoon("simulate", *SMALL, *FAST, "--seed", "2", "--out", str(tmp_path / "two"))
    assert load(tmp_path / "two").digest != load(done[1]).digest


def test_a_sweep_runs_every_combination(tmp_path: Path) -> None:
    sweeps = ("--sweep", "speedup=8", "--sweep", "policy=baseline,none")
    result = halfmoon("simulate", *SMALL, *sweeps, "--jobs", "2", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "sweep.json").read_text())["halfmoon_sweep"] == 1
    runs = {entry["label"]: entry for entry in json.loads((tmp_path / "sweep.json").read_text())["runs"]}
    assert list(runs) == ["speedup 8, policy baseline", "speedup 8, policy none"]
    page = (tmp_path / "report.html").read_text()
    for number, (label, entry) in enumerate(runs.items(), 1):
        (folder,) = tmp_path.glob(f"{number:03d}-*")
        assert load(folder).digest == entry["digest"]
        assert f"{entry['digest']}  {label}" in result.output
        assert label in page
        report = (folder / "report.html").read_text()
        assert len(report) < 500_000
        assert "<script src='../plotly.min.js'></script>" in report
    assert "<script src='plotly.min.js'></script>" in page
    assert (tmp_path / "plotly.min.js").read_text(encoding="utf-8") == library()
    alone = Scenario(trace=str(FIXTURE), requests=40, prefill=2, decode=1, speedup=8.0, policy="baseline")
    found, _ = simulate_scenario(alone, trace_of(alone))
    assert found.digest == runs["speedup 8, policy baseline"]["digest"], "a worker's run is the run"


def test_seeds_of_a_sweep_are_put_together(tmp_path: Path) -> None:
    sweeps = ("--sweep", "policy=baseline,none", "--sweep", "seed=1,2", "--jobs", "1")
    result = halfmoon("simulate", *SMALL, *FAST, *sweeps, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    runs = {entry["label"]: entry for entry in json.loads((tmp_path / "sweep.json").read_text())["runs"]}
    table = result.output.split("Over seeds: mean (lowest to highest)")[1]
    for policy in ("baseline", "none"):
        shares = [100 * runs[f"policy {policy}, seed {seed}"]["statistics"]["capacity"] for seed in (1, 2)]
        said = f"{sum(shares) / 2:.1f} ({min(shares):.1f} to {max(shares):.1f})"
        assert re.search(rf"policy {policy} +2 +{re.escape(said)}", table), table


def test_so_many_seeds_are_run_and_put_together(tmp_path: Path) -> None:
    words = ("--seed", "4", "--seeds", "3", "--jobs", "1", "--out", str(tmp_path))
    result = halfmoon("simulate", *SMALL, *FAST, *words)
    assert result.exit_code == 0, result.output
    runs = json.loads((tmp_path / "sweep.json").read_text())["runs"]
    assert [run["label"] for run in runs] == ["seed 4", "seed 5", "seed 6"]
    p90s = [run["statistics"]["ttft"]["p90"] for run in runs]
    cells = (fmean(p90s), stdev(p90s), min(p90s), max(p90s))
    said = " +".join(["TTFT p90, s", "3", *(f"{value:.2f}" for value in cells)])
    assert "3 seeds" in result.output
    assert re.search(said, result.output), result.output
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Over 3 seeds</h2>" in page
    assert f"<tr><th>TTFT p90, s</th><td>3</td><td>{cells[0]:.2f}</td>" in page
    assert "One seed, 5: another draws" in next(tmp_path.glob("002-*/report.html")).read_text()


def test_seeds_are_named_once() -> None:
    both = halfmoon("simulate", *SMALL, "--seeds", "3", "--sweep", "seed=1,2")
    assert (both.exit_code, "--seeds does not go with --sweep seed" in both.output) == (2, True)
    taped = halfmoon("simulate", *SMALL, "--seeds", "3", "--record", "x.jsonl")
    assert (taped.exit_code, "not with --sweep or --seeds" in taped.output) == (2, True)
    assert with_seeds((), 7, 1) == with_seeds((), 7, None) == ()


def test_one_that_fails_in_a_sweep_is_named_with_its_command(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(FIXTURE.read_text().splitlines()[0] + "\nnonsense\n")
    sweeps = ("--sweep", "skip-bad=false,true")
    result = halfmoon("simulate", "--trace", str(bad), *sweeps, "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "1 of 2 simulations did not finish" in result.output
    assert "skip-bad false: TraceError" in result.output
    one = Scenario(trace=str(bad))
    assert f"reproduce: {command(one)}" in result.output
    assert "skip-bad true" in result.output.split("Report:")[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--policy", "wishful"), ("simulate.policy", "'wishful'", "baseline")),
        (("--placement", "wishful"), ("simulate.placement", "'wishful'", "algorithm1")),
        (("--hardware", "abacus"), ("hardware", "'abacus'", "a800-llama-70b", ".yaml file")),
        (("--faults", "earthquake"), ("faults", "'earthquake'", "crash")),
        (("--speedup", "-1"), ("simulate.speedup", "-1.0", "a number above 0")),
        (("--prefill", "0"), ("simulate.prefill", "a prefill and a decode node, or a coupled one")),
        (("--format", "morse"), ("format", "'morse'", "mooncake")),
        (("--slo-tbt", "0"), ("simulate.slo-tbt:", "seconds, above 0")),
        (("--belief", "0"), ("simulate.belief:", "0.01 to 100 times the truth")),
        (("--jitter", "-1"), ("simulate.jitter:", "0 (off) to 3600 s")),
        (("--eviction", "wishful"), ("simulate.eviction", "'wishful'", "lru, lfu, length_aware, s3fifo, leased")),
        (("--hardware", "/nowhere/node.yaml"), ("hardware", "'/nowhere/node.yaml'", "no such file")),
        (("--faults", "slow_tier=50"), ("faults.slow_tier", "no node has a DRAM tier", "a800-llama-70b-dram")),
        (("--trace", "/nowhere/trace.jsonl"), ("/nowhere/trace.jsonl",)),
        (("--chunk", "8"), ("simulate.chunk", "16 to 1,000,000,000 tokens")),
        (("--decode-room", "100"), ("decode-room", "a block, 512 tokens, at least")),
        (("--decode-room", "9000", "--decode", "0", "--coupled", "1"), ("simulate.decode-room", "a decode node")),
        (("--mfu-scale", "0"), ("simulate.mfu-scale", "0.001 to 1000 times")),
        (("--sweep", "polcy=none"), ("simulate.sweep", "'polcy'", "policy")),
        (("--sweep", "policy=none,wishful"), ("simulate.policy", "'wishful'")),
    ],
)
def test_bad_input_is_named_with_what_is_allowed(words: tuple[str, ...], said: tuple[str, ...], tmp_path: Path) -> None:
    result = halfmoon("simulate", *SMALL, *words, "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert re.match(r"(ConfigError|NotFound|TraceError): ", result.output), result.output
    for text in said:
        assert text in result.output
    assert not (tmp_path / "out").exists(), "nothing is left of what did not begin"


def test_malformed_lines_are_refused_or_counted(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(FIXTURE.read_text().splitlines(keepends=True)[:20]) + '{"timestamp": 1}\n')
    refused = halfmoon("simulate", "--trace", str(bad), "--out", str(tmp_path / "out"))
    assert "line 21" in refused.output
    taken = halfmoon("simulate", "--trace", str(bad), "--skip-bad", "--out", str(tmp_path / "out"))
    assert taken.exit_code == 0, taken.output
    settings = load(tmp_path / "out").settings
    said = f"1 malformed line was left out: {bad}, line 21, input_length: "
    assert settings["lines skipped"] == 1
    assert settings["first lines skipped"] == [taken.output.split("left out: ")[1].splitlines()[0]]
    assert said in taken.output
    assert said in (tmp_path / "out" / "report.html").read_text()
    sweeps = ("--sweep", "seed=1,2", "--jobs", "1")
    swept = halfmoon("simulate", "--trace", str(bad), "--skip-bad", *sweeps, "--out", str(tmp_path / "swept"))
    assert swept.output.count(said) == 1, swept.output
    assert said in (tmp_path / "swept" / "report.html").read_text()
    limits = (
        "--slo-ttft",
        "3",
        "--slo-tbt",
        "0.1",
        "--gpus",
        "8",
        "--policies",
        "none",
        "--seeds",
        "1",
        "--chunks",
        "512",
    )
    planned = halfmoon("plan", "--trace", str(bad), "--skip-bad", *limits, "--jobs", "1")
    assert planned.output.count(said) == 1, planned.output


def test_folders_are_told_apart_by_every_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fast, many = ("--requests", "3"), ("random", "algorithm1", "random")
    reports = []
    for placement in many:
        done = halfmoon("simulate", *SMALL, *fast, "--placement", placement)
        assert done.exit_code == 0, done.output
        reports += re.findall(r"Report: (runs/synthetic_chat-2P\+1D-baseline-1x-seed-1-\S+/report.html)", done.output)
    assert reports[0] == reports[2] != reports[1]
    assert [load(Path(report).parent).settings["placement"] for report in reports[1:]] == ["algorithm1", "random"]
    base = Scenario(trace="a/chat.jsonl")
    others = [
        replace(base, **{name: value})  # type: ignore[arg-type]
        for name, value in (
            ("slo_ttft_s", 3.0), ("faults", "crash=1"), ("hardware", "h800-llama-70b"), ("requests", 9),
            ("belief", "1.2"), ("jitter_s", 1.0), ("trace", "b/chat.jsonl"), ("eviction", "lfu"),
        )
    ]  # fmt: skip
    long = [f"seed={','.join(map(str, range(60)))},{last}" for last in (60, 61)]
    names = [default_name(one, []) for one in (base, *others)] + [default_name(base, [text]) for text in long]
    assert len(set(names)) == len(names)


def test_arrivals_in_ticks_are_spread_and_others_are_not() -> None:
    def trace(*times_s: float) -> Trace:
        requests = tuple(TraceRequest(at_s=t, input_tokens=1, output_tokens=1) for t in times_s)
        return Trace(source="t", block_tokens=512, requests=requests)

    assert ticked(trace(0, 3, 3, 5.999, 9.003))
    assert not ticked(trace(0, 3, 4))
    assert not ticked(trace(0, 3.02, 6))
    asked = Scenario(trace="t")
    assert config_of(asked, trace(0, 3)).jitter_s == 3.0
    assert config_of(asked, trace(0, 1)).jitter_s == 0.0
    assert config_of(replace(asked, jitter_s=1.5), trace(0, 3)).jitter_s == 1.5


def test_a_sweep_may_vary_what_leaves_first() -> None:
    asked = [one for _, one in sweep(Scenario(trace="t"), ["eviction=lru,lfu,length_aware,s3fifo"])]
    assert [config_of(one).eviction for one in asked] == ["lru", "lfu", "length_aware", "s3fifo"]
    assert "--eviction lfu" in command(asked[1])


def test_a_cluster_is_changed_by_options_that_a_sweep_may_vary() -> None:
    base = Scenario(trace="t", prefill=0, decode=0, coupled=2)
    chunks = [config_of(one).hardware for _, one in sweep(base, ["chunk=256,8192"])]
    assert [(h.tokens_per_pass_max, h.prompts_per_pass_max) for h in chunks] == [(256, 128), (8192, 256)]
    hides = [config_of(one).hardware.mixed_hides_weights for _, one in sweep(base, ["hide-weights=true,false"])]
    assert hides == [True, False]
    apart = replace(
        base, prefill=1, decode=1, coupled=0, chunk=2048, decode_room=400_000, link_scale=2.0, mfu_scale=0.5
    )
    plain, changed = (config_of(one).hardware for one in (Scenario(trace="t"), apart))
    assert (changed.tokens_per_pass_max, changed.prompts_per_pass_max, changed.decode_blocks) == (2048, 1, 781)
    assert changed.link_bytes_per_s == 2 * plain.link_bytes_per_s
    assert changed.prefill_pair_s == 2 * plain.prefill_pair_s
    said = command(apart)
    assert "--chunk 2048 --decode-room 400000 --link-scale 2 --mfu-scale 0.5" in said
    assert "hide-weights" not in said
    assert "--no-hide-weights" in command(replace(base, hide_weights=False))


def test_smaller_chunks_let_a_coupled_node_keep_its_gaps_short(tmp_path: Path) -> None:
    nodes = ("--prefill", "0", "--decode", "0", "--coupled", "2")
    words = ("--sweep", "chunk=256,8192", "--jobs", "1", "--out", str(tmp_path))
    result = halfmoon("simulate", *SMALL, *nodes, *words)
    assert result.exit_code == 0, result.output
    small, large = json.loads((tmp_path / "sweep.json").read_text())["runs"]
    assert [run["settings"]["chunk_tokens"] for run in (small, large)] == [256, 8192]
    assert small["statistics"]["tbt_worst"]["p90"] < large["statistics"]["tbt_worst"]["p90"] / 3


def test_a_broken_promise_ends_with_the_whole_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Simulation, on_progress: object) -> None:
        raise AssertionError("a block is held twice")

    monkeypatch.setattr(Simulation, "run", broken)
    asked = Scenario(trace=str(FIXTURE), requests=2, output_scale=2.0, slo_tbt_s=0.2, belief="1.5", exact=True)
    with pytest.raises(Failed) as caught:
        simulate_scenario(asked, trace_of(asked))
    said, how = str(caught.value).splitlines()
    assert "a block is held twice" in said
    assert how == f"again: {command(asked)}"
    for option in ("--requests 2", "--output-scale 2", "--slo-tbt 0.2", "--belief 1.5", "--seed 1", "--exact"):
        assert option in how


PLANNED = ("plan", "--trace", str(FIXTURE), "--requests", "20", "--speedup", "8", "--jobs", "1")


def test_a_plan_answers_from_simulations_and_says_so() -> None:
    limits = ("--slo-ttft", "3", "--slo-tbt", "0.1", "--goal", "5")
    result = halfmoon(*PLANNED, *limits, "--gpus", "16", "--seeds", "1", "--policies", "none", "--chunks", "256,2048")
    assert result.exit_code == 0, result.output
    for shape in ("1P+1D", "2C"):
        assert shape in result.output
    said = r"Best: (\S+), none, chunks of ([\d,]+): ([\d.]+) effective requests/s, ([\d.]+) % of all"
    best = re.search(said, result.output)
    assert best is not None
    prefill, decode = re.fullmatch(r"(\d)P\+(\d)D", best.group(1)).groups() if "P" in best.group(1) else ("0", "0")  # type: ignore[union-attr]
    coupled = best.group(1)[:-1] if best.group(1).endswith("C") else "0"
    asked = Scenario(
        trace=str(FIXTURE), requests=20, speedup=8.0, slo_ttft_s=3.0, prefill=int(prefill), decode=int(decode),
        coupled=int(coupled), policy="none", chunk=int(best.group(2).replace(",", "")),
    )  # fmt: skip
    found, _ = simulate_scenario(asked, trace_of(asked))
    assert best.group(4) == f"{found.statistics.effective / 20 * 100:.1f}"
    runs = re.search(r"from (\d+) simulations \((\d+) search, (\d+) sensitivity\) of 20 requests", result.output)
    assert runs is not None, result.output
    assert (runs.group(1), runs.group(2)) == (str(int(runs.group(2)) + int(runs.group(3))), "4")
    assert "nothing was measured on hardware" in result.output
    for change in ("costs believed", "another chunk", "TTFT limit", "TBT limit", "link speed", "MFU of prefill",
                   "output length", "weights of mixed passes: behind prompts, 2C"):  # fmt: skip
        assert change in result.output
    assert f"See it whole: {command(asked)}" in result.output


def test_a_plan_says_when_nothing_keeps_the_limits() -> None:
    limits = ("--slo-ttft", "0.01", "--slo-tbt", "0.1")
    result = halfmoon(*PLANNED, *limits, "--gpus", "8", "--seeds", "1", "--policies", "none", "--chunks", "512")
    assert result.exit_code == 3, result.output
    assert "Best:" not in result.output
    assert "No candidate keeps these limits: both for 90 % of all requests (--goal)." in result.output
    asked = Scenario(
        trace=str(FIXTURE), requests=20, speedup=8.0, slo_ttft_s=0.01, prefill=0, decode=0, coupled=1, policy="none",
        chunk=512,
    )  # fmt: skip
    ttft = simulate_scenario(asked, trace_of(asked))[0].statistics.ttft
    assert ttft is not None
    assert re.search(rf"1C, none, chunks of 512 +0.0 +100.0 +{ttft.p90:,.2f} ", result.output), result.output
    assert "With twice its nodes: 0.0 % keep both" in result.output
    assert "more nodes of this kind, so used, would hardly reach 90 %" in result.output
    assert "3 simulations (1 search, 2 more nodes, less load)" in result.output


def test_a_plan_compares_its_finalists_over_seeds() -> None:
    limits = ("--slo-ttft", "3", "--slo-tbt", "0.1", "--goal", "5")
    result = halfmoon(*PLANNED, *limits, "--gpus", "16", "--policies", "none", "--seeds", "2", "--chunks", "2048")
    assert result.exit_code == 0, result.output
    finalists = result.output.split("The finalists over 2 seeds: mean (lowest to highest)")[1].split("Sensitivity")[0]
    for shape in ("1P+1D", "2C"):
        shares = []
        for seed in (1, 2):
            nodes = {"prefill": 1, "decode": 1} if shape == "1P+1D" else {"prefill": 0, "decode": 0, "coupled": 2}
            asked = Scenario(
                trace=str(FIXTURE),
                requests=20,
                speedup=8.0,
                slo_ttft_s=3.0,
                policy="none",
                seed=seed,
                chunk=2048,
                **nodes,
            )
            shares.append(simulate_scenario(asked, trace_of(asked))[0].statistics.effective / 20 * 100)
        assert f"{sum(shares) / 2:.1f} ({min(shares):.1f} to {max(shares):.1f})" in finalists
    assert "load: -20%" in result.output
    assert "load: +20%" in result.output
    assert "ranges overlap" in result.output or "No other finalist's range reaches the best's" in result.output
    assert "seed 1 and 1 after it" in result.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpus", "12"), "plan.gpus: got 12; expected a multiple of --gpus-per-node, 8"),
        (("--gpus", "0"), "plan.gpus: got 0; expected at least 1"),
        (("--gpus", "16", "--chunks", "many"), "plan.chunks: got 'many'; expected numbers of tokens"),
        (("--gpus", "16", "--policies", "wishful"), "simulate.policy: got 'wishful'"),
        (("--gpus", "16", "--slo-ttft", "-1"), "plan.slo-ttft: got -1.0"),
    ],
)
def test_a_plan_refuses_bad_input(words: tuple[str, ...], said: str) -> None:
    result = halfmoon("plan", "--trace", str(FIXTURE), "--slo-tbt", "0.1", "--slo-ttft", "3", *words)
    assert result.exit_code == 1
    assert said in result.output


def test_the_trace_is_read_as_it_is() -> None:
    assert len(trace_of(Scenario(trace=str(FIXTURE), requests=7)).requests) == 7
