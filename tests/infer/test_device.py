"""Plain PyTorch on any device: what a machine without a GPU can hold it to, and the comparison for one that has one."""

import pytest
import torch
from tests.infer.test_engine import PLAIN, prompts, tokens
from tests.infer.test_network import TABLE, in_pieces, some_ids
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from sparing.base.config import UserError
from sparing.infer.engine import Engine
from sparing.infer.generate import load
from sparing.infer.network import Rows, TorchNetwork, choose_backend
from sparing.infer.request import Sampling
from sparing.kernels.decode import library

SHAPES = [{}, {"attention": "gqa"}, {"n_group": 4, "topk_group": 2, "q_lora_rank": None}]


class Strict(TorchFunctionMode):
    """Tensors that go to the GPU say so, and nothing is read as numbers before it has come back."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert function not in _device_constructors() or kwargs.get("device") is not None, f"{function.__name__} without a device"
        found = function(*args, **kwargs)
        if function is torch.Tensor.cpu:
            found.is_back = True
        assert function is not torch.Tensor.numpy or getattr(args[0], "is_back", False), "numpy() of a tensor on its device"
        return found


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_made_without_a_device(make_run, monkeypatch, changes, dtype):
    monkeypatch.setattr("sparing.kernels.native.usable", lambda x: False)  # as on a GPU
    network = TorchNetwork(load(make_run(**changes), dtype=dtype).network, 16)
    ids = some_ids(network.c.vocab_size, 70)
    with Strict():
        logits = in_pieces(network, ids, [60, 1, 9])
        rows = Rows()
        rows.add(TABLE, ids[1:], 0, 3)
        drafts = network.draft(rows, network.hidden[-1:].repeat(69, 0))
    assert logits.shape == (70, network.c.vocab_size) and drafts.shape == (3, network.c.vocab_size)
    with Strict(), pytest.raises(AssertionError, match="without a device"):
        torch.arange(3)
    with Strict(), pytest.raises(AssertionError, match="numpy"):
        torch.ones(3, device="cpu").numpy()


@pytest.mark.parametrize("changes", SHAPES)
def test_bfloat16_weights_are_kept_and_near_float32(make_run, changes):
    run = make_run(mtp_depth=0, num_dense_layers=3, **{k: v for k, v in changes.items() if "group" not in k})  # routing flips at roundings
    exact, half = (load(run, dtype=dtype).network for dtype in (torch.float32, torch.bfloat16))
    assert half.model.embed_tokens.weight.dtype == half.head_weight.dtype == torch.bfloat16
    assert half.model.norm.weight.dtype == torch.float32
    assert all(
        p.dtype == torch.float32 for name, p in load(make_run(), dtype=torch.bfloat16).network.named_parameters() if ".gate." in name
    )
    ids = some_ids(exact.config.vocab_size)
    p, q = (torch.from_numpy(in_pieces(TorchNetwork(network, 16), ids, [100, 1, 49])).log_softmax(-1) for network in (exact, half))
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 0.02


def test_what_cannot_run_here_is_told(make_run):
    with pytest.raises(UserError, match="device tpu: choose from auto, cpu, cuda"):
        Engine(make_run(), device="tpu")
    with pytest.raises(UserError, match="a limit for experts needs the compiled step"):
        Engine(make_run(**PLAIN), device="cpu", expert_bytes=1 << 20)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="PyTorch finds no GPU here"):
            Engine(make_run(), device="cuda")


@pytest.mark.skipif(library() is None, reason="int8 needs a C compiler")
def test_a_gpu_is_taken_where_there_is_one(make_run, monkeypatch):
    c = load(make_run()).config.model
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert choose_backend(c, "auto", "auto") == ("cuda", "bfloat16", "on a GPU")
    assert choose_backend(c, "auto", "float32").device == "cuda"
    assert choose_backend(c, "auto", "int8").device == choose_backend(c, "cpu", "float32").device == "cpu"
    with pytest.raises(UserError, match="float32 and bfloat16 here"):
        choose_backend(c, "cuda", "int4")


@pytest.mark.gpu
@pytest.mark.parametrize("changes", SHAPES)
def test_a_gpu_computes_what_the_processor_does(make_run, tokenizer, changes):
    run = make_run(**changes)
    ids = some_ids(load(run).config.model.vocab_size)
    here, there = (in_pieces(TorchNetwork(load(run, device).network, 16), ids, [100, 1, 49]) for device in ("cpu", "cuda"))
    assert abs(here - there).max() < 1e-3
    texts, s = [], Sampling(max_tokens=40, temperature=0, ignore_eos=True)
    for device, speculate in (("cpu", False), ("cuda", False), ("cuda", True)):
        with Engine(run, weights="float32", device=device, speculate=speculate) as engine:
            texts.append([tokens(request) for request in [engine.submit(p, s) for p in prompts(tokenizer)]])
    assert texts[0] == texts[1] == texts[2]
    with Engine(run) as engine:
        assert (engine.device, engine.weights) == ("cuda", "bfloat16")
        assert len(tokens(engine.submit(prompts(tokenizer)[0], s))) == 40
