"""What is on disk after training: kept, pruned, fallen back to, refused."""

import json
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import MODEL, Counting, config, fit, held_out, new_run, steps

from sparing.base.config import Budget, Config, ModelConfig, OptimConfig, UserError
from sparing.base.files import read_lines
from sparing.base.hardware import free_memory
from sparing.base.run import RunFolder, verify_folder, write_into
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer
from sparing.train import checkpoint
from sparing.train.checkpoint import fingerprint, rewind
from sparing.train.log import render
from sparing.train.optim import decay_start
from sparing.train.pace import Pace


def fresh(chosen) -> Transformer:
    model = Transformer(chosen.model)
    init_weights(model, chosen.train.seed)
    return model


def test_what_a_run_leaves(tmp_path):
    chosen, run = config(steps(30)), new_run(tmp_path / "run")
    model = fresh(chosen)
    result = fit(run, chosen, model=model)
    assert (result.steps, result.tokens) == (30, 30 * 128) and result.tokens_per_s > 0 and result.mfu > 0
    folders = sorted(path.name for path in run.state.glob("[!.]*") if path.is_dir())
    assert len(folders) == 3 and folders[0] == "pre-decay" and folders[-1] == "step-00000030"
    for name in folders:
        verify_folder(run.state / name)
    start = json.loads((run.state / "pre-decay/state.json").read_text())["step"]
    assert start == decay_start(30, chosen.optim)
    saved = load_file(run.weights_file)
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) and tensor.dtype == torch.float32 for name, tensor in model.state_dict().items())
    lines = read_lines(run.metrics_file)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 31))
    assert all(
        {"step", "tokens", "loss", "lr", "tokens_per_s", "grad_norm", "max_violation"} <= line.keys() for line in lines if "loss" in line
    )
    evals = [line for line in lines if "eval_bpb" in line]
    assert [line["step"] for line in evals] == [8, 15, 23, 30] and evals[-1]["eval_bpb"] < evals[0]["eval_bpb"]
    assert result.evaluation["bpb"] == evals[-1]["eval_bpb"]


def test_each_step_says_what_was_idle_and_what_waited(tmp_path):
    run = new_run(tmp_path / "run")
    fit(run, config(steps(3)))
    lines = [line for line in read_lines(run.metrics_file) if "loss" in line]
    assert len(lines) == 3 and all(0 <= line[name] <= 1 for line in lines for name in ("idle", "input_wait"))
    shown = {"step": 3, "total": 9, "loss": 2.0, "tokens_per_s": 10.0}
    assert render(shown | {"idle": 0.123, "input_wait": 0.002}).endswith("tokens/s  idle 12 %")
    assert render(shown | {"idle": 0.0, "input_wait": 0.25}).endswith("idle 0 %  waits for input 25 %")


def test_a_finished_run_is_finished(tmp_path):
    chosen, run = config(steps(10)), new_run(tmp_path / "run")
    first = fit(run, chosen)
    before = run.metrics_file.read_bytes()
    again = fit(run, chosen, evaluate=lambda nll: pytest.fail("it has been evaluated"))
    assert run.metrics_file.read_bytes() == before
    assert (again.steps, again.evaluation["bpb"], again.loss) == (first.steps, first.evaluation["bpb"], first.loss)


def test_micro_batches_add_up(tmp_path):
    """The same step whether its batch is processed at once or in parts, MTP and unequal numbers of targets included."""
    losses = {}
    for micro in (1, 2, 4, None):
        chosen = config(steps(6), micro_batch_size=micro, sequence_balance=0.0, optim=OptimConfig(matrix="adamw", lr=1e-3, eps=1e-6))
        run = new_run(tmp_path / str(micro))
        fit(run, chosen)
        losses[micro] = [line["loss"] for line in read_lines(run.metrics_file) if "loss" in line]
    for micro in (1, 2, None):
        assert losses[micro] == pytest.approx(losses[4], abs=2e-4)


def test_recomputing_activations_changes_nothing(tmp_path):
    told = []
    for recompute in (False, True):
        run = new_run(tmp_path / str(recompute))
        fit(run, config(steps(4), recompute=recompute))
        told.append([(line["loss"], line["max_violation"]) for line in read_lines(run.metrics_file) if "loss" in line])
    assert told[0] == told[1]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "state"])
def test_a_damaged_newest_checkpoint_falls_back(tmp_path, capsys, damage):
    chosen, run = config(steps(20)), new_run(tmp_path / "run")
    fit(run, chosen)
    before = run.metrics_file.read_text()
    file = run.state / "step-00000020" / ("state.json" if damage == "state" else "weights.safetensors")
    data = bytearray(file.read_bytes())
    file.unlink()  # not in place: weights/model.safetensors is the same file
    if damage != "delete":
        data[len(data) // 2] ^= 1
        file.write_bytes(data[: len(data) // 2] if damage == "truncate" else data)
    fit(run, chosen)
    assert "step-00000020 is damaged" in capsys.readouterr().err
    losses = [[json.loads(line).get("loss") for line in text.splitlines()] for text in (before, run.metrics_file.read_text())]
    assert losses[0] == losses[1]
    verify_folder(run.state / "step-00000020")
    assert not list(run.state.glob("damaged-*"))  # the next save swept it away


def test_nothing_intact_is_an_error(tmp_path):
    chosen, run = config(steps(10)), new_run(tmp_path / "run")
    fit(run, chosen)
    for file in run.state.glob("step-*/checksums.json"):
        file.write_text("[]")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        fit(run, chosen)


def test_another_model_is_refused_and_another_recipe_is_said(tmp_path, capsys):
    chosen, run = config(steps(10)), new_run(tmp_path / "run")
    fit(run, chosen)
    with pytest.raises(UserError, match=r"\[model\]"):
        fit(run, replace(chosen, model=replace(MODEL, rope_theta=5000.0)))
    fit(run, replace(chosen, optim=OptimConfig(lr=0.5)))
    assert "config.toml was changed" in capsys.readouterr().err


def losses_of(run) -> list[float]:
    return [line["loss"] for line in read_lines(run.metrics_file) if "loss" in line]


def test_new_fields_of_the_configuration_do_not_part_a_run_from_its_older_checkpoints():
    assert fingerprint(Config()) == {"model": "dc149a8e8090b1a9", "recipe": "4271b15c7db36797"}  # as of checkpoints of November 2026
    assert fingerprint(Config(model=ModelConfig(head_norm=True)))["model"] == "1bff99fec37ca5c8"


@pytest.mark.parametrize("back", [False, True])
def test_a_finished_run_can_be_extended(tmp_path, back):
    run = new_run(tmp_path / "run")
    fit(run, config(steps(20)))
    first = losses_of(run)
    kept = decay_start(20, OptimConfig())
    if back:
        assert rewind(run) == kept
    result = fit(run, config(steps(40)))
    assert result.steps == 40 and len(losses_of(run)) == 40
    assert losses_of(run)[: kept if back else 20] == first[: kept if back else 20]
    assert json.loads((run.state / "pre-decay/state.json").read_text())["step"] == (decay_start(40, OptimConfig()) if back else kept)
    lrs = [line["lr"] for line in read_lines(run.metrics_file) if "loss" in line]
    assert lrs[-1] == pytest.approx(0.02 * OptimConfig().final_lr)
    assert max(lrs[20:]) > 10 * lrs[19] or back  # re-warmed, or from where it had not yet cooled down


def test_money_needs_seconds(tmp_path):
    run = new_run(tmp_path / "run")
    with pytest.raises(UserError, match="budget in usd"):
        fit(run, config(Budget(5.0, "usd")))


def test_time_budget_is_kept_by_the_real_loop(tmp_path, clock):
    run, began, chosen = new_run(tmp_path / "run"), clock.now, config(Budget(8.0, "s"))

    class Slow(Counting):
        def batch(self, step, rank=0, world=1):
            clock.advance(0.05)
            return super().batch(step, rank, world)

    def slow_evaluation(nll):
        clock.advance(0.1)
        return held_out(chosen)(nll)

    # The caller was busy for a second before.
    result = fit(run, chosen, loader=Slow(chosen), evaluate=slow_evaluation, started=began - 1.0, reserve_s=0.3)
    used = clock.now - began + 1.0 + 0.3
    assert 0.95 * 8 <= used <= 1.02 * 8
    plan = read_lines(run.state / "plan.jsonl")
    assert plan[-1]["total_steps"] == result.steps and result.steps > 10
    lines = [line for line in read_lines(run.metrics_file) if "loss" in line]
    assert lines[-1]["lr"] < 0.05 * OptimConfig().lr  # the decay ended with the budget


def test_sinks(tmp_path):
    run = new_run(tmp_path / "run")
    fit(run, config(steps(3), log="tensorboard"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="pip install wandb") as error:
            fit(new_run(tmp_path / "other"), config(steps(3), log="wandb"))
        assert "\n" not in str(error.value)


def test_full_disk_stops_with_one_line_and_the_last_checkpoint_intact(tmp_path):
    """A limit on the size of files stands in for the full disk: the checkpoint doesn't fit any more once moments exist."""
    chosen, run = config(steps(40)), new_run(tmp_path / "run")
    code = """
        import resource, sys
        sys.path.insert(0, sys.argv[2])
        from tiny import *

        class Filling(Counting):
            def batch(self, step, rank=0, world=1):
                if step == 12:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
                return super().batch(step)

        chosen = config(steps(40), checkpoint_interval_s=0.0)
        try:
            fit(RunFolder.open(sys.argv[1]), chosen, loader=Filling(chosen))
        except UserError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(run), str(Path(__file__).parent)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.count("\n") == 1 and "no room left" in done.stdout, done
    verify_folder(max(run.state.glob("step-*")))
    assert fit(run, chosen).steps == 40  # with room again, it goes on
    assert [line["step"] for line in read_lines(run.metrics_file) if "loss" in line] == list(range(1, 41))


def test_steps_are_made_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    chosen, run, whole = config(steps(14)), new_run(tmp_path / "run"), new_run(tmp_path / "whole")
    fit(whole, chosen)
    goes_on, made_meanwhile = threading.Event(), []

    def slowly(beside, files):
        if "00000005" in beside.name:
            assert goes_on.wait(60)
            made_meanwhile.append(not (run.state / "step-00000005").exists())
        return write_into(beside, files)

    class Watching(Counting):
        def batch(self, step, rank=0, world=1):
            if step == 8:
                goes_on.set()
            if step == 12:
                raise RuntimeError("a crash")
            return super().batch(step)

    monkeypatch.setattr(checkpoint, "write_into", slowly)
    monkeypatch.setattr(Pace, "checkpoint_due", lambda pace, step, since: step == 5)
    with pytest.raises(RuntimeError, match="a crash"):
        fit(run, chosen, loader=Watching(chosen))
    assert made_meanwhile == [True]
    verify_folder(run.state / "step-00000005")
    monkeypatch.undo()
    fit(run, chosen)
    losses = [[line["loss"] for line in read_lines(one.metrics_file) if "loss" in line] for one in (whole, run)]
    assert losses[0] == losses[1] and run.weights_file.read_bytes() == whole.weights_file.read_bytes()


def test_a_checkpoint_is_not_copied_where_memory_is_short(tmp_path, monkeypatch):
    copied = []
    monkeypatch.setattr(checkpoint, "_copy", lambda tensor: copied.append(tensor) or tensor.clone())
    for free, run in ((10**12, "much"), (1000, "little")):
        copied.clear()
        monkeypatch.setattr(checkpoint, "free_memory", lambda free=free: free)
        fit(new_run(tmp_path / run), config(steps(6), checkpoint_interval_s=0.0))
        assert bool(copied) == (run == "much")
    assert free_memory() > 0


def test_what_is_not_copied_is_written_before_the_next_step(tmp_path, monkeypatch):
    chosen, run, begun = config(steps(8)), new_run(tmp_path / "run"), []

    def slowly(beside, files):
        begun.append(threading.current_thread())
        time.sleep(0.1)
        return write_into(beside, files)

    class Watching(Counting):
        def batch(self, step, rank=0, world=1):
            assert not any(thread.is_alive() for thread in begun), "the last checkpoint is still written"
            return super().batch(step)

    monkeypatch.setattr(checkpoint, "write_into", slowly)
    monkeypatch.setattr(checkpoint, "free_memory", lambda: 1000)
    monkeypatch.setattr(Pace, "checkpoint_due", lambda pace, step, since: True)
    fit(run, chosen, loader=Watching(chosen))
    assert len(begun) > 4


def test_two_trainers_do_not_share_a_run(start, tmp_path):
    process = start(tmp_path / "run", "--steps", 1000, "--slow-step", 0.1)
    process.until_says("batch 1")
    with pytest.raises(UserError, match=f"is being written by process {process.pid}"):
        fit(RunFolder.open(tmp_path / "run"), config(steps(5)))
    process.kill(signal.SIGTERM)
    assert process.wait() == 130
