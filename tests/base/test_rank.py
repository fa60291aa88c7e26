"""How a rank ends."""

import pytest

from sparing.base.rank import STATUS, leave


@pytest.mark.parametrize("local", [0, 1])
def test_each_host_learns_that_its_ranks_were_stopped(monkeypatch, tmp_path, local):
    names = {"TORCHELASTIC_RUN_ID": "x", "RANK": 2 + local, "WORLD_SIZE": 4, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": 2}
    for name, value in (names | {STATUS: tmp_path / "status"}).items():
        monkeypatch.setenv(name, str(value))
    assert leave(0) == 0 and not (tmp_path / "status").exists()
    assert leave(1) == 1, "a rank that failed is started anew"
    assert leave(130) == 0
    assert (tmp_path / "status").exists() == (local == 0)
    assert local or (tmp_path / "status").read_text() == "130"
