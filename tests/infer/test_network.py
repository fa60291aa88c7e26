"""The compiled step against the model that is trained, against plain PyTorch, and against itself in other company."""

import gc
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from sparing.account.power import resident_memory
from sparing.base.config import Llama3RopeConfig, ModelConfig, UserError
from sparing.base.hardware import cpu_flags
from sparing.base.held import GROUP, PANEL
from sparing.base.layers import layers
from sparing.base.run import RunFolder, read_tensors, write_tensors
from sparing.infer.generate import load
from sparing.infer.network import CompiledNetwork, Rows, TorchNetwork, cannot_compile
from sparing.infer.packed_weights import open_packed, pack_matrix
from sparing.interop.huggingface import export_hf
from sparing.kernels.decode import library

pytestmark = pytest.mark.skipif(library() is None, reason="there is no C compiler")
TABLE = [3, 1, 4, 5, 9]
SHAPES = [
    {},
    {"attention": "gqa"},
    {"attention": "gqa", "num_kv_heads": 1, "num_heads": 3},
    {"num_heads": 3, "kv_lora_rank": 48, "v_head_dim": 48},
    {"q_lora_rank": None, "num_dense_layers": 3},
    {"n_group": 4, "topk_group": 2, "scoring_func": "softmax", "norm_topk_prob": False},
    {"scoring_func": "sqrtsoftplus", "n_shared_experts": 0, "num_experts_per_tok": 2},
    {"yarn": None, "tie_word_embeddings": True, "rope_theta": 500.0},
    {"attention": "gqa", "num_heads": 9, "num_kv_heads": 3, "num_dense_layers": 3, "tie_word_embeddings": True},
    {"attention": "gqa", "num_dense_layers": 3, "attention_bias": True, "llama3": Llama3RopeConfig(original_max_position_embeddings=64)},
    {"attention": "gqa", "head_norm": True, "partial_rotary_factor": 0.5, "head_dim": 32},
    {"attention": "gqa", "head_norm": True, "n_shared_experts": 0, "scoring_func": "softmax", "selection_bias": False},
    {"scoring_func": "softmax", "selection_bias": False, "norm_topk_prob": False, "n_group": 4, "topk_group": 2},
]
IMPORTED = {
    "llama": {"attention": "gqa", "num_heads": 9, "num_kv_heads": 3, "num_dense_layers": 3, "tie_word_embeddings": True, "mtp_depth": 0},
    "qwen2": {"attention": "gqa", "num_heads": 6, "num_dense_layers": 3, "attention_bias": True, "mtp_depth": 0},
    "qwen3": {"attention": "gqa", "num_dense_layers": 3, "head_norm": True, "tie_word_embeddings": True, "mtp_depth": 0},
}
"""Dense: routing of a random mixture flips at every rounding."""


PROCESSORS = ["native", "x86-64-v3", "alderlake"]
"""alderlake: AVX2 and AVX-VNNI without AVX-512."""


def skip_other(processor: str) -> None:
    if library(processor) is None or not {"x86-64-v3": {"avx2"}, "alderlake": {"avx2", "avx_vnni"}}.get(processor, set()) <= cpu_flags():
        pytest.skip("not this processor")


def compiled(run, weights="float32", threads=2, **more):
    c = load(run).config.model
    return CompiledNetwork(c, open_packed(RunFolder.open(run), c, weights), weights, 16, threads, **more)


def in_pieces(network, ids, pieces, table=TABLE):
    """(T, V) logits of a text computed piece by piece."""
    out, at = [], 0
    for size in pieces:
        rows = Rows()
        rows.add(table, ids[at : at + size], at, size)
        out.append(network.forward(rows).copy())
        at += size
    return np.concatenate(out)


def some_ids(vocab_size, count=150, seed=0):
    return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("changes", SHAPES)
def test_float32_is_the_training_forward_and_latent_is_expanded(make_run, changes):
    run = make_run(**changes)
    model = load(run).network  # keys and values expanded from the latent
    ids = some_ids(model.config.vocab_size)
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0].numpy()
    assert np.abs(in_pieces(TorchNetwork(model, 16), ids, [150]) - expected).max() < 1e-4
    network = compiled(run)
    assert np.abs(in_pieces(network, ids, [150]) - expected).max() < 1e-4
    network.close()


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("changes", [{}, {"attention": "gqa", "num_heads": 6, "attention_bias": True, "head_norm": True}], ids=str)
def test_a_row_does_not_depend_on_its_company(make_run, weights, processor, changes):
    run = make_run(**changes)
    skip_other(processor)
    network = compiled(run, weights, threads=1, processor=processor)
    ids = some_ids(network.c.vocab_size)
    whole = in_pieces(network, ids, [150])
    assert (in_pieces(network, ids, [70, 1, 2, 3, 4, 5, 33, 1, 1, 30]) == whole).all()
    other = some_ids(network.c.vocab_size, 60, seed=1)
    alone = in_pieces(network, other, [60], table=[0, 2])
    rows = Rows()
    rows.add([6, 7, 8, 10, 11], ids[:140], 0, 1)
    rows.add([12, 13], other, 0, 60)
    rows.add(TABLE, ids[140:143], 140, 3)
    together = network.forward(rows)
    assert (together[1:61] == alone).all()
    assert (together[0] == whole[139]).all() and (together[61:] == whole[140:143]).all()
    network.close()
    more = compiled(run, weights, threads=3, processor=processor)
    assert (in_pieces(more, ids, [150]) == whole).all()
    more.close()


@pytest.mark.parametrize("processor", PROCESSORS[1:])
def test_integers_are_the_same_on_every_processor(make_run, processor):
    skip_other(processor)
    run, rows = make_run(), Rows()
    ids = some_ids(400)
    rows.add(TABLE, ids, 0, 150)
    for weights in ("int8", "int4"):
        a, b = compiled(run, weights), compiled(run, weights, processor=processor)
        one, two = a.forward(rows).copy(), b.forward(rows)
        # Only attention's and norms' floats may differ in their last bits, and flip a rounding.
        assert np.median(np.abs(one - two)) < 0.05 * np.median(np.abs(one))
        a.close(), b.close()


def unpack(data, format, N, K):
    """The (N, K) float32 matrix that `pack_matrix`'s bytes stand for."""
    panels = -(-N // PANEL)
    if format == "float32":
        return data.view(torch.float32).view(panels, K, PANEL).transpose(1, 2).flatten(0, 1)[:N]
    if format == "bfloat16":
        return data.view(torch.bfloat16).view(panels, K // 2, PANEL, 2).transpose(1, 2).flatten(0, 1).flatten(1)[:N].float()
    if format == "int8":
        q, scale = data[: panels * PANEL * K], data[panels * PANEL * K :].view(torch.float32)
        return ((q.view(panels, K // 4, PANEL, 4).transpose(1, 2).flatten(0, 1).flatten(1).float() - 128) * scale[:, None])[:N]
    blocks = data.view(panels, K // GROUP, -1)
    halves = blocks[..., : 8 * GROUP].reshape(panels, K // GROUP, 4, PANEL, 4)
    q = torch.stack((halves & 15, halves >> 4), 2).permute(0, 4, 1, 2, 3, 5).flatten(3).float() - 8
    scale = blocks[..., 8 * GROUP :].contiguous().view(torch.bfloat16).float().transpose(1, 2)
    return (q * scale[..., None]).flatten(2).flatten(0, 1)[:N]


def head(weights):
    """The float32 matrix that the packed head stands for."""
    part = weights.parts["head"]
    return unpack(weights.data[part.offset : part.offset + part.bytes], part.format, part.outputs, part.inner)


@pytest.mark.parametrize("shape", [(16, 32), (50, 64), (33, 96)])
@pytest.mark.parametrize(("weights", "error"), [("float32", 0), ("bfloat16", 0.004), ("int8", 0.004), ("int4", 0.09)])
def test_packing_and_unpacking(shape, weights, error):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    w[3] = 0
    back = unpack(pack_matrix(w, weights), weights, *shape)
    assert back.shape == w.shape and (back[3] == 0).all()
    assert float((back - w).abs().max()) <= error * float(w.abs().max())
    if weights == "int4":  # each group's largest number is exact up to bfloat16
        groups, near = w.unflatten(1, (-1, 32)), back.unflatten(1, (-1, 32))
        at = groups.abs().argmax(-1, keepdim=True)
        assert torch.allclose(near.gather(-1, at), groups.gather(-1, at), rtol=0.005)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_two_digits_leave_the_error_of_the_weights_alone(make_run, weights, processor):
    """The head's logits against those of the unpacked weights: without a second digit rounding the row is most of the error."""
    skip_other(processor)
    errors = []
    for digits in ((), ("head", "o", "down", "first", "gate_up")):
        network, rows = compiled(make_run(num_dense_layers=3, mtp_depth=0), weights, two_digits=digits, processor=processor), Rows()
        rows.add(TABLE, some_ids(network.c.vocab_size, 40), 0, 40)
        logits = network.forward(rows)
        expected = (torch.from_numpy(network.hidden) @ head(network.packed_weights).T).numpy()
        network.close()
        errors.append(np.abs(logits - expected).max() / np.abs(expected).max())
    assert errors[1] < 1e-4 < errors[0] < 1e-2


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
def test_quantised_products_are_those_of_the_unpacked_weights(make_run, weights):
    """Head and final norm, by the packed weights: what is left is the rounding of activations."""
    network = compiled(make_run(), weights)
    rows = Rows()
    rows.add(TABLE, some_ids(network.c.vocab_size, 40), 0, 40)
    logits = network.forward(rows)
    x = torch.from_numpy(network.hidden)
    if weights != "bfloat16":
        scale = x.abs().amax(1, keepdim=True) / 127
        x = (x / scale).round() * scale
    expected = (x @ head(network.packed_weights).T).numpy()
    network.close()
    assert np.abs(logits - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("changes", [{"num_dense_layers": 3, "mtp_depth": 0}, *IMPORTED.values()], ids=["latent", *IMPORTED])
@pytest.mark.parametrize(("weights", "most"), [("bfloat16", 0.01), ("int8", 0.03), ("int4", 0.5)])
def test_quantisation_costs_little(make_run, weights, most, changes):
    run = make_run(**changes)
    network, model = compiled(run, weights), load(run).network
    ids = some_ids(network.c.vocab_size)
    with torch.no_grad():
        p = model(torch.tensor([ids]))[0].log_softmax(-1)
    q = torch.from_numpy(in_pieces(network, ids, [150])).log_softmax(-1)
    network.close()
    assert float((p.exp() * (p - q)).sum(-1).mean()) < most


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="resident pages are read from /proc")
@pytest.mark.parametrize("threads", [1, 2])
def test_experts_stay_under_their_cap_and_change_nothing(make_run, threads):
    run = make_run(seed=2, hidden_size=256, n_routed_experts=128, moe_intermediate_size=256, num_experts_per_tok=4, mtp_depth=0)
    network = compiled(run, "int8", threads)
    ids = some_ids(network.c.vocab_size)
    whole = in_pieces(network, ids, [100, *[1] * 50])
    network.close()
    experts = sum(part.stride * part.count for name, part in network.packed_weights.parts.items() if name.endswith("expert_gate_up"))
    rest = network.packed_weights.bytes - experts
    del network
    gc.collect()  # unmaps the file
    with open(run / "packed" / "int8.bin", "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = resident_memory()
    network, most, out = compiled(run, "int8", threads, expert_bytes=experts // 4), 0, []
    for start, end in [(0, 100), *((i, i + 1) for i in range(100, 150))]:
        rows = Rows()
        rows.add(TABLE, ids[start:end], start, end - start)
        out.append(network.forward(rows).copy())
        most = max(most, resident_memory())
    assert (np.concatenate(out) == whole).all()
    counts = network.metrics()
    network.close()
    assert counts["expert_bytes"] <= experts // 4 and counts["expert_loads_total"] > 64
    assert most - before <= experts // 4 + rest + (8 << 20)  # scratch and what the allocator keeps


def test_float32_is_transformers(make_run, tmp_path):
    transformers = pytest.importorskip("transformers")
    run = RunFolder.open(make_run(mtp_depth=0))
    c = load(run.path).config.model
    export_hf(c, read_tensors(run.weights_file), None, tmp_path / "hf")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    ids = some_ids(c.vocab_size)
    with torch.no_grad():
        expected = peer(torch.tensor([ids])).logits[0].numpy()
    network = compiled(run.path)
    assert np.abs(in_pieces(network, ids, [100, 1, 1, 48]) - expected).max() < 1e-4
    network.close()


def test_the_cache_is_small():
    """Figure 5: latents of 16 heads (nope 128, rope 64, value 128, rank 256) against the keys and values of all heads."""
    c = ModelConfig(num_heads=16, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=256)
    assert layers(c)[0].attention.cache_width / (16 * (128 + 64 + 128)) <= 0.07
    assert layers(replace(c, attention="gqa", num_kv_heads=2, head_dim=64))[0].attention.cache_width == 256


def test_only_the_widths_that_a_model_has_must_be_multiples_of_16():
    c = ModelConfig(moe_intermediate_size=24, mtp_depth=1)
    assert "moe_intermediate_size is 24" in cannot_compile(c)
    assert cannot_compile(replace(c, num_dense_layers=c.num_layers)) is None


def test_a_packed_model_is_opened_at_once_and_made_anew_when_it_changed(make_run, tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run")
    shutil.copytree(make_run(), run.path)
    shutil.rmtree(run.path / "packed", ignore_errors=True)
    c = load(run.path).config.model
    first = open_packed(run, c, "int8")
    stamp = (run.path / "packed" / "int8.bin").stat().st_mtime_ns
    os.utime(run.weights_file)  # as copying the folder does
    assert open_packed(run, c, "int8").source == first.source
    assert (run.path / "packed" / "int8.bin").stat().st_mtime_ns == stamp
    tensors = dict(read_tensors(run.weights_file))
    write_tensors(run.weights_file, {name: tensor * 0.5 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()})
    again = open_packed(run, c, "int8")
    assert again.source != first.source
    assert torch.allclose(head(again), head(first) * 0.5)
    (run.path / "packed" / "int8.bin").write_bytes(b"\0" * 100)  # cut short
    assert open_packed(run, c, "int8").source == again.source
    write_tensors(run.weights_file, {**tensors, "model.norm.weight": torch.ones(8)})
    with pytest.raises(UserError, match=r"model\.norm\.weight does not belong to the model"):
        open_packed(run, c, "int8")
    run.weights_file.unlink()
    with pytest.raises(UserError, match="no usable weights"):
        open_packed(run, c, "float32")


def random_shares(c, seed, low=0.4):
    shares = np.ones(c.num_layers + c.mtp_depth, np.float32)
    shares[: c.num_layers] = np.random.default_rng(seed).uniform(low, 1.05, c.num_layers)
    return shares


def thin_rows(ids, shares, start=0, table=TABLE):
    rows = Rows()
    rows.add(table, ids, start, len(ids), shares)
    return rows


def kept_experts(weights_NK, share, min_experts):
    """Gate weights with 0 for skipped experts: a row keeps its heaviest experts until they carry this share of the row's weight, and at
    least `min_experts`. A share of 1 keeps all."""
    ranked, order = weights_NK.sort(dim=-1, descending=True, stable=True)
    carried = ranked.cumsum(-1) - ranked  # by the heavier ones
    kept = carried < share * ranked.sum(-1, keepdim=True)
    kept[:, :min_experts] = True
    kept |= share >= 1
    return weights_NK * torch.zeros_like(weights_NK).scatter_(-1, order, kept.float())


def plain_logits(network, rows, min_experts):
    """TorchNetwork's logits with the only sequence's shares applied to its routers."""
    hooks = []
    for layer, share in zip(network.model.model.layers, rows.shares[0]):
        if hasattr(layer.mlp, "gate"):
            thin = lambda _, x, out, share=share: out._replace(weights_NK=kept_experts(out.weights_NK, float(share), min_experts))  # noqa: E731
            hooks.append(layer.mlp.gate.register_forward_hook(thin))
    logits = network.forward(rows)
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize("floor", [1, 2])
@pytest.mark.parametrize(
    "changes", [{}, {"num_experts_per_tok": 6, "scoring_func": "softmax", "norm_topk_prob": False}, {"n_group": 4, "topk_group": 2}]
)
def test_fewer_experts_are_those_of_plain_pytorch(make_run, changes, floor):
    run = make_run(**changes)
    network, plain = compiled(run), TorchNetwork(load(run).network, 16)
    network.min_experts = floor
    ids, moe = some_ids(network.c.vocab_size), network.c.num_layers - 1
    whole = network.forward(thin_rows(ids, None)).copy()
    seen = set()
    for seed in range(3):
        rows = thin_rows(ids, random_shares(network.c, seed))
        got = network.forward(rows)
        assert np.abs(got - plain_logits(plain, rows, floor)).max() < 1e-4
        assert (np.abs(got - whole) > 1e-3).any(1).mean() > 0.3
        seen |= set(network.used.tolist())
        assert floor * moe <= network.used.min() and network.used.mean() < network.c.num_experts_per_tok * moe
    assert len(seen) > 1
    network.forward(thin_rows(ids, np.zeros_like(rows.shares[0])))
    assert (network.used == floor * moe).all()
    network.close()


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_a_share_of_1_is_exact_and_company_may_have_other_shares(make_run, weights):
    network = compiled(make_run(), weights)
    c = network.c
    ids, other = some_ids(c.vocab_size, 120), some_ids(c.vocab_size, 40, seed=1)
    exact, ones = network.forward(thin_rows(ids, None)).copy(), np.ones(c.num_layers + c.mtp_depth, np.float32)
    assert (network.forward(thin_rows(ids, ones)) == exact).all()
    assert (network.used == (c.num_layers - 1) * c.num_experts_per_tok).all()
    shares = random_shares(c, 5, 0.2)
    thin = network.forward(thin_rows(other, shares, table=[0, 2])).copy()
    alone = network.used
    rows = Rows()
    rows.add(TABLE, ids, 0, 120)
    rows.add([6, 7], other, 0, 40, shares)
    together = network.forward(rows)
    assert (together[:120] == exact).all() and (together[120:] == thin).all() and (network.used[120:] == alone).all()
    for start, end in ((0, 17), (17, 18), (18, 40)):
        assert (network.forward(thin_rows(other[start:end], shares, start, [0, 2])) == thin[start:end]).all()
    network.close()
    capped = compiled(make_run(), weights, expert_bytes=64 << 10)  # a few experts at a time
    assert (capped.forward(thin_rows(other, shares, table=[0, 2])) == thin).all()
    capped.close()
