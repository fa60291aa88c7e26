"""Block-scaled 8-bit checkpoints in and out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from sparing.interop.huggingface import export_hf, import_hf


def published_fp8(edit, edit_config, scale_as) -> dict[str, torch.Tensor]:
    """Turn the projections of a folder into e4m3 blocks of 8x16 with factors; -> what they dequantise to, the slow way."""
    expected = {}

    def change(stored):
        for name in [n for n in stored if n.endswith("_proj.weight") and "eh_proj" not in n]:
            weight = stored[name]
            quantised, dequantised = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(weight.shape)
            scales = torch.empty(-(-weight.shape[0] // 8), -(-weight.shape[1] // 16))
            for i in range(scales.shape[0]):
                for j in range(scales.shape[1]):
                    block = (slice(8 * i, 8 * i + 8), slice(16 * j, 16 * j + 16))
                    scale = weight[block].abs().max() / 448
                    scales[i, j] = scale if scale_as == "float32" else torch.exp2(torch.ceil(torch.log2(scale)))
                    quantised[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
                    dequantised[block] = quantised[block].float() * scales[i, j]
            stored[name] = quantised
            expected[name] = dequantised
            if scale_as == "e8m0":
                scales = scales.to(torch.float8_e8m0fnu)
            elif scale_as == "uint8":
                scales = (torch.log2(scales) + 127).to(torch.uint8)
            stored[name + "_scale_inv"] = scales

    edit(change)
    edit_config(quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [8, 16]})
    return expected


@pytest.mark.parametrize("scale_as", ["float32", "power of two", "e8m0", "uint8"])
def test_block_scaled_fp8(scale_as, exported, edit, edit_config):
    expected = published_fp8(edit, edit_config, scale_as)
    config, tensors, _ = import_hf(exported)
    ours = dict(tensors)
    assert config.mtp_depth == 1
    compared = 0
    for name, tensor in expected.items():
        if ".mlp.experts." in name:
            stem, j, projection, _ = name.rsplit(".", 3)
            fused = ours[f"{stem}.down_proj" if projection == "down_proj" else f"{stem}.gate_up_proj"][int(j)]
            if projection != "down_proj":
                fused = fused.chunk(2)[projection == "up_proj"]
        else:
            fused = ours[name]
        assert torch.equal(fused, tensor), name
        compared += 1
    assert compared > 80


def test_fp8_with_one_factor_for_a_whole_tensor(exported, edit):
    name = "model.layers.0.mlp.down_proj.weight"

    def change(stored):
        stored[name] = (stored[name] * 100).to(torch.float8_e4m3fn)
        stored[name + "_scale_inv"] = torch.tensor(0.01)

    edit(change)
    with safe_open(exported / "model.safetensors", "pt") as file:
        expected = file.get_tensor(name).float() * torch.tensor(0.01)
    assert torch.equal(dict(import_hf(exported)[1])[name], expected)


def test_fp8_round_trip_and_what_transformers_makes_of_it(small, random_model, hf_logits, tmp_path):
    config = replace(small, hidden_size=160, mtp_depth=1)  # blocks of 128: more than one, the last one partial
    model = random_model(config)
    export_hf(config, model.state_dict(), None, tmp_path / "hf", dtype="float8")
    with safe_open(tmp_path / "hf/model.safetensors", "pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}
        assert file.get_slice("model.layers.0.self_attn.q_a_proj.weight_scale_inv").get_shape() == [1, 2]
    eight_bit = {name for name, kind in kinds.items() if kind == "F8_E4M3"}
    assert {name + "_scale_inv" for name in eight_bit} == {name for name in kinds if name.endswith("_scale_inv")}
    assert {name.split(".")[-2] for name in eight_bit} == {
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert {kind for name, kind in kinds.items() if name not in eight_bit and "_scale_inv" not in name} == {"BF16", "F32"}

    back = dict(import_hf(tmp_path / "hf")[1])
    for name, tensor in model.state_dict().items():
        error = (back[name] - tensor).abs().max() / tensor.abs().max()
        assert error <= 2**-4, name  # e4m3 has 3 bits of mantissa
        # A second trip is exact: factors and 8-bit values are those of the first.
    export_hf(config, back, None, tmp_path / "again", dtype="float8")
    again = dict(import_hf(tmp_path / "again")[1])
    for name in back:
        assert torch.allclose(again[name], back[name], rtol=1e-6, atol=0), name


@pytest.mark.parametrize(("width", "partial"), [(256, False), (160, True)])
def test_transformers_reads_our_fp8(width, partial, small, random_model, hf_logits, our_logits, tmp_path):
    """Without a GPU it dequantises to bfloat16, and takes blocks to be of equal size: a partial one beside a whole one is noted."""
    config = replace(small, hidden_size=width)
    notes = export_hf(config, random_model(config).state_dict(), None, tmp_path / "hf", dtype="float8")
    assert any("multiple of 128" in note for note in notes) == partial
    if not partial:
        pytest.importorskip("accelerate")  # transformers wants it for FP8
        logits, _ = our_logits(tmp_path / "hf")
        assert (hf_logits(tmp_path / "hf", dtype=torch.bfloat16) - logits).abs().mean() < 0.05 * logits.std()
