"""Small models at which every part matters, and what transformers makes of an exported folder."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparing.base.config import ModelConfig, YarnConfig
from sparing.interop.huggingface import export_hf, import_hf
from sparing.model.transformer import Transformer

SMALL = ModelConfig(
    vocab_size=128,
    hidden_size=32,
    num_layers=3,
    num_dense_layers=1,
    intermediate_size=48,
    num_heads=2,
    num_kv_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=12,
    head_dim=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    n_group=2,
    topk_group=1,
    yarn=YarnConfig(factor=4.0, original_max_position_embeddings=32, mscale=0.8, mscale_all_dim=0.6),
    max_position_embeddings=128,
)


@pytest.fixture
def small() -> ModelConfig:
    return SMALL


def randomised(config: ModelConfig, seed: int = 0) -> Transformer:
    """A Transformer whose weights are none of them at their defaults."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(0.5 * noise)
            elif tensor.dim() == 1:
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_(noise if "embed_tokens" in name else noise * tensor.shape[-1] ** -0.5)
    return model


@pytest.fixture(scope="session")
def random_model():
    """`randomised`."""
    return randomised


@pytest.fixture
def tokens() -> torch.Tensor:
    """(2, 40) token ids; longer than the original context."""
    return torch.randint(128, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def hf_logits(tokens):
    """folder -> logits of the model that transformers' AutoModelForCausalLM finds there, all of whose weights came from the folder."""
    transformers = pytest.importorskip("transformers")

    def logits(folder, dtype=torch.float32) -> torch.Tensor:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
        empty = {name for name, parameter in model.named_parameters() if not parameter.numel()}  # no shared experts: matrices of no rows
        assert set(info["missing_keys"]) <= empty
        assert not info["mismatched_keys"]
        with torch.no_grad():
            return model(tokens).logits.float()

    return logits


@pytest.fixture
def our_logits(tokens):
    """folder -> (our logits, notes)."""

    def logits(folder) -> tuple[torch.Tensor, list[str]]:
        config, tensors, notes = import_hf(folder)
        streamed = Transformer(config)
        streamed.load_state_dict(dict(tensors))
        with torch.no_grad():
            return streamed(tokens), notes

    return logits


@pytest.fixture
def exported(small, random_model, tmp_path):
    """A folder with one MTP module, as published."""
    config = replace(small, mtp_depth=1)
    export_hf(config, random_model(config).state_dict(), None, tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def edit(exported):
    """Rewrite the tensors of `exported`: the given function gets the dictionary name -> tensor."""

    def rewrite(change) -> None:
        # Copies, because loaded tensors may be views of the file that is about to be replaced.
        tensors = {name: tensor.clone() for name, tensor in load_file(exported / "model.safetensors").items()}
        change(tensors)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, exported / "model.safetensors", metadata={"format": "pt"}
        )

    return rewrite


@pytest.fixture
def edit_config(exported):
    """Change keys of `exported`'s config.json; the value `...` removes one."""

    def rewrite(**changes) -> None:
        raw = json.loads((exported / "config.json").read_text()) | changes
        (exported / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))

    return rewrite
