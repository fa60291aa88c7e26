"""Tensors that come one by one are those of a whole model, to the bit."""

from dataclasses import replace

import pytest
import torch
from tests.model.shapes import TINY

from sparing.base.config import AdapterConfig, Config, PrecisionConfig, TrainConfig
from sparing.base.run import fill
from sparing.model.init import give_memory, init_weights, initial, unfilled
from sparing.model.low_rank import adapted, add_low_rank, fill_frozen, hold_of, unfilled_adapted
from sparing.model.transformer import Transformer
from sparing.train.optim import keep_as


def whole(config) -> Transformer:
    model = Transformer(config)
    init_weights(model, 3)
    return model


def same(state: dict, tensors: dict) -> bool:
    return state.keys() == tensors.keys() and all(torch.equal(tensor, tensors[name]) for name, tensor in state.items())


def types(model) -> dict:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("init", ["scaled", "deepseek"])
@pytest.mark.parametrize("tied", [False, True])
def test_initial_weights(init, tied):
    config = replace(TINY, mtp_depth=1, init=init, tie_word_embeddings=tied)
    model, tensors = whole(config), dict(initial(config, 3))
    assert same(model.state_dict(), tensors) and not same(model.state_dict(), dict(initial(config, 4)))
    other = unfilled(config)
    assert types(other) == types(model) and all(tensor.is_meta for tensor in (*other.parameters(), *other.buffers()))
    give_memory(other, torch.device("cpu"))
    other.load_state_dict(tensors)
    tokens = torch.arange(8)[None]
    assert torch.equal(other(tokens), model(tokens))


@pytest.mark.parametrize("base", ["float32", "bfloat16", "int8", "int4"])
def test_a_frozen_base_with_low_rank_updates(base):
    config, adapter = replace(TINY, attention="gqa", num_kv_heads=1, head_dim=16, attention_bias=True), AdapterConfig(rank=4, base=base)
    floats, model = whole(config).state_dict(), Transformer(config)
    fill_frozen(model, floats.items(), hold_of(adapter), "here")
    add_low_rank(model, adapter, 7)
    assert same(model.state_dict(), dict(adapted(config, adapter, 7, floats.items())))
    other = unfilled_adapted(config, adapter)
    assert types(other) == types(model)
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in model.parameters()]


def test_weights_in_bfloat16_are_rounded_from_the_same_numbers():
    config = Config(model=TINY, train=TrainConfig(seq_len=8, batch_size=1), precision=PrecisionConfig(weights="bfloat16"))
    model, other = whole(TINY), unfilled(TINY)
    for one in (model, other):
        keep_as(one, config)
    assert types(other) == types(model)
    give_memory(other, torch.device("cpu"))
    fill(other.state_dict(), initial(TINY, 3), "here")
    assert same(model.state_dict(), other.state_dict())
