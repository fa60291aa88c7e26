"""`sft`: a run learns to answer, inside a budget, bit for bit the same after a kill; what cannot be learnt from leaves nothing behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from sparing import api
from sparing.base.config import UserError
from sparing.base.config_file import read_config
from sparing.base.files import file_sha256, read_lines
from sparing.base.run import RunFolder
from sparing.cli.main import main
from sparing.data.chat import ChatTemplate, template_text
from sparing.data.tokenizer import Tokenizer
from sparing.kernels import native

TRAIN = {"threads": 1, "replicas": 1, "compile": False, "micro_batch_size": 8, "kernels": "plain", "dtype": "float32"}
BASE = {
    "model": {
        "hidden_size": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 512, "num_dense_layers": 2, "max_position_embeddings": 256,
    },
    "train": TRAIN | {"seq_len": 64, "batch_size": 8, "evals": 0},
}  # fmt: skip
WISHES = {"train": TRAIN | {"batch_size": 8, "seq_len": 64, "evals": 2}, "optim": {"lr": 0.003}}
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def say(number: int, answer: str = "It is number {} of the ship.") -> dict:
    return {"messages": [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": answer.format(number)}]}


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    root = tmp_path_factory.mktemp("sft")
    (root / "text").mkdir()
    for i in range(40):
        lines = [f"The {word} number {j} of book {i} went to the sea. What is it?" for j, word in enumerate(["cat", "dog", "ship"] * 20)]
        (root / "text" / f"{i:02d}.txt").write_text("\n".join(lines))
    write(root / "chats.jsonl", map(say, range(300)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARING_HOME", str(root / "home"))
        api.train([str(root / "text")], "60ktok", str(root / "base"), BASE, seed=3, samples=0)
        yield root


@pytest.fixture(scope="module", params=["full", "lora"])
def tuned(workplace, request):
    """(summary, run folder)."""
    out = workplace / request.param
    summary = api.sft(
        str(workplace / "base"), [str(workplace / "chats.jsonl")], "16ktok", str(out), request.param, wishes=WISHES, samples=2
    )
    return summary, RunFolder(out)


def test_it_learns_to_answer(tuned, workplace):
    summary, run = tuned
    before, after = summary["before"], summary["after"]
    assert after["new"]["loss"] < 0.7 * before["new"]["loss"] and after["new"]["bpb"] < before["new"]["bpb"]
    assert summary["bpb"] == after["new"]["bpb"] and summary["base"] == file_sha256(workplace / "base/weights/model.safetensors")
    assert before["old"]["loss"] > 0 and after["old"]["loss"] != before["old"]["loss"]
    assert [row["name"] for row in summary["ancestors"]] == ["base"]
    assert 0 < summary["trained_tokens"] < summary["tokens"] <= 16_000
    metrics = read_lines(run.metrics_file)
    assert metrics[0]["step"] == 0 and metrics[0]["eval_loss"] == before["new"]["loss"]
    counts = json.loads((run.state / "chats/counts.json").read_text())
    assert counts["train"]["chats"] + counts["held_out"]["chats"] == 300 and counts["train"]["trained"] > 0
    assert "conversations" in run.model_card_file.read_text()
    small = summary["trainable_parameters"] < 0.3 * summary["parameters"]
    assert small == (read_config(run.config_file).adapter is not None)


def test_it_was_asked_as_the_server_asks(tuned):
    summary, run = tuned
    text = template_text(run)
    assert "User: " in text or "capitalize" in text, "a base without a template gets the plain one, which is the run's own from now on"
    assert not ChatTemplate(text).plain
    for sample in summary["samples"]:
        assert sample["prompt"].endswith("\n\nAssistant:")
    config = read_config(run.config_file)
    assert config.train.seq_len == 64 and config.optim.final_lr == 0 and config.optim.matrix == "adamw"
    few = config.adapter is None and config.train.dtype == "bfloat16" and native.can("vectors")
    assert (config.precision.weights, config.precision.moments) == (("bfloat16", "int8") if few else ("float32", "float32"))
    assert config.data.holdout_fraction == 0.05


def test_eval_of_conversations(workplace):
    """The base, scored by `eval`, is what `sft` saw before its first step."""
    file = write(workplace / "asked.jsonl", [say(number) for number in range(1000, 1040)])
    result = api.evaluate(str(workplace / "base"), [file], context=256)
    assert result["examples"] == 40 and result["answer_tokens"] > 200 and result["bpb"] > 0 and result["truncated"] == 0
    out = api.sft(
        str(workplace / "base"), [str(workplace / "chats.jsonl")], "4096tok", str(workplace / "scored"), "full", [file],
        wishes={"train": TRAIN}, samples=0,
    )  # fmt: skip
    assert read_config(workplace / "scored/config.toml").train.seq_len == 256, "the shortest rows that hold the answers"
    assert out["before"]["new"]["loss"] == pytest.approx(result["answer_loss"], rel=1e-4)
    assert out["before"]["new"]["bpb"] == pytest.approx(result["bpb"], rel=1e-4)
    with pytest.raises(UserError, match="no answer to score: 1 × no answer"):
        api.evaluate(str(workplace / "base"), [write(workplace / "none.jsonl", [{"messages": [{"role": "user", "content": "Hi"}]}])])


def test_the_best_weights_are_kept(workplace, tmp_path, capsys):
    """Answers that are the contrary of the held-out ones: the longer it learns, the worse it is."""
    val = write(tmp_path / "val.jsonl", [say(number) for number in range(400, 420)])
    contrary = write(tmp_path / "contrary.jsonl", [say(number, "zzz qqq {} xxx vvv jjj") for number in range(40)])
    wishes = {"train": WISHES["train"] | {"evals": 4}, "optim": {"lr": 0.01, "warmup": 0.5, "decay": 0.5}}
    first = tmp_path / "first"
    api.sft(
        str(workplace / "base"), [str(workplace / "chats.jsonl"), contrary], "10ktok", str(first), "full", [val], wishes=wishes, samples=0
    )
    summary = api.sft(str(first), [contrary], "20ktok", str(tmp_path / "run"), "full", [val], wishes=wishes, samples=0)
    losses = {
        line["step"]: line["eval_loss"] for line in read_lines(tmp_path / "run/metrics.jsonl") if line.get("step") and "eval_loss" in line
    }
    best = min(losses, key=losses.get)
    assert best < max(losses) and summary["after"]["new"]["loss"] == losses[best]
    assert f"lowest after step {best}" in capsys.readouterr().err
    kept = api.evaluate(str(tmp_path / "run"), [val])
    assert kept["answer_loss"] == pytest.approx(losses[best], rel=1e-3), "and served"


def test_old_text_that_is_named(workplace, tmp_path):
    keep = str(workplace / "text" / "00.txt")
    summary = api.sft(
        str(workplace / "base"), [str(workplace / "chats.jsonl")], "8ktok", str(tmp_path / "run"), "full", keep=[keep], wishes=WISHES,
        samples=0,
    )  # fmt: skip
    of_base = api.evaluate(str(workplace / "base"), [keep])
    assert summary["before"]["old"]["bpb"] == pytest.approx(of_base["bpb"], rel=0.2), "its beginning"
    assert summary["after"]["old"]["loss"] > summary["before"]["old"]["loss"], "forgetting shows"
    assert len(read_lines(tmp_path / "run/state/old.jsonl")) == 1


def test_a_run_with_a_template_keeps_it(workplace, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(workplace / "base", base)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    summary = api.sft(str(base), [str(workplace / "chats.jsonl")], "2ktok", str(tmp_path / "run"), "full", wishes=WISHES, samples=1)
    assert (tmp_path / "run/chat_template.jinja").read_text() == TEMPLATE
    run = RunFolder(tmp_path / "run")
    tokenizer = Tokenizer.load(run.tokenizer_file)
    (sample,) = summary["samples"]
    assert sample["prompt"].startswith("<|user|>What is") and sample["prompt"].endswith("<|end|>\n<|assistant|>")
    assert tokenizer.special["<|end|>"] in tokenizer.eos_ids


@pytest.mark.parametrize(
    ("rows", "template", "method", "said"),
    [
        ([{"messages": [{"role": "user", "content": "Hi"}]}], None, "full", "no usable conversation in .*no answer"),
        ([{"text": "a document"}], None, "full", r"no conversation in it \(keys: text\)"),
        ([say(1)], None, "full", "all questions are alike"),
        (
            list(map(say, range(9))),
            "{{ raise_exception('no chats') }}",
            "full",
            "nothing can be learnt .* refuses these messages: no chats",
        ),
        (list(map(say, range(9))), "{% if %}", "full", "no Jinja template"),
        ([say(n, "word " * 9) for n in range(9)], None, "both", "--method both: choose lora or full or esft"),
    ],
)
def test_what_cannot_be_learnt_from_leaves_nothing(workplace, tmp_path, rows, template, method, said):
    base = workplace / "base"
    if template:
        base = tmp_path / "base"
        shutil.copytree(workplace / "base", base)
        (base / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=said) as error:
        api.sft(str(base), [write(tmp_path / "c.jsonl", rows)], "20ktok", str(tmp_path / "run"), method, wishes=WISHES)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_answers_that_no_row_reaches(workplace, tmp_path):
    long = [say(number) for number in range(20)]
    for row in long:
        row["messages"][0]["content"] += " word" * 300
    with pytest.raises(UserError, match="nothing can be learnt"):
        api.sft(str(workplace / "base"), [write(tmp_path / "c.jsonl", long)], "20ktok", str(tmp_path / "run"), "full", wishes=WISHES)


@pytest.mark.parametrize("verb", ["sft", "train --from", "dpo", "grow"])
def test_a_budget_that_is_too_short_is_one_line_and_leaves_nothing(workplace, tmp_path, verb):
    base, chats, run = str(workplace / "base"), str(workplace / "chats.jsonl"), str(tmp_path / "run")
    pair = {"prompt": "What is it?", "chosen": "A ship.", "rejected": "A cat."}
    pairs = write(tmp_path / "pairs.jsonl", [pair | {"prompt": f"What is number {number}?"} for number in range(60)])
    text = [str(workplace / "text")]
    begin = {
        "sft": lambda budget: api.sft(base, [chats], budget, run, "full", wishes=WISHES, samples=0),
        "train --from": lambda budget: api.train(text, budget, run, {"start": {"run": base}, "train": TRAIN}, samples=0),
        "dpo": lambda budget: api.dpo(base, [pairs], budget, run, "full", wishes=WISHES, samples=0),
        "grow": lambda budget: api.grow(base, "sea", text, budget, run),
    }[verb]
    with pytest.raises(UserError, match=r"^budget 1s: \d+ s have gone by now, and .* nearest that works: \S+$"):
        begin("1s")
    assert not (tmp_path / "run").exists()


def test_texts_to_keep_that_are_none_leave_nothing(workplace, tmp_path):
    (tmp_path / "keep.jsonl").write_text('{"bad"')
    options = {"wishes": WISHES, "keep": [str(tmp_path / "keep.jsonl")]}
    with pytest.raises(UserError, match="--keep: no usable text"):
        api.sft(str(workplace / "base"), [str(workplace / "chats.jsonl")], "4ktok", str(tmp_path / "run"), **options)
    assert not (tmp_path / "run").exists()


def test_paths_mean_the_same_from_any_folder(workplace, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    data = [write(workplace / "few.jsonl", [say(n, "word " * 300) for n in range(30)])]
    options = {"wishes": {"train": TRAIN | {"batch_size": 8}}, "samples": 0, "val": ["chats.jsonl"], "keep": ["text"]}
    api.sft("base", [os.path.relpath(data[0])], "4ktok", str(tmp_path / "run"), **options)
    said = capsys.readouterr().err
    lost = re.search(r"which lost ([\d.]+)% of the answers", said)[1]
    assert f"rows that hold {100 - float(lost):.1f}% of the answers" in said and float(lost) > 10, "no context is longer"
    assert f"next: sparing chat {tmp_path}/run" in said
    config = read_config(tmp_path / "run/config.toml")
    assert (config.start.run, config.data.paths) == (str(workplace / "base"), tuple(data))
    assert (config.chats.val, config.chats.keep) == ((str(workplace / "chats.jsonl"),), (str(workplace / "text"),))
    monkeypatch.chdir(tmp_path)
    api.resume("run", "+4ktok", samples=0)
    assert api.merge("run", "merged")["updates"] > 0


def test_other_verbs_say_what_they_are_not_for(workplace, tmp_path):
    with pytest.raises(UserError, match=r"chats: train has no use for this section, which is for .sparing sft"):
        api.train([str(workplace / "text")], "20ktok", str(tmp_path / "run"), {"chats": {}})
    with pytest.raises(UserError, match="leave it out with full"):
        api.sft(str(workplace / "base"), [str(workplace / "chats.jsonl")], "1ktok", str(tmp_path / "run"), "full", wishes={"adapter": {}})


OPTIONS = (
    "--budget 24ktok --samples 0 --train.seq-len 64 --train.batch-size 8 --train.micro-batch-size 8 --train.threads 1 --train.replicas 1"
    " --train.compile false --train.kernels plain --train.dtype float32 --train.evals 3 --train.checkpoint-interval-s 0.2 --optim.lr 0.003"
).split()
TIMING = ("seconds", "tokens_per_s", "mfu", "took_s", "watts", "memory_bytes", "idle", "input_wait")


def losses(run) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in TIMING} for line in read_lines(run / "metrics.jsonl")]


def kill_at(arguments: list, run, step: int) -> None:
    """Begin a run by the command line, and kill it once its metrics have this step."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "sparing", *map(str, arguments)]
    process = subprocess.Popen(words, env=environment, stdout=-1, stderr=-1, text=True)
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        done = losses(run) if (run / "metrics.jsonl").exists() else []
        if any(line.get("step", 0) >= step for line in done):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()


def killed_and_straight(workplace, tmp_path, method: str, options: list[str]) -> tuple:
    """Folders of two runs from the same base: one that was killed and resumed, and one that was not disturbed."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    kill_at(["sft", workplace / "base", "--data", workplace / "chats.jsonl", "--out", killed, "--method", method, *options], killed, 12)
    api.resume(str(killed), samples=0)
    wishes = {"train": TRAIN | {"batch_size": 8, "seq_len": 64, "evals": 3, "checkpoint_interval_s": 0.2}, "optim": {"lr": 0.003}}
    api.sft(str(workplace / "base"), [str(workplace / "chats.jsonl")], "24ktok", str(straight), method, wishes=wishes, samples=0)
    return killed, straight


@pytest.mark.parametrize("method", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_killed_and_resumed_bit_for_bit(workplace, tmp_path, method):
    killed, straight = killed_and_straight(workplace, tmp_path, method, OPTIONS)
    assert losses(killed) == losses(straight) and len(losses(killed)) > 25
    for name in ("state/old.jsonl", "state/chats/train.safetensors"):
        assert (killed / name).read_bytes() == (straight / name).read_bytes()
    assert file_sha256(RunFolder(killed).learned_file) == file_sha256(RunFolder(straight).learned_file)


def test_a_finished_run_is_extended_and_other_conversations_are_noticed(workplace, tmp_path):
    file = write(tmp_path / "c.jsonl", map(say, range(100)))
    run = tmp_path / "run"
    api.sft(str(workplace / "base"), [file], "4ktok", str(run), "full", wishes=WISHES, samples=0)
    longer = api.resume(str(run), "+4ktok", samples=0)
    assert longer["tokens"] > 4000 and longer["before"]["new"]["loss"] > longer["after"]["new"]["loss"]
    write(tmp_path / "c.jsonl", map(say, range(120)))
    with pytest.raises(UserError, match=r"the texts of .* have changed"):
        api.resume(str(run), "+4ktok", samples=0)
    more = api.resume(str(run), "+4ktok", samples=0, data=[file])
    assert json.loads((run / "state/chats/counts.json").read_text())["train"]["chats"] > 100 and more["tokens"] > 8000


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("sft", "sft needs RUN"),
        ("sft r --budget 5m --out o", "sft needs --data"),
        ("sft r --data d --out o", "sft needs --budget"),
        ("sft r --data d --budget soon --out o", "not a number with a unit"),
        ("sft r --data d --budget 5m --out o --method both", "--method both: not available; choose lora or full or esft"),
        ("sft r --data d --budget 5m --out o --samples -1", "--samples -1: must be 0 or more"),
        ("sft r --data d --budget 5m --out o --vall x", "unknown option --vall; nearest: --val"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, line, says):
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err
