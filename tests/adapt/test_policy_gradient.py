"""Losses of log-probabilities on a model: gradients as autograd makes them through the logits, however rows are divided; routing replay."""

from dataclasses import replace
from math import comb

import numpy as np
import pytest
import torch
from tests.model.shapes import SHAPES, TINY
from tests.model.test_frozen import filled

from sparing.adapt.dpo import PairBatch, Preference, pair_losses
from sparing.adapt.logprobs import loss_of_logprobs
from sparing.adapt.policy import FACTS, Policy, PolicyBatch, advantages, replaying
from sparing.base.config import AdapterConfig, DpoConfig, GrpoConfig
from sparing.data.loader import IGNORED, Batch
from sparing.kernels import native
from sparing.model.experts import routers
from sparing.model.low_rank import add_low_rank

B, T = 4, 24
MODELS = {"dense": SHAPES["dense"], "gqa": replace(SHAPES["gqa"], num_dense_layers=3), "mixture": TINY}


def rows(config, seed: int = 0) -> dict:
    """Rows of three documents each; the last is padding."""
    g = torch.Generator().manual_seed(seed)
    documents = torch.tensor([0] * 9 + [1] * 11 + [2] * 4, dtype=torch.int32).expand(B, T).contiguous()
    targets = torch.randint(config.vocab_size, (B, T, 1), generator=g)
    for begin, end in ((0, 3), (9, 14), (20, 24)):
        targets[:, begin:end] = IGNORED
    return {"tokens": torch.randint(config.vocab_size, (B, T), generator=g), "targets": targets, "documents": documents}


def policy_batch(config, **more) -> PolicyBatch:
    g = torch.Generator().manual_seed(1)
    made = rows(config) | {
        "weights": torch.rand(B, T, generator=g), "divisor": torch.full((B,), 1.5), "advantages": torch.randn(B, T, generator=g),
        "sampled": -4 + torch.randn(B, T, generator=g), "known": torch.ones(B, len(FACTS)) / B, "total": torch.full((B,), 60.0),
    }  # fmt: skip
    return PolicyBatch(**made | more)


def pair_batch(config) -> PairBatch:
    reference = torch.full((B, 2), -30.0)
    return PairBatch(**rows(config), divisor=torch.ones(B), reference=reference, pairs=torch.ones(B, 1, dtype=torch.bool))


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def close(ours, theirs, rtol: float = 1e-4) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name, expected in theirs.items():
        assert (ours[name] - expected).norm() <= rtol * expected.norm() + 1e-7, name


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("path", ["plain", "vectors"])
def test_gradients_are_those_through_the_logits(kind, adapted, path):
    """Any function of the log-probabilities, here one in which each depends on all."""
    if not native.can(path, torch.float32):
        pytest.skip(f"no {path} kernels here")
    model, batch = filled(MODELS[kind]), Batch(**rows(MODELS[kind]))
    if adapted:
        add_low_rank(model, AdapterConfig(4, 8.0), 0)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.normal_(generator=torch.Generator().manual_seed(3), std=0.1)
    counted = batch.targets[..., 0] != IGNORED

    def loss(logprobs):
        total = (logprobs.sum(1) ** 2).mean() * 1e-3 + (logprobs.exp() * counted).sum()
        return total, total.reshape(1)

    torch.set_num_threads(1)
    with native.path(path):
        found = loss_of_logprobs(model, batch, loss)
        found.total.backward()
    ours = gradients(model)
    logits = model(batch.tokens, batch.documents).log_softmax(-1)
    logprobs = logits.gather(-1, batch.targets.clamp(min=0))[..., 0] * counted
    expected, _ = loss(logprobs)
    expected.backward()
    theirs = gradients(model)
    torch.testing.assert_close(found.parts[0], expected.detach(), rtol=1e-4, atol=1e-5)
    close(ours, {name: grad for name, grad in theirs.items() if name in ours or grad.any()}, 1e-3)


@pytest.mark.parametrize("objective", [Policy(GrpoConfig(kind="gspo")), Policy(GrpoConfig(updates=2)), Preference(DpoConfig(loss="ipo"))])
def test_micro_batches_add_up(objective):
    model = filled(SHAPES["dense"])
    batch = (policy_batch if isinstance(objective, Policy) else pair_batch)(model.config)
    whole = objective(model, batch, float(batch.divisor.sum()))
    whole.total.backward()
    theirs = gradients(model)
    parts = [objective(model, batch[n : n + 1], float(batch.divisor.sum())) for n in range(B)]
    sum(part.total for part in parts).backward()
    torch.testing.assert_close(torch.stack([part.parts for part in parts]).sum(0), whole.parts, rtol=1e-4, atol=1e-5)
    close(gradients(model), theirs)
    assert len(whole.parts) == len(objective.parts)


def test_a_pair_is_compared_with_its_start():
    model = filled(SHAPES["dense"])
    batch = pair_batch(model.config)
    logits = model(batch.tokens, batch.documents).log_softmax(-1)
    logprobs = logits.gather(-1, batch.targets.clamp(min=0))[..., 0] * (batch.targets[..., 0] != IGNORED)
    chosen, rejected = logprobs[:, :9].sum(1) + 30, logprobs[:, 9:20].sum(1) + 30
    found = Preference(DpoConfig(0.2))(model, batch)
    expected = pair_losses(chosen, rejected, DpoConfig(0.2)).mean()
    torch.testing.assert_close(found.parts[0], expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.parts[2], (chosen - rejected).mean().detach(), rtol=1e-4, atol=1e-4)


def test_on_policy_the_correction_is_truncated():
    """What was sampled with less probability than the trainer gives counts more, up to a limit."""
    model = filled(SHAPES["dense"])
    batch = policy_batch(model.config)
    logits = model(batch.tokens, batch.documents).log_softmax(-1)
    counted = batch.targets[..., 0] != IGNORED
    own = logits.gather(-1, batch.targets.clamp(min=0))[..., 0].detach() * counted
    ratio = (own - batch.sampled * counted).exp().clamp(max=1.2)
    expected = -(ratio * batch.advantages * batch.weights * counted).sum() / 6
    found = Policy(GrpoConfig(truncate=1.2))(model, batch)
    values = dict(zip(Policy.parts, found.parts.tolist(), strict=True))
    assert values["loss"] == pytest.approx(float(expected), rel=1e-4)
    assert values["corrected"] == pytest.approx(float(((own - batch.sampled).exp() > 1.2)[counted].sum() / 60), rel=1e-4)
    assert values["mismatch"] == pytest.approx(float((own - batch.sampled)[counted].abs().sum() / 60), rel=1e-4)
    assert values["reward"] == pytest.approx(1) and values["trained"] == counted.sum()


def test_routes_are_replayed_and_gates_computed_anew():
    model = filled(TINY)
    batch = policy_batch(TINY)
    chosen = {}
    for number, router in enumerate(routers(model)):
        router.register_forward_hook(lambda _m, _i, routing, number=number: chosen.__setitem__(number, routing))
    objective = Policy(GrpoConfig())
    own = objective(model, batch)
    own.total.backward()
    before, free = gradients(model), dict(chosen)
    K, layers = TINY.num_experts_per_tok, TINY.num_layers
    routes = torch.zeros(B, T, layers, K, dtype=torch.int16)
    for number, routing in free.items():
        routes[:, :, number + TINY.num_dense_layers] = routing.experts_NK.view(B, T, K).short()
    same = objective(model, replace(batch, routes=routes))
    same.total.backward()
    torch.testing.assert_close(same.parts, own.parts)
    close(gradients(model), before, 1e-5)
    others = (routes + 3) % TINY.n_routed_experts
    objective(model, replace(batch, routes=others)).total.backward()
    after = gradients(model)
    for number, routing in chosen.items():
        assert (routing.experts_NK == others[:, :, number + TINY.num_dense_layers].flatten(0, 1)).all()
        weights = routing.scores_NE.gather(1, routing.experts_NK)
        weights = weights / weights.sum(1, keepdim=True) * TINY.routed_scaling_factor
        torch.testing.assert_close(routing.weights_NK, weights)
    assert all(after[name].any() for name in after if name.endswith("mlp.gate.weight")), "routers learn through replayed gates"
    with replaying(model, others):
        assert routers(model)[0].replayed_NK is not None
    assert all(router.replayed_NK is None for router in routers(model)), "evaluations choose freely"


@pytest.mark.parametrize("pass_at", [1, 2, 4, 8])
def test_answers_are_worth_what_they_add_to_pass_at_k(pass_at):
    """Of answers that are right with probability p, all groups weighed by their chance: the gradient is that of 1 - (1 - p)^k, over k."""
    group, p, gradient = 8, 0.3, 0.0
    for right in range(group + 1):
        rewards = np.array([[1.0] * right + [0.0] * (group - right)])
        worth = advantages(rewards, "dr_grpo", pass_at) * group / (group - 1)  # the mean of the others as baseline
        of_logarithms = np.where(rewards, 1 / p, -1 / (1 - p))
        gradient += comb(group, right) * p**right * (1 - p) ** (group - right) * (worth * of_logarithms).mean()
    assert gradient == pytest.approx((1 - p) ** (pass_at - 1))


def test_a_group_that_is_worth_the_same_has_no_signal():
    assert not advantages(np.full((1, 3), 0.1), "dr_grpo").any()  # whose mean is not 0.1 in float64


def test_where_all_have_to_fail_the_only_right_answer_counts_alone():
    worth = advantages(np.array([[1.0] + [0.0] * 7, [1.0] * 2 + [0.0] * 6, [1.0] * 8]), "dr_grpo", 8)
    assert worth[0, 0] == pytest.approx(7 / 8) and not worth[0, 1:].any() and not worth[1:].any()
