"""Curation's speed beside datatrove's, where that is installed."""

from importlib.util import find_spec

import pytest

from sparing.base.config import UserError
from sparing.bench.figures import bench


def test_text_is_curated_and_timed(text):
    result = bench("data", data=str(text / "train"), rounds=1, megabytes=0.1)
    same, default = result["rows"]
    assert same["unit"] == "MB/s" and same["ours"] > 0 and default["ours"] > 0 and same["runs"] == 1
    assert 0 <= same["kept"] <= 1 and same["megabytes"] >= 0.1
    assert (same["peer"] is None) == (find_spec("datatrove") is None)


def test_what_cannot_be_measured(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="no usable text"):
        bench("data", "curate", data=str(tmp_path))
    with pytest.raises(UserError, match="must be more than 0"):
        bench("data", data=str(tmp_path), megabytes=0)
