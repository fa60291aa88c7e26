"""Figure 1 on a tiny model: both sides really run, in turn."""

import time

import pytest

pytest.importorskip("transformers")

from bench_tiny import TINY

from sparing.bench.limit import Limit
from sparing.bench.peer import PeerSetting
from sparing.bench.report import ROW_KEYS
from sparing.bench.throughput import WARM_UP, take_turns, throughput
from sparing.config import UserError
from sparing.kernels.formats import this_machine

SMALL = {"threads": 1, "batch_size": 2, "seq_len": 32, "model": TINY, "peak_sizes": (64, 128)}


def test_figure(text, capfd):
    settings = [PeerSetting("eager", "no such experts"), PeerSetting("eager", "grouped_mm")]
    rows = throughput(str(text / "train"), rounds=2, steps=2, trial_steps=1, settings=settings, precision="float32", **SMALL)
    assert all(set(ROW_KEYS) <= set(row) for row in rows)
    speed, mfu, peak, memory, gap = rows
    assert speed["ours"] > 0 and speed["ratio"] == pytest.approx(speed["ours"] / speed["peer"]) and speed["unit"] == "tokens/s"
    assert "grouped_mm" in speed["peer_name"] and speed["runs"] == 2 and "cut_short" not in speed
    assert [bool(trial["error"]) for trial in speed["settings"]] == [True, False]
    trained_in = this_machine().training_dtype("cpu")
    assert all(row["formats"] == {"ours": "float32", "peer": "float32", "peak": trained_in} for row in rows)
    assert mfu["ours"] == pytest.approx(speed["ours"] * mfu["flops_per_token"] / (peak["ours"] * 1e9))
    assert memory["ours"] > 0 and memory["peer"] > 0
    assert len(gap["losses"]["ours"]) == WARM_UP + 2 * 2
    assert gap["ours"] < 1e-4 and len(set(gap["losses"]["ours"])) > 1
    assert capfd.readouterr().out == ""


def test_without_fast_bfloat16_the_peer_has_float32_and_ours_what_was_asked_for(text, slow_formats, capfd):
    """The whole grid: what is far slower is skipped on the peer's side, where nobody named it, and said on ours, where somebody did."""
    rows = throughput(str(text / "train"), rounds=1, steps=1, trial_steps=1, precision="bfloat16", **SMALL)
    speed, _, peak, *_ = rows
    assert speed["formats"] == {"ours": "bfloat16", "peer": "float32", "peak": "float32"}
    assert peak["name"] == "peak: best square fp32 product"
    timed = [trial["setting"]["precision"] for trial in speed["settings"] if trial["tokens_per_s"]]
    assert timed == ["float32"] * 4 and len(speed["settings"]) == 12
    said = " ".join(capfd.readouterr().err.split())
    line = "bfloat16: this processor multiplies it 100 times slower than float32 (measured)"
    assert f"8 settings: skipped: {line}" in said and f"--precision {line}" in said


def test_no_setting_that_runs_is_the_users_to_know(text):
    with pytest.raises(UserError, match="no setting of transformers trains here"):
        throughput(str(text / "train"), rounds=1, steps=1, settings=[PeerSetting(attention="none")], **SMALL)


class Fake:
    """A worker whose steps take a tenth of a second."""

    def ask(self, do, count=1, **more):
        time.sleep(0.1 * count * (do == "steps"))
        return {"seconds": 0.1 * count, "losses": [1.0] * count} if do == "steps" else {"flops": 1.0, "cut_short": None}


def test_the_limit_cuts_rounds(capfd):
    found = take_turns({"ours": Fake(), "peer": Fake()}, Fake(), 100, 1, {}, Limit(1.5))
    made = found["rounds"].made
    assert 1 <= made < 8 and len(found["ours"]["seconds"]) == made and found["rounds"].said()
    assert f"cut short: {made} of 100 rounds" in " ".join(capfd.readouterr().err.split())
    with pytest.raises(UserError, match="a round of 40 steps would take about 8 s"):
        take_turns({"ours": Fake(), "peer": Fake()}, Fake(), 100, 40, {}, Limit(1.0))
