"""A page is one file that holds the run's figures and fetches nothing; what is absent is said."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs

from report import figures
from report.curves import Sketch, sketch
from report.html import comparison_page, library, run_page
from report.lines import headline, lines
from tests.report_runs import row, run, seeded_run


def plots(page: str) -> list[dict[str, Any]]:
    found = re.search(r"<script id='plots' type='application/json'>(.*?)</script>", page, re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


def without_plotly(page: str) -> str:
    return page.replace(get_plotlyjs(), "")


@pytest.fixture(scope="module")
def one() -> Sketch:
    return sketch(seeded_run(requests=300), command="halfmoon simulate --seed 1")


@pytest.fixture(scope="module")
def page(one: Sketch) -> str:
    return run_page(one)


def test_the_first_lines_that_were_left_out_stand_at_the_top() -> None:
    settings = {"lines skipped": 7, "first lines skipped": ["line 2: <none>", "line 5", "line 9"]}
    page = run_page(sketch(run(row(), settings=settings)))
    assert "7 malformed lines were left out; the first 3: line 2: &lt;none&gt;; line 5; line 9" in page
    assert "One seed" not in page, "nobody said that it had one"


def test_the_page_has_every_figure_of_the_run(one: Sketch, page: str) -> None:
    for _, value, _ in headline(one):
        assert f">{value}<" in page
    for line in lines(one):
        name = line.name + (f", {line.unit}" if line.unit else "")
        assert f"<th>{name}</th><td>{line.text}</td>" in page, name
    for text in (one.title, one.digest, one.command, "8P+2D", "evictions", "120,456", "+18.0"):
        assert text in page, text


def test_the_page_needs_no_network(page: str) -> None:
    assert page.count(get_plotlyjs()) == 1
    ours = without_plotly(page)
    assert not re.search(r"(src|href)\s*=|@import|url\(|https?://", ours)


def test_pages_of_one_folder_may_share_the_library(one: Sketch) -> None:
    for page in (run_page(one, "../plotly.min.js"), comparison_page("two", [one, one], shared="../plotly.min.js")):
        assert library() not in page
        assert re.findall(r"(?:src|href)\s*=\s*\S+", page) == ["src='../plotly.min.js'></script>"]
        assert len(plots(page)) > 5


def test_every_plot_is_one_that_plotly_knows(page: str) -> None:
    drawn = plots(page)
    assert len(drawn) == page.count("<div id='plot") == 9
    for plot in drawn:
        go.Figure(plot)  # raises on an unknown property
        assert plot["layout"]["xaxis"]["title"]["text"]


def test_limits_are_drawn_where_they_are(page: str) -> None:
    ttft, tbt = plots(page)[:2]
    assert [shape["x0"] for shape in ttft["layout"]["shapes"]] == [30.0]
    assert [shape["x0"] for shape in tbt["layout"]["shapes"]] == [100.0]
    assert ttft["layout"]["annotations"][0]["text"] == "limit 30 s"


def test_a_logarithmic_axis_has_ticks_that_read() -> None:
    plot = figures.ttft([sketch(run(*(row(ttft_s=t) for t in (0.04, 0.5, 30.0))))])
    assert plot is not None
    axis = plot["layout"]["xaxis"]
    assert axis["type"] == "log"
    assert axis["ticktext"] == ["0.1", "1", "10"]
    few = figures.tbt([sketch(run(row(tbt_worst_s=0.016), row(tbt_worst_s=0.9)))])
    assert few is not None
    assert few["layout"]["xaxis"]["ticktext"] == ["20", "50", "100", "200", "500"]


def test_a_single_wild_error_does_not_flatten_the_others() -> None:
    rows = [row(f"r{n}", ttft_s=1.0, predicted_ttft_s=1.0 + n / 200) for n in range(200)]
    plot = figures.errors([sketch(run(*rows, row("wild", ttft_s=1000.0, predicted_ttft_s=1.0)))], "ttft")
    assert plot is not None
    low, high = plot["layout"]["xaxis"]["range"]
    assert -0.1 < low <= 0.0
    assert 0.9 < high < 1.1
    assert plot["data"][0]["x"][0] == -999.0, "it is there for whoever zooms out"


def test_what_did_not_happen_is_said() -> None:
    page = without_plotly(run_page(sketch(run())))
    for sentence in ("No request was rejected.", "No request got a first token.", "No samples were taken."):
        assert sentence in page
    assert plots(page) == []


def test_text_from_outside_is_text() -> None:
    evil = "</script><script>alert(1)</script>"
    made = replace(seeded_run(requests=60), title=evil, settings={evil: evil}, counters={evil: 1})
    for page in (run_page(sketch(made)), comparison_page(evil, [sketch(made, label=evil)] * 2, evil)):
        assert "<script>alert" not in page
        assert page.count("</script>") == without_plotly(page).count("</script>") == 3


def test_a_comparison_has_every_run() -> None:
    runs = [replace(seeded_run(n, 60), settings={"policy": f"p{n}", "seed": 1}) for n in range(1, 11)]
    sketches = [sketch(made, label=f"policy p{n}") for n, made in enumerate(runs, 1)]
    page = comparison_page("ten", sketches)
    assert "10 runs, different in: policy" in page
    assert "The 8 runs of highest goodput; the tables have all 10." in page
    for found in sketches:
        assert f"<th>{found.label}</th>" in page
        assert f"<td>{found.statistics.served_kv_tokens:,}</td>" in page
    for plot in plots(page):
        go.Figure(plot)


def test_a_swept_number_is_an_axis() -> None:
    sketches = [
        sketch(replace(seeded_run(1, 30), settings={"policy": policy, "speedup": speedup}))
        for policy in ("early", "predictive")
        for speedup in (3.0, 1.0, 2.0)
    ]
    assert figures.differing(sketches) == ["policy", "speedup"]
    plot = figures.goodput_of(sketches)
    assert [(line["name"], line["x"]) for line in plot["data"]] == [
        ("policy early", [1.0, 2.0, 3.0]), ("policy predictive", [1.0, 2.0, 3.0]),
    ]  # fmt: skip
    assert figures.goodput_of(sketches[:2])["data"][0]["type"] == "bar"


def test_bars_add_up() -> None:
    found = sketch(run(row(input_tokens=200, hit_tokens_dram=50, prefill_s=3.0, ttft_s=1.0)))
    hits = figures.hits([found])
    assert hits is not None
    assert [(bar["name"], bar["x"]) for bar in hits["data"]] == [
        ("on the worker’s device", [0.0]), ("in its DRAM", [25.0]), ("on another node", [0.0]), ("computed", [75.0]),
    ]  # fmt: skip
