import itertools

import pytest
import torch

from sparing.config import ModelConfig, UserError
from sparing.infer.generate import generate, sample
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "num_layers": 3, "intermediate_size": 48, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4,
    "moe_intermediate_size": 16, "max_position_embeddings": 64,
}  # fmt: skip


def model_of(**changes):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**SMALL, **changes}))
    init_weights(model, seed=1)
    with torch.no_grad():  # logits far apart, so that a rounding error decides nothing
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.3)
    return model


def greedy_without_cache(model, prompt, count, context=None):
    window, out = list(prompt), []
    window = window if context is None else window[-context:]
    model.eval()
    for _ in range(count):
        with torch.no_grad():
            out.append(int(model(torch.tensor([window]))[0, -1].argmax()))
        window.append(out[-1])
        if context is not None and len(window) > context:
            window = window[-(context // 2) :]
    return out


@pytest.mark.parametrize("changes", [{}, {"attention": "gqa"}, {"q_lora_rank": None}, {"num_dense_layers": 3}, {"mtp_depth": 1}])
def test_the_cache_changes_nothing(changes):
    model = model_of(**changes)
    prompt = [0, 5, 9, 11]
    got = list(generate(model, prompt, 20, temperature=0))
    assert got == greedy_without_cache(model, prompt, 20)
    assert len(set(got)) > 2, "a model that repeats itself would hide a wrong position"


@pytest.mark.parametrize("length", [1, 7, 8, 9, 30])
def test_the_context_slides(length):
    model = model_of()
    prompt = list(range(1, length + 1))
    assert list(generate(model, prompt, 25, temperature=0, context=8)) == greedy_without_cache(model, prompt, 25, context=8)


def test_one_seed_one_text():
    model = model_of()
    draw = lambda seed: list(generate(model, [0], 30, temperature=3.0, seed=seed))  # noqa: E731
    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert draw(None) != draw(None)


def test_it_ends_before_the_end_of_text():
    model = model_of()
    free = list(generate(model, [0, 1], 30, temperature=0))
    eot = free[5]
    assert list(generate(model, [0, 1], 30, temperature=0, eot_id=eot)) == free[: free.index(eot)]


def test_it_comes_piece_by_piece_and_leaves_the_mode_alone():
    model = model_of()
    model.train()
    pieces = list(itertools.islice(generate(model, [0], 10**9, temperature=0), 3))
    assert len(pieces) == 3
    assert model.training
    counts = [b for name, b in model.named_buffers() if name.endswith("tokens_per_expert")]
    assert counts and all(float(b.sum()) == 0 for b in counts), "generating counted as training"
    assert not torch.is_inference_mode_enabled()


def draws(logits, n=4000, **settings):
    generator = torch.Generator().manual_seed(0)
    defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    tokens = [sample(logits, **{**defaults, **settings}, generator=generator) for _ in range(n)]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / n


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([0.1, 0.6, 0.25, 0.05]).log()
    assert torch.allclose(draws(logits), torch.tensor([0.1, 0.6, 0.25, 0.05]), atol=0.03)
    sharp = torch.tensor([0.1, 0.6, 0.25, 0.05]) ** 2
    assert torch.allclose(draws(logits, temperature=0.5), sharp / sharp.sum(), atol=0.03)


def test_top_k_and_top_p_cut_the_tail():
    logits = torch.tensor([0.1, 0.6, 0.25, 0.05]).log()
    assert torch.allclose(draws(logits, top_k=2), torch.tensor([0, 0.6, 0.25, 0]) / 0.85, atol=0.03)
    assert torch.allclose(draws(logits, top_p=0.7), torch.tensor([0, 0.6, 0.25, 0]) / 0.85, atol=0.03)
    assert draws(logits, 50, top_p=0.5).tolist() == [0, 1, 0, 0]
    assert draws(logits, 50, top_k=1, temperature=50.0).tolist() == [0, 1, 0, 0]
    assert draws(logits, 50, temperature=1e-300).tolist() == [0, 1, 0, 0]
    assert float(draws(logits, top_k=99)[3]) > 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_tokens": 0}, "--max-tokens 0: must be 1 or more"),
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"top_p": 1.5}, "--top-p 1.5"),
        ({"top_k": -1}, "--top-k -1"),
        ({"context": 1}, "--context 1"),
        ({"prompt_ids": []}, "no tokens"),
    ],
)
def test_bad_settings_are_told_at_once(settings, says):
    with pytest.raises(UserError, match=says):
        generate(**{"model": model_of(), "prompt_ids": [0], "max_tokens": 1, **settings})
