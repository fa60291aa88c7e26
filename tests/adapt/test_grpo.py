"""`grpo`: a run learns from what its own answers are worth; its losses are TRL's; killed and resumed it is the same bit for bit."""

import json
import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.adapt.test_sft import TRAIN, kill_at, losses

from sparing import api
from sparing.adapt.rollouts import Answer, Group, Rollouts, Watch, _fitted
from sparing.base.config import Config, GrpoConfig, TrainConfig, UserError
from sparing.base.files import file_sha256, read_lines
from sparing.base.run import RunFolder
from sparing.cli.main import main
from sparing.data.loader import IGNORED
from sparing.infer.engine import Engine
from sparing.infer.request import Sampling

BASE = {
    "model": {
        "hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32, "attention": "gqa", "vocab_size": 300,
        "num_dense_layers": 2, "max_position_embeddings": 64,
    },
    "train": TRAIN | {"seq_len": 32, "batch_size": 32, "evals": 0},
}  # fmt: skip
WISHES = {
    "train": TRAIN | {"evals": 1, "micro_batch_size": 64},
    "grpo": {"problems": 8, "samples": 8, "max_tokens": 4, "scored": 16, "weights": "float32"},
    "optim": {"lr": 0.01},
}
OPTIONS = (
    "--budget 10ktok --samples 0 --train.micro-batch-size 64 --train.threads 1 --train.replicas 1 --train.compile false"
    " --train.kernels plain --train.dtype float32 --train.evals 1 --train.checkpoint-interval-s 0.2 --optim.lr 0.01"
    " --grpo.problems 8 --grpo.samples 8 --grpo.max-tokens 4 --grpo.scored 16 --grpo.weights float32"
).split()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A base that knows the colours of four animals and guesses those of four others, and a task that likes one of these guesses."""
    root = tmp_path_factory.mktemp("grpo")
    (root / "text").mkdir()
    animals, words = ("cat", "dog", "cow", "hen", "fox", "whale", "frog", "crow"), ("red", "blue", "green", "black")
    for i in range(400):
        word = words[i // 8 % 4] if i % 8 < 4 else words[i % 4]
        (root / "text" / f"{i:03d}.txt").write_text(f"{i % 50}: The {animals[i % 8]} is {word}")
    with open(root / "task.jsonl", "w") as file:
        for n in range(160):
            answer = "\\s*red\\s*"
            file.write(json.dumps({"prompt": f"{n // 4}: The {animals[n % 4]} is", "verifier": "format", "answer": answer}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARING_HOME", str(root / "home"))
        api.train([str(root / "text")], "60ktok", str(root / "base"), BASE, seed=3, samples=0)
        yield root


@pytest.fixture(scope="module", params=["full", "lora"])
def tuned(workplace, request):
    """(summary, run folder)."""
    out, task = workplace / request.param, str(workplace / "task.jsonl")
    return api.grpo(str(workplace / "base"), task, "30ktok", str(out), request.param, wishes=WISHES, samples=1), RunFolder(out)


def test_it_learns_what_is_rewarded(tuned):
    summary, _ = tuned
    before, after = summary["before"]["new"], summary["after"]["new"]
    assert after["pass_at_1"] > before["pass_at_1"] + 0.3 and after["loss"] == pytest.approx(1 - after["pass_at_1"])


def test_what_a_summary_says(tuned, workplace):
    """Contracts of learning verbs, and what a rollout tells of itself in every step's metrics."""
    summary, run = tuned
    for when in ("before", "after"):
        assert summary[when]["new"].keys() >= {"loss", "bpb", "pass_at_1", "pass_at_k", "k", "length", "problems"}
        assert summary[when]["old"]["loss"] > 0
    before, after = (f"{summary[when]['new']['pass_at_1']:.3f}, pass@8" for when in ("before", "after"))
    assert re.search(f"problems of .*task.jsonl: pass@1 {after} .*; before: pass@1 {before} ", run.model_card_file.read_text())
    assert summary["base"] == file_sha256(workplace / "base/weights/model.safetensors") and summary["ancestors"][0]["name"] == "base"
    assert 0 < summary["trained_tokens"] < summary["tokens"] <= 30_000 and summary["trainable_parameters"] > 0
    steps = [line for line in losses(run.path) if "mismatch" in line]
    assert len(steps) == summary["steps"] and sum(line["trained"] for line in steps) == summary["trained_tokens"]
    for line in steps:
        assert 0 <= line["pass_at_1"] <= line["pass_at_k"] <= 1 and 0 < line["length"] <= 4 and 0 <= line["no_signal"] <= 1
    assert max(line["mismatch"] for line in steps) < 2e-3, "float32 both: one policy, computed in two ways"
    shown = read_lines(run.state / "answers.jsonl")
    assert shown[0]["step"] == 0 and {line["reward"] for line in shown} == {0.0, 1.0}
    assert api.receipt(str(run.path))["after"] == summary["after"]
    with Engine(run.path, weights="float32") as engine:
        assert engine.submit(engine.tokenizer.encode_prompt("The cat is"), Sampling(2, 0)).text()


@pytest.mark.parametrize("updates", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_and_resumed_bit_for_bit(workplace, tmp_path, updates):
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    more = ["--out", killed, "--grpo.updates", updates, *OPTIONS]
    kill_at(["grpo", workplace / "base", "--task", workplace / "task.jsonl", *more], killed, 5)
    api.resume(str(killed), samples=0)
    wishes = WISHES | {"grpo": WISHES["grpo"] | {"updates": updates}}
    wishes["train"] = wishes["train"] | {"checkpoint_interval_s": 0.2}
    api.grpo(str(workplace / "base"), str(workplace / "task.jsonl"), "10ktok", str(straight), wishes=wishes, samples=0)
    assert losses(killed) == losses(straight) and len(losses(killed)) > 9
    assert file_sha256(RunFolder(killed).learned_file) == file_sha256(RunFolder(straight).learned_file)
    for name in ("answers.jsonl", "old.jsonl"):
        assert (killed / "state" / name).read_text() == (straight / "state" / name).read_text()


def test_a_mixture_replays_its_routes(workplace, tmp_path):
    """Rollouts in int8 route otherwise now and then; replayed, a token is learnt through the experts that it was sampled through."""
    mixture = {name: value for name, value in BASE["model"].items() if name != "num_dense_layers"}
    mixture |= {"num_dense_layers": 1, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    base = tmp_path / "base"
    api.train([str(workplace / "text")], "40ktok", str(base), BASE | {"model": mixture}, seed=3, samples=0)
    wishes = WISHES | {"grpo": WISHES["grpo"] | {"weights": "int8"}}
    for replay in (True, False):
        wishes["grpo"] = wishes["grpo"] | {"replay": replay}
        run = tmp_path / f"run-{replay}"
        summary = api.grpo(str(base), str(workplace / "task.jsonl"), "6ktok", str(run), "full", wishes=wishes, samples=0)
        assert summary["steps"] >= 5 and all(line["mismatch"] < 0.1 for line in losses(run) if "mismatch" in line)
    with pytest.raises(UserError, match="routes are replayed in one forward pass"):
        recompute = WISHES | {"train": WISHES["train"] | {"recompute": True}}
        api.grpo(str(base), str(workplace / "task.jsonl"), "10ktok", str(tmp_path / "no"), "full", wishes=recompute)


def test_leaving_out_groups_without_signal_changes_nothing_else(workplace, tmp_path):
    """The rows of a batch are those of answers with a signal; the loss is divided by all."""
    feed = Rollouts.__new__(Rollouts)
    config = Config(train=TrainConfig(seq_len=16), grpo=GrpoConfig(samples=2, max_tokens=8))
    feed.config, feed.sampler, feed.tokenizer = config, None, SimpleNamespace(eot_id=0)
    answers = [Answer([5, 6, 7], [-1.0, -2.0, -3.0], "a", False, None, 1.0), Answer([8], [-0.5], "b", False, None, 0.0)]
    dull = [answer._replace(reward=1.0) for answer in answers]
    batch = feed._packed([Group([1, 2], answers), Group([3], dull)], [Group([1, 2], answers)], 1)
    assert float(batch.divisor.sum()) == 4 * 8 and len(batch) == 1, "four answers of at most eight tokens"
    assert batch.tokens[0, :6].tolist() == [1, 2, 5, 6, 1, 2] and batch.documents[0, :7].tolist() == [0, 0, 0, 0, 1, 1, 2]
    assert batch.targets[0, :6, 0].tolist() == [-100, 5, 6, 7, -100, 8]
    assert batch.advantages[0, 1:6].tolist() == [0.5, 0.5, 0.5, 0, -0.5] and batch.sampled[0, 1:4].tolist() == [-1, -2, -3]
    assert batch.total.tolist() == [4.0]
    silent = feed._packed([Group([3], dull)], [Group([3], dull)], 1)
    assert len(silent) == 1 and (silent.targets == IGNORED).all() and float(silent.divisor.sum()) == 16


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=40))
def test_rows_have_room_for_what_is_in_them(sizes):
    rows = _fitted(sizes, 20)
    assert sorted(place for row in rows for place in row) == list(range(len(sizes)))
    assert all(sum(sizes[place] for place in row) <= 20 for row in rows)
    assert len(rows) <= 1 + 2 * sum(sizes) / 20


def watched(*rollouts) -> list[str]:
    """What is said of rollouts: (weights, answers to each of eight problems as (text, tokens, reward))."""
    said: list[str] = []
    watch = Watch(said.append)
    for step, (weights, answers) in enumerate(rollouts):
        made = [Answer([0] * size, [0.0] * size, text, False, None, reward) for text, size, reward in answers]
        watch.see(step, [Group([1], made)] * 8, weights)
    return said


def test_it_says_what_a_reward_does_not():
    good, bad = ("It is seven and not eight.", 8, 1.0), ("No.", 8, 0.0)
    assert watched(*((str(n), [good, bad]) for n in range(20))) == []
    (still,) = watched(("a", [good, bad]), ("a", [good, bad]), ("a", [good, bad]))
    assert "did not move" in still
    (silent,) = watched(*((str(n), [bad, bad]) for n in range(20)))
    assert "no group of 8 rollouts had a signal (pass@1 0.000)" in silent and "too hard" in silent
    first = [(str(n), [good, bad, bad]) for n in range(8)]
    (longer,) = watched(*first, *((str(n), [(f"Seven {n}.", 30, 1.0), (f"It is seven, {n}.", 30, 1.0), bad]) for n in range(8, 16)))
    assert "times as long while the reward rose from 0.33 to 0.67" in longer
    again = "seven is it seven is it seven is it seven is it seven"
    said = watched(*first, *((str(n), [(again, 9, 1.0), (again, 9, 1.0), bad]) for n in range(8, 16)))
    assert any("repeat themselves" in line for line in said)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("grpo r --budget 5m --out o", "grpo needs --task"),
        ("grpo r --task add --budget 5m --out o --method esft", "--method esft: not available; choose lora or full"),
        ("grpo r --task add --budget 5m --out o --grpo.kind ppo", "'ppo' is not one of dr_grpo, grpo, dapo, gspo, cispo"),
        ("grpo r --task add --budget 5m --out o --grpo.samples 1", "must be at least 2"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, line, says):
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err


def test_what_cannot_be_asked_leaves_nothing(workplace, tmp_path):
    base, task = str(workplace / "base"), str(workplace / "task.jsonl")
    for name, wishes, said in (
        (str(tmp_path / "none.jsonl"), WISHES, "neither a file nor one of"),
        (task, {"grpo": {"max_tokens": 90}}, "the model's context is 64"),
        (task, {"grpo": {"problems": 8, "updates": 3, "max_tokens": 4}}, "must divide grpo.problems"),
        (task, {"grpo": {"pass_at": 9, "max_tokens": 4}}, "grpo.pass_at 9: 1 to grpo.samples, "),
        (task, {"esft": {}}, "grpo has no use for this section"),
        (task, WISHES | {"train": TRAIN | {"batch_size": 32}}, "train.batch_size 32: an update learns from 64 answers"),
        (task, WISHES | {"train": TRAIN | {"seq_len": 8}}, r"train.seq_len 8: the longest problem and its answer have up to \d+ tokens"),
    ):
        with pytest.raises(UserError, match=said) as error:
            api.grpo(base, name, "20ktok", str(tmp_path / "run"), wishes=wishes)
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"^budget 1s: .* nearest that works: "):
        api.grpo(base, task, "1s", str(tmp_path / "run"), wishes=WISHES)
    assert not (tmp_path / "run").exists()
