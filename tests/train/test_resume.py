"""kill -9, then resume: the losses of the undisturbed run, bit for bit."""

import random
import signal
import time

import pytest

from sparing.base.files import read_lines

STEPS = 50
TIMING = ("seconds", "tokens_per_s", "mfu", "took_s", "watts", "memory_bytes", "idle", "input_wait")


def told(run) -> list[dict]:
    """metrics.jsonl without what a clock says."""
    return [{key: value for key, value in line.items() if key not in TIMING} for line in read_lines(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(run, "--steps", STEPS)
    assert process.wait() == 0, process.output()
    return run


def check_equal(run, undisturbed) -> None:
    assert told(run) == told(undisturbed)
    assert len([line for line in told(run) if "loss" in line]) == STEPS and len([line for line in told(run) if "eval_bpb" in line]) == 4
    assert (run / "weights/model.safetensors").read_bytes() == (undisturbed / "weights/model.safetensors").read_bytes()
    newest = f"state/step-{STEPS:08d}/optimizer.safetensors"
    assert (run / newest).read_bytes() == (undisturbed / newest).read_bytes()


def finish(start, run, *options) -> None:
    process = start(run, "--steps", STEPS, *options)
    assert process.wait() == 0, process.output()


def saving(run):
    return lambda: any(run.glob("state/.step-*")) or any(run.glob("state/.pre-decay*"))


def logged(run) -> int:
    return sum("loss" in line for line in read_lines(run / "metrics.jsonl"))


def disturb(start, run, kills: int, rng: random.Random) -> list[str]:
    """Kill the run again and again: at a random step and instant within it, while saving, and while evaluating."""
    instants = []
    for _ in range(kills):
        before, kind = logged(run), rng.choice(["step", "step", "saving", "evaluation", "start"])
        process = start(run, "--steps", STEPS, "--slow-eval", 0.1 if kind == "evaluation" else 0)
        if kind == "evaluation" and before < 0.7 * STEPS:
            process.until_says("evaluating")
        elif kind == "saving" and before < 0.7 * STEPS:
            process.until(saving(run))
        elif kind == "step" and before < 0.8 * STEPS:
            aim = before + rng.randrange(1, 6)
            process.until(lambda aim=aim: logged(run) >= aim)
        time.sleep(rng.random() * 0.03)
        process.kill()
        assert process.wait() in (-signal.SIGKILL, 0)
        instants.append(kind)
    return instants


def test_killed_and_resumed_equals_undisturbed(start, tmp_path, undisturbed):
    disturb(start, tmp_path / "run", 8, random.Random(1))
    finish(start, tmp_path / "run")
    check_equal(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_many_instants(start, tmp_path, undisturbed, seed):
    instants = disturb(start, tmp_path / "run", 12, random.Random(seed))
    finish(start, tmp_path / "run")
    check_equal(tmp_path / "run", undisturbed)
    assert len(set(instants)) >= 3


@pytest.mark.parametrize("kind", ["saving", "evaluation", "start", "last evaluation"])
def test_killed_while(start, tmp_path, undisturbed, kind):
    run = tmp_path / "run"
    process = start(run, "--steps", STEPS, "--slow-eval", 0.5 if "evaluation" in kind else 0)
    if kind == "saving":
        process.until(lambda: saving(run)() and logged(run) > 10)
    elif kind == "evaluation":
        process.until_says("evaluating")
    elif kind == "last evaluation":
        process.until(lambda: logged(run) == STEPS)
        process.until(lambda: process.output().count("evaluating") == 4)
    else:
        process.until(lambda: (run / "state").exists())
    process.kill()
    assert process.wait() == -signal.SIGKILL
    if kind == "last evaluation":
        trained = logged(run)
        assert trained == STEPS
    finish(start, run)
    check_equal(run, undisturbed)


def test_signals_are_as_harmless_as_kills(start, tmp_path, undisturbed):
    run = tmp_path / "run"
    for steps in (5, 20, 35):
        process = start(run, "--steps", STEPS)
        process.until(lambda steps=steps: logged(run) >= steps)
        process.kill(signal.SIGTERM)
        assert process.wait() == 130, process.output()
    finish(start, run)
    check_equal(run, undisturbed)


def test_damaged_newest_checkpoint_falls_back_and_stays_identical(start, tmp_path, undisturbed):
    run = tmp_path / "run"
    process = start(run, "--steps", STEPS)
    process.until(lambda: logged(run) > 30)
    process.kill()
    process.wait()
    newest = max(run.glob("state/step-*"))
    data = bytearray((newest / "optimizer.safetensors").read_bytes())
    data[len(data) // 2] ^= 64
    (newest / "optimizer.safetensors").write_bytes(data)
    process = start(run, "--steps", STEPS)
    assert process.wait() == 0
    assert f"{newest.name} is damaged" in process.output() and "going on from step" in process.output()
    check_equal(run, undisturbed)


def test_time_budget_replays_its_plans(start, tmp_path):
    """With a time budget: the same up to the first plan made after the kill, and the budget kept, lost work included."""
    run, budget = tmp_path / "run", 12.0
    options = ("--seconds", budget, "--interval", 1.0, "--tick", 0.1)
    process = start(run, *options)
    process.until(lambda: logged(run) > 50)
    process.kill()
    process.wait()
    first, plans = told(run), read_lines(run / "state/plan.jsonl")
    process = start(run, *options)
    assert process.wait() == 0, process.output()
    second, later = told(run), read_lines(run / "state/plan.jsonl")
    kept = max(i for i in range(len(plans) + 1) if plans[:i] == later[:i])
    assert kept >= 2
    until = min([plan["step"] for plan in later[kept:] + plans[kept:]] + [len(first)])
    assert until > 4
    same = [[line for line in lines if "loss" in line and line["step"] <= until] for lines in (first, second)]
    assert same[0] == same[1]
    assert [line["step"] for line in second if "loss" in line] == list(range(1, later[-1]["total_steps"] + 1))
    assert 0.95 * budget < read_lines(run / "metrics.jsonl")[-1]["seconds"] < 1.015 * budget
