"""Exported folders: what transformers computes from them, their names, and what is refused."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from sparing.base.config import UserError, YarnConfig
from sparing.interop.huggingface import export_hf, import_hf
from sparing.model.transformer import Transformer

DENSE = {"num_dense_layers": 3}
GQA = {"attention": "gqa", "num_heads": 4, "num_kv_heads": 2}
VARIANTS = {
    "mla moe": ({}, "deepseek_v3"),
    "mla without q-lora, no yarn": ({"q_lora_rank": None, "yarn": None}, "deepseek_v3"),
    "tied": ({"tie_word_embeddings": True}, "deepseek_v3"),
    "no shared expert": ({"n_shared_experts": 0}, "deepseek_v3"),
    "mla dense": (DENSE, "deepseek_v3"),
    "mla dense, another gate that no layer has": (DENSE | {"scoring_func": "softmax"}, "deepseek_v3"),
    "mla moe with MTP": ({"mtp_depth": 2}, "deepseek_v3"),
    "mla dense with MTP": (DENSE | {"mtp_depth": 1}, "deepseek_v3"),
    "gqa dense": (DENSE | GQA | {"yarn": None}, "llama"),
    "gqa dense, wide heads, tied": (DENSE | GQA | {"yarn": None, "head_dim": 24, "tie_word_embeddings": True}, "llama"),
    "gqa dense with yarn": (DENSE | GQA, "llama"),
    "gqa dense with yarn, no mscale": (DENSE | GQA | {"yarn": YarnConfig(4.0, 32, mscale=1.0, mscale_all_dim=0.0)}, "llama"),
    "gqa moe": (GQA, "glm4_moe"),
}


def stored(folder) -> dict[str, tuple[str, list[int]]]:
    """name -> (dtype, shape) of all tensors of a folder, as the safetensors library sees them."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                found[name] = (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape())
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_computes_the_same_and_so_does_what_we_read_back(name, small, random_model, tokens, hf_logits, tmp_path):
    changes, kind = VARIANTS[name]
    config = replace(small, **changes)
    model = random_model(config)
    export_hf(config, model.state_dict(), None, tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == kind
    with torch.no_grad():
        logits = model(tokens)
        assert logits.std() > 0.5
        assert (hf_logits(tmp_path / "hf") - logits).abs().max() < 1e-4
        back = Transformer(config)
        back.load_state_dict(dict(import_hf(tmp_path / "hf")[1]))
        assert torch.equal(back(tokens), logits)
    for ours, theirs in zip(model.state_dict().items(), back.state_dict().items(), strict=True):
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1], theirs[1]), ours[0]


def test_import_returns_the_exported_config(small, random_model, tmp_path):
    for i, changes in enumerate([{}, {"mtp_depth": 2, "q_lora_rank": None}, {"tie_word_embeddings": True, "yarn": None}]):
        config = replace(small, **changes)
        export_hf(config, random_model(config).state_dict(), None, tmp_path / str(i))
        found, _, _ = import_hf(tmp_path / str(i))
        assert replace(found, head_dim=config.head_dim, init=config.init) == config


@pytest.mark.parametrize("tied", [False, True])
def test_published_names(tied, small, random_model, tmp_path):
    """Per-expert tensors, the MTP module behind the last layer with its copies of embedding and head; and nothing else."""
    config = replace(small, mtp_depth=1, tie_word_embeddings=tied)
    export_hf(config, random_model(config).state_dict(), None, tmp_path / "hf", dtype="bfloat16")
    found = stored(tmp_path / "hf")
    expected = {"model.embed_tokens.weight", "model.norm.weight"} | (set() if tied else {"lm_head.weight"})
    attention = ["q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]
    for layer in range(4):
        at = f"model.layers.{layer}."
        expected |= {f"{at}{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")}
        expected |= {f"{at}self_attn.{part}.weight" for part in attention}
        projections = ("gate_proj", "up_proj", "down_proj")
        if layer == 0:
            expected |= {f"{at}mlp.{p}.weight" for p in projections}
        else:
            expected |= {f"{at}mlp.experts.{j}.{p}.weight" for j in range(8) for p in projections}
            expected |= {f"{at}mlp.shared_experts.{p}.weight" for p in projections}
            expected |= {f"{at}mlp.gate.weight", f"{at}mlp.gate.e_score_correction_bias"}
    mtp = ("enorm", "hnorm", "eh_proj", "shared_head.norm", "embed_tokens", "shared_head.head")
    expected |= {f"model.layers.3.{part}.weight" for part in mtp}
    assert set(found) == expected
    assert found["model.layers.3.eh_proj.weight"] == ("BF16", [32, 64])
    assert found["model.layers.1.mlp.experts.7.gate_proj.weight"] == ("BF16", [16, 32])
    assert {name for name, (dtype, _) in found.items() if dtype == "F32"} == {n for n in found if n.endswith("e_score_correction_bias")}


def test_config_json_has_the_published_keys(small, random_model, tmp_path):
    config = replace(small, mtp_depth=1)
    export_hf(config, random_model(config).state_dict(), None, tmp_path / "hf", dtype="float8")
    raw = json.loads((tmp_path / "hf/config.json").read_text())
    published = """model_type architectures vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers
        num_attention_heads num_key_value_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts
        n_shared_experts num_experts_per_tok n_group topk_group first_k_dense_replace moe_layer_freq routed_scaling_factor scoring_func
        topk_method norm_topk_prob num_nextn_predict_layers rope_theta rope_scaling max_position_embeddings rms_norm_eps
        initializer_range tie_word_embeddings ep_size quantization_config""".split()
    assert not set(published) - set(raw)
    assert raw["architectures"] == ["DeepseekV3ForCausalLM"]
    assert (raw["num_hidden_layers"], raw["first_k_dense_replace"], raw["num_nextn_predict_layers"]) == (3, 1, 1)
    assert raw["rope_scaling"]["type"] == "yarn"
    assert raw["quantization_config"]["weight_block_size"] == [128, 128]


def test_shards_and_any_order(small, random_model, tokens, hf_logits, tmp_path):
    model = random_model(small)
    tensors = list(model.state_dict().items())
    export_hf(small, reversed(tensors), None, tmp_path / "hf", shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(stored(tmp_path / "hf"))
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for _, t in tensors)
    for file in files:
        assert (tmp_path / "hf" / file).stat().st_size < 30_000
    with torch.no_grad():
        assert (hf_logits(tmp_path / "hf") - model(tokens)).abs().max() < 1e-4


def test_bfloat16(small, random_model, tokens, hf_logits, tmp_path):
    model = random_model(small)
    export_hf(small, model.state_dict(), None, tmp_path / "hf", dtype="bfloat16")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not name.endswith("e_score_correction_bias"):
                tensor.copy_(tensor.bfloat16())
        assert (hf_logits(tmp_path / "hf") - model(tokens)).abs().max() < 1e-4


def test_llama_leaves_the_mtp_module_out_and_says_so(small, random_model, tokens, hf_logits, tmp_path):
    config = replace(small, **DENSE, **GQA, mtp_depth=1)
    model = random_model(config)
    notes = export_hf(config, model.state_dict(), None, tmp_path / "hf")
    assert any("MTP" in note for note in notes)
    assert not any(name.startswith("model.layers.3") for name in stored(tmp_path / "hf"))
    with torch.no_grad():
        assert (hf_logits(tmp_path / "hf") - model(tokens)).abs().max() < 1e-4
    assert import_hf(tmp_path / "hf")[0].mtp_depth == 0


def test_an_epsilon_that_transformers_ignores_is_noted(small, random_model, tmp_path):
    notes = export_hf(replace(small, rms_norm_eps=1e-5), random_model(small).state_dict(), None, tmp_path / "a")
    assert any("epsilon" in note for note in notes)
    assert not any("epsilon" in note for note in export_hf(small, random_model(small).state_dict(), None, tmp_path / "b"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring_func": "softmax"}, "scoring_func softmax"),
        ({"scoring_func": "sqrtsoftplus"}, "scoring_func sqrtsoftplus"),
        (DENSE | GQA | {"hidden_size": 30, "yarn": None}, "multiple of num_heads"),
    ],
)
def test_what_no_type_expresses_is_refused_before_anything_is_written(changes, message, small, random_model, tmp_path):
    config = replace(small, **changes)
    with pytest.raises(UserError, match=message) as caught:
        export_hf(config, random_model(config).state_dict(), None, tmp_path / "hf")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_existing_folders(small, random_model, tmp_path):
    state = random_model(small).state_dict()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name, says in {"full": "already exists", "file": "is a file", "file/under": "Not a directory", "n" * 300: "name too long"}.items():
        with pytest.raises(UserError, match=says):
            export_hf(small, state, None, tmp_path / name)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    export_hf(small, state, None, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    export_hf(small, state, None, tmp_path / "made/on/the/way")
    assert (tmp_path / "empty/config.json").exists()
    assert (tmp_path / "made/on/the/way/config.json").exists()


def test_wrong_tensors_leave_nothing_behind(small, random_model, tmp_path):
    state = dict(random_model(small).state_dict())
    without = {k: v for k, v in state.items() if k != "model.norm.weight"}
    for wrong, message in [
        (without, r"lack model\.norm\.weight"),
        (state | {"model.extra": torch.zeros(2)}, "model.extra is not a tensor"),
        (state | {"model.norm.weight": torch.zeros(31)}, r"shape \[31\]"),
    ]:
        with pytest.raises(UserError, match=message):
            export_hf(small, wrong, None, tmp_path / "hf")
        assert not list(tmp_path.iterdir())


FULL_DISK = """
import resource, sys, pathlib
from sparing.base.config import ModelConfig, UserError
from sparing.interop.huggingface import export_hf
from sparing.model.transformer import Transformer
from sparing.model.init import init_weights
config = ModelConfig(vocab_size=512, hidden_size=64, num_layers=1)
model = Transformer(config)
init_weights(model, 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    export_hf(config, model.state_dict(), None, sys.argv[1])
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limit on file sizes here")
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path / "hf")], capture_output=True, text=True, check=True)
    assert "no room left" in done.stdout
    assert done.stdout.count("\n") == 1
    assert not list(tmp_path.iterdir())
