"""Adapter runs: low-rank updates learn beside the weights of another run, which stay where and as they are."""

import shutil

import pytest
from safetensors.torch import load_file
from tests.job.test_start import SMALL, TRAIN, losses

from sparing import api
from sparing.base.config import UserError
from sparing.base.config_file import read_config
from sparing.base.files import file_sha256

MIXTURE = SMALL["model"] | {"num_dense_layers": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "mtp_depth": 1}
ADAPTER = {"train": TRAIN, "adapter": {"rank": 4, "alpha": 8.0}}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapter")
    for folder, words in (("text", ["cat", "dog", "ship"]), ("other", ["bird", "cow", "road"])):
        (root / folder).mkdir()
        for i in range(40):
            lines = [f"The {word} number {j} of book {i} went to the sea and came back." for j, word in enumerate(words * 20)]
            (root / folder / f"{i:02d}.txt").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARING_HOME", str(root / "home"))
        api.train([str(root / "text")], "40ktok", str(root / "dense"), SMALL, seed=3, samples=0)
        api.train([str(root / "text")], "40ktok", str(root / "mixture"), {"model": MIXTURE, "train": TRAIN}, seed=3, samples=0)
        yield root


@pytest.mark.parametrize("base", ["dense", "mixture"])
@pytest.mark.parametrize("held", ["float32", "bfloat16", "int8"])
def test_only_the_factors_learn_and_are_kept(workplace, tmp_path, base, held):
    run, before = tmp_path / "run", file_sha256(workplace / base / "weights/model.safetensors")
    wishes = ADAPTER | {"adapter": ADAPTER["adapter"] | {"base": held}}
    api.train([str(workplace / "other")], "20ktok", str(run), wishes, samples=0, start=str(workplace / base))
    seen = losses(run)
    assert seen[0] < losses(workplace / base)[0] - 1.5 and seen[-1] < seen[0] - 0.3
    config = read_config(run / "config.toml")
    assert config.start.run == str(workplace / base) and config.start.weights_sha256 == before
    assert config.adapter.base == held and config.optim.matrix == "adamw" and config.optim.lr == 1e-3
    assert not (run / "weights").exists()
    kept = load_file(run / "adapter/adapter_model.safetensors")
    assert kept and all(name.endswith(("lora_A.weight", "lora_B.weight")) and "layers.2." not in name for name in kept)
    assert all(tensor.abs().sum() > 0 for tensor in kept.values())
    moments = load_file(max(run.glob("state/step-*")) / "optimizer.safetensors")
    assert {name.split("/", 2)[2] for name in moments} == set(kept)
    assert sum(file.stat().st_size for file in run.glob("state/step-*/*")) < 8 * 4 * sum(t.numel() for t in kept.values()) + 100_000
    assert file_sha256(workplace / base / "weights/model.safetensors") == before
    assert api.resume(str(run), "+5ktok", samples=0)["tokens"] >= 24_000


def test_an_adapter_needs_a_base_that_is_there(workplace, tmp_path):
    with pytest.raises(UserError, match="name one as start.run"):
        api.train([str(workplace / "other")], "20ktok", str(tmp_path / "run"), ADAPTER, samples=0)
    with pytest.raises(UserError, match="adapter.base"):
        wishes = ADAPTER | {"precision": {"weights": "bfloat16"}}
        api.train([str(workplace / "other")], "20ktok", str(tmp_path / "run2"), wishes, samples=0, start=str(workplace / "dense"))
    shutil.copytree(workplace / "dense", tmp_path / "base")
    api.train([str(workplace / "other")], "4ktok", str(tmp_path / "run3"), ADAPTER, samples=0, start=str(tmp_path / "base"))
    shutil.rmtree(tmp_path / "base" / "weights")
    with pytest.raises(UserError, match="its weights are gone"):
        api.resume(str(tmp_path / "run3"), "+4ktok", samples=0)
