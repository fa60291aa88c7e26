import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparing.base.config import Config, ModelConfig
from sparing.base.config_file import write_config
from sparing.base.run import RunFolder, write_tensors
from sparing.data.tokenizer import Tokenizer, train_tokenizer
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer

SMALL = ModelConfig(
    hidden_size=64, num_layers=3, num_dense_layers=1, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16, q_lora_rank=32,
    kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, n_routed_experts=8, num_experts_per_tok=3,
    moe_intermediate_size=32, n_shared_experts=1, max_position_embeddings=256, mtp_depth=1,
)  # fmt: skip
TEXT = Path(json.__file__).read_text()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT], 400)


@pytest.fixture(scope="session")
def make_run(tokenizer, tmp_path_factory):
    """A function (changes of SMALL, seed) -> path of a run folder whose random weights tell tokens well apart."""
    made: dict = {}

    def make(seed: int = 0, **changes) -> Path:
        key = (seed, *sorted(changes.items()))
        if key not in made:
            path = tmp_path_factory.mktemp("run")
            c = replace(SMALL, vocab_size=tokenizer.vocab_size, **changes)
            run = RunFolder.create(path)
            model = Transformer(c)
            init_weights(model, seed)
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():  # far from the identity, experts unevenly liked
                for name, parameter in model.named_parameters():
                    if parameter.dim() >= 2 and "embed" not in name:
                        parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5, generator=generator)
                for name, parameter in model.named_parameters():
                    if name.endswith(".bias"):
                        parameter.normal_(0, 0.5, generator=generator)
                    elif name.endswith(("q_norm.weight", "k_norm.weight")):
                        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
                for name, buffer in model.named_buffers():
                    if name.endswith("e_score_correction_bias"):
                        buffer.normal_(0, 0.1, generator=generator)
            write_tensors(run.weights_file, model.state_dict())
            run.config_file.write_text(write_config(replace(Config(), model=c)))
            tokenizer.save(run.tokenizer_file)
            made[key] = path
        return made[key]

    return make
