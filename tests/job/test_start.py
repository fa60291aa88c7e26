"""A run that starts from another one or from an imported model, and what else may be given to `learn`: data, objective."""

import json
import shutil
from types import SimpleNamespace

import pytest

from sparing import api
from sparing.account.history import ancestors_of, entries
from sparing.base.config import UserError
from sparing.base.config_file import Wishes, read_config
from sparing.base.files import file_sha256, read_lines
from sparing.base.hardware import Machine
from sparing.base.run import RunFolder, read_tensors
from sparing.budget.units import parse_budget
from sparing.job.begin import begin, resolved
from sparing.job.corpus import TrainingData, text
from sparing.job.learn import learn
from sparing.planning import places
from sparing.planning import plan as planning
from sparing.resolve import resolve
from sparing.train.objective import NextToken

TRAIN = {"seq_len": 64, "batch_size": 8, "threads": 1, "replicas": 1, "compile": False, "micro_batch_size": 8, "evals": 0}
SMALL = {
    "model": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 512, "num_dense_layers": 2},
    "train": TRAIN,
}
CONTINUED = {"train": TRAIN, "optim": {"lr": 0.003}}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    root = tmp_path_factory.mktemp("start")
    (root / "text").mkdir()
    for i in range(40):
        lines = [f"The {word} number {j} of book {i} went to the sea and came back." for j, word in enumerate(["cat", "dog", "ship"] * 20)]
        (root / "text" / f"{i:02d}.txt").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARING_HOME", str(root / "home"))
        api.train([str(root / "text")], "60ktok", str(root / "base"), SMALL, seed=3, samples=0)
        yield root


def losses(run):
    return [line["loss"] for line in read_lines(RunFolder(run).metrics_file) if "grad_norm" in line]


def test_a_run_goes_on_from_another_one(workplace, tmp_path):
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(workplace / "base", base)
    api.train([str(workplace / "text")], "20ktok", str(run), CONTINUED, samples=0, start=str(base))
    before = losses(base)
    assert losses(run)[0] < before[-1] + 0.3 < before[0] - 1, "from its loss, not from noise"
    config, parent = read_config(run / "config.toml"), read_config(base / "config.toml")
    assert config.model == parent.model and config.start.run == str(base)
    assert config.start.weights_sha256 == file_sha256(base / "weights/model.safetensors")
    assert json.loads((run / "state/start.json").read_text()) == {"run": str(base), "weights_sha256": config.start.weights_sha256}
    assert (run / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    (row,) = api.receipt(str(run))["ancestors"]
    assert row["name"] == "base" and row["relation"] == "first weights" and 0 < row["share"] < 1 and row["tokens"] > 50_000
    forecast, summary = api.receipt(str(run))["predicted"], json.loads((run / "state/summary.json").read_text())
    assert forecast["gain"]["value"] > 0 and "law" in forecast["gain"]["source"]
    assert forecast["bpb"]["value"] == pytest.approx(summary["before"]["new"]["bpb"] * (1 - forecast["gain"]["value"]))
    assert summary["after"]["new"]["bpb"] == summary["bpb"] and summary["trained_tokens"] == summary["tokens"]
    assert summary["base"] == config.start.weights_sha256 and summary["ancestors"][0]["name"] == "base"
    again = api.plan(str(run / "config.toml"), budget="30s")  # a run's configuration is a recipe
    assert again["bpb"]["value"] is None and again["config"]["start"]["run"] == str(base)
    shutil.rmtree(base)
    longer = api.resume(str(run), "+10ktok", samples=0)  # which needs nothing of it any more
    assert longer["tokens"] > 20_000
    assert len(ancestors_of(RunFolder(run))) == 1


def test_a_plan_scores_what_it_would_start_from(workplace, monkeypatch):
    text, base = str(workplace / "text"), str(workplace / "base")
    monkeypatch.setattr(planning, "here", lambda rent, country, say: places.here(rent, country))  # default rates
    result = planning.plan(data=[text], budget="5m", compare=True, start=[base])
    row, (score,) = result["alternatives"][-1], result["scored"]
    assert row["name"] == "from an open model: base" and row["from"] == score["run"] == base and score["seconds"] > 0
    assert row["before"] == score["bpb"] and row["bpb"]["value"] == pytest.approx(score["bpb"] * (1 - row["gain"]["value"]))
    assert result["alternatives"][0]["name"] == "as resolved" and "gain" not in result["alternatives"][0]
    held_out = json.loads((workplace / "base/state/summary.json").read_text())["bpb"]
    assert score["bpb"] == pytest.approx(held_out, rel=0.01), "the same text that the run's own evaluation reads"
    alone = planning.plan(data=[text], budget="5m", start=[base])
    assert alone["config"]["start"]["run"] == base and alone["bpb"]["value"] == pytest.approx(row["bpb"]["value"])
    for mistake in ({"start": [base, base]}, {"start": [base], "budget": None, "target_bpb": 1.0}, {"start": [text], "compare": True}):
        with pytest.raises(UserError, match=r"--from goes with --budget|not a run folder"):
            planning.plan(**({"data": [text], "budget": "5m"} | mistake))


def test_an_imported_model_goes_on_gently():
    """Its own settings, however large the budget; what Sparing trained goes on as it began."""
    shape = {"vocab_size": 49152, "hidden_size": 576, "num_layers": 30, "num_dense_layers": 30, "max_position_embeddings": 8192}
    begun = {"model": shape, "start": {"run": "base", "weights_sha256": "0"}}
    machine = Machine("Linux", "some CPU", 2, 4, 16 << 30, formats={"float32": 1e11, "bfloat16": 2e11})

    def derived(budget, **more):
        facts = SimpleNamespace(train_bytes=78e6, bytes=80e6)
        return resolve(Wishes.of(begun, more), parse_budget(budget), machine, facts, lambda config: 200.0 * config.train.batch_size**0.5)

    opened = {"tokens": {"bos": 1, "eos": [2]}}
    for budget in ("5m", "20m", "5h"):
        config, reasons = derived(budget, **opened)
        t, o = config.train, config.optim
        assert o.matrix == "adamw" and {o.lr, o.lr_embed, o.lr_head, o.lr_norm} == {1e-4} and o.final_lr == 0 == o.weight_decay
        assert t.seq_len == 512 and t.short_seq_len is None and 2 <= t.batch_size <= 8 and "train.batch_size" in reasons
        assert config.model.hidden_size == 576 and 16_000 <= t.eval_bytes <= 200_000
    assert derived("5m", **opened)[0].train.batch_size < derived("5h", **opened)[0].train.batch_size
    wished = derived("5m", **opened, optim={"lr": 3e-4})[0].optim
    assert wished.lr == wished.lr_embed == 3e-4, "one rate for all"
    own = derived("5m")[0]
    assert own.optim.matrix == "muon" and own.optim.lr > 0.005


def test_ancestors_are_handed_on(workplace, tmp_path):
    for name, parent in (("second", workplace / "base"), ("third", tmp_path / "second")):
        api.train([str(workplace / "text")], "4ktok", str(tmp_path / name), CONTINUED, samples=0, start=str(parent))
    assert [(row.name, row.generation) for row in ancestors_of(RunFolder(tmp_path / "third"))] == [("second", 1), ("base", 2)]


def test_an_imported_model_is_a_start_too(workplace, tmp_path):
    api.export(str(workplace / "base"), "hf", str(tmp_path / "hf"))
    api.import_(str(tmp_path / "hf"), str(tmp_path / "imported"))
    api.train([str(workplace / "text")], "8ktok", str(tmp_path / "run"), CONTINUED, samples=0, start=str(tmp_path / "imported"))
    assert losses(tmp_path / "run")[0] < losses(workplace / "base")[-1] + 0.3


GQA = {"attention": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
MIXTURE = {"num_dense_layers": 1, "n_routed_experts": 4, "moe_intermediate_size": 32, "n_shared_experts": 0, "routed_scaling_factor": 1.0}
FAMILIES = {
    "qwen2": GQA | {"attention_bias": True},
    "qwen3_moe": GQA | MIXTURE | {"head_norm": True, "scoring_func": "softmax", "selection_bias": False},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_other_families_are_trained_too(family, workplace, tmp_path):
    """From noise, out, in, and twenty steps on: biases and head norms learn, and the model stays one of its family."""
    wishes = {"model": SMALL["model"] | FAMILIES[family], "train": TRAIN}
    api.train([str(workplace / "text")], "15ktok", str(tmp_path / "base"), wishes, seed=3, samples=0)
    api.export(str(tmp_path / "base"), "hf", str(tmp_path / "hf"))
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == family
    api.import_(str(tmp_path / "hf"), str(tmp_path / "imported"))
    api.train([str(workplace / "text")], "11ktok", str(tmp_path / "run"), CONTINUED, samples=0, start=str(tmp_path / "imported"))
    before, after = losses(tmp_path / "base"), losses(tmp_path / "run")
    assert len(after) >= 20 and after[0] < before[0] - 0.5 and after[-1] < before[-1] - 0.1
    was, now = (dict(read_tensors(RunFolder(tmp_path / name).weights_file)) for name in ("imported", "run"))
    vectors = [name for name in was if name.endswith(("_proj.bias", "q_norm.weight", "k_norm.weight"))]
    assert vectors and all(not was[name].equal(now[name]) for name in vectors)
    api.export(str(tmp_path / "run"), "hf", str(tmp_path / "again"))
    assert json.loads((tmp_path / "again/config.json").read_text())["model_type"] == family


@pytest.mark.parametrize("start", [True, False])
def test_data_and_objective_may_be_others(workplace, tmp_path, start):
    """The same batch again and again, under half the loss, from noise and from a run."""

    class Same:
        def __init__(self, feed):
            self.feed = feed

        def batch(self, step, rank=0, world=1):
            return self.feed.batch(0, rank, world)

    def same(job, config):
        usual = text(job, config)
        return TrainingData(Same(usual.feed), usual.tokenizer, usual.held_out[:1])

    class Halved(NextToken):
        def __call__(self, *arguments):
            loss = super().__call__(*arguments)
            return loss._replace(total=loss.total / 2)

    wishes = {**CONTINUED, "start": {"run": str(workplace / "base")}} if start else SMALL
    wishes = Wishes.of(wishes, {"data": {"paths": [str(workplace / "text")]}, "optim": {"lr": 0.02}})
    run = RunFolder.create(tmp_path / "run")
    with begin("train", run) as job:
        config = resolved(job, wishes, parse_budget("15ktok"))
        learn(job, config, 0, data=same, objective=Halved.of(config))
    assert losses(run.path)[-1] < 0.7 * losses(run.path)[0], "it knows that batch"


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        ({"model": {"num_layers": 3}}, "model.num_layers 3: .*base has 2, which stays"),
        ({"data": {"tokenizer": "/elsewhere/tokenizer.json"}}, "data.tokenizer /elsewhere/tokenizer.json: .* keeps its tokenizer"),
        ({"start": {"weights_sha256": "0"}}, "start.weights_sha256: .*base has other weights"),
    ],
)
def test_what_a_start_settles_is_not_the_users_to_choose(workplace, tmp_path, wishes, said):
    with pytest.raises(UserError, match=said):
        api.train([str(workplace / "text")], "20ktok", str(tmp_path / "run"), wishes, start=str(workplace / "base"))
    assert not (tmp_path / "run/config.toml").exists()


def test_a_start_that_is_none_or_that_has_changed(workplace, tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        api.train([], "20ktok", str(tmp_path / "run"), start=str(tmp_path / "nowhere"))
    assert not (tmp_path / "run").exists()
    base = tmp_path / "base"
    shutil.copytree(workplace / "base", base)
    with begin("train", RunFolder.create(tmp_path / "run")) as job:
        wishes = Wishes.of(CONTINUED, {"data": {"paths": [str(workplace / "text")]}, "start": {"run": str(base)}})
        config = resolved(job, wishes, parse_budget("15ktok"))
    with open(base / "weights/model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(UserError, match="its weights have changed"):
        api.resume(str(tmp_path / "run"), samples=0)
    assert config.start.run == str(base)


def test_a_refused_resume_leaves_no_row(workplace):
    rows = len(entries(RunFolder(workplace / "base").ledger_file))
    for budget in (None, "+5m"):
        with pytest.raises(UserError):
            api.resume(str(workplace / "base"), budget)
    assert len(entries(RunFolder(workplace / "base").ledger_file)) == rows
