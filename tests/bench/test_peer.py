"""The two sides of the throughput figure compute the same training."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from bench_tiny import TINY

from sparing.bench.ours import OurSetting, OursSide, save_initial_weights, shifted
from sparing.bench.peer import PeerSetting, PeerSide, all_settings, peer_config
from sparing.config import UserError

OPTIMIZER = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


def losses(side, steps: int = 6) -> list[float]:
    tokens = torch.randint(0, TINY.vocab_size, (steps, 2, 32), generator=torch.Generator().manual_seed(1))
    return [side.step(batch) for batch in tokens]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_initial_weights(TINY, 0, path)
    return path


@pytest.fixture(scope="module")
def ours(weights) -> list[float]:
    return losses(OursSide(TINY, OurSetting("float32"), weights, OPTIMIZER))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("experts", ["grouped_mm", "eager"])
def test_the_losses_agree_in_float32(attention, experts, weights, ours):
    peer = losses(PeerSide(TINY, PeerSetting(attention, experts, "float32"), weights, OPTIMIZER))
    assert peer == pytest.approx(ours, rel=1e-4)
    assert peer[-1] != pytest.approx(peer[0], rel=1e-3), "the optimizer moves nothing"


@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
def test_the_losses_are_near_in_bfloat16(precision, weights, ours):
    """The settings that are timed: all of them train."""
    for setting in all_settings(compile=False):
        if setting.precision == precision:
            assert losses(PeerSide(TINY, setting, weights, OPTIMIZER)) == pytest.approx(ours, rel=2e-2)


def test_other_initial_weights_are_told_apart(tmp_path, ours):
    save_initial_weights(TINY, 1, tmp_path / "other.safetensors")
    other = losses(OursSide(TINY, OurSetting("float32"), tmp_path / "other.safetensors", OPTIMIZER))
    assert other[1:] != pytest.approx(ours[1:], rel=1e-4)


def test_the_grid_is_the_figures():
    assert len(all_settings(compile=False)) == 8 and len(set(all_settings(compile=True))) == 16


def test_what_the_peer_cannot_express_is_refused():
    for changed in ({"attention": "gqa"}, {"scoring_func": "softmax"}, {"num_dense_layers": 2}, {"num_dense_layers": 2, "mtp_depth": 1}):
        with pytest.raises(UserError):
            peer_config(replace(TINY, **changed))


def test_targets_are_shifted_and_end_with_the_row():
    tokens = torch.tensor([[5, 6, 7]])
    assert shifted(tokens, 2).tolist() == [[[6, 7], [7, -100], [-100, -100]]]
