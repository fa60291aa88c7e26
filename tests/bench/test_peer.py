"""The two sides of the throughput figure compute the same training."""

from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("transformers")

from bench_tiny import TINY

from sparing.base.config import UserError
from sparing.bench.ours import OurSetting, OursSide, save_initial_weights, shifted
from sparing.bench.peer import PeerSide, all_settings, peer_config

OPTIMIZER = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


def losses(side, steps: int = 6) -> list[float]:
    tokens = torch.randint(0, TINY.vocab_size, (steps, 2, 32), generator=torch.Generator().manual_seed(1))
    return [side.step(batch) for batch in tokens]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_initial_weights(asdict(TINY), 0, str(path))
    return path


@pytest.fixture(scope="module")
def ours(weights) -> list[float]:
    return losses(OursSide(TINY, OurSetting("float32"), weights, OPTIMIZER))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_the_losses_agree(precision, weights, ours):
    """The settings that are timed: all of them train."""
    for setting in (setting for setting in all_settings(compile=False) if setting.precision == precision):
        peer = losses(PeerSide(TINY, setting, weights, OPTIMIZER))
        assert peer == pytest.approx(ours, rel=1e-4 if precision == "float32" else 2e-2)
        assert peer[-1] != pytest.approx(peer[0], rel=1e-3), "the optimizer moves nothing"


def test_other_initial_weights_are_told_apart(tmp_path, ours):
    save_initial_weights(asdict(TINY), 1, str(tmp_path / "other.safetensors"))
    other = losses(OursSide(TINY, OurSetting("float32"), tmp_path / "other.safetensors", OPTIMIZER))
    assert other[1:] != pytest.approx(ours[1:], rel=1e-4)


def test_the_grid_is_the_figures():
    """Every attention and experts in every number format, and all of them compiled as well."""
    plain, both = all_settings(compile=False), all_settings(compile=True)
    assert len(set(plain)) == len(plain) == 12 and len(set(both)) == 24
    assert [sum(s.precision == p for s in plain) for p in ("float32", "bfloat16", "autocast")] == [4, 4, 4]
    assert {(s.precision, s.format) for s in plain} == {("float32", "float32"), ("bfloat16", "bfloat16"), ("autocast", "bfloat16")}


def test_what_the_peer_cannot_express_is_refused():
    for changed in ({"attention": "gqa"}, {"scoring_func": "softmax"}, {"num_dense_layers": 2}, {"num_dense_layers": 2, "mtp_depth": 1}):
        with pytest.raises(UserError):
            peer_config(replace(TINY, **changed))


def test_targets_are_shifted_and_end_with_the_row():
    tokens = torch.tensor([[5, 6, 7]])
    assert shifted(tokens, 2).tolist() == [[[6, 7], [7, -100], [-100, -100]]]
