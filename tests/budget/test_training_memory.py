"""The memory model against what autograd really keeps, and against the module's own tensors."""

from dataclasses import replace

import pytest
import torch
from tests.model.shapes import SHAPES

from sparing.budget.memory import activations, optimizer_bytes, path_of, serving_memory, training_memory
from sparing.config import Config, ModelConfig, OptimConfig, TrainConfig
from sparing.kernels import native, products
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer
from sparing.resolve import LADDER, shaped
from sparing.train.optim import Optimizer


def path_here(config: Config):
    """Which kernels run in this process."""
    tensor = torch.zeros(2, 2, dtype=getattr(torch, config.train.dtype))
    return path_of(replace(config, train=replace(config.train, threads=1)), native.usable(tensor), products.usable(tensor))


def kept_bytes(config: Config, rows: int) -> int:
    """Bytes of all tensors that a training forward pass keeps, shared storage counted once, parameters not."""
    c, t = config.model, config.train
    model = Transformer(c)
    init_weights(model, 0)
    model.compute_dtype = getattr(torch, t.dtype)
    model.train()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    tokens = torch.randint(0, c.vocab_size, (rows, t.seq_len))
    targets = torch.randint(0, c.vocab_size, (rows, t.seq_len, 1 + c.mtp_depth))
    documents = (torch.arange(t.seq_len) >= t.seq_len // 2).long().expand(rows, -1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.loss(tokens, targets, documents, sequence_balance=t.sequence_balance)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize(
    ("rung", "moe", "mtp", "seq_len", "dtype"),
    [(1, False, 0, 256, "bfloat16"), (2, True, 0, 256, "bfloat16"), (2, True, 1, 256, "bfloat16"), (2, True, 0, 256, "float32")],
)
def test_activations_are_what_autograd_keeps(rung, moe, mtp, seq_len, dtype):
    model = replace(shaped(LADDER[rung], 4096, seq_len, moe), mtp_depth=mtp)
    config = Config(model=model, train=TrainConfig(seq_len=seq_len, batch_size=4, dtype=dtype, device="cpu"))
    assert activations(config, 4, seq_len, path_here(config)) == pytest.approx(kept_bytes(config, 4), rel=0.08)
    with native.plain():
        assert activations(config, 4, seq_len, "plain") == pytest.approx(kept_bytes(config, 4), rel=0.08)


def test_grouped_query_attention_too():
    model = replace(shaped(LADDER[2], 4096, 256, False), attention="gqa", num_kv_heads=1)
    config = Config(model=model, train=TrainConfig(seq_len=256, batch_size=4, device="cpu"))
    assert activations(config, 4, 256, path_here(config)) == pytest.approx(kept_bytes(config, 4), rel=0.08)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("matrix", ["muon", "adamw"])
def test_moments(name, matrix):
    config = replace(SHAPES[name], mtp_depth=1)
    model = Transformer(config)
    init_weights(model, 0)
    optimizer = Optimizer(model, OptimConfig(matrix=matrix))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.0, 0.9)
    state = sum(t.numel() * t.element_size() for key, t in optimizer.state().items() if "/step/" not in key)
    assert optimizer_bytes(config, matrix) == state


def test_what_makes_it_larger_and_smaller():
    base = Config(model=shaped(LADDER[3], 4096, 512, True), train=TrainConfig(seq_len=512, batch_size=8, device="cpu"))
    total = training_memory(base).total

    def with_train(**changes):
        return training_memory(replace(base, train=replace(base.train, **changes)))

    assert with_train(micro_batch_size=2).total < total
    assert with_train(recompute=True).activations < 0.6 * training_memory(base).activations
    assert with_train(replicas=2).gradients == 2 * training_memory(base).gradients
    assert with_train(threads=1).activations < 0.8 * with_train(threads=2).activations  # the compiled kernels keep less
    assert with_train(dtype="float32").total > total
    parts = training_memory(base)
    assert parts.total == parts.weights + parts.gradients + parts.optimizer + parts.activations + parts.process


def test_serving_counts_weights_and_cache():
    v3_cache = ModelConfig(num_layers=61, kv_lora_rank=512, qk_rope_head_dim=64)
    more = serving_memory(v3_cache, 1000) - serving_memory(v3_cache, 0)
    assert more == 1000 * 70_272
