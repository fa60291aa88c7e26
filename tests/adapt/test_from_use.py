"""`adapt`: accepted answers are learnt and kept where that does good; mixed-up, repeated and contradictory ones are turned down."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from sparing import api
from sparing.account.history import ancestors_of
from sparing.adapt import feedback
from sparing.adapt.from_use import TurnedDown
from sparing.base.config import UserError
from sparing.base.config_file import read_config
from sparing.base.files import file_sha256, read_lines
from sparing.base.run import RunFolder, weights_sha256
from sparing.cli.main import main
from sparing.data.accounts import Accounts

TRAIN = {"threads": 1, "replicas": 1, "compile": False, "micro_batch_size": 8, "kernels": "plain", "dtype": "float32"}
BASE = {
    "model": {
        "hidden_size": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 512, "num_dense_layers": 2, "max_position_embeddings": 256,
        "attention": "gqa", "num_kv_heads": 1, "head_dim": 32,
    },
    "train": TRAIN | {"seq_len": 64, "batch_size": 8, "evals": 0},
}  # fmt: skip
MIXTURE = {"model": BASE["model"] | {"num_dense_layers": 1, "n_routed_experts": 4, "moe_intermediate_size": 64}, "train": BASE["train"]}
WISHES = {"train": TRAIN | {"batch_size": 8, "seq_len": 64, "evals": 2}, "optim": {"lr": 0.01}, "use": {"old_limit": 0.5}}
OPTIONS = [
    "--train.threads", "1", "--train.replicas", "1", "--train.kernels", "plain", "--train.dtype", "float32", "--train.micro-batch-size",
    "8", "--train.compile", "false", "--train.seq-len", "64", "--train.batch-size", "8",
]  # fmt: skip
NAMES = ["cat", "dog", "ship", "tree"]


def known(name: str, number: int) -> str:
    """What the base was taught to say."""
    return f"{name} it is."


def ask(name: str, number: int, answer: str = "") -> dict:
    answer = answer or f"{known(name, number)} Number {number} of them."
    return {"messages": [{"role": "user", "content": f"Which is {number} {name}"}, {"role": "assistant", "content": answer}]}


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


GOOD = [ask(name, number) for number in range(50) for name in NAMES]


def begun(root, base: dict):
    """A folder with a base, good answers, and trusted ones."""
    (root / "text").mkdir()
    names = random.Random(0)
    for i in range(60):  # each as a server would ask
        named = names.choices(NAMES, k=16)
        turns = [f"User: Which is {i + 60 * j} {name}\n\nAssistant: {known(name, i)}\n\n" for j, name in enumerate(named)]
        (root / "text" / f"{i:02d}.txt").write_text("".join(turns))
    write(root / "good.jsonl", GOOD)
    write(root / "check.jsonl", [ask(name, number) for number in range(50, 60) for name in NAMES])
    api.train([str(root / "text")], "40ktok", str(root / "base"), base, seed=3, samples=0)
    return root


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARING_HOME", str(tmp_path_factory.mktemp("home")))
        yield begun(tmp_path_factory.mktemp("use"), BASE)


def adapt(root, data: str, out: str, budget: str = "12ktok", **options) -> dict:
    return api.adapt(str(root / "base"), [data], [str(root / "check.jsonl")], budget, str(root / out), wishes=WISHES, samples=0, **options)


def test_good_answers_are_kept_and_the_way_back_is_exact(workplace, capsys):
    before = weights_sha256(RunFolder(workplace / "base"))
    summary = adapt(workplace, str(workplace / "good.jsonl"), "better", keep=[str(workplace / "text")])
    assert summary["committed"] and summary["update"] in (1.0, 0.5, 0.25, 0.125)
    assert summary["after"]["new"]["loss"] < summary["before"]["new"]["loss"] and summary["base"] == before
    assert summary["grounds"]["trusted_change"]["high"] < 0 and summary["grounds"]["old_change"]["high"] < 0.5
    assert summary["grounds"].keys() >= {"feedback_belongs", "trusted_belongs", "belonging_change", "kl"}
    assert read_config(workplace / "better/config.toml").use.check == (str(workplace / "check.jsonl"),)
    out = capsys.readouterr().err
    assert "committed: update ×" in out and "200 answers to learn from, 40 trusted ones" in out
    score = api.evaluate(str(workplace / "better"), [str(workplace / "better/state/use/chosen.jsonl")], context=64)
    assert score["answer_loss"] == pytest.approx(summary["after"]["new"]["loss"], rel=1e-3), "what was decided on is what is served"
    back = api.rollback(str(workplace / "better"), str(workplace / "back"))
    assert back["weights_sha256"] == before == weights_sha256(RunFolder(workplace / "back"))
    assert file_sha256(workplace / "back/weights/model.safetensors") == file_sha256(workplace / "base/weights/model.safetensors")
    assert {row.name for row in ancestors_of(RunFolder(workplace / "back"))} == {"base"} and api.receipt(str(workplace / "back"))["stages"]
    assert api.generate(str(workplace / "back"), "Which", max_tokens=3, temperature=0)["text"]


def test_a_mixture_learns_from_use_too(workplace, tmp_path):
    root = begun(tmp_path, MIXTURE)
    summary = adapt(root, str(root / "good.jsonl"), "better", "8ktok", keep=[str(root / "text")])
    assert summary["committed"] and summary["after"]["new"]["loss"] < summary["before"]["new"]["loss"]
    assert api.rollback(str(root / "better"), str(root / "back"))["weights_sha256"] == summary["base"]


def test_answers_that_do_harm_are_turned_down(workplace, capsys):
    data = write(workplace / "other.jsonl", [ask(name, number, f"zzz {number} qqq {name} xxx") for number in range(50) for name in NAMES])
    status = main(
        ["adapt", str(workplace / "base"), "--data", data, "--check", str(workplace / "check.jsonl"), "--budget", "12ktok", "--out",
         str(workplace / "other"), "--samples", "0", "--json", *OPTIONS, "--train.evals", "0", "--optim.lr", "0.03"]
    )  # fmt: skip
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert status == 3 and summary["committed"] is False and summary["turned_down"] in err
    assert err.splitlines()[-1].startswith("sparing: turned down: ")
    assert not RunFolder(workplace / "other").learned_file.exists()
    with pytest.raises(UserError, match="finished"):
        api.resume(str(workplace / "other"))
    assert api.receipt(str(workplace / "other"))["stages"]


def test_a_planted_answer_that_comes_again_and_again_teaches_nothing(workplace):
    planted = [ask("cat", 7, "The cat is the king of the sea.")] * 200
    with pytest.raises(TurnedDown, match="only one is left to learn from"):
        adapt(workplace, write(workplace / "planted.jsonl", planted), "planted")
    assert not (workplace / "planted").exists()


def test_old_text_that_would_be_forgotten(workplace, tmp_path):
    wishes = WISHES | {"use": {"old_limit": 1e-9}}
    with pytest.raises(TurnedDown, match="old text would lose more than"):
        api.adapt(
            str(workplace / "base"), [str(workplace / "good.jsonl")], [str(workplace / "check.jsonl")], "12ktok", str(tmp_path / "run"),
            [str(workplace / "text")], wishes, samples=0,
        )  # fmt: skip
    lines = json.loads((tmp_path / "run/state/summary.json").read_text())
    assert lines["committed"] is False and lines["grounds"]["old_change"]["value"] > 0


def test_a_killed_run_decides_the_same(workplace, tmp_path):
    """Killed after its first checkpoint, by whoever reads its metrics."""
    command = [
        sys.executable, "-m", "sparing", "adapt", str(workplace / "base"), "--data", str(workplace / "good.jsonl"), "--check",
        str(workplace / "check.jsonl"), "--budget", "12ktok", "--samples", "0", *OPTIONS, "--optim.lr", "0.01", "--use.old-limit", "5",
        "--train.checkpoint-interval-s", "0",
    ]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, "--out", str(whole)], check=True, capture_output=True)
    process = subprocess.Popen([*command, "--out", str(killed)], stderr=subprocess.DEVNULL)
    while process.poll() is None and not any(line.get("step", 0) >= 3 for line in read_lines(killed / "metrics.jsonl")):
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it was killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    summary = api.resume(str(killed), samples=0)
    first = json.loads((whole / "state/summary.json").read_text())
    assert summary["grounds"] == first["grounds"] and summary["update"] == first["update"]
    assert file_sha256(RunFolder(killed).adapter_file) == file_sha256(RunFolder(whole).adapter_file)


# what is left to learn from


def test_feedback_is_made_fit_to_learn_from(tmp_path):
    rows = [
        ask("cat", 1), ask("cat", 1), ask("cat", 2), ask("cat", 2, "No."), ask("cat", 3, "Wrong.") | {"verdict": "accepted"},
        ask("cat", 3, "Right.") | {"verdict": "corrected"}, ask("cat", 4) | {"verdict": "rejected"}, ask("dog", 1),
        *(ask("bird", number, "Yes.") for number in range(10)), {"text": "no conversation"},
    ]  # fmt: skip
    accounts = Accounts()
    checked = feedback.exchanges([write(tmp_path / "check.jsonl", [ask("dog", 1, "Another answer.")])], "--check", accounts)
    found = feedback.read([write(tmp_path / "data.jsonl", rows)], checked, accounts)
    assert (accounts.into, accounts.quarantined) == (1 + len(rows), 1)
    answers = sorted(chat.messages[-1]["content"] for chat in found.chats)
    assert answers == sorted(["Right.", ask("cat", 1)["messages"][1]["content"], "Yes.", "Yes."])
    assert found.left_out == {
        "unusable": 1, "rejected": 1, "asked in --check too": 1, "said again": 2, "of two answers to one question": 2,
        "the same answer to other questions": 8,
    }  # fmt: skip
    with pytest.raises(UserError, match="nothing to learn from is left: 1 asked in --check too"):
        feedback.read([write(tmp_path / "one.jsonl", [ask("dog", 1)])], checked, Accounts())


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--data", "good.jsonl", "--budget", "1ktok"], "adapt needs --check"),
        (["--data", "good.jsonl", "--check", "two.jsonl", "--budget", "1ktok"], "at least 20 are needed"),
        (["--data", "none.jsonl", "--check", "check.jsonl", "--budget", "1ktok"], "none.jsonl"),
    ],
)
def test_slips_leave_nothing_behind(workplace, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(workplace)
    write(workplace / "two.jsonl", GOOD[:2])
    assert main(["adapt", "base", *arguments, "--out", "none"]) == 2
    assert said in capsys.readouterr().err and not (workplace / "none").exists()


def test_a_run_that_writes_nothing_needs_old_text(workplace, monkeypatch):
    monkeypatch.setattr("sparing.adapt.sft.own_texts", lambda *_: [])
    with pytest.raises(UserError, match=r"writes no text by itself: .*--keep"):
        adapt(workplace, str(workplace / "good.jsonl"), "silent")


def test_there_is_no_way_back_from_a_beginning(workplace):
    with pytest.raises(UserError, match="nothing before it"):
        api.rollback(str(workplace / "base"), str(workplace / "nothing"))
