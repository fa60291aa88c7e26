"""Losses of preferences and of policies beside TRL's trainers: the same on the same tensors, and so are their gradients."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.adapt.test_beside_trl import MARKED, content  # noqa: F401

from sparing.adapt.dpo import pair_losses
from sparing.adapt.policy import LIMITS, advantages, token_losses, token_weights
from sparing.base.config import DpoConfig

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

LONGEST = 12


@pytest.fixture(scope="module")
def parts(content, tmp_path_factory):  # noqa: F811
    """(folder, a small model of transformers', its tokenizer)."""
    folder = tmp_path_factory.mktemp("trl")
    (folder / "tokenizer.json").write_text(content)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|im_end|>")
    tokenizer.pad_token, tokenizer.chat_template = "<|endoftext|>", MARKED
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 402}
    return folder, transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)), tokenizer


@pytest.fixture(scope="module")
def dpo(parts):
    folder, model, tokenizer = parts
    args = trl.DPOConfig(output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, beta=0.3)
    rows = datasets.Dataset.from_list([{"prompt": f"Is it {n}?", "chosen": f"It is {n}.", "rejected": "No."} for n in range(4)])
    trainer = trl.DPOTrainer(model, copy.deepcopy(model), args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.precompute_ref_logps = True
    return trainer


@pytest.mark.parametrize(("loss", "smoothing"), [("sigmoid", 0.0), ("ipo", 0.0)])
def test_pairs(dpo, loss, smoothing):
    torch.manual_seed(1)
    P, T = 5, 9
    mask = (torch.arange(T) >= 3) & (torch.arange(T) < torch.randint(5, T + 1, (2 * P, 1)))
    logprobs = (-3 * torch.rand(2 * P, T - 1) * mask[:, 1:]).requires_grad_()
    reference = -10 * torch.rand(2 * P)
    zeros = torch.zeros(2 * P, T - 1)
    answer = SimpleNamespace(log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    inputs = {
        "input_ids": torch.zeros(2 * P, T, dtype=torch.int64), "attention_mask": torch.ones(2 * P, T), "completion_mask": mask.long(),
        "ref_chosen_logps": reference[:P], "ref_rejected_logps": reference[P:],
    }  # fmt: skip
    dpo.loss_types, dpo.loss_weights = [loss], [1.0]
    theirs = dpo._compute_loss(lambda **_: answer, inputs, False)
    (slopes,) = torch.autograd.grad(theirs, logprobs)
    gains, lengths = logprobs.sum(1) - reference, mask.sum(1).float()
    settings = DpoConfig(beta=0.3, loss=loss, label_smoothing=smoothing)
    ours = pair_losses(gains[:P], gains[P:], settings, (lengths[:P], lengths[P:])).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(ours, logprobs)[0], slopes, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def grpo(parts):
    folder, model, tokenizer = parts
    args = trl.GRPOConfig(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, per_device_train_batch_size=8, num_generations=4,
        max_completion_length=LONGEST, beta=0.0,
    )  # fmt: skip
    rows = datasets.Dataset.from_list([{"prompt": f"Is it {n}?"} for n in range(4)])
    trainer = trl.GRPOTrainer(model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args, train_dataset=rows,
                              processing_class=tokenizer)  # fmt: skip
    trainer.model.train()
    trainer.current_gradient_accumulation_steps, trainer.args.steps_per_generation = 1, 1
    return trainer


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("on_policy", [True, False])
def test_policies(grpo, monkeypatch, kind, on_policy):
    """On-policy, with the truncated correction of what sampled; and with several updates, where what sampled is the old policy."""
    torch.manual_seed(2)
    groups, size = 3, 4
    rows = groups * size
    lengths = torch.randint(1, LONGEST + 1, (rows,))
    mask = (torch.arange(LONGEST) < lengths[:, None]).float()
    logprobs = (-2 * torch.rand(rows, LONGEST) * mask).requires_grad_()
    sampled = (logprobs.detach() + 0.5 * torch.randn(rows, LONGEST)) * mask
    rewards = np.array([[0.0, 1, 1, 0], [0, 0, 0, 1], [1, 1, 1, 0.5]])
    low, high = LIMITS[kind]
    grpo.loss_type = {"gspo": "grpo"}.get(kind, kind)
    grpo.importance_sampling_level = "sequence" if kind == "gspo" else "token"
    grpo.epsilon_low, grpo.epsilon_high = low, high
    grpo.use_vllm, grpo.vllm_importance_sampling_correction = on_policy, on_policy
    monkeypatch.setattr(grpo, "_get_per_token_logps_and_entropies", lambda *_, **__: (logprobs, torch.zeros_like(sampled), None))
    worth = torch.from_numpy(advantages(rewards, kind)).float().flatten()
    ratio = (logprobs.detach() - sampled).exp().clamp(max=2.0)
    inputs = {
        "prompt_ids": torch.zeros(rows, 2, dtype=torch.int64), "prompt_mask": torch.ones(rows, 2),
        "completion_ids": torch.zeros(rows, LONGEST, dtype=torch.int64), "completion_mask": mask, "advantages": worth,
        "num_items_in_batch": mask.sum(), "importance_sampling_ratio": ratio, "old_per_token_logps": None if on_policy else sampled,
    }  # fmt: skip
    theirs = grpo._compute_loss(None, inputs)
    (slopes,) = torch.autograd.grad(theirs, logprobs)

    weights, divisor = token_weights(lengths.numpy(), kind, LONGEST)
    sequences = torch.arange(rows)[:, None].expand(rows, LONGEST)
    old = logprobs.detach() if on_policy else sampled
    each = token_losses(logprobs, old, worth[:, None].expand_as(mask), mask, sequences, kind, (low, high))
    each = each * ratio if on_policy else each
    ours = (each * mask * torch.from_numpy(weights).float()[:, None]).sum() / divisor
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(ours, logprobs)[0], slopes, rtol=1e-5, atol=1e-7)


def test_advantages(grpo):
    """As TRL computes them: the sample's standard deviation, and 1e-4 beside it."""
    rewards = np.array([[0.0, 1, 1, 0], [0, 0, 0, 0], [0.2, 0.4, 0.1, 0]])
    tensor = torch.from_numpy(rewards)
    deviation = trl.trainer.grpo_trainer.nanstd(tensor, dim=1)
    theirs = (tensor - tensor.mean(1, keepdim=True)) / (deviation[:, None] + 1e-4)
    np.testing.assert_allclose(advantages(rewards, "grpo"), theirs.numpy(), rtol=1e-5)
    assert not advantages(rewards, "grpo")[1].any() and not advantages(rewards, "dr_grpo")[1].any()
    np.testing.assert_allclose(advantages(rewards, "dr_grpo"), rewards - rewards.mean(1, keepdims=True))
