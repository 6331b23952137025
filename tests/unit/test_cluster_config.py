"""What `halfmoon up` is told: refused by name before anything starts, and told in one sentence when a start fails."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from cli.cluster_commands import cluster_config
from cli.main import main
from cluster import local
from cluster.local import LocalCluster
from cluster.plan import ClusterConfig, ProcessSpec, conductor_spec
from cluster.process import SupervisedProcess
from conductor.admission_config import Mode
from conductor.admission_policies import POLICIES, name_of
from conductor.config import PlacementName
from conductor.server import load_settings
from halfmoon.errors import ConfigError, Unavailable
from node.config import NodeConfig
from node.pools import _named_as_set
from service.settings import environment_of_child, gather


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_size", 0),
        ("tokens_per_pass_max", 0),
        ("sequences_max", -1),
        ("drain_s", float("inf")),
        ("start_s_max", float("nan")),
        ("fake_pass_s", -0.1),
        ("threads", 100_000),
        ("link", "carrier-pigeon"),
        ("link", "nccl"),  # the default device is the host
        ("dtype", "float7"),
        ("devices", ("cpu", "gpu:0")),
        ("admin_port", 50051),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as refusal:
        ClusterConfig(**{key: value})
    assert refusal.value.key == key


def test_the_admission_policies_of_the_conductor_are_chosen_in_the_cluster_s_file(tmp_path: Path) -> None:
    file = tmp_path / "up.yaml"
    file.write_text("cluster: {conductor: {admission: {predictive: enforce, forecast: shadow, defer: false}}}")
    config = cluster_config(str(file), {}, "default")
    told = conductor_spec(config, "redis://").settings["conductor"]["admission"]
    assert isinstance(told, dict)
    assert (told["predictive"], told["forecast"], told["defer"]) == ("enforce", "shadow", False)
    file.write_text("cluster: {conductor: {admission: {predicitve: enforce}}}")
    with pytest.raises(ConfigError, match=r"conductor.admission.predicitve: .*did you mean 'predictive'"):
        cluster_config(str(file), {}, "default")
    file.write_text("cluster: {conductor: {admission: {predictive: maybe}}}")
    with pytest.raises(ConfigError, match=r"admission.predictive: got 'maybe'; expected one of off, shadow, enforce"):
        cluster_config(str(file), {}, "default")


def test_any_two_ports_may_be_the_same_zero() -> None:
    assert ClusterConfig(port=0, admin_port=0).port == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clutser: {prefill: 2}", "config clutser: .*did you mean 'cluster'"),
        ("cluster: 5", "config cluster: got 5; expected a mapping"),
        ("cluster: {prefill: 1, prefill: 2}", "'prefill' is there twice"),
    ],
)
def test_a_file_that_means_something_else_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "up.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        cluster_config(str(file), {}, "default")


def test_the_environment_sets_the_cluster_and_not_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFMOON_CLUSTER__PREFILL", "3")
    monkeypatch.setenv("HALFMOON_OPERATORS", "torch")
    assert cluster_config(None, {}, "default").prefill == 3
    child = environment_of_child()
    assert child["HALFMOON_OPERATORS"] == "torch"
    assert gather(environ=child) == {}
    monkeypatch.setenv("HALFMOON_CLUTSER__PREFILL", "3")
    with pytest.raises(ConfigError, match="did you mean 'cluster'"):
        cluster_config(None, {}, "default")


def start(config: ClusterConfig) -> None:
    async def attempt() -> None:
        async with LocalCluster(config, lambda progress: None):
            raise AssertionError("it started")

    asyncio.run(attempt())


def test_a_directory_that_cannot_be_used_is_a_setting_to_mend(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for directory in ("/proc/halfmoon", str(file), ""):
        with pytest.raises(ConfigError) as refusal:
            start(ClusterConfig(model="fake", directory=directory))
        assert (refusal.value.key, refusal.value.value) == ("directory", directory)


def test_a_path_too_long_for_a_socket_leaves_nothing_behind(tmp_path: Path) -> None:
    directory = tmp_path / ("x" * 100)
    with pytest.raises(ConfigError, match="100 bytes"):
        start(ClusterConfig(model="fake", directory=str(directory)))
    assert not directory.exists()


def test_a_relative_directory_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert LocalCluster(ClusterConfig(directory="here"), lambda progress: None).directory == tmp_path / "here"


def test_a_registry_that_does_not_answer_ends_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(local, "REGISTRY_S_MAX", 0.2)
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
        start(ClusterConfig(model="fake", directory=str(tmp_path), redis="redis://127.0.0.1:1/0"))


def test_a_failed_start_tells_its_own_last_critical_message_unescaped(tmp_path: Path) -> None:
    process = SupervisedProcess(ProcessSpec(name="prefill-0", module="m"), tmp_path, lambda progress: None)
    log = tmp_path / "prefill-0.log"
    old = 'time=t level=critical node=p from=service.run msg="ConfigError: of an earlier run"\n'
    log.write_text(old)
    process._log_start = len(old)
    assert "(no log)" in process.why()
    with log.open("a") as lines:
        lines.write(
            'time=t level=critical node=p from=service.run msg="CheckpointError: /m: \\"x\\" is missing"\nlast\n'
        )
    assert process.why() == f'prefill-0: CheckpointError: /m: "x" is missing\nlog: {log}'


def test_who_set_mib_is_told_of_mib() -> None:
    config = NodeConfig(node_id="a", device_mib=60_000)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as refusal, _named_as_set(config, "device", lambda: 5 << 20):
        raise ConfigError(key="node.device_blocks", value=123, expected="at most 10 blocks")
    assert str(refusal.value) == "config node.device_mib: got 60000; expected at most the 5 MiB that are free"


def test_the_conductor_is_told_its_settings_as_they_were_given(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("cluster: {conductor: {balancing_threshold: 3, priors: {decode: {read_ssd: [0.01, 1.0e-9]}}}}")
    config = cluster_config(str(file), {"placement": "mooncake", "directory": str(tmp_path)}, "test")
    written = tmp_path / "conductor.yaml"
    written.write_text(yaml.safe_dump(conductor_spec(config, "redis://x").settings))
    assert load_settings(written).conductor == config.conductor
    assert (config.conductor.placement, config.conductor.balancing_threshold) == (PlacementName.MOONCAKE, 3.0)
    assert config.conductor.priors["decode"].read_ssd == (0.01, 1e-9)


@pytest.mark.parametrize("setting", ["placement: best", "balancing_threshold: 0.5", "prior: {decode: [1, 2, -3]}"])
def test_what_the_conductor_would_refuse_is_refused_where_it_was_written(tmp_path: Path, setting: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(f"cluster: {{conductor: {{{setting}}}}}")
    with pytest.raises(ConfigError) as refusal:
        cluster_config(str(file), {}, "test")
    assert refusal.value.key.startswith(f"cluster.conductor.{setting.split(':')[0]}")


def test_the_admission_policy_in_force_is_named_and_what_is_off_stays_off(tmp_path: Path) -> None:
    def modes(**given: object) -> str:
        admission = cluster_config(None, {"directory": str(tmp_path), **given}, "test").conductor.admission
        off = " ".join(name for name in POLICIES if getattr(admission, name) is Mode.OFF)
        return f"{name_of(admission)}, off: {off}"

    assert modes() == modes(admission="forecast") == "forecast, off: predictive"
    assert modes(admission="early+defer") == "early+defer, off: predictive"
    assert modes(admission="predictive") == "predictive, off: "
    assert modes(admission="none") == "none, off: predictive"
    refused = CliRunner().invoke(main, ["config", "--admission", "oracle"])
    assert refused.exit_code == 2
    assert "'oracle' is not one of 'baseline'" in refused.output
    shown = CliRunner().invoke(main, ["config", "--admission", "baseline"])
    assert "baseline: enforce" in shown.output
