"""Every model family against transformers: logits and gradients of random configurations, both directions, and what is refused."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from sparing.base.config import Llama3RopeConfig, ModelConfig, UserError
from sparing.base.config_limits import contradiction
from sparing.budget.flops import parameters
from sparing.interop.families import FAMILIES, family_of
from sparing.interop.hf_config import from_hf
from sparing.interop.hf_tensors import published_tensors
from sparing.interop.huggingface import export_hf, import_hf
from sparing.model.experts import Router
from sparing.model.transformer import Transformer

transformers = pytest.importorskip("transformers")

LENGTH = 48
"""Longer than the original context (16) of every stretched rotary embedding."""
ROPES = {
    "default": {"rope_type": "default"},
    "llama3": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    },
    "linear": {"rope_type": "linear", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip
CASES = [
    ("llama", "default"), ("llama", "llama3"), ("llama", "linear"), ("mistral", "default"), ("qwen2", "default"), ("qwen2", "yarn"),
    ("qwen3", "default"), ("qwen3", "yarn"), ("qwen3_moe", "default"), ("qwen3_moe", "llama3"), ("glm4_moe", "default"),
    ("glm4_moe", "default"), ("deepseek_v2", "default"), ("deepseek_v2", "yarn"),
]  # fmt: skip
EXPORTED = {"mistral": "llama"}
"""The model type that an imported model is exported as, where it is another one."""


def random_settings(case: int) -> dict:
    """Arguments of the family's config class; features cycle with different periods, so that they meet in different company."""
    rng, (family, rope) = random.Random(case), CASES[case]
    heads = rng.choice((4, 6))
    settings = {
        "vocab_size": 128, "hidden_size": heads * rng.choice((8, 12)), "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": heads, "max_position_embeddings": 64, "tie_word_embeddings": case % 5 == 3, "attention_bias": False,
        "rms_norm_eps": rng.choice((1e-5, 1e-6)), "rope_parameters": {"rope_theta": rng.choice((500.0, 10000.0)), **ROPES[rope]},
        "attn_implementation": "eager", "bos_token_id": 1, "eos_token_id": 2, "sliding_window": None,
    }  # fmt: skip
    if family == "deepseek_v2":
        limited = rope == "yarn"
        settings["rope_parameters"] |= {"mscale": 0.7, "mscale_all_dim": 0.9} if limited else {}
        return settings | {
            "moe_intermediate_size": 16, "n_routed_experts": 8, "n_shared_experts": 1 + limited, "num_experts_per_tok": 3,
            "first_k_dense_replace": 1, "q_lora_rank": 16 if limited else None, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8, "v_head_dim": 12, "routed_scaling_factor": rng.choice((1.0, 1.7)), "rms_norm_eps": 1e-6,
            **({"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2} if limited else {}),
        }  # fmt: skip
    settings |= {"num_key_value_heads": rng.choice((2, heads)), "head_dim": rng.choice((8, 16))}
    if family == "qwen3_moe":
        settings |= {
            "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": case % 2 == 0,
            "mlp_only_layers": [0] if case % 2 else [],
        }  # fmt: skip
    if family == "glm4_moe":
        settings |= {
            "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1, "n_group": 2,
            "topk_group": 1, "first_k_dense_replace": 1, "attention_bias": True, "use_qk_norm": case % 2 == 0,
            "partial_rotary_factor": 0.5 if case % 2 else 0.75, "routed_scaling_factor": 1.7, "num_mtp_layers": 0,
        }  # fmt: skip
    return settings


def random_model(family: str, settings: dict, seed: int = 0):
    """A model of transformers, none of whose weights are at their defaults."""
    config = transformers.CONFIG_MAPPING[family](**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith(("bias",)):
                tensor.copy_(0.5 * noise)
            elif tensor.dim() == 1:
                tensor.copy_(1 + 0.3 * noise)
            elif "embed_tokens" in name:
                tensor.copy_(noise * (0.25 if settings["tie_word_embeddings"] else 1.0))
            else:
                tensor.copy_(1.3 * noise * tensor.shape[-1] ** -0.5)
    return model.eval()


def load(folder: Path) -> Transformer:
    config, tensors, _ = import_hf(folder)
    model = Transformer(config)
    model.load_state_dict(dict(tensors))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """case -> (transformers' model, the folder it was saved to)."""
    known = {}

    def get(case: int):
        if case not in known:
            model = random_model(CASES[case][0], random_settings(case), seed=case)
            known[case] = model, tmp_path_factory.mktemp(f"{CASES[case][0]}{case}")
            model.save_pretrained(known[case][1])
        return known[case]

    return get


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(128, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference of logits, as a share of the largest logit."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{family}, {rope}, {i}" for i, (family, rope) in enumerate(CASES)])
def test_logits_gradients_and_the_way_back(case, saved, tokens, tmp_path):
    theirs, folder = saved(case)
    ours = load(folder)
    logits = theirs(tokens).logits
    assert logits.std() > 0.5
    mine = ours(tokens)
    assert relative(mine, logits) <= 1e-4

    targets = tokens.roll(-1, 1)
    theirs.zero_grad()
    for out in (logits, mine):
        F.cross_entropy(out.flatten(0, 1), targets.flatten()).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    rotary = {one.name: one.rotary for one in published_tensors(ours.config, FAMILIES[CASES[case][0]].halves)}
    assert set(expected) == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        grad = rotary[name].permute(parameter.grad, halves=True) if rotary.get(name) else parameter.grad
        assert expected[name].norm() > 0, name
        if name.endswith("k_proj.bias"):  # a bias of keys moves each query's logits alike where nothing is rotated: little is left
            assert (grad - expected[name]).norm() <= 1e-3 * expected[name.replace("k_proj", "q_proj")].norm()
            continue
        assert (grad - expected[name]).norm() <= 1e-3 * expected[name].norm(), name

    notes = export_hf(ours.config, ours.state_dict(), None, tmp_path / "out")
    assert not any("epsilon" in note for note in notes)
    raw = json.loads((tmp_path / "out/config.json").read_text())
    assert raw["model_type"] == EXPORTED.get(CASES[case][0], CASES[case][0])
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        assert relative(again(tokens).logits, logits) <= 1e-5
    back = load(tmp_path / "out")
    assert back.config == ours.config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name


def test_the_cases_cover_what_they_should():
    settings = [random_settings(case) for case in range(len(CASES))]
    assert {family for family, _ in CASES} == set(FAMILIES) - {"deepseek_v3"}  # which tests/model/test_parity.py compares
    assert {s["head_dim"] * s["num_attention_heads"] == s["hidden_size"] for s in settings if "head_dim" in s} == {True, False}
    assert {s["num_key_value_heads"] == s["num_attention_heads"] for s in settings if "num_key_value_heads" in s} == {True, False}
    assert {s["tie_word_embeddings"] for s in settings} == {True, False}


def case_of(family: str, rope: str = "default") -> int:
    return CASES.index((family, rope))


def without_biases(model: Transformer) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.zero_()


def not_in_our_order(part: str):
    """The rows of a tensor as the file has them: a loader that permuted the weights and forgot these."""

    def change(model: Transformer) -> None:
        for one in published_tensors(model.config, halves=True):
            if part in one.name:
                tensor = model.get_parameter(one.name)
                tensor.data = one.rotary.permute(tensor.data, halves=True)

    return change


def permuted_as_if_they_were_pairs(model: Transformer) -> None:
    for part in ("q_proj.weight", "k_proj.weight"):
        not_in_our_order(part)(model)


def changed(**changes):
    def change(model: Transformer) -> None:
        model.config = replace(model.config, **changes)
        model.rotary = model.rotary[:0]
        for module in model.modules():
            if isinstance(module, Router):
                module.c = model.config

    return change


MUTANTS = {
    "dropped biases": (case_of("qwen2"), without_biases),
    "rows of weights not permuted": (case_of("qwen2"), permuted_as_if_they_were_pairs),
    "rows of a bias not permuted": (case_of("qwen2"), not_in_our_order("q_proj.bias")),
    "rows of a key bias not permuted": (case_of("qwen2"), not_in_our_order("k_proj.bias")),
    "rows of a head norm not permuted": (case_of("qwen3"), not_in_our_order("q_norm")),
    "whole heads rotated": (case_of("glm4_moe"), changed(partial_rotary_factor=1.0)),
    "llama3 not stretched": (case_of("llama", "llama3"), changed(llama3=None)),
    "llama3 stretched evenly": (case_of("llama", "llama3"), changed(llama3=None, linear_rope_factor=4.0)),
    "not stretched": (case_of("llama", "linear"), changed(linear_rope_factor=1.0)),
    "gates normalised": (case_of("qwen3_moe", "llama3"), changed(norm_topk_prob=True)),
    "gates not normalised": (case_of("qwen3_moe"), changed(norm_topk_prob=False)),
    "groups by their two best": (case_of("deepseek_v2", "yarn"), changed(selection_bias=True)),
    "no groups": (case_of("deepseek_v2", "yarn"), changed(n_group=1, topk_group=1)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_model_is_caught(mutant, saved, tokens):
    case, change = MUTANTS[mutant]
    theirs, folder = saved(case)
    ours = load(folder)
    change(ours)
    with torch.no_grad():
        assert relative(ours(tokens), theirs(tokens).logits) > 3e-3


WHERE = Path("config.json")


def published(family: str, **changes) -> dict:
    """A config.json of the family; the value `...` removes a key."""
    settings = {k: v for k, v in random_settings(case_of(family)).items() if k != "attn_implementation"}
    raw = {"model_type": family, **settings, "num_nextn_predict_layers": 0} | changes
    return {key: value for key, value in raw.items() if value is not ...}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"model_type": "gemma3"}, f"model_type is 'gemma3', supported: {', '.join(FAMILIES)}"),
        ("llama", {"attention_bias": True}, "attention_bias is True, supported: False .*qwen2"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "type 'dynamic', supported: .*'llama3'.*model types.*llama",
        ),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "type 'longrope'"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ("llama", {"rope_parameters": {**ROPES["llama3"], "low_freq_factor": 4.0}}, r"low_freq_factor \(4.0\) must be less"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5, supported: 1.0"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', supported: 'silu'"),
        ("mistral", {"sliding_window": 32}, r"sliding_window is 32, supported: none, or max_position_embeddings \(64\)"),
        ("mistral", {"sliding_window": ..., "max_position_embeddings": 32768}, "sliding_window is 4096"),
        ("mistral", {"num_key_value_heads": ...}, "num_key_value_heads is missing"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, "sliding_window is 16 with use_sliding_window true"),
        ("qwen2", {"layer_types": ["linear_attention"] * 2}, "layer_types has 'linear_attention'"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers is \[1\], supported: leading layers"),
        ("qwen3_moe", {"num_experts": ...}, "num_experts is missing"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ("glm4_moe", {"head_dim": 10, "partial_rotary_factor": 0.5}, "partial_rotary_factor rotates 5 of a head's 10 numbers"),
        ("glm4_moe", {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        ("glm4_moe", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc', supported: 'greedy', 'group_limited_greedy'"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ("deepseek_v2", {"attention_bias": True}, "attention_bias is True"),
    ],
)
def test_what_is_not_computed_is_one_line(family, changes, message):
    from_hf(published(family), WHERE)  # it is the change that is refused
    with pytest.raises(UserError, match=message) as caught:
        from_hf(published(family, **changes), WHERE)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("config.json: ")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 64}),
        ("mistral", {"sliding_window": ...}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention"] * 2}),
        ("deepseek_v2", {"n_group": None, "topk_group": None, "topk_method": None}),
    ],
)
def test_settings_that_change_nothing_are_accepted(family, changes):
    assert from_hf(published(family, **changes), WHERE)[0] == from_hf(published(family), WHERE)[0]


def test_head_widths_where_none_is_given():
    raw = published("llama", head_dim=...)
    assert from_hf(raw, WHERE)[0].head_dim * raw["num_attention_heads"] == raw["hidden_size"]
    assert from_hf(published("qwen3", head_dim=...), WHERE)[0].head_dim == 128


def test_missing_and_unexpected_tensors_are_named(saved, tmp_path):
    _, folder = saved(case_of("qwen2"))
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}

    def write(**changes) -> Path:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        out.mkdir()
        (out / "config.json").write_bytes((folder / "config.json").read_bytes())
        save_file({n: t for n, t in (tensors | changes).items() if t is not None}, out / "model.safetensors")
        return out

    key = "model.layers.1.self_attn.k_proj.bias"
    for changes, message in [
        ({key: None}, rf"tensor {key} is missing"),
        ({key: tensors[key][:-1].clone()}, rf"tensor {key} has shape"),
        ({"model.layers.1.self_attn.o_proj.bias": tensors[key].clone()}, "o_proj.bias is not part of this model"),
        ({"model.layers.1.self_attn.q_norm.weight": tensors[key].clone()}, "q_norm.weight is not part of this model"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            import_hf(write(**changes))
        assert "\n" not in str(caught.value)


GQA = ModelConfig(attention="gqa", num_dense_layers=6)


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (GQA, "llama"),
        (replace(GQA, llama3=Llama3RopeConfig()), "llama"),
        (replace(GQA, attention_bias=True), "qwen2"),
        (replace(GQA, head_norm=True), "qwen3"),
        (replace(GQA, head_norm=True, attention_bias=True), "glm4_moe"),
        (replace(GQA, partial_rotary_factor=0.5), "glm4_moe"),
        (replace(GQA, num_dense_layers=0), "glm4_moe"),
        (ModelConfig(scoring_func="softmax", selection_bias=False, norm_topk_prob=False), "deepseek_v2"),
        (ModelConfig(num_dense_layers=6, selection_bias=False), "deepseek_v3"),
    ],
)
def test_the_family_that_a_model_is_exported_as(config, family):
    assert family_of(config) == family


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            ModelConfig(scoring_func="softmax"),
            "has scoring_func softmax beside the rest; the nearest, deepseek_v3, has scoring_func sigmoid",
        ),
        (ModelConfig(selection_bias=False), "selection_bias False.*deepseek_v3, has selection_bias True"),
        (replace(GQA, num_dense_layers=0, scoring_func="sqrtsoftplus"), "scoring_func sqrtsoftplus"),
        (
            ModelConfig(scoring_func="softmax", selection_bias=False, norm_topk_prob=False, hidden_size=258),
            r"deepseek_v2 wants hidden_size \(258\)",
        ),
    ],
)
def test_a_model_of_no_family_is_refused(config, message):
    with pytest.raises(UserError, match=message) as caught:
        family_of(config)
    assert "\n" not in str(caught.value)


PUBLISHED = {
    "Llama-3.2-1B": (
        {
            "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True, "rope_theta": 500000.0,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1,
            "rope_scaling": {
                "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
        1_235_814_400,
        None,
    ),
    "Mistral-7B-v0.3": (
        {
            "model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
            "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": None, "rope_theta": 1000000.0,
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        },
        7_248_023_552,
        None,
    ),
    "Qwen2.5-0.5B": (
        {
            "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864,
            "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 1000000.0,
            "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 24, "max_position_embeddings": 32768,
        },
        494_032_768,
        None,
    ),
    "Qwen3-0.6B": (
        {
            "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True, "rope_theta": 1000000,
            "attention_bias": False, "rope_scaling": None, "use_sliding_window": False, "sliding_window": None,
            "max_position_embeddings": 40960,
        },
        596_049_920,
        None,
    ),
    "Qwen3-30B-A3B": (
        {
            "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "intermediate_size": 6144,
            "moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
            "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "rope_theta": 1000000.0,
            "max_position_embeddings": 40960, "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": None,
        },
        30_532_122_624,
        3.35e9 - 151936 * 2048,  # published with the input embedding, which ours leaves out
    ),
    "DeepSeek-V2-Lite": (
        {
            "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "num_hidden_layers": 27, "intermediate_size": 10944,
            "moe_intermediate_size": 1408, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None, "kv_lora_rank": 512,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64, "n_shared_experts": 2,
            "num_experts_per_tok": 6, "first_k_dense_replace": 1, "moe_layer_freq": 1, "scoring_func": "softmax", "norm_topk_prob": False,
            "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "max_position_embeddings": 163840,
            "rope_theta": 10000, "rope_scaling": {
                "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                "original_max_position_embeddings": 4096, "type": "yarn",
            },
        },
        15_706_484_224,
        2.45e9,
    ),
    "GLM-4.5-Air": (
        {
            "model_type": "glm4_moe", "vocab_size": 151552, "hidden_size": 4096, "num_hidden_layers": 46, "intermediate_size": 10944,
            "moe_intermediate_size": 1408, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "n_routed_experts": 128,
            "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 1, "attention_bias": True, "use_qk_norm": False,
            "partial_rotary_factor": 0.5, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
            "num_nextn_predict_layers": 1, "max_position_embeddings": 131072, "rope_theta": 1000000, "rope_scaling": None,
        },
        106.8e9,
        12.6e9,
    ),
}  # fmt: skip
"""config.json as the models' pages have it -> published numbers of parameters: all (safetensors' count), active."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size(name):
    raw, total, active = PUBLISHED[name]
    config, _ = from_hf(raw, WHERE)
    counts = parameters(config)
    assert counts.total == total if isinstance(total, int) else counts.total == pytest.approx(total, rel=0.005)
    assert active is None or counts.active == pytest.approx(active, rel=0.05)
    assert family_of(config) == EXPORTED.get(raw["model_type"], raw["model_type"])


def test_eight_bits(saved, tokens, tmp_path):
    """Rows are put into the file's order before they are quantised, and biases and head norms are no weights."""
    for family in ("qwen2", "qwen3"):
        ours = load(saved(case_of(family))[1])
        export_hf(ours.config, ours.state_dict(), None, tmp_path / family, dtype="float8")
        with torch.no_grad():
            assert 1e-3 < relative(load(tmp_path / family)(tokens), ours(tokens)) < 0.2


ANYTHING = [None, True, False, -1, 0, 1, 7, 10**30, 0.5, -2.0, float("nan"), float("inf"), "", "yarn", [], [0], ["x"], {}, {"x": 1}]


@pytest.mark.parametrize("family", sorted({family for family, _ in CASES}))
def test_any_value_of_any_key_is_read_or_refused_in_one_line(family):
    raw = {key: value for key, value in published(family).items() if key != "rope_parameters"} | {"layer_types": ["full_attention"]}
    raw |= {"rope_theta": 10000.0, "partial_rotary_factor": 1.0, "use_sliding_window": True, "quantization_config": None}
    scaled = [{**raw, "rope_scaling": {**rope, "attention_factor": 1.0, "mscale": 1.0}} for rope in ROPES.values()]
    changed = [{**raw, key: value} for key in raw for value in ANYTHING]
    changed += [{**raw, "rope_scaling": value} for value in ANYTHING]
    changed += [
        {**one, "rope_scaling": one["rope_scaling"] | {key: value}} for one in scaled for key in one["rope_scaling"] for value in ANYTHING
    ]
    refused = 0
    for one in changed:
        try:
            config, _ = from_hf(one, WHERE)
            assert contradiction(config) is None
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(error).startswith("config.json: "), error
    assert 0.2 * len(changed) < refused < len(changed)
