"""Figure 1 on a tiny model: both sides really run, in turn."""

import pytest

pytest.importorskip("transformers")

from bench_tiny import TINY

from sparing.bench.peer import PeerSetting
from sparing.bench.report import ROW_KEYS
from sparing.bench.throughput import WARM_UP, throughput
from sparing.config import UserError

SMALL = {"threads": 1, "batch_size": 2, "seq_len": 32, "model": TINY, "peak_sizes": (64, 128)}


def test_figure(text, capfd):
    settings = [PeerSetting("eager", "no such experts", "float32"), PeerSetting("eager", "grouped_mm", "float32")]
    rows = throughput(str(text / "train"), rounds=2, steps=2, trial_steps=1, settings=settings, precision="float32", **SMALL)
    assert all(set(ROW_KEYS) <= set(row) for row in rows)
    speed, mfu, peak, memory, gap = rows
    assert speed["ours"] > 0 and speed["ratio"] == pytest.approx(speed["ours"] / speed["peer"]) and speed["unit"] == "tokens/s"
    assert "grouped_mm" in speed["peer_name"] and speed["runs"] == 2
    assert [bool(trial["error"]) for trial in speed["settings"]] == [True, False]
    assert mfu["ours"] == pytest.approx(speed["ours"] * mfu["flops_per_token"] / (peak["ours"] * 1e9))
    assert memory["ours"] > 0 and memory["peer"] > 0
    assert len(gap["losses"]["ours"]) == WARM_UP + 2 * 2
    assert gap["ours"] < 1e-4 and len(set(gap["losses"]["ours"])) > 1
    assert capfd.readouterr().out == ""


def test_no_setting_that_runs_is_the_users_to_know(text):
    with pytest.raises(UserError, match="no setting of transformers trains here"):
        throughput(str(text / "train"), rounds=1, steps=1, settings=[PeerSetting(attention="none")], **SMALL)
