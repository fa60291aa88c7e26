"""Bad batches: judged, skipped, and, when they keep coming, undone."""

import math
import random
from dataclasses import replace

import pytest
import torch
from tiny import Counting, config, fit, new_run, steps

from sparing.base.config import OptimConfig
from sparing.base.files import read_lines
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer
from sparing.train.guard import WINDOW, Guard
from sparing.train.objective import Loss, NextToken
from sparing.train.trainer import Diverged


def test_nothing_is_wrong_with_an_ordinary_run():
    """A falling loss with the noise of tiny batches, and a step up when the data changes: no verdict."""
    for seed in range(20):
        rng, guard = random.Random(seed), Guard()
        for step in range(2000):
            loss = 1.5 + 6 * math.exp(-step / 150) + rng.gauss(0, 0.25) + (0.4 if step > 1000 else 0)
            assert guard.verdict(loss, 1.0, warm=step > 20) is None
            guard.accept(loss)


def test_verdicts():
    guard = Guard()
    assert guard.verdict(math.nan, 1.0, warm=False) and guard.verdict(math.inf, 1.0, warm=False)
    assert "gradient norm" in guard.verdict(2.0, math.inf, warm=False)
    for _ in range(WINDOW):
        assert guard.verdict(50.0, 1.0, warm=True) is None  # too little is known yet
        guard.accept(2.0 + random.Random(0).gauss(0, 0.01))
    assert guard.verdict(2.9, 1.0, warm=True) is None and guard.verdict(3.2, 1.0, warm=False) is None
    assert "usual" in guard.verdict(3.2, 1.0, warm=True)
    again = Guard()
    again.load(guard.state())
    assert again.verdict(3.2, 1.0, warm=True) == guard.verdict(3.2, 1.0, warm=True)


class Faulty(NextToken):
    """The real loss, multiplied by `fault` whenever the batch's first word is `trigger`."""

    trigger, fault = None, math.nan

    def __call__(self, model, batch, *rest):
        out = super().__call__(model, batch, *rest)
        factor = self.fault if int(batch.tokens[0, 0]) in (self.trigger or ()) else 1.0
        return Loss(out.total * factor, out.parts * factor)


class Marked(Counting):
    """Some batches begin with word 63, which no other batch does."""

    bad = ()

    def batch(self, step, rank=0, world=1):
        batch = super().batch(step)
        tokens = batch.tokens.clone()
        tokens[:, 0] = 63 if step in self.bad else tokens[:, 0].clamp(max=62)
        return replace(batch, tokens=tokens)


def trained(path, chosen, bad, fault=math.nan, loader=None):
    model, objective = Transformer(chosen.model), Faulty.of(chosen)
    init_weights(model, 0)
    objective.trigger, objective.fault = {63}, fault
    loader = loader or Marked(chosen)
    loader.bad = bad
    run = new_run(path)
    result = fit(run, chosen, model=model, loader=loader, objective=objective)
    return result, read_lines(run.metrics_file), model


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_nan_batch_is_skipped_and_leaves_no_trace(tmp_path, capsys, fault):
    chosen = config(steps(20), checkpoint_interval_s=100.0)
    result, lines, model = trained(tmp_path / "bad", chosen, {7, 8, 15}, fault)
    assert (result.steps, result.skipped) == (20, 3)
    assert [line["skipped_batch"] for line in lines if "skipped_batch" in line] == [7, 8, 15]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert "batch 7 is skipped" in capsys.readouterr().err

    class Without(Marked):
        """The same batches, the bad ones never there."""

        def batch(self, step, rank=0, world=1):
            return super().batch([n for n in range(30) if n not in (7, 8, 15)][step])

    _, clean, twin = trained(tmp_path / "clean", chosen, (), loader=Without(chosen))
    assert [line["loss"] for line in lines if "loss" in line] == [line["loss"] for line in clean if "loss" in line]
    for name, tensor in twin.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_spike_is_skipped(tmp_path):
    result, lines, _ = trained(tmp_path / "run", config(steps(76), checkpoint_interval_s=100.0, evals=0), {72}, fault=10.0)
    assert result.skipped == 1
    assert [line["skipped_batch"] for line in lines if "skipped_batch" in line] == [72]


def test_bad_batch_after_bad_batch_goes_back_to_a_checkpoint(tmp_path, capsys):
    result, lines, _ = trained(tmp_path / "run", config(steps(30)), {20, 21, 22})
    assert (result.steps, result.skipped) == (30, 3)
    assert "back to step" in capsys.readouterr().err
    numbers = [line["step"] for line in lines if "loss" in line]
    assert numbers == list(range(1, 31))  # each step once, those done again too


def test_divergence_stops_with_a_hint(tmp_path):
    with pytest.raises(Diverged, match=r"diverged at step .*--optim\.lr") as error:
        trained(tmp_path / "run", config(steps(30), optim=OptimConfig()), range(10, 1000))
    assert "\n" not in str(error.value)
