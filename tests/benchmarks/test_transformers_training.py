"""The two sides of the throughput figure compute the same training."""

from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import save_file
from tests.bench.bench_tiny import TINY

from benchmarks.transformers_training import Peer, all_settings, peer_config
from sparing.base.config import UserError
from sparing.bench.throughput import Ours, next_tokens, save_initial_weights

OPTIMIZER = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """A function (class of a side, setting, seed of the weights) -> losses of six steps."""
    folder = tmp_path_factory.mktemp("weights")
    tokens = torch.randint(0, TINY.vocab_size, (6, 2, 32), generator=torch.Generator().manual_seed(1))
    save_file({"tokens": tokens.int()}, folder / "batches")
    for seed in (0, 1):
        save_initial_weights(asdict(TINY), seed, str(folder / str(seed)))

    def train(kind, seed: int = 0, **setting) -> list[float]:
        return kind(asdict(TINY), str(folder / str(seed)), str(folder / "batches"), OPTIMIZER, setting).steps(0, 6)["losses"]

    return train


@pytest.fixture(scope="module")
def ours(losses) -> list[float]:
    return losses(Ours, precision="float32")


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_the_losses_agree(precision, losses, ours):
    """The settings that are timed: all of them train."""
    for setting in (setting for setting in all_settings(compile=False) if setting.precision == precision):
        peer = losses(Peer, **asdict(setting))
        assert peer == pytest.approx(ours, rel=1e-4 if precision == "float32" else 2e-2)
        assert peer[-1] != pytest.approx(peer[0], rel=1e-3), "the optimizer moves nothing"


def test_other_initial_weights_are_told_apart(losses, ours):
    assert losses(Ours, seed=1, precision="float32")[1:] != pytest.approx(ours[1:], rel=1e-4)


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
    assert next_tokens(tokens, 2).tolist() == [[[6, 7], [7, -100], [-100, -100]]]
