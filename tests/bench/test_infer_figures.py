"""The figures of `sparing bench infer` on a tiny model: both sides really run, in turn."""

import pytest
from tests.infer.conftest import make_run, tokenizer  # noqa: F401

from sparing.base.config import UserError
from sparing.base.config_file import read_config
from sparing.base.run import RunFolder
from sparing.bench.drafting import repeats
from sparing.bench.figures import bench
from sparing.bench.results import ROW_KEYS
from sparing.kernels.decode import library

COMPILED = pytest.mark.skipif(library() is None, reason="int8, which these figures are in, needs a C compiler")


@pytest.mark.slow
def test_generate(make_run):  # noqa: F811
    pytest.importorskip("transformers")
    path = str(make_run(mtp_depth=1))
    rows = bench("infer", "generate", run=path, rounds=2, prompt_tokens=8, tokens=12, threads=1, weights="float32", compile=False)["rows"]
    assert all(set(ROW_KEYS) <= set(row) for row in rows)
    speed, memory, start = rows
    assert {trial["setting"]["dtype"] for trial in speed["settings"]} == {"float32", "bfloat16"} and len(speed["settings"]) == 8
    assert speed["formats"]["ours"] == "float32" and speed["formats"]["peer"] in speed["peer_name"]
    assert speed["ours"] > 0 and speed["peer"] > 0
    assert speed["same_tokens"] == 1.0 or "bfloat16" in speed["peer_name"]  # whichever setting was the fastest
    assert "dynamic" in speed["peer_name"] or "static" in speed["peer_name"]
    assert memory["ours"] > 0 and start["ours"] > 0


def test_drafts(make_run, tmp_path):  # noqa: F811
    (tmp_path / "text.txt").write_text("def parse(self, text):\n    return json.loads(text)\n\n" * 40)
    options = {"data": str(tmp_path / "text.txt"), "prompts": 4, "prompt_tokens": 8, "tokens": 16, "threads": 1}
    speed, accepted, repeated = bench("infer", "drafts", run=str(make_run()), **options)["rows"]
    assert speed["ratio"] > 0 and 0 <= accepted["ours"] <= 1 and speed["counts"]["drafted_total"] > 0
    assert 0 <= repeated["ours"] <= 1
    with pytest.raises(UserError, match="no MTP module"):
        bench("infer", "drafts", run=str(make_run(mtp_depth=0)))


@COMPILED
def test_turns(make_run):  # noqa: F811
    (row,) = bench("infer", "turns", run=str(make_run(mtp_depth=0)), rounds=2, first=200, second=20, threads=1)["rows"]
    assert row["ratio"] > 0  # below 1 on a machine that does nothing else


@COMPILED
def test_cache(make_run):  # noqa: F811
    path = make_run(mtp_depth=1)
    c = read_config(RunFolder.open(path).config_file).model
    (row,) = bench("infer", "cache", run=str(path), context=c.max_position_embeddings)["rows"]
    heads = c.num_layers * c.num_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    latents = (c.num_layers + 1) * (c.kv_lora_rank + c.qk_rope_head_dim)
    assert row["ratio"] == pytest.approx(latents / heads, rel=0.2)  # blocks are whole
    with pytest.raises(UserError, match="context"):
        bench("infer", "cache", run=str(path), context=c.max_position_embeddings + 1)


@COMPILED
def test_experts(make_run):  # noqa: F811
    speed, memory = bench("infer", "experts", run=str(make_run(mtp_depth=0)), rounds=1, tokens=4, threads=1)["rows"]
    assert speed["ours"] > 0 and speed["peer"] == speed["tokens_per_s"] > 0 and 0 < speed["reads"]
    assert 0 < memory["ours"] < memory["peer"]


def test_repeats():
    assert repeats(list(range(20))) == 0
    assert repeats([1, 2] * 10) == pytest.approx(11 / 13)
