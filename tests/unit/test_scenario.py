"""A scenario refuses what makes no sense, is asked again by one command, and is swept over every combination."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import Any

import pytest

from cli.scenario import COMBINATIONS_MAX, SHOWN_AS, Scenario, command, scenario, slug, sweep, without_seed
from conductor.admission_config import AdmissionConfig, Mode
from conductor.admission_policies import admission_named
from conductor.config import ConductorConfig
from halfmoon.errors import ConfigError

BASE = Scenario(trace="chat.jsonl", prefill=8, decode=8)
FIELDS = {option.replace("_", "-"): name for name, option in SHOWN_AS.items()}


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("speedup", -1.0, "a number above 0"),
        ("speedup", float("nan"), "a number above 0"),
        ("speedup", float("inf"), "at most 1e"),
        ("output-scale", 0.0, "a number above 0"),
        ("slo-ttft", -3.0, "seconds, above 0"),
        ("slo-tbt", 0.0, "seconds, above 0"),
        ("prefill", -1, "0 to 1000 nodes"),
        ("prefill", 0, "a prefill and a decode node, or a coupled one"),
        ("requests", 0, "at least 1"),
        ("jitter", -1.0, "0 (off) to 3600 s"),
        ("belief-bias", 1.0, "a share in [0, 1)"),
        ("belief", "0", "0.01 to 100 times the truth"),
        ("belief", "nan", "0.01 to 100 times the truth"),
        ("belief", "much", "0.01 to 100 times the truth"),
        ("belief", "prefill=", "0.01 to 100 times the truth"),
        ("belief", "prefil=10", "by term (prefill, decode, transfer, read, queue)"),
        ("belief", "queue=2,queue=3", "by term"),
        ("belief", "2,decode=3", "by term"),
        ("fit", "melted", "one of online, frozen"),
        ("seed", -1, "an integer in [0, 2^63)"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(option: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        scenario({"trace": "t", FIELDS.get(option, option.replace("-", "_")): value}, "plan")
    assert caught.value.key == f"plan.{option}"
    assert expected in caught.value.expected


def test_coupled_nodes_alone_are_a_cluster() -> None:
    assert scenario({"trace": "t", "prefill": 0, "decode": 0, "coupled": 4}).nodes == "4C"
    assert BASE.nodes == "8P+8D"


def test_what_was_not_given_takes_its_default() -> None:
    assert scenario({"trace": "t", "policy": None, "skip_bad": None}) == Scenario(trace="t")


def test_admission_and_placement_are_a_new_clusters_unless_told_otherwise() -> None:
    product, asked = ConductorConfig(), Scenario(trace="t")
    named = admission_named(asked.policy, product.admission)
    assert enforced(named) == enforced(product.admission) == {"forecast"}
    assert named.defer == product.admission.defer
    assert asked.placement == product.placement.value


def enforced(config: AdmissionConfig) -> set[str]:
    return {name for name, value in asdict(config).items() if value is Mode.ENFORCE}


def test_the_command_asks_for_the_same_again() -> None:
    asked = Scenario(trace="my trace.jsonl", prefill=2, speedup=2.5, slo_tbt_s=0.2, check=True, learn=False, requests=9)
    words = shlex.split(command(asked))
    assert words[:4] == ["halfmoon", "simulate", "--trace", "my trace.jsonl"]
    assert "--check" in words
    assert "--no-learn" in words
    assert words[words.index("--slo-tbt") + 1] == "0.2"
    assert words[words.index("--speedup") + 1] == "2.5"
    assert words[words.index("--requests") + 1] == "9"
    assert "--slo-ttft" not in words
    assert "--skip-bad" not in words


def test_the_command_of_a_sweep_says_once_what_it_varies() -> None:
    said = shlex.split(command(BASE, ["policy=early,none", "slo-ttft=3,4"]))
    assert "--policy" not in said
    assert said[-4:] == ["--sweep", "policy=early,none", "--sweep", "slo-ttft=3,4"]
    assert said[said.index("--seed") + 1] == "1"


def test_a_sweep_is_every_combination() -> None:
    found = sweep(BASE, ["policy=early, predictive", "--speedup=1,2", "slo-ttft=10"])
    assert [label for label, _ in found] == [
        "policy early, speedup 1, slo-ttft 10",
        "policy early, speedup 2, slo-ttft 10",
        "policy predictive, speedup 1, slo-ttft 10",
        "policy predictive, speedup 2, slo-ttft 10",
    ]
    assert [(s.policy, s.speedup, s.slo_ttft_s, s.prefill) for _, s in found][3] == ("predictive", 2.0, 10.0, 8)


@pytest.mark.parametrize(
    ("texts", "key", "expected"),
    [
        (["polcy=early"], "simulate.sweep", "one of trace, format"),
        (["policy"], "sweep", "an option and its values"),
        (["policy=early,"], "sweep", "an option and its values"),
        (["policy=early,early"], "sweep", "every value once"),
        (["seed=1", "seed=2"], "sweep", "every option in one --sweep only"),
        (["speedup=1,fast"], "simulate.speedup", "a number"),
        (["speedup=1,-2"], "simulate.speedup", "a number above 0"),
        (["slo-ttft=1,-2"], "simulate.slo-ttft", "seconds, above 0"),
        (["belief=1,much"], "simulate.belief", "0.01 to 100 times the truth"),
        (["seed=" + ",".join(map(str, range(COMBINATIONS_MAX + 1)))], "sweep", f"at most {COMBINATIONS_MAX}"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(texts: list[str], key: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep(BASE, texts)
    assert caught.value.key == key
    assert expected in caught.value.expected


def test_a_label_without_its_seed_is_what_runs_have_in_common() -> None:
    labels = [label for label, _ in sweep(BASE, ["policy=early,none", "seed=1,2"])]
    assert [without_seed(label) for label in labels] == ["policy early"] * 2 + ["policy none"] * 2
    assert without_seed(sweep(BASE, ["seed=1,2"])[0][0]) == ""


def test_folders_are_told_apart_and_recognised() -> None:
    assert slug(3, "policy early, hardware /a/b.yaml") == "003-policy-early-hardware-a-b.yaml"
