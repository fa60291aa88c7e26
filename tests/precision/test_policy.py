"""Moves between 8 bits, finer blocks and 16 bits: by measured error, by faults, with hysteresis; replayed by a resumed run."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from tests.train import tiny

from sparing.base.config import PrecisionConfig
from sparing.base.files import read_lines
from sparing.base.run import RunFolder
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer
from sparing.precision.eight_bit import COARSE, FINE, SIXTEEN, EightBit
from sparing.precision.policy import PENALTY, Policy

CONFIG = PrecisionConfig(linear="int8", error_budget=0.1, measure_every=10)


def policy(**changes) -> Policy:
    return Policy([EightBit("a", "int8", 3.0), EightBit("b", "int8", 1.0)], replace(CONFIG, **changes))


def measured(p: Policy, **errors: float) -> list:
    """One measuring step in which site a's forward product made these errors at these levels."""
    p.begin(0)
    names = {"coarse": COARSE, "fine": FINE}
    p.sites[0].errors.update({("forward", names[n]): [e**2, 1.0] for n, e in errors.items()})
    return p.end()


def test_up_and_down_with_hysteresis():
    p = policy()
    site = p.sites[0]
    assert measured(p, coarse=0.09) == []
    assert [m.after for m in measured(p, coarse=0.11)] == [FINE]
    assert measured(p, fine=0.09, coarse=0.07) == []  # under the budget, and not by enough
    assert [m.after for m in measured(p, fine=0.12, coarse=0.07)] == [SIXTEEN]
    assert site.levels == {"forward": SIXTEEN, "dgrad": COARSE, "wgrad": COARSE}
    assert p.shares() == {"forward": 0.25, "dgrad": 1.0, "wgrad": 1.0}
    assert measured(p, fine=0.06) == []
    assert [m.after for m in measured(p, fine=0.04)] == [FINE]
    assert [m.after for m in measured(p, fine=0.04, coarse=0.01)] == [COARSE]
    assert [m.after for m in measured(p, coarse=float("nan"))] == [FINE]


def test_a_fault_promotes_at_once_and_for_a_while():
    p = policy()
    twin_of_another_thread = copy.deepcopy(p.sites[1])
    twin_of_another_thread.faults["wgrad"][0] += 2
    p.begin(3)
    (move,) = p.end()
    assert (move.name, move.direction, move.after) == ("b", "wgrad", SIXTEEN) and "2 blocks with an infinity" in move.why
    assert p.end() == []  # told once
    for _ in range(PENALTY):
        p.begin(0)
        p.sites[1].errors[("wgrad", FINE)] = [1e-6, 1.0]
        moves = p.end()
    assert [m.after for m in moves] == [FINE]
    p.sites[0].faults["dgrad"][1] += 1
    assert "too small to scale" in p.end()[0].why


def test_measures_when_due_and_not_otherwise():
    p = policy()
    for step, due in [(0, True), (1, False), (20, True)]:
        p.begin(step)
        assert p.measured == due and all((site.errors is not None) == due for site in p.sites)
    never = policy(measure_every=0)
    never.begin(0)
    assert not never.measured and never.values() == {}


def test_the_state_comes_back():
    p, q = policy(), policy()
    measured(p, coarse=0.5)
    p.sites[1].faults["forward"][0] += 1
    p.end()
    q.load(json.loads(json.dumps(p.state())))
    assert q.state() == p.state() and [s.levels for s in q.sites] == [s.levels for s in p.sites]
    q.load({})
    assert all(set(s.levels.values()) == {COARSE} for s in q.sites)


def test_measured_errors_are_those_of_the_products():
    site = EightBit("a", "int8")
    site.errors = {}
    x, w = torch.randn(64, 96), torch.randn(32, 96)
    x[:, 0] *= 300  # an outlier channel takes the whole row's range, and spoils one block of many
    site.nt(x, w)
    site.levels["forward"] = FINE
    site.nt(x, w)
    y = x @ w.t()
    mine = (site.errors["forward", FINE][0] / site.errors["forward", FINE][1]) ** 0.5
    site.errors = None
    assert mine == pytest.approx(float((site.nt(x, w) - y).norm() / y.norm()), rel=1e-4)


# Whole runs.


def fit(path, steps, **changes):
    run = RunFolder.open(path) if (path / "config.toml").exists() else tiny.new_run(path)
    chosen = replace(tiny.config(tiny.steps(steps), dtype="bfloat16"), precision=replace(CONFIG, **changes))
    return run, tiny.fit(run, chosen, evaluate=None)


def told(run) -> list[dict]:
    timing = ("seconds", "tokens_per_s", "mfu", "took_s", "watts", "memory_bytes", "idle", "input_wait")
    return [{k: v for k, v in line.items() if k not in timing} for line in read_lines(run.metrics_file)]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_run_moves_linears_and_says_so(tmp_path, kind, capsys):
    budget = 0.012 if kind == "int8" else 0.03
    run, result = fit(tmp_path / "run", 12, linear=kind, error_budget=budget, measure_every=4)
    lines = told(run)
    moves = [line["precision"] for line in lines if "precision" in line]
    assert moves and {"name", "direction", "before", "after", "why"} <= moves[0].keys()
    assert "8 bit -> 8 bit, finer blocks" in capsys.readouterr().err
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps if "error_forward" in line] == [1, 5, 9]
    assert 0 < steps[0]["error_forward"] and steps[8]["eight_bit_wgrad"] <= 1.0
    assert result.steps == 12 and result.skipped == 0


def test_resumed_in_the_middle_equals_undisturbed(tmp_path):
    """Stopped after the moves of step 5, on from there: every loss, move and weight as without the stop."""
    options = {"error_budget": 0.012, "measure_every": 4}
    whole, _ = fit(tmp_path / "whole", 12, **options)
    run = tiny.new_run(tmp_path / "run")
    chosen = replace(tiny.config(tiny.steps(12), dtype="bfloat16"), precision=replace(CONFIG, **options))

    class Stop(Exception):
        pass

    def stop(values):
        if values["step"] == 7:
            raise Stop

    with pytest.raises(Stop):
        tiny.fit(run, replace(chosen, train=replace(chosen.train, checkpoint_interval_s=0.0)), evaluate=None, on_progress=stop)
    assert 0 < max(int(p.name[-8:]) for p in run.state.glob("step-*")) < 12
    fit(tmp_path / "run", 12, **options)
    assert told(run) == told(whole)
    assert any("precision" in line for line in told(run))
    assert run.weights_file.read_bytes() == whole.weights_file.read_bytes()


def test_an_overflow_promotes_the_layer_and_training_goes_on(tmp_path):
    """A weight that is infinite for one batch: the batch is dropped, the layer's products are in 16 bits from there on."""
    chosen = replace(tiny.config(tiny.steps(8), dtype="bfloat16"), precision=replace(CONFIG, measure_every=0))
    model = Transformer(chosen.model)
    init_weights(model, 0)
    weight = model.model.layers[0].mlp.gate_proj.weight

    class Cosmic(tiny.Counting):
        def batch(self, step, rank=0, world=1):
            with torch.no_grad():
                if step == 3:
                    self.kept = float(weight[0, 0])
                    weight[0, 0] = torch.inf
                elif step == 4:
                    weight[0, 0] = self.kept
            return super().batch(step)

    run = tiny.new_run(tmp_path / "run")
    result = tiny.fit(run, chosen, loader=Cosmic(chosen), evaluate=None, model=model)
    assert result.steps == 8 and result.skipped == 1
    moves = [line["precision"] for line in told(run) if "precision" in line]
    assert {move["name"] for move in moves} == {"model.layers.0.mlp.gate_proj"}  # and not those that the NaN went on to
    assert moves[0]["direction"] == "forward" and moves[0]["after"] == "16 bit"
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert model.model.layers[0].mlp.gate_proj.eight_bit.levels["forward"] == SIXTEEN
