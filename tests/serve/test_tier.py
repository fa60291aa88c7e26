"""Fewer experts: only where the operator allows it and the request asks for it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.serve.chrome import Page
from tests.serve.conftest import Server

from sparing.kernels.decode import library

pytestmark = pytest.mark.skipif(library() is None, reason="there is no C compiler")
ASK = {"model": "copy", "prompt": "import json\n", "max_tokens": 40, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def copy(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("tier") / "copy"
    shutil.copytree(run, path)
    return path


def test_without_the_operators_word_it_is_refused(server, copy, home):
    status, _, body = server.ask("POST", "/v1/completions", ASK | {"model": server.name, "tier": "approximate"})
    assert status == 400 and body["error"]["code"] == "tier_not_available" and body["error"]["param"] == "tier"
    assert server.ask("POST", "/v1/completions", ASK | {"model": server.name, "tier": "exact"})[0] == 200
    assert server.ask("POST", "/v1/completions", ASK | {"model": server.name, "tier": "quick"})[0] == 400
    assert server.ask("GET", "/v1/models")[2]["data"][0]["tiers"] == ["exact"]
    assert "approximate" not in server.ask("GET", "/metrics")[2]
    for options, message in (
        (["--approximate"], "not calibrated for approximate answers"),
        (["--approximate", "--approximate-floor", "9"], "approximate floor 9"),
        (["--approximate", "--approximate-limit", "100"], "approximate limit 100 %"),
    ):
        command = [sys.executable, "-m", "sparing", "serve", str(copy), "--port", "0", *options]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "SPARING_HOME": str(home)})
        assert done.returncode == 2 and message in done.stderr.splitlines()[-1]


def test_both_tiers_of_one_server(copy, home):
    data = str(Path(json.__file__).parent)
    first = ["--approximate-data", data, "--approximate-limit", "5"]
    answers = []
    for options in (first, ["--approximate"]):  # the second start knows the calibration
        server = Server(copy, *options, env={"SPARING_HOME": str(home)})
        assert server.ask("GET", "/v1/models")[2]["data"][0]["tiers"] == ["exact", "approximate"]
        _, _, exact = server.ask("POST", "/v1/completions", ASK)
        _, _, thin = server.ask("POST", "/v1/completions", ASK | {"tier": "approximate"})
        assert exact["usage"]["tier"] == "exact" and "approximate" not in exact["usage"]
        said = thin["usage"]["approximate"]
        assert thin["usage"]["tier"] == "approximate"
        assert 1 <= said["experts_per_token"] < said["experts_exact"] == 2 and said["back_offs"] == 0
        assert said["loss_increase"] <= 0.025 and said["limit"] == pytest.approx(0.05)
        metrics = server.ask("GET", "/metrics")[2]
        mean = re.search(r"^sparing_approximate_experts_per_token (\S+)$", metrics, re.M)
        assert float(mean[1]) == pytest.approx(said["experts_per_token"], abs=1e-3)
        answers.append((exact["choices"][0]["text"], thin["choices"][0]["text"]))
        assert server.stop() == 0
        assert any("approximate answers: 1." in line for line in server.log)
    assert answers[0] == answers[1]
    kept = json.loads(next((copy / "packed").glob("*-experts.json")).read_text())
    assert kept["limit"] == pytest.approx(0.05) and 1 <= kept["experts"] < 2 and kept["date"] and kept["text"]


def test_the_page_offers_what_the_server_allows(server, copy, home, tmp_path):
    with Page(tmp_path / "exact") as page:
        page.go(server.url)
        page.until(f"document.querySelector('#model').textContent.startsWith('{server.name}')")
        assert page.js("document.querySelector('#tiers').hidden")
    both = Server(copy, "--approximate-data", str(Path(json.__file__).parent), "--approximate-limit", "5", env={"SPARING_HOME": str(home)})
    try:
        with Page(tmp_path / "both") as page:
            page.go(both.url)
            page.until("document.querySelector('#model').textContent.startsWith('copy')")
            page.js("document.querySelector('#open').click()")
            assert not page.js("document.querySelector('#tiers').hidden")
            page.js("document.querySelector('#tier').value = 'approximate'")
            page.js("document.querySelector('#settings button').click()")
            page.until("JSON.parse(localStorage.getItem('sparing.chat.1') || '{}').tier === 'approximate'")
            page.js("document.querySelector('#page').value = 'import json'")
            page.js("document.querySelector('#send').click()")
            page.until("document.querySelector('#measured').textContent.includes('approximate')")
            assert page.problems == []
    finally:
        assert both.stop() == 0
