"""Adapter runs: low-rank updates learn beside the weights of another run, which stay where and as they are."""

import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tests.job.test_start import SMALL, TRAIN, losses

from sparing import api
from sparing.base.config import UserError
from sparing.base.config_file import read_config
from sparing.base.files import file_sha256, read_lines
from sparing.base.layers import mixtures
from sparing.base.run import fill, read_tensors, write_tensors
from sparing.cli.main import main
from sparing.job.start import start_of
from sparing.kernels import decode, native
from sparing.model.low_rank import adaptable, learned

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


HELD = [("dense", "float32"), ("mixture", "bfloat16"), ("mixture", "int8"), ("dense", "int4")]


@pytest.mark.parametrize("base, held", HELD)
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


KILLED = """
import sys
from sparing import api
api.train([sys.argv[1]], "40ktok", sys.argv[2], eval(sys.argv[4]), samples=0, start=sys.argv[3])
"""


@pytest.mark.slow
def test_killed_and_resumed_equals_undisturbed(workplace, tmp_path):
    kernels = next(path for path in ("vectors", "compiled", "plain") if native.can(path))
    train = TRAIN | {"kernels": kernels, "checkpoint_interval_s": 0.1}
    wishes = {"train": train, "adapter": ADAPTER["adapter"] | {"base": "int4"}}
    data, base = str(workplace / "other"), str(workplace / "mixture")
    api.train([data], "40ktok", str(tmp_path / "whole"), wishes, samples=0, start=base)
    process = subprocess.Popen([sys.executable, "-c", KILLED, data, str(tmp_path / "run"), base, repr(wishes)], stderr=-1, text=True)
    end = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < end and len(read_lines(tmp_path / "run/metrics.jsonl")) < 30:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    assert list((tmp_path / "run/state").glob("step-*")) and not (tmp_path / "run/state/summary.json").exists()
    api.resume(str(tmp_path / "run"), samples=0)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole") and len(losses(tmp_path / "run")) == 78
    for file in ("adapter/adapter_model.safetensors", "state/step-00000078/optimizer.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_an_adapter_needs_a_base_that_is_there(workplace, tmp_path):
    with pytest.raises(UserError, match="name one as start"):
        api.train([str(workplace / "other")], "20ktok", str(tmp_path / "run"), ADAPTER, samples=0)
    with pytest.raises(UserError, match=r"adapter\.base"):
        wishes = ADAPTER | {"precision": {"weights": "bfloat16"}}
        api.train([str(workplace / "other")], "20ktok", str(tmp_path / "run2"), wishes, samples=0, start=str(workplace / "dense"))
    shutil.copytree(workplace / "dense", tmp_path / "base")
    api.train([str(workplace / "other")], "4ktok", str(tmp_path / "run3"), ADAPTER, samples=0, start=str(tmp_path / "base"))
    shutil.rmtree(tmp_path / "base" / "weights")
    with pytest.raises(UserError, match="its weights are gone: if they have moved, say --base RUN"):
        api.resume(str(tmp_path / "run3"), "+4ktok", samples=0)


@pytest.fixture(scope="module", params=[("dense", "int8"), ("mixture", "int4")], ids=" in ".join)
def adapted(request, workplace):
    """An adapter run whose base was held in few bits, where that makes a difference."""
    model, held = request.param
    base, run = workplace / model, workplace / f"adapted-{model}"
    wishes = ADAPTER | {"adapter": ADAPTER["adapter"] | {"base": held}, "optim": {"lr": 0.01}}
    api.train([str(workplace / "other")], "20ktok", str(run), wishes, samples=1, start=str(base))
    return base, run


def logits(run, tokens=((1, 5, 9, 30, 31, 32, 200, 7),)):
    return api.load(str(run)).logits(tokens)


def apart(a, b) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_merged_is_unmerged(adapted, workplace, tmp_path):
    base, run = adapted
    config = read_config(run / "config.toml")
    trained = start_of(config).model(config)
    fill(learned(trained), read_tensors(run / "adapter/adapter_model.safetensors"), run)
    exact = trained.eval()(torch.tensor([[1, 5, 9, 30, 31, 32, 200, 7]])).detach()
    result = api.merge(str(run), str(tmp_path / "merged"))
    assert result["updates"] == len(adaptable(trained)) + len(mixtures(config.model)) - config.model.mtp_depth
    assert apart(logits(tmp_path / "merged"), exact) < 1e-4 and apart(logits(run), exact) < 1e-4
    assert apart(exact, logits(base)) > 0.01
    merged = read_config(tmp_path / "merged/config.toml")
    assert merged.adapter is None and merged.start is None and merged.model == config.model
    assert [row["name"] for row in api.receipt(str(tmp_path / "merged"))["ancestors"]] == [run.name, base.name]
    assert "lm_head.weight" in load_file(tmp_path / "merged/weights/model.safetensors")
    with pytest.raises(UserError, match="is no adapter"):
        api.merge(str(base), str(tmp_path / "no"))
    assert not (tmp_path / "no").exists()


def test_an_adapter_run_works_wherever_a_run_does(adapted, workplace, tmp_path):
    base, run = adapted
    text = api.generate(str(run), "The bird", max_tokens=12, temperature=0)["text"]
    api.merge(str(run), str(tmp_path / "merged"))
    assert text == api.generate(str(tmp_path / "merged"), "The bird", max_tokens=12, temperature=0)["text"]
    assert text != api.generate(str(base), "The bird", max_tokens=12, temperature=0)["text"]
    if decode.library() is not None:
        assert api.generate(str(run), "The bird", max_tokens=12, temperature=0, weights="int8")["tokens"] == 12
    scores = [api.evaluate(str(folder), [str(workplace / "other")])["bpb"] for folder in (base, run, tmp_path / "merged")]
    assert scores[1] == pytest.approx(scores[2], rel=1e-3) and scores[1] < scores[0] - 0.2
    api.export(str(run), "hf", str(tmp_path / "hf"))
    api.import_(str(tmp_path / "hf"), str(tmp_path / "imported"))
    assert apart(logits(tmp_path / "imported"), logits(run)) < 1e-5
    last = losses(run)[-1]
    for name, wishes in (("full", {"train": TRAIN, "optim": {"lr": 0.001}}), ("again", ADAPTER)):
        api.train([str(workplace / "other")], "4ktok", str(tmp_path / name), wishes, samples=0, start=str(run))
        assert losses(tmp_path / name)[0] < last + 0.3
    assert read_config(tmp_path / "again/config.toml").start.weights_sha256 != read_config(run / "config.toml").start.weights_sha256
    assert apart(logits(tmp_path / "again"), logits(run)) < 0.5


def test_a_base_that_moved_and_another_one(adapted, workplace, tmp_path):
    base, run, moved = adapted[0], tmp_path / "run", tmp_path / "moved"
    shutil.copytree(adapted[1], run)
    shutil.copytree(base, tmp_path / "before")
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace(str(base), str(tmp_path / "before")))
    expected = logits(run)
    (tmp_path / "before").rename(moved)
    data = [str(workplace / "other")]
    for use in (
        lambda: api.load(str(run)),
        lambda: api.merge(str(run), str(tmp_path / "out")),
        lambda: api.export(str(run), "hf", "x"),
        lambda: api.train(data, "4ktok", str(tmp_path / "out"), ADAPTER, samples=0, start=str(run)),
        lambda: api.plan(data=data, budget="4ktok", wishes=ADAPTER, start=[str(run)]),
    ):
        with pytest.raises(UserError, match="is gone: if it has moved, say --base"):
            use()
    assert not (tmp_path / "out/config.toml").exists(), "told before anything is begun"
    with pytest.raises(UserError, match="was not trained on its weights"):
        api.rebase(str(run), str(run))
    with pytest.raises(UserError, match="is no adapter"):
        api.rebase(str(base), str(moved))
    api.rebase(str(run), str(moved))
    assert torch.equal(logits(run), expected)
    config = read_config(run / "config.toml")
    assert config.start.run == str(moved) and config.adapter.base in ("int8", "int4")
    weights = load_file(moved / "weights/model.safetensors")
    write_tensors(moved / "weights/model.safetensors", weights | {"model.norm.weight": weights["model.norm.weight"] * 2})
    with pytest.raises(UserError, match="an adapter of other weights"):
        api.load(str(run))
    kept = load_file(run / "adapter/adapter_model.safetensors")
    write_tensors(moved / "weights/model.safetensors", weights)
    write_tensors(run / "adapter/adapter_model.safetensors", kept | {"model.layers.7.mlp.x.lora_A.weight": torch.ones(2, 2)})
    with pytest.raises(UserError, match="updates no weight"):
        api.load(str(run))
    name = "model.layers.0.self_attn.o_proj.lora_A.weight"
    write_tensors(run / "adapter/adapter_model.safetensors", kept | {name: kept[name][:1]})
    with pytest.raises(UserError, match=r"cannot be merged: factors of .*o_proj"):
        api.merge(str(run), str(tmp_path / "torn"))
    assert not (tmp_path / "torn").exists()


def test_every_verb_that_takes_a_run_takes_its_base_that_moved(workplace, tmp_path, capsys):
    """An adapter run beside another one, over a base: both have moved, and are named one after the other."""
    base, first, second = (tmp_path / name for name in ("base", "first", "second"))
    shutil.copytree(workplace / "dense", base)
    data = str(workplace / "other")
    for start, run in ((base, first), (first, second)):
        api.train([data], "4ktok", str(run), ADAPTER, samples=0, start=str(start))
    expected = logits(second)
    for folder in (base, first):
        folder.rename(tmp_path / f"{folder.name}-moved")
    options = ["--budget", "4ktok", "--data", data]
    assert main(["train", "--from", str(second), "--out", str(tmp_path / "no"), *options]) == 2
    assert "is an adapter of" in capsys.readouterr().err and not (tmp_path / "no").exists()
    threads = [word for name, value in TRAIN.items() for word in (f"--train.{name.replace('_', '-')}", str(value).lower())]
    assert main(["train", "--from", str(second), "--base", f"{first}-moved", "--out", str(tmp_path / "no"), *options]) == 2
    assert f"{first}-moved is an adapter of {base}, which is gone" in capsys.readouterr().err
    for status, words in (
        (2, ["plan", "--from", str(second), "--data", data]),  # needs a budget too: nothing is measured
        (0, ["train", "--from", str(second), "--out", str(tmp_path / "more"), "--samples", "0", *options, *threads]),
        (0, ["generate", str(second), "--prompt", "The", "--max-tokens", "2"]),
    ):
        assert main([*words, "--base", f"{base}-moved"]) == status, capsys.readouterr().err
        config = f"{first}-moved/config.toml"
        assert read_config(config).start.run == f"{base}-moved"
        with open(config) as file:
            changed = file.read().replace(f"{base}-moved", str(base))
        with open(config, "w") as file:
            file.write(changed)
    api.rebase(str(second), f"{base}-moved")
    assert torch.equal(logits(second), expected)
    for words, says in (
        (["train", *options, "--out", str(tmp_path / "no"), "--base", str(base)], "--base goes with --from"),
        (["plan", *options, "--base", str(base)], "--base goes with one --from"),
        (["train", "--from", str(second), *options, "--out", str(tmp_path / "no"), "--base", str(workplace / "mixture")], "not trained on"),
        (["sft", str(workplace / "dense"), *options, "--out", str(tmp_path / "no"), "--base", str(second)], "is no adapter"),
    ):
        assert main(words) == 2 and says in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
