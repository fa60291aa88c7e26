"""Figure 1 on a tiny model: both sides really run, in turn."""

import time

import pytest

pytest.importorskip("transformers")

from bench_tiny import TINY

from sparing.base.config import UserError
from sparing.bench.limit import Limit
from sparing.bench.results import ROW_KEYS
from sparing.bench.throughput import WARM_UP, take_turns, throughput

LINE = "bfloat16: this processor multiplies it 100 times slower than float32 (measured)"
SMALL = {"threads": 1, "batch_size": 2, "seq_len": 32, "model": TINY}


class Fake:
    """A worker whose steps take a tenth of a second."""

    def call(self, method, count=1, **more):
        time.sleep(0.1 * count)
        return {"seconds": 0.1 * count, "losses": [1.0] * count}

    def run(self, function, **more):
        return {"flops": 1.0, "cut_short": None, "setting": {}}


@pytest.mark.slow
def test_figure_where_only_float32_is_fast(text, slow_formats, monkeypatch, capfd):
    """Both sides really train; of the peer's grid only what is far slower is skipped."""
    monkeypatch.setattr("sparing.bench.throughput.PEAK_S", 1.0)
    rows = throughput(str(text / "train"), rounds=2, steps=2, **SMALL)
    assert all(set(ROW_KEYS) <= set(row) for row in rows)
    speed, mfu, peak, memory, gap = rows
    assert speed["ours"] > 0 and speed["ratio"] == pytest.approx(speed["ours"] / speed["peer"]) and speed["unit"] == "tokens/s"
    assert "float32" in speed["peer_name"] and speed["runs"] == 2 and "cut_short" not in speed
    assert [trial["setting"]["precision"] for trial in speed["settings"] if trial["tokens_per_s"]] == ["float32"] * 4
    assert len(speed["settings"]) == 12
    assert all(row["formats"] == {"ours": "float32", "peer": "float32", "peak": "float32"} for row in rows)
    assert peak["name"] == "peak: best square fp32 product"
    assert mfu["ours"] == pytest.approx(speed["ours"] * mfu["flops_per_token"] / (peak["ours"] * 1e9))
    assert memory["ours"] > 0 and memory["peer"] > 0
    assert len(gap["losses"]["ours"]) == WARM_UP + 2 * 2
    assert gap["ours"] < 1e-4 and len(set(gap["losses"]["ours"])) > 1
    shown = capfd.readouterr()
    assert shown.out == "" and f"8 settings: skipped: {LINE}" in " ".join(shown.err.split())


def test_whoever_names_a_slow_format_gets_it_and_is_told(slow_formats, monkeypatch, capfd):
    class Stop(Exception):
        pass

    asked = []

    class Recorder(Fake):
        def __init__(self, threads, limit):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def make(self, function, setting, **more):
            asked.append(setting["precision"])
            raise Stop

    monkeypatch.setattr("sparing.bench.throughput.Worker", Recorder)
    with pytest.raises(Stop):
        throughput(precision="bfloat16", **SMALL)
    assert asked == ["bfloat16"] and f"--precision {LINE}" in " ".join(capfd.readouterr().err.split())


def test_the_limit_cuts_rounds(capfd):
    found = take_turns({"ours": Fake(), "peer": Fake()}, Fake(), 100, 1, {}, Limit(1.5))
    made = found["rounds"].made
    assert 1 <= made < 8 and len(found["ours"]["seconds"]) == made and found["rounds"].more()
    assert f"cut short: {made} of 100 rounds" in " ".join(capfd.readouterr().err.split())
    with pytest.raises(UserError, match="a round of 40 steps would take about 8 s"):
        take_turns({"ours": Fake(), "peer": Fake()}, Fake(), 100, 40, {}, Limit(1.0))
