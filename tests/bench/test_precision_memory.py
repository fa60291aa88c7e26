"""The memory figure on a model small enough for seconds: its rows, its sides, its mistakes."""

from dataclasses import replace

import pytest
from bench_tiny import TINY

from sparing.base.config import UserError
from sparing.bench import precision_memory
from sparing.bench.figures import bench
from sparing.kernels.formats import this_machine

WIDE = replace(TINY, vocab_size=4096, hidden_size=256, num_layers=6, num_heads=4, intermediate_size=1024, moe_intermediate_size=256)


DTYPE = this_machine().training_dtype("cpu")


@pytest.mark.slow
def test_few_bits_take_less(monkeypatch):
    monkeypatch.setattr(precision_memory, "MODELS", {"tiny": WIDE})
    rows = bench("precision", "memory", models="tiny", batch_size=4, seq_len=64, linear="none")["rows"]
    assert all(row["formats"] == {"ours": DTYPE, "peer": DTYPE} and row["linear"] == "none" for row in rows)
    peaks = [row for row in rows if row["name"].endswith(": peak")]
    assert len(peaks) == 2 and all(row["ratio"] == row["ours"] / row["peer"] and row["required"] == 0.5 for row in peaks)
    full, small = peaks[0]["found"]["full"], peaks[0]["found"]["ours"]
    assert 0 < small["peak"] < 0.75 * full["peak"]
    assert full["peak"] >= full["updated"] > 0 and full["imported"] > 50e6
    counted = {row["name"].split(": ")[1]: row for row in rows if "counted" in row["name"]}
    assert counted["weights, counted"]["ratio"] == pytest.approx(0.5, abs=0.01)
    assert counted["optimizer, counted"]["ratio"] == pytest.approx(0.26, abs=0.02)
    assert sum("plan of the process" in row["name"] for row in rows) == 2


def test_a_wrong_model_is_one_line():
    with pytest.raises(UserError, match="choose from dense, mixture"):
        bench("precision", "memory", models="dens")
