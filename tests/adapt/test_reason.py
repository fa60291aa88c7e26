"""`reason`: all stages of R1's recipe by one command, each a run; killed in a stage and resumed, it is the same bit for bit."""

import json
import shutil
import time

import pytest
from tests.adapt.test_grpo import BASE
from tests.adapt.test_sft import TRAIN, kill_at, write

from sparing import api
from sparing.adapt.reason import FEWEST, SHARES, STAGES, Verbs, _Recipe, _shortest, _worked_right
from sparing.adapt.rewards import _in_columns, load_task, verify
from sparing.adapt.rollouts import Answer
from sparing.base.config import Budget, CannotGoOn, Config, ReasonConfig, TrainConfig, UserError
from sparing.base.config_file import read_config
from sparing.base.files import file_sha256, read_lines
from sparing.base.run import RunFolder
from sparing.cli.main import main
from sparing.infer.engine import Engine
from sparing.infer.request import Sampling

BUDGET = "40ktok"
TRAINED = TRAIN | {"evals": 1, "micro_batch_size": 64, "batch_size": 4, "seq_len": 64, "checkpoint_interval_s": 0.2}
WISHES = {
    "train": TRAINED,
    "optim": {"lr": 0.01},
    "grpo": {"problems": 8, "samples": 8, "max_tokens": 4, "scored": 16, "weights": "float32"},
}
OPTIONS = [word for section, fields in WISHES.items() for name, value in fields.items() for word in (
    f"--{section}.{name}".replace("_", "-"), str(value).lower())]  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Two bases that have read a little about the colours of animals, the second one narrower and with fewer words; a task that likes one
    colour; answers that show how to answer, mostly with others."""
    root = tmp_path_factory.mktemp("reason")
    (root / "text").mkdir()
    animals, words = ("cat", "dog", "cow", "hen"), ("red", "blue", "green", "black")
    for i in range(300):
        (root / "text" / f"{i:03d}.txt").write_text(f"{i % 50}: The {animals[i % 4]} is {words[i // 4 % 4]}")
    with open(root / "task.jsonl", "w") as file:
        for n in range(160):
            file.write(json.dumps({"prompt": f"{n}: {animals[n % 4]}", "verifier": "format", "answer": "\\s*red"}) + "\n")
    write(root / "cold.jsonl", ({"prompt": f"{n}: {animals[n % 4]}", "completion": words[n // 4 % 4]} for n in range(200, 400)))
    adamw = {"matrix": "adamw", **dict.fromkeys(("lr", "lr_embed", "lr_head", "lr_norm"), 0.01)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARING_HOME", str(root / "home"))
        for name, more, budget in (("base", {}, "24ktok"), ("small", {"hidden_size": 32, "num_heads": 1, "vocab_size": 280}, "8ktok")):
            wishes = BASE | {"model": BASE["model"] | more, "optim": adamw, "train": BASE["train"] | {"batch_size": 16}}
            api.train([str(root / "text")], budget, str(root / name), wishes, seed=3, samples=0)
        yield root


def options(workplace, **more) -> dict:
    return {"cold": [str(workplace / "cold.jsonl")], "wishes": WISHES, "seed": 1, "samples": 1} | more


@pytest.fixture(scope="module")
def taught(workplace):
    """(summary, run folder)."""
    out, more = workplace / "taught", options(workplace, student=str(workplace / "small"))
    return api.reason(str(workplace / "base"), str(workplace / "task.jsonl"), BUDGET, str(out), **more), RunFolder(out)


def test_every_stage_is_a_run_and_does_its_part(taught, workplace):
    summary, run = taught
    rows = {row["stage"]: row for row in summary["stages"]}
    assert list(rows) == ["base", "1-cold", "2-rl", "3-sampled", "4-sft", "student", "5-student"] and summary["left_out"] == []
    scored = {name: row["pass_at_1"] for name, row in rows.items() if name != "3-sampled"}
    assert scored["base"] < 0.1 < scored["1-cold"] < 0.5 and scored["2-rl"] >= scored["1-cold"]
    begun, rewarded = (file_sha256(RunFolder(run.path / name).learned_file) for name in ("1-cold", "2-rl"))
    assert begun != rewarded and rows["2-rl"]["tokens"] > 1000, "rewards moved it"
    assert scored["4-sft"] > scored["base"] + 0.15
    student = json.loads((run.path / "5-student/state/summary.json").read_text())
    assert student["after"]["new"]["loss"] < student["before"]["new"]["loss"] - 0.2, "it is too small for the answers within this budget"
    assert {row["problems"] for row in rows.values() if "k" in row} == {16}
    for name in ("1-cold", "2-rl", "4-sft", "5-student"):
        own = json.loads((run.path / name / "state/summary.json").read_text())
        assert rows[name]["budget"] == own["budget"] and rows[name]["tokens"] > 0
        assert 0 < own["seconds"] <= rows[name]["seconds"], "the ledger's rows cover the stage's own time"
    configs = {name: read_config(run.path / name / "config.toml") for name in ("1-cold", "2-rl", "4-sft", "5-student")}
    begun = {name: config.start.run for name, config in configs.items()}
    base, small = str(workplace / "base"), str(workplace / "small")
    assert begun == {"1-cold": base, "2-rl": str(run.path / "1-cold"), "4-sft": base, "5-student": small}


def test_what_a_summary_says(taught, workplace):
    summary, run = taught
    rows = {row["stage"]: row for row in summary["stages"]}
    assert summary["before"]["new"]["pass_at_1"] == rows["base"]["pass_at_1"] == 1 - summary["before"]["new"]["loss"]
    assert summary["after"]["new"]["pass_at_1"] == rows["4-sft"]["pass_at_1"]
    assert summary["student"]["after"]["new"]["pass_at_1"] == rows["5-student"]["pass_at_1"]
    assert summary["base"] == file_sha256(workplace / "base/weights/model.safetensors")
    assert [row["name"] for row in summary["ancestors"]] == ["base"]
    assert 0 < summary["trained_tokens"] < summary["tokens"] <= 40_000 and summary["trainable_parameters"] > 0
    assert json.loads((run.state / "summary.json").read_text())["stages"] == summary["stages"]
    assert len(summary["samples"]) == 1


def test_its_report_shows_the_stages_side_by_side(taught, tmp_path):
    page = str(tmp_path / "report.html")
    assert api.report(str(taught[1].path), page)["report"] == page
    text = (tmp_path / "report.html").read_text()
    assert "<h1>Runs compared</h1>" in text
    assert [name for name in ("1-cold", "2-rl", "3-sampled", "4-sft", "5-student") if f"<summary>{name}</summary>" in text] == [
        "1-cold", "2-rl", "4-sft", "5-student",
    ]  # fmt: skip


def test_right_answers_are_kept_with_their_source_and_no_held_out_problem(taught, workplace):
    summary, run = taught
    task, rows = load_task(str(workplace / "task.jsonl")), read_lines(run.path / "3-sampled/answers.jsonl")
    counts = summary["answers"]
    assert FEWEST <= len(rows) == counts["kept"] == counts["solved"] <= counts["right"] <= counts["answers"] == 4 * counts["problems"]
    learnt, held_out = {problem.prompt: problem for problem in task.problems}, {problem.prompt for problem in task.held_out}
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        assert question in learnt and question not in held_out and verify(learnt[question], answer).reward == 1
        assert task.problems[row["source"]["problem"]].prompt == question and 1 <= row["source"]["right"] <= 4
    assert len({row["messages"][0]["content"] for row in rows}) == len(rows)


def test_a_receipt_adds_up_the_stages(taught):
    summary, run = taught
    receipt = api.receipt(str(run.path))
    times = {row["stage"]: row["time_s"] for row in receipt["stages"]}
    assert {"score", "sample", "1-cold: train", "2-rl: rollout", "4-sft: train", "5-student: train"} <= set(times)
    assert receipt["status"] == "done" and receipt["actual"]["time_s"]["value"] == pytest.approx(sum(times.values()))
    assert summary["seconds"] == pytest.approx(sum(times.values())) and summary["cost_usd"] == receipt["actual"]["cost_usd"]["value"]
    assert [row["name"] for row in receipt["ancestors"]] == ["base"]
    behind = {row["name"]: row["relation"] for row in api.receipt(str(run.path / "5-student"))["ancestors"]}
    wanted = {"small": "first weights", "2-rl": "wrote its answers", "taught": "chose its answers", "1-cold": "first weights"}
    assert behind.items() >= wanted.items()


def test_a_run_inside_another_ones_folder_is_no_stage_of_it(workplace, tmp_path):
    for name in ("run", "run/1-other"):
        shutil.copytree(workplace / "small", tmp_path / name)
    assert [row["stage"] for row in api.receipt(str(tmp_path / "run"))["stages"] if "1-other" in row["stage"]] == []


def test_the_whole_run_has_the_model_of_the_fine_tuning(taught):
    _, run = taught
    said = []
    for folder in (run.path, run.path / "4-sft"):
        with Engine(folder, weights="float32") as engine:
            said.append(engine.submit(engine.tokenizer.encode_prompt("User: 7: cow\n\nAssistant:"), Sampling(4, 0)).text())
    assert said[0] == said[1] and RunFolder(run.path).adapter_file.exists()
    for more in ({}, {"budget": "+1ktok"}):
        with pytest.raises(UserError, match="is made of stages"):
            api.resume(str(run.path), **more)


def test_killed_and_resumed_bit_for_bit(taught, workplace):
    """Its base has moved meanwhile."""
    _, straight = taught
    killed, base, moved = workplace / "killed", workplace / "kept", workplace / "moved"
    shutil.copytree(workplace / "base", base)
    words = ["reason", base, "--task", workplace / "task.jsonl", "--cold", workplace / "cold.jsonl", "--seed", 1]
    words += ["--student", workplace / "small", "--budget", BUDGET, "--samples", 1, "--out", killed, *OPTIONS]
    kill_at(words, killed / "2-rl", 3)
    assert not (killed / "2-rl/state/summary.json").exists()
    began = (killed / "1-cold/state/summary.json").read_bytes()
    base.rename(moved)
    with pytest.raises(UserError, match="if it has moved, say --base RUN"):
        api.resume(str(killed), samples=1)
    api.rebase(str(killed), str(moved))
    summary = api.resume(str(killed), samples=1)
    assert (killed / "1-cold/state/summary.json").read_bytes() == began, "a finished stage is not made again"
    for name in ("1-cold", "2-rl", "4-sft", "5-student"):
        ours, theirs = (RunFolder(run / name).learned_file for run in (killed, straight.path))
        assert file_sha256(ours) == file_sha256(theirs), name
    assert (killed / "3-sampled/answers.jsonl").read_text() == (straight.path / "3-sampled/answers.jsonl").read_text()
    assert read_lines(killed / "state/scores.jsonl")[-1]["new"] == read_lines(straight.state / "scores.jsonl")[-1]["new"]
    assert summary["run"] == str(killed)


def test_sampling_goes_on_behind_its_last_whole_line(taught, workplace, monkeypatch):
    monkeypatch.setattr("sparing.adapt.reason.AT_A_TIME", 16)
    whole, cut = workplace / "whole", workplace / "cut"
    for copy in (whole, cut):
        shutil.copytree(taught[1].path, copy)
        shutil.rmtree(copy / "3-sampled")
    recipe = _Recipe(RunFolder(whole), None, 0.0, 0)
    first = recipe._sampled(RunFolder(whole / "2-rl")).read_text()
    lines = (whole / "3-sampled/drawn.jsonl").read_text().splitlines()
    assert len(lines) > 4
    (cut / "3-sampled").mkdir()
    (cut / "3-sampled/drawn.jsonl").write_text("\n".join(lines[:2]) + "\n" + lines[2][:40])
    recipe = _Recipe(RunFolder(cut), None, 0.0, 0)
    assert recipe._sampled(RunFolder(cut / "2-rl")).read_text() == first


def test_unsolved_problems_are_asked_again_and_solved_ones_not():
    recipe = _Recipe.__new__(_Recipe)
    recipe.task, recipe.config = load_task("add:1"), Config(train=TrainConfig(seed=5))
    lines = []
    while found := recipe._next(lines, 7):
        epoch, places = found
        kept = [{"source": {"problem": place}} for place in places if place % 2]
        lines.append({"epoch": epoch, "problems": places, "kept": kept})
    every = range(len(recipe.task.problems))
    asked = [[place for line in lines if line["epoch"] == epoch for place in line["problems"]] for epoch in range(4)]
    assert sorted(asked[0]) == list(every) and asked[0] != list(every)
    assert all(sorted(again) == [place for place in every if place % 2 == 0] for again in asked[1:])


def test_the_shortest_of_different_right_answers():
    texts = {"a b": 3, "a": 1, " a ": 2, "long": 5}
    answers = [Answer([0] * size, [], text, False, None, 1.0) for text, size in texts.items()]
    assert _shortest(answers, 1) == ["a"] and _shortest(answers, 9) == ["a", "a b", "long"]


def test_what_is_not_used_goes_on_to_those_that_follow():
    """Of a budget in time: what is left, less what scores will take, by the shares of the stages that are left."""
    recipe = _Recipe.__new__(_Recipe)
    recipe.stages, recipe.budget, recipe.reason = list(SHARES), Budget(1000.0, "s"), ReasonConfig(student="small")
    scores = {"base": {"cost": 10.0}}
    recipe._scores, recipe._spent = lambda: scores, lambda: spent
    spent = 40.0
    first = recipe._shares("1-cold")
    assert sum(first.values()) == pytest.approx(1000 - 40 - 5 * 10) and first["2-rl"] == pytest.approx(5 * first["1-cold"])
    scores |= {"1-cold": {"cost": 20.0}}
    spent = 100.0
    after = recipe._shares("2-rl")
    assert sum(after.values()) == pytest.approx(1000 - 100 - 4 * 20) and "1-cold" not in after
    recipe.budget = Budget(1000.0, "tok")
    assert recipe._shares("4-sft") == {name: pytest.approx(1000 * SHARES[name][0]) for name in ("4-sft", "5-student")}


@pytest.mark.parametrize("name", ["add", "add:1", "add:12", "countdown", "countdown:2", "countdown:6"])
def test_worked_answers_of_built_in_tasks_are_right(name):
    task = load_task(name)
    for problem in task.problems[:300] + task.held_out[:50]:
        assert problem.worked.startswith("<think>") and verify(problem, problem.worked).reward == 1, problem.worked


def test_a_file_has_worked_answers_too_and_wrong_ones_are_left_out(tmp_path, capsys):
    """So a file of `data synth` is a task that begins with them."""
    rows = [{"prompt": f"Say {n}.", "verifier": "number", "answer": n, "worked": f"<think>It is {n}.</think>{n}"} for n in range(20)]
    code = {"verifier": "code", "tests": ["assert f() == 1"]}
    rows += [code | {"prompt": f"Write f, {n}.", "worked": f"```python\ndef f():\n    return {1 + n % 2}\n```"} for n in range(6)]
    rows += [{"prompt": "Say nothing.", "verifier": "number", "answer": 0}]
    rows[3]["worked"] = "<think>It is 3.</think>4"
    task = load_task(write(tmp_path / "t.jsonl", rows))
    learnt = {problem.prompt for problem in task.problems}
    expected = {f"Say {n}." for n in range(20) if n != 3} | {f"Write f, {n}." for n in (0, 2, 4)}
    assert {problem.prompt for problem, _ in _worked_right(task)} == expected & learnt
    wrong = len(({"Say 3."} | {f"Write f, {n}." for n in (1, 3, 5)}) & learnt)
    assert wrong and f"{wrong} of {len(learnt - {'Say nothing.'})} worked answers are not right" in capsys.readouterr().err


def test_what_worked_answers_look_like():
    assert _in_columns(46, 78) == "<think>6 + 8 = 14, write 4, carry 1. 4 + 7 + 1 = 12.</think>124"
    assert _in_columns(3, 9) == "<think>3 + 9 = 12.</think>12"


def test_gsm8k_has_worked_answers(tmp_path):
    rows = [{"question": f"How many is {n}?", "answer": f"It is {n}*2=<<{n}*2={2 * n}>>{2 * n}.\n#### {2 * n}"} for n in range(9)]
    task = load_task("gsm8k", [write(tmp_path / "t.jsonl", rows)])
    (problem,) = (one for one in task.problems + task.held_out if one.answer == "6")
    assert problem.worked == "It is 3*2=6.\n#### 6" and verify(problem, problem.worked).reward == 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("reason r --budget 5m --out o", "reason needs --task"),
        ("reason r --task add --budget 5m --out o --method esft", "--method esft: not available; choose lora or full"),
        ("reason r --task add --budget 5m --out o --reason.samples 0", "must be at least 1"),
        ("reason {base} --task ad --budget 5m --out {out}", "neither a file nor one of"),
        ("reason {base} --task {task} --budget 5s --out {out}", "several stages need 30 s"),
        (
            "reason {base} --task {task} --budget 9ktok --out {out}",
            "4-sft has 20% of --budget 9ktok: budget 1800tok is less than one batch",
        ),
        ("reason {base} --task {task} --budget 5m --out {out} --grpo.max-tokens 60", "the model's context has room for"),
        ("reason {base} --task {task} --budget 5m --out {out} --cold {out}.jsonl", "{out}.jsonl"),
        ("reason {base} --task {task} --budget 5m --out {out} --student {out}", "is not a run folder"),
        ("reason {base} --task {task} --budget 5m --out {out} --esft.share 0.1", "reason has no use for this section"),
        ("reason {base} --task {task} --budget 5m --out {base}", "already holds a run"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(workplace, capsys, line, says):
    names = {"base": workplace / "base", "task": workplace / "task.jsonl", "out": workplace / "none"}
    assert main(line.format(**names).split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and says.format(**names) in err.splitlines()[-1] and not (workplace / "none").exists()


def test_too_few_right_answers_are_no_stage(taught, workplace):
    out = workplace / "few"
    shutil.copytree(taught[1].path, out)
    for line in ("answers.jsonl", "counts.json"):
        (out / "3-sampled" / line).unlink()
    drawn = out / "3-sampled/drawn.jsonl"
    drawn.write_text("".join(json.dumps(line | {"kept": []}) + "\n" for line in read_lines(drawn)))
    with pytest.raises(CannotGoOn, match="0 of 16 problems have a right answer"):
        _Recipe(RunFolder(out), None, 0.0, 0)._sampled(RunFolder(out / "2-rl"))


def test_a_stage_that_no_longer_fits_the_budget(taught, workplace):
    out = workplace / "late"
    shutil.copytree(taught[1].path, out)
    shutil.rmtree(out / "4-sft")
    run = RunFolder(out)
    (run.state / STAGES).unlink()
    recipe = _Recipe(run, Verbs(api.sft, api.grpo, api.resume), time.monotonic() - 20_000, 0)  # so long ago, the last stage ended
    recipe.budget = Budget(10_800, "s")
    with pytest.raises(CannotGoOn, match=r"3h in all leave too little for 4-sft: budget .* 2\d{4} s have gone by now"):
        recipe._learnt("4-sft", RunFolder(workplace / "base"), out / "3-sampled/answers.jsonl")
    assert not (out / "4-sft").exists()
