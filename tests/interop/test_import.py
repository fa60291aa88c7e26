"""What transformers saves computes the same here, and is streamed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from sparing.interop.huggingface import export_hf, import_hf, read_hf
from sparing.model.transformer import Transformer


def transformers_model(**changes):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 8, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 12, "qk_nope_head_dim": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
        "first_k_dense_replace": 1, "initializer_range": 0.2, "max_position_embeddings": 128, "attn_implementation": "eager",
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**(sizes | changes)))
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.5)
    return model.eval()


YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1, "mscale": 0.7,
    "mscale_all_dim": 0.9, "rope_theta": 5000.0,
}  # fmt: skip
WRITTEN = {
    "plain": {},
    "no q-lora": {"q_lora_rank": None},
    "yarn": {"rope_parameters": YARN},
    "yarn without mscale": {"rope_parameters": {k: v for k, v in YARN.items() if not k.startswith("mscale")}},
    "yarn with mscale_all_dim alone": {"rope_parameters": {k: v for k, v in YARN.items() if k != "mscale"}},
    "rotary halves": {"rope_interleave": False},
    "rotary halves without q-lora": {"rope_interleave": False, "q_lora_rank": None},
    "tied": {"tie_word_embeddings": True},
    "all dense": {"first_k_dense_replace": 3},
    "no shared expert": {"n_shared_experts": 0},
    "gates not normalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.3},
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_transformers_saved_computes_the_same(name, tokens, our_logits, tmp_path):
    model = transformers_model(**WRITTEN[name])
    model.save_pretrained(tmp_path / "hf")
    logits, notes = our_logits(tmp_path / "hf")
    with torch.no_grad():
        expected = model(tokens).logits
    assert expected.std() > 0.1
    assert (logits - expected).abs().max() < 1e-4
    # transformers announces an MTP module by default and never writes one.
    assert any("MTP off" in note for note in notes)
    assert any("no tokenizer.json" in note for note in notes)


def test_what_transformers_saved_in_shards_and_in_bfloat16(hf_logits, our_logits, tmp_path):
    transformers_model().to(torch.bfloat16).save_pretrained(tmp_path / "hf", max_shard_size="30KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    logits, _ = our_logits(tmp_path / "hf")
    assert (logits - hf_logits(tmp_path / "hf")).abs().max() < 1e-4


def test_experts_stored_fused(exported, edit, our_logits):
    """transformers 5 holds a layer's experts as one tensor; some tools save them so."""
    before, _ = our_logits(exported)
    _, tensors, _ = import_hf(exported)
    fused = {name: tensor for name, tensor in tensors if ".experts." in name and "shared" not in name}

    def change(stored):
        for name in [n for n in stored if ".mlp.experts." in n]:
            del stored[name]
        stored.update(fused)

    edit(change)
    assert torch.equal(our_logits(exported)[0], before)


def test_half_precision_and_stored_frequencies(exported, edit, our_logits):
    before, _ = our_logits(exported)

    def change(stored):
        for name in stored:
            stored[name] = stored[name].half()
        stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # old versions of transformers stored these

    edit(change)
    assert (our_logits(exported)[0] - before).abs().max() < 0.1


PEAK = """
import sys
from sparing.interop.huggingface import import_hf

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

config, tensors, _ = import_hf(sys.argv[1])
before = status("VmRSS")
for _ in tensors:
    pass
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_tensors_stream_one_by_one(small, tmp_path):
    """A checkpoint of 200 MB: one of our tensors is held at a time."""
    config = replace(small, num_layers=7, hidden_size=256, moe_intermediate_size=256, n_routed_experts=48, yarn=None)
    shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    export_hf(config, ((name, torch.zeros(shape)) for name, shape in shapes.items()), None, tmp_path / "hf", shard_bytes=10**8)
    total = sum(shape.numel() for shape in shapes.values()) * 4
    assert total > 200e6
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path / "hf")], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2 * (48 * 512 * 256 * 4) + 16e6 < total / 3


def test_what_a_folder_says_of_its_licence(exported):
    assert read_hf(exported).origin.licence == ""
    (exported / "LICENSE.txt").write_text("\n  Some Licence of Ours\n\nYou may ...")
    assert read_hf(exported).origin.licence == "Some Licence of Ours"
    (exported / "README.md").write_text('---\ntags: [x]\nlicense: other\nlicense_name: "ours-2.0"\n---\nlicense: mit\n')
    assert read_hf(exported).origin.licence == "ours-2.0"
    (exported / "README.md").write_text("---\nlicense: Apache-2.0\nbase_model: somebody/first\n---\n")
    origin = read_hf(exported).origin
    assert (origin.licence, origin.publisher, origin.name) == ("Apache-2.0", "somebody", "first")
