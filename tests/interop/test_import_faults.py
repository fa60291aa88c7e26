"""Everything that can be wrong with a folder is one line that names it."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparing import api
from sparing.base.config import UserError
from sparing.data.tokenizer import train_tokenizer
from sparing.interop.hf_tensors import read_folder
from sparing.interop.huggingface import export_hf, import_hf


def test_mtp_absent_present_and_in_part(exported, edit, our_logits):
    config, _, notes = import_hf(exported)
    assert config.mtp_depth == 1
    assert not any("MTP" in note for note in notes)
    whole = {name: tensor.clone() for name, tensor in load_file(exported / "model.safetensors").items()}  # not mapped: it is replaced

    def without_copies(stored):
        del stored["model.layers.3.embed_tokens.weight"], stored["model.layers.3.shared_head.head.weight"]

    edit(without_copies)
    assert import_hf(exported)[0].mtp_depth == 1  # the copies are no loss

    save_file({n: t for n, t in whole.items() if n != "model.layers.3.enorm.weight"}, exported / "model.safetensors")
    with pytest.raises(UserError, match=r"tensor model\.layers\.3\.enorm\.weight is missing"):
        import_hf(exported)

    save_file({n: t for n, t in whole.items() if not n.startswith("model.layers.3.")}, exported / "model.safetensors")
    config, _, notes = import_hf(exported)
    assert config.mtp_depth == 0
    assert any("MTP off" in note for note in notes)
    our_logits(exported)


def rename(old, new):
    return lambda stored: stored.update({new: stored.pop(old)})


TENSOR_FAULTS = {
    "missing": (lambda s: s.pop("model.layers.1.mlp.experts.5.up_proj.weight"), r"experts\.5\.up_proj\.weight is missing"),
    "missing bias": (
        lambda s: s.pop("model.layers.2.mlp.gate.e_score_correction_bias"),
        r"2\.mlp\.gate\.e_score_correction_bias is missing",
    ),
    "misspelt": (
        rename("model.norm.weight", "model.norms.weight"),
        r"model\.norm\.weight is missing \(nearest present: model\.norms\.weight\)",
    ),
    "unexpected": (
        lambda s: s.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(4)}),
        r"q_norm\.weight is not part of this model",
    ),
    "one expert too many": (
        lambda s: s.update({"model.layers.1.mlp.experts.8.up_proj.weight": torch.ones(16, 32)}),
        r"experts\.8\.up_proj",
    ),
    "a layer past the last": (lambda s: s.update({"model.layers.4.enorm.weight": torch.ones(32)}), r"layers\.4\.enorm\.weight is not part"),
    "wrong shape": (lambda s: s.update({"lm_head.weight": torch.ones(127, 32)}), r"lm_head\.weight has shape \[127, 32\].*\[128, 32\]"),
    "integers": (lambda s: s.update({"lm_head.weight": torch.ones(128, 32, dtype=torch.int8)}), r"lm_head\.weight is of type torch\.int8"),
    "another embedding": (lambda s: s["model.layers.3.embed_tokens.weight"].add_(1), r"3\.embed_tokens\.weight differs"),
    "fp8 without factors": (
        lambda s: s.update({"model.layers.0.mlp.up_proj.weight": s["model.layers.0.mlp.up_proj.weight"].to(torch.float8_e4m3fn)}),
        r"up_proj\.weight_scale_inv is missing",
    ),
    "factors without fp8": (lambda s: s.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 1)}), "scale_inv is not part"),
    "factors of the wrong shape": (
        lambda s: s.update(
            {
                "model.layers.0.mlp.up_proj.weight": s["model.layers.0.mlp.up_proj.weight"].to(torch.float8_e4m3fn),
                "model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(2, 1),
            }
        ),
        r"scale_inv has shape \[2, 1\], expected \[1, 1\]",
    ),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_a_wrong_tensor_is_named(fault, exported, edit):
    change, message = TENSOR_FAULTS[fault]
    edit(change)
    with pytest.raises(UserError, match=message) as caught:
        import_hf(exported)
    assert "\n" not in str(caught.value)


CONFIG_FAULTS = {
    "another type": ({"model_type": "gpt2"}, "model_type is 'gpt2', supported: deepseek_v3"),
    "no type": ({"model_type": ...}, "model_type is None"),
    "gate": ({"scoring_func": "tanh"}, "scoring_func is 'tanh', supported: 'sigmoid'"),
    "top-k method": ({"topk_method": "greedy"}, "topk_method is 'greedy'"),
    "missing": ({"kv_lora_rank": ...}, "kv_lora_rank is missing"),
    "misspelt": ({"hidden_size": ..., "hiden_size": 32}, r"hidden_size is missing \(nearest present: hiden_size\)"),
    "not a number": ({"num_hidden_layers": "3"}, "num_hidden_layers is '3'"),
    "negative": ({"vocab_size": -1}, "vocab_size is -1"),
    "zero": ({"num_attention_heads": 0, "num_key_value_heads": 0}, "num_attention_heads must be at least 1, not 0"),
    "a truth as a number": ({"n_group": True}, "n_group is True"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "attention bias": ({"attention_bias": True}, "attention_bias is True"),
    "grouped MLA": ({"num_key_value_heads": 1}, "num_key_value_heads is 1"),
    "rope": ({"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, "type 'dynamic', supported: 'default', 'linear', 'llama3', 'yarn'"),
    "rope not an object": ({"rope_scaling": [1]}, "not an object"),
    "odd rope": ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7"),
    "groups": ({"n_group": 3}, "8 experts in 3 groups"),
    "top-k": ({"num_experts_per_tok": 5}, r"num_experts_per_tok \(5\)"),
    "quantised otherwise": ({"quantization_config": {"quant_method": "gptq"}}, "method 'gptq'"),
    "block size": ({"quantization_config": {"quant_method": "fp8", "weight_block_size": 128}}, "weight_block_size is 128"),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_wrong_config_is_one_line(fault, exported, edit_config):
    changes, message = CONFIG_FAULTS[fault]
    edit_config(**changes)
    with pytest.raises(UserError, match=message) as caught:
        import_hf(exported)
    assert "\n" not in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"[]", b"", b"\xff\xfe", b"\xff", b"null", b"[" * 100_000])
def test_a_config_that_is_not_a_json_object(content, exported):
    (exported / "config.json").write_bytes(content)
    said = "not valid JSON|nested too deeply|expected a JSON object|is UTF-16|line 1 is not UTF-8"
    with pytest.raises(UserError, match=rf"config\.json: ({said})"):
        import_hf(exported)


def test_files_that_are_not_there_or_not_safe(exported, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        import_hf(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        import_hf(tmp_path / "empty")
    weights = exported / "model.safetensors"
    shutil.copy(weights, exported / "pytorch_model.bin")
    import_hf(exported)  # a pickle beside safetensors is not touched
    weights.unlink()
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle.*safetensors"):
        import_hf(exported)
    (exported / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        import_hf(exported)


def test_damaged_safetensors(exported):
    path = exported / "model.safetensors"
    whole = path.read_bytes()
    start = int.from_bytes(whole[:8], "little") + 8
    header = json.loads(whole[8:start])
    name = "model.norm.weight"

    def with_entry(**changes):
        text = json.dumps(header | {name: header[name] | changes}).encode()
        return len(text).to_bytes(8, "little") + text + whole[start:]

    for content, message in [
        (whole[:-100], "truncated"),
        (whole[: start // 2], "not a safetensors file, or truncated"),
        (b"", "not a safetensors file, or truncated"),
        (b"\xff" * 16, "not a safetensors file, or truncated"),
        (whole[:8] + b"x" * (start - 8) + whole[start:], "header is not JSON"),
        ((100_000).to_bytes(8, "little") + b"[" * 100_000, "header is not JSON"),
        (with_entry(dtype="F4"), r"model\.norm\.weight has the type F4"),
        (with_entry(shape=[31]), r"entry of model\.norm\.weight is inconsistent"),
        (with_entry(shape=[-32]), r"entry of model\.norm\.weight is inconsistent"),
        (with_entry(shape="x"), "malformed safetensors header"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            import_hf(exported)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_not_finite_is_named(value, name, dtype, exported, edit, tmp_path):
    edit(lambda stored: stored[name].view(-1)[-1:].fill_(value))
    with pytest.raises(UserError, match=f"tensor {re.escape(name)} has numbers that are not finite"):
        api.import_(str(exported), str(tmp_path / "run"), dtype)
    assert not (tmp_path / "run").exists()


def test_added_tokens_that_the_model_does_not_have_are_left_out(exported, tmp_path):
    """As folders of fine-tuned models have them, to pad with: read as a token, the text would index past the embedding."""
    content = json.loads(train_tokenizer(["the cat sat on the mat"], 300).to_json())
    content["model"]["merges"], special = [], [token["content"] for token in content["added_tokens"]]
    ordinary = [token for token in content["model"]["vocab"] if token not in special]
    for count, left_out in ((128, True), (127, False)):
        kept = [*special, *ordinary[: count - len(special)]]
        ids = {token: number for number, token in enumerate(kept)}
        added = [token | {"id": ids[token["content"]]} for token in content["added_tokens"]]
        added.append(added[0] | {"id": count, "content": "[PAD]", "special": False})
        changed = content | {"model": content["model"] | {"vocab": ids}, "added_tokens": added}
        (exported / "tokenizer.json").write_text(json.dumps(changed))
        (exported / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[PAD]"}))
        run = str(tmp_path / str(count))
        notes = api.import_(str(exported), run)["notes"]
        assert any("ends at 127; added tokens behind it are left out: '[PAD]' (128)" in note for note in notes) is left_out
        tokenizer = api.load(run).tokenizer
        assert (127 in tokenizer.encode("a[PAD]")) is not left_out and max(tokenizer.encode("a[PAD]")) < 128
        assert (127 in tokenizer.eos_ids) is not left_out and max(tokenizer.eos_ids) < 128


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(exported, tmp_path):
    train_tokenizer(["the cat sat on the mat"], 300).save(exported / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.json: has a token with id \d+, the model's vocabulary ends at 127"):
        api.import_(str(exported), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_index_faults(small, random_model, tmp_path):
    folder = tmp_path / "hf"
    export_hf(small, random_model(small).state_dict(), None, folder, shard_bytes=30_000)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for weight_map, message in [
        (None, "no usable weight_map"),
        (index["weight_map"] | {"x": "../model.safetensors"}, "points outside the folder"),
        (index["weight_map"] | {"x": "model-00009-of-00009.safetensors"}, r"model-00009-of-00009\.safetensors is missing"),
        (index["weight_map"] | {"x": "model-00001-of-" + sorted(index["weight_map"].values())[0].split("-of-")[1]}, "x should be in"),
    ]:
        path.write_text(json.dumps(index | {"weight_map": weight_map}))
        with pytest.raises(UserError, match=message):
            import_hf(folder)


def test_git_lfs_pointers_are_named(exported):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for name in ("model.safetensors", "config.json"):
        whole = (exported / name).read_bytes()
        (exported / name).write_text(pointer)
        with pytest.raises(UserError, match=rf"{name}: a Git LFS pointer, not the file itself \(`git lfs pull`") as error:
            import_hf(exported)
        assert "\n" not in str(error.value)
        (exported / name).write_bytes(whole)


def test_a_named_pipe_is_no_file_of_weights(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: is not a file"):
        read_folder(tmp_path)
