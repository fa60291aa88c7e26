"""With `benchmarks/` beside src/ figures compare with other programs; without it, as after `pip install`, the peer's values are absent."""

import shutil
import subprocess
import sys

import pytest
from bench_tiny import TINY
from tests.infer.conftest import make_run, tokenizer  # noqa: F401

import sparing
from sparing.base.config import UserError
from sparing.bench import peers
from sparing.bench.quality import quality
from sparing.bench.throughput import throughput
from sparing.kernels.decode import library


@pytest.fixture
def installed(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "SOURCE_TREE", tmp_path)


def test_benchmarks_are_found_in_the_source_tree_alone(tmp_path):
    assert peers.exist() and (peers.SOURCE_TREE / "src" / "sparing").is_dir()
    packages = tmp_path / "python3" / "site-packages"
    shutil.copytree(peers.SOURCE_TREE / "src" / "sparing", packages / "sparing")
    command = [sys.executable, "-c", "import sparing.bench.peers as p; print(p.SOURCE_TREE, p.exist())"]
    shown = subprocess.run(command, env={"PYTHONPATH": str(packages)}, capture_output=True, text=True, check=True).stdout
    assert shown.split() == [str(packages.parent), "False"]


def test_training_speed_without_a_peer(installed, text, capsys):
    rows = throughput(str(text / "train"), rounds=1, steps=1, threads=1, batch_size=2, seq_len=32, model=TINY, limit="100s")
    assert [row["name"] for row in rows[:2]] == ["training speed", "MFU"] and len(rows) == 4
    assert all(
        row["ours"] > 0 and row["peer"] is None and row["peer_name"] is None and "peer" not in row["formats"]
        for row in rows
        if row["name"] != "peak memory"
    )
    assert capsys.readouterr().err.count("transformers is left out") == 1


@pytest.mark.skipif(library() is None, reason="int8, which these figures are in, needs a C compiler")
def test_decoding_without_a_peer(installed, make_run, capsys):  # noqa: F811
    path = str(make_run(mtp_depth=1))
    (speed, memory, start) = sparing.bench("infer", "generate", run=path, rounds=1, prompt_tokens=8, tokens=4, threads=1)["rows"]
    assert speed["ours"] > 0 and memory["ours"] > 0 and start["ours"] > 0 and {row["peer"] for row in (speed, memory, start)} == {None}
    assert capsys.readouterr().err.count("transformers is left out") == 1
    sparing.bench("infer", "llamacpp", run=path, rounds=1, prompt_tokens=8, tokens=4, prefill=16, threads=1, texts=2)
    assert capsys.readouterr().err.count("llama.cpp is left out") == 1


def test_quality_without_the_yardstick(installed, tmp_path, capsys):
    assert quality("x", "y", "yardstick:2ktok", out=str(tmp_path)) == []
    assert capsys.readouterr().err.count("the yardstick, which is trained in transformers, is left out") == 1


def test_what_is_only_about_a_peer_is_refused(installed):
    with pytest.raises(UserError, match="bench train tune measures another program only"):
        sparing.bench("train", "tune", data="x", val="y")
