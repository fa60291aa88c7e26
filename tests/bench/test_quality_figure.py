"""Figure 2: what is run, what is compared, and one of each side for real."""

import json

import pytest

pytest.importorskip("transformers")

from sparing.base.config import UserError
from sparing.bench.quality import parse_runs, quality, rows_of
from sparing.bench.results import ROW_KEYS
from sparing.kernels.formats import this_machine

RECIPE = """
[data]
max_tokens = 1000000
[model]
vocab_size = 512
hidden_size = 32
num_layers = 2
num_heads = 2
q_lora_rank = 32
kv_lora_rank = 32
moe_intermediate_size = 32
[train]
seq_len = 32
batch_size = 4
micro_batch_size = 4
threads = 1
compile = false
dtype = "float32"
"""


@pytest.mark.slow
def test_both_sides_run_and_are_kept(text, tmp_path):
    (tmp_path / "tiny.toml").write_text(RECIPE)
    options = {"yardstick": "64x1@1e-2", "yardstick_batch": 1, "context": 32, "val_bytes": 2000, "recipe": str(tmp_path / "tiny.toml")}
    runs = "moe+mtp:2ktok, yardstick:2ktok"
    rows = quality(str(text / "train"), str(text / "val"), runs, **options, threads=1, out=str(tmp_path / "out"))
    ours, reached = rows
    assert all(set(ROW_KEYS) <= set(row) for row in rows)
    assert ours["result"]["recipe"]["model"]["mtp_depth"] == 1 and ours["result"]["recipe"]["model"]["num_dense_layers"] == 1
    assert 1 < ours["ours"] < 9 and 1 < ours["peer"] < 9 and ours["result"]["tokens"] == 15 * 128
    assert reached["peer"] == reached["result"]["seconds"]
    assert ours["formats"] == {"ours": "float32", "peer": this_machine().training_dtype("cpu")}
    [kept] = (tmp_path / "out").glob("moe-mtp-2ktok-*.json")
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"bpb": 0.5}))
    again = quality(str(text / "train"), str(text / "val"), runs, **options, threads=1, out=str(tmp_path / "out"))
    assert again[0]["ours"] == 0.5, "a result that is there is not measured again"


def result(bpb: float, seconds: float) -> dict:
    return {"bpb": bpb, "seconds": seconds, "dtype": "float32"}


def test_the_yardstick_is_the_peer_of_all():
    plan = parse_runs("dense:2m, moe:5m, yardstick:5m, yardstick:20m")
    rows = rows_of(plan, [result(1.9, 120), result(1.7, 300), result(2.0, 300), result(1.8, 1200)])
    assert [row["peer"] for row in rows] == [1.8, 1.8, 1200]
    assert rows[-1]["ours"] == 300 and rows[-1]["name"].endswith("moe")
    assert rows_of(plan[:1], [result(1.9, 120)])[0]["peer"] is None
    assert rows_of(plan[2:], [result(2.0, 300), result(1.8, 1200)])[-1]["ours"] is None


def test_runs_are_checked_before_any_starts():
    for wrong in ("dense", "desne:5m", "dense:5", "dense:5m,,moe:5m", "dense:../../x"):
        with pytest.raises(UserError):
            parse_runs(wrong)
