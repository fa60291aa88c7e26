"""Optimizers over weights and averages in few bits: torch's own result in float32, compiled against plain, and resumption."""

import copy
from dataclasses import replace

import pytest
import torch
from tests.losses import loss_of
from tiny import MODEL, Counting, config, fit, new_run, steps

from sparing.base.config import Config, OptimConfig, PrecisionConfig, TrainConfig, UserError
from sparing.base.config_limits import checked
from sparing.base.files import DamagedError, read_lines
from sparing.kernels import native
from sparing.kernels.vocabulary import embedding
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer
from sparing.precision.compensation import join
from sparing.train.optim import Optimizer, group_of, keep_as
from sparing.train.stored import StoredAdamW, StoredMuon

SMALL = PrecisionConfig(weights="bfloat16", moments="int8")
CASES = {
    "bfloat16 weights": PrecisionConfig(weights="bfloat16"),
    "with a remainder": PrecisionConfig(weights="bfloat16", compensation="kahan"),
    "8-bit moments": PrecisionConfig(moments="int8"),
    "both": SMALL,
    "all": PrecisionConfig(weights="bfloat16", moments="int8", activations="int8"),
}


def trained(precision: PrecisionConfig, number: int = 3, matrix: str = "muon", dtype=torch.bfloat16, before=None):
    model = Transformer(MODEL)
    init_weights(model, 0)
    keep_as(model, Config(precision=precision))
    model.compute_dtype = dtype
    model.train()
    optimizer = Optimizer(model, OptimConfig(matrix=matrix, lr=0.02 if matrix == "muon" else 0.002), dtype, precision, seed=5)
    losses = []
    for step in range(number):
        batch = Counting(config(steps(1))).batch(step)
        out = loss_of(model, batch.tokens, batch.targets, batch.documents)
        out.total.backward()
        optimizer.clip(float(optimizer.grad_norm()))
        optimizer.step(1.0, 0.95)
        losses.append(out.loss.item())
    return model, optimizer, losses


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_in_float32_is_torchs_bit_for_bit(decay):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.randn(300, 70, generator=torch.Generator().manual_seed(1)))] for _ in range(2))
    group = {"params": {"w": ours[0]}, "lr": 1e-2, "weight_decay": decay}
    stored = StoredAdamW([group], (0.8, 0.99), 1e-10, "stochastic", False, 0)
    reference = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.8, 0.99), eps=1e-10, weight_decay=decay, foreach=False, fused=False)
    for step in range(1, 5):
        ours[0].grad = torch.randn(300, 70, generator=generator)
        theirs[0].grad = ours[0].grad.clone()
        with native.path("plain"):
            stored.step(step)
        reference.step()
    assert torch.equal(ours[0], theirs[0])


@pytest.mark.skipif(native.passes() is None, reason="no C compiler here")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_compiled_updates_are_the_plain_ones(name, kind):
    """One update from equal states: but for the order of float32 operations the same numbers, random bits included."""
    p, results = CASES[name], []
    for compiled in (True, False):
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, p.weights)
        shapes = {"wide": (32, 600), "tall": (96, 32), "experts.gate_up_proj": (3, 32, 48), "experts.down_proj": (3, 48, 16)}
        parameters = {n: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for n, shape in shapes.items()}
        small = {"compensation": p.compensation, "eight_bit": p.moments == "int8", "seed": 1}
        if kind == "adamw":
            optimizer = StoredAdamW([{"params": parameters, "lr": 0.01, "weight_decay": 0.1}], (0.8, 0.99), 1e-8, **small)
        else:
            optimizer = StoredMuon(parameters, steps=5, weight_decay=0.1, dtype=torch.bfloat16, **small)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
        with native.path("compiled" if compiled else "plain"):
            optimizer.step(*((1,) if kind == "adamw" else (0.02, 0.95, 1)))
        state = {f"weight {n}": w.detach() for n, w in parameters.items()}
        for key, tensor in optimizer.state().items():
            part, _, n = key.partition("/")  # 8 bits behind a number mean nothing without it
            state[key] = join(parameters[n].detach().view_as(tensor), tensor) if part == "remainder" else tensor
        results.append(state)
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        difference = (value.double() - results[1][key].double()).abs()
        if key.startswith("weight") or "remainder" in key:
            # Muon's iterations run in bfloat16, in another order of sums; rounding turns a few numbers by a last bit.
            assert float(difference.mean()) < (4e-4 if kind == "muon" else 1e-4) and float(difference.max()) < 0.05, key
        else:
            assert float((difference > 1e-6).double().mean()) < 2e-3 and float(difference.max()) <= 1.0001, key


CHOICES = [(name, matrix, plain) for name in CASES for matrix in ("muon", "adamw") for plain in (False, True)]
SLOW = [case for case in CHOICES if case[0] != "all" and case[1:] == ("muon", True)]
"""PyTorch's own operations take Muon's iterations seconds."""


@pytest.mark.parametrize(("name", "matrix", "plain"), [pytest.param(*one, marks=[pytest.mark.slow] * (one in SLOW)) for one in CHOICES])
def test_it_learns_as_in_float32(name, matrix, plain):
    with native.path("plain" if plain else "compiled"):
        full, small = (sum(trained(p, 40, matrix)[2][-8:]) / 8 for p in (PrecisionConfig(), CASES[name]))
    assert small == pytest.approx(full, rel=0.02) and full < 3.5


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("matrix", ["muon", "adamw"])
def test_state_reloads_bit_for_bit(name, matrix):
    p = CASES[name]
    model, first, _ = trained(p, 3, matrix)
    twin = copy.deepcopy(model)
    second = Optimizer(twin, first.config, precision=p, seed=5)
    for key, tensor in first.state().items():
        second.load(key, tensor.clone())
    for number in range(3, 6):
        for each, optimizer in ((model, first), (twin, second)):
            batch = Counting(config(steps(1))).batch(number)
            loss_of(each, batch.tokens, batch.targets, batch.documents).total.backward()
            optimizer.step(0.5, 0.95)
    for (key, mine), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other), key
    second.reset()
    assert all(not bool(tensor.any()) for tensor in second.state().values())


def test_foreign_state_is_refused():
    _, optimizer, _ = trained(SMALL, 1)
    for name, tensor in (("optimizer/momentum/x", torch.zeros(1)), ("optimizer/exp_avg/lm_head.weight", torch.zeros(64, 32))):
        with pytest.raises(DamagedError, match="does not belong"):
            optimizer.load(name, tensor)


def test_routers_and_norms_stay_in_float32_and_gradients_follow_the_weights():
    model, optimizer, _ = trained(SMALL, 1)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert all((d == torch.float32) == (group_of(n, model.get_parameter(n)) in ("router", "norm")) for n, d in kinds.items())
    batch = Counting(config(steps(1))).batch(0)
    loss_of(model, batch.tokens, batch.targets, batch.documents).total.backward()
    assert all(p.grad.dtype == p.dtype for p in model.parameters())
    exact = torch.stack([p.grad.double().square().sum() for p in model.parameters()]).sum().sqrt()
    assert float(optimizer.grad_norm()) == pytest.approx(float(exact), rel=1e-5)


def test_a_frequent_words_gradient_keeps_growing():
    """2,000 equal gradients of one word, added up in bfloat16, would stop at 256 of them."""
    weight = torch.nn.Parameter(torch.zeros(8, 4, dtype=torch.bfloat16))
    embedding(torch.full((2000,), 3), weight).backward(torch.ones(2000, 4, dtype=torch.bfloat16))
    assert float(weight.grad[3, 0]) == 2000.0 and float(weight.grad.float().sum()) == 8000.0


def told(run) -> list[float]:
    return [line["loss"] for line in read_lines(run.metrics_file) if "loss" in line]


@pytest.mark.parametrize("name", CASES)
def test_interrupted_and_resumed_equals_undisturbed(tmp_path, name):
    """A run that was cut off between two checkpoints goes on as if nothing had happened."""
    chosen = replace(config(steps(12), dtype="bfloat16", evals=0), precision=CASES[name])
    whole, cut = new_run(tmp_path / "whole"), new_run(tmp_path / "cut")
    fit(whole, chosen, evaluate=None)

    class Stop:
        def batch(self, step, rank=0, world=1):
            if step == 7:
                raise KeyboardInterrupt
            return Counting(chosen).batch(step)

    with pytest.raises(KeyboardInterrupt):
        fit(cut, chosen, loader=Stop(), evaluate=None)
    fit(cut, chosen, evaluate=None)
    assert told(whole) == told(cut) and len(told(whole)) == 12
    assert whole.weights_file.read_bytes() == cut.weights_file.read_bytes()
    states = [(run.state / "step-00000012" / "optimizer.safetensors").read_bytes() for run in (whole, cut)]
    assert states[0] == states[1]


def test_a_checkpoint_kept_otherwise_is_refused(tmp_path):
    run, chosen = new_run(tmp_path / "run"), config(steps(2), evals=0)
    fit(run, replace(chosen, precision=SMALL), evaluate=None)
    for other in (chosen, replace(chosen, precision=CASES["8-bit moments"]), replace(chosen, precision=CASES["with a remainder"])):
        with pytest.raises(UserError, match=r"\[precision\]"):
            fit(run, other, evaluate=None)
    assert not list(run.state.glob("damaged-*"))


def test_int8_activations_are_not_compiled():
    chosen = Config(precision=CASES["all"], train=TrainConfig(compile=True))
    with pytest.raises(UserError, match=r"train\.compile"):
        checked(chosen)
