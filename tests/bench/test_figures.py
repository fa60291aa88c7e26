"""The way in: figures, options, errors."""

import pytest
import torch

from sparing.base.config import UserError
from sparing.bench.figures import FIGURES, bench
from sparing.bench.results import ROW_KEYS, print_table, row


def test_rows_have_the_schema_and_a_table_goes_to_standard_error(capsys):
    result = bench("train", "startup", runs=2)
    assert set(ROW_KEYS) == set(result["rows"][0]) and result["rows"][0]["runs"] == 2 and 0 < result["rows"][0]["ours"] < 20
    print_table(**result)
    shown = capsys.readouterr()
    assert shown.out == "" and "sparing --help" in shown.err and "Starting up" in shown.err


def test_ratio_is_ours_over_the_peers():
    assert row("a", 3.0, "s", 2.0, "b")["ratio"] == 1.5
    assert row("a", None, "s", 2.0)["ratio"] is None and row("a", 3.0, "s")["ratio"] is None


def test_mistakes_are_one_line_with_the_nearest_choice():
    for arguments, options, said in (
        (("troughput",), {}, "throughput"),
        (("throughput",), {"round": 3}, "--rounds"),
        (("quality",), {"val": "x"}, "needs --data"),
        (("throughput",), {"rounds": 0}, "at least 1"),
        (("quality",), {"data": "x", "val": "x", "runs": "dense"}, "SIDE:BUDGET"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            bench("train", *arguments, **options)
        assert "\n" not in str(caught.value)
    assert set(FIGURES["train"]) == {"throughput", "quality", "tune", "gpu", "startup", "forecast"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_the_gpu_figure_needs_a_gpu():
    with pytest.raises(UserError, match="CUDA"):
        bench("train", "gpu")
