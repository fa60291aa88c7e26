"""The report of real (tiny) runs: whole, offline, drawn in a real browser without overflow at 1280 and 400 pixels."""

import json
import math
import re
import shutil

import pytest
from tests.account.browser import look

from sparing import api
from sparing.account.report.charts import ROWS, charts
from sparing.account.report.page import page
from sparing.account.report.story import POINTS, Story, curve, story
from sparing.base.config import UserError
from sparing.base.run import RunFolder

WISHES = {
    "model": {"hidden_size": 32, "num_layers": 3, "num_heads": 2, "vocab_size": 384, "n_routed_experts": 4, "num_dense_layers": 1},
    "train": {"seq_len": 32, "batch_size": 8, "threads": 1, "replicas": 1, "compile": False, "micro_batch_size": 8},
    "data": {"workers": 1},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs, the first with a prediction beside it."""
    root = tmp_path_factory.mktemp("runs")
    (root / "text").mkdir()
    for i in range(30):
        lines = [f"The {word} number {j} of <b>book</b> {i} went to sea & came back." for j, word in enumerate(["cat", "dog", "ship"] * 10)]
        (root / "text" / f"{i}.txt").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARING_HOME", str(root / "home"))
        for name in ("one", "two"):
            api.train([str(root / "text")], "30ktok", str(root / name), WISHES)
        predicted = {"time_s": {"value": 5.0, "low": 1.0, "high": 60.0}, "bpb": {"value": 2.0, "low": 1.9, "high": 2.1}}
        (root / "one/state/prediction.json").write_text(json.dumps(predicted))
        api.report(str(root / "one"))
        api.compare([str(root / "one"), str(root / "two")], str(root / "compare.html"))
        yield root


def test_the_page_has_all_its_parts(runs):
    text = (runs / "one/report.html").read_text()
    for heading in ("Predicted and actual", "Curves", "Experts", "Samples", "Receipt", "Recipe"):
        assert f">{heading}</h2>" in text
    for title in ("Training loss", "Held-out text", "Speed", "MFU", "Memory", "Experts&#x27; balance"):
        assert title in text, title
    assert text.count("plotly.js v") == 1  # embedded once
    assert "&lt;b&gt;book&lt;/b&gt;" in text and "<b>book</b>" not in text.split("<script")[0]
    assert not re.search(r'<(script|link|img|iframe)[^>]+(src|href)="(?!data:)', text)


def test_the_loads_of_experts_were_written_sparsely(runs):
    found = story(RunFolder.open(runs / "one"))
    assert 10 <= len(found.loads) <= 300 and len(found.loads[0]["loads"]) == 2
    tokens = 8 * 32 * 2  # batch, length, experts a token
    assert all(sum(layer) == tokens for line in found.loads for layer in line["loads"])
    assert "memory_bytes" in found.steps[-1]


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["one/report.html", "compare.html"])
def test_in_a_real_browser(runs, name, width):
    seen = look(runs / name, width, unfold=True)
    assert seen["width"] == width
    assert seen["scroll"] <= width and seen["overflowing"] == []
    assert seen["plots"] == seen["drawn"] >= 6 and seen["unlabelled"] == 0
    assert seen["requests"] == [] and seen["errors"] == []
    assert seen["focusable"] >= 7


def test_a_page_that_is_too_wide_is_noticed(tmp_path):
    (tmp_path / "wide.html").write_text("<body style='margin:0'><p style='width:600px'>wide</p></body>")
    seen = look(tmp_path / "wide.html", 400)
    assert seen["scroll"] == 600 and seen["overflowing"] == ["P. wide"]


def test_contrast_of_text_is_enough():
    """WCAG 2.2, 1.4.3: 4.5:1 for text."""
    from sparing.account.report.charts import COLOURS
    from sparing.account.report.page import STYLE

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    named = dict(re.findall(r"--(\w+): (#\w{6})", STYLE))
    for name in ("ink", "soft", "accent"):
        for ground in ("#ffffff", named["panel"]):
            assert (luminance(ground) + 0.05) / (luminance(named[name]) + 0.05) >= 4.5, (name, ground)
    for colour in COLOURS:  # lines need 3:1 (1.4.11)
        assert 1.05 / (luminance(colour) + 0.05) >= 3, colour


def test_a_run_without_steps_or_plotly_is_one_clear_line(tmp_path, runs, monkeypatch):
    run = RunFolder.create(tmp_path / "run")
    run.config_file.write_text("")
    with pytest.raises(UserError, match="no training steps"):
        api.report(str(run))
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(UserError, match="pip install plotly"):
        api.report(str(runs / "one"), str(tmp_path / "r.html"))
    with pytest.raises(UserError, match="there is no folder"):
        api.report(str(runs / "one"), str(tmp_path / "nowhere/r.html"))


def made_up(steps: int, experts: int = 0, layers: int = 1) -> Story:
    lines = [{"step": i, "tokens": 1000 * i, "loss": 5 - i / steps} for i in range(1, steps + 1)]
    loads = [{"step": i, "loads": [[i] * experts] * layers} for i in range(1, 4)] if experts else []
    return Story(RunFolder("x"), "x", lines, [], loads, [], {}, None)


def test_long_runs_are_thinned_and_many_experts_summed_up():
    x, y = curve(made_up(100_000), "loss")
    assert len(x) <= POINTS and y[0] == pytest.approx(5, abs=0.01) and y[-1] == pytest.approx(4, abs=0.01)
    (chart,) = [chart for chart in charts([made_up(10, experts=64, layers=58)]) if chart.wide]
    assert len(chart.data[0]["z"]) == 58 < ROWS
    (chart,) = [chart for chart in charts([made_up(10, experts=8, layers=2)]) if chart.wide]
    assert len(chart.data[0]["z"]) == 16 and set(chart.data[0]["z"][0]) == {1.0}


def test_numbers_that_are_none_are_left_out(runs, tmp_path):
    """metrics.jsonl of an older version, or of another program, may say NaN; a page and a receipt come of it all the same."""
    shutil.copytree(runs / "one", tmp_path / "run")
    run = RunFolder.open(tmp_path / "run")
    lines = run.metrics_file.read_text().splitlines()
    for i, name in ((0, "loss"), (1, "tokens_per_s"), (2, "grad_norm")):
        lines[i] = re.sub(rf'"{name}": [^,}}]+', f'"{name}": {["NaN", "Infinity", "-Infinity"][i]}', lines[i])
    last = max(i for i, line in enumerate(lines) if "eval_bpb" in line)
    lines[last] = re.sub(r'"eval_bpb": [^,}]+', '"eval_bpb": NaN', lines[last])
    run.metrics_file.write_text("\n".join(lines) + "\n")
    (run.state / "summary.json").write_text(re.sub(r'"loss": [^,}]+', '"loss": NaN', (run.state / "summary.json").read_text()))
    found = story(run)
    assert len(found.steps) == len(story(RunFolder.open(runs / "one")).steps) - 1
    figures = re.findall(r'<script type="application/json" id="figure\d+">(.*?)</script>', page([found]))
    assert len(figures) >= 6
    for figure in figures:
        json.loads(figure, parse_constant=pytest.fail)
    assert api.report(str(run))["bytes"] > 1e6
    api.compare([str(run), str(runs / "two")], str(tmp_path / "c.html"))
    assert math.isfinite(api.receipt(str(run))["actual"]["bpb"]["value"])


def test_an_unfinished_run_without_a_ledger_is_shown_as_far_as_it_is():
    found = made_up(10)
    found.notes = ["not finished"]
    text = page([found])
    assert "not finished" in text and ">Curves</h2>" in text and ">Receipt</h2>" not in text and ">Experts</h2>" not in text
