"""The memory model against what autograd really keeps, and against the module's own tensors."""

from dataclasses import replace

import pytest
import torch
from tests.losses import loss_of
from tests.model.shapes import SHAPES
from torch.utils._python_dispatch import TorchDispatchMode

import sparing.model.transformer as block_module
import sparing.precision.activations as activations_module
from sparing.base.config import AdapterConfig, Config, ModelConfig, OptimConfig, PrecisionConfig, TrainConfig, UserError
from sparing.base.layers import layers
from sparing.budget.flops import factor_weights
from sparing.budget.memory import (
    activations,
    held_bytes,
    optimizer_bytes,
    path_of,
    saved_per_token,
    serving_memory,
    training_memory,
    weight_bytes,
)
from sparing.kernels import native, products
from sparing.kernels.sizes import EXPERT_ROWS, HEAD_TOKENS, MOMENT_BLOCK
from sparing.kernels.vocabulary import linear_cross_entropy
from sparing.model.init import init_weights
from sparing.model.low_rank import add_low_rank, fill_frozen, learned
from sparing.model.rope import rotary_table
from sparing.model.transformer import Block, Transformer
from sparing.planning.plan import plan
from sparing.precision.moments import Average
from sparing.resolve import LADDER, shaped
from sparing.train.optim import Optimizer, keep_as

pytestmark = pytest.mark.usefixtures("one_thread")


def path_here(config: Config):
    """Which kernels run in this process."""
    tensor = torch.zeros(2, 2, dtype=getattr(torch, config.train.dtype))
    return path_of(replace(config, train=replace(config.train, threads=1)), native.usable(tensor), products.usable(tensor))


class Kept:
    """Counts the bytes of all tensors that a module's forward pass keeps, shared storage counted once, parameters not."""

    def __init__(self, module: torch.nn.Module):
        self.parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.found = {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.found[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other tensor takes its place
        return tensor

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.found.values())

    def counting(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)


def kept_bytes(config: Config, rows: int, monkeypatch=None) -> int:
    """Of a training forward pass."""
    c, t = config.model, config.train
    model = Transformer(c)
    init_weights(model, 0)
    model.compute_dtype = getattr(torch, t.dtype)
    model.train()
    kept = Kept(model)
    tokens = torch.randint(0, c.vocab_size, (rows, t.seq_len))
    targets = torch.randint(0, c.vocab_size, (rows, t.seq_len, 1 + c.mtp_depth))
    documents = (torch.arange(t.seq_len) >= t.seq_len // 2).long().expand(rows, -1)

    def pack_int8(tensor):
        packed = activations_module.pack(tensor)
        for part in (packed,) if isinstance(packed, torch.Tensor) else packed:
            if part is not None:
                kept.pack(part)
        return tensor

    if config.precision.activations == "int8":  # in the place of the layers' own hook
        model.set_int8_activations(True)
        recording = torch.autograd.graph.saved_tensors_hooks(pack_int8, lambda tensor: tensor)
        monkeypatch.setattr(block_module, "kept_in_int8", lambda: recording)
    with kept.counting():
        loss_of(model, tokens, targets, documents, sequence_balance=t.sequence_balance)
    return kept.bytes


@pytest.mark.parametrize(
    ("rung", "moe", "mtp", "seq_len", "dtype"),
    [(1, False, 0, 256, "bfloat16"), (2, True, 0, 256, "bfloat16"), (2, True, 1, 256, "bfloat16"), (2, True, 0, 256, "float32")],
)
def test_activations_are_what_autograd_keeps(rung, moe, mtp, seq_len, dtype):
    model = replace(shaped(LADDER[rung], 4096, seq_len, moe), mtp_depth=mtp)
    config = Config(model=model, train=TrainConfig(seq_len=seq_len, batch_size=4, dtype=dtype, device="cpu"))
    assert activations(config, 4, seq_len, path_here(config)) == pytest.approx(kept_bytes(config, 4), rel=0.08)
    with native.path("plain"):
        assert activations(config, 4, seq_len, "plain") == pytest.approx(kept_bytes(config, 4), rel=0.08)


NARROWEST = 64
ONE = ModelConfig(
    hidden_size=128, num_layers=2, num_dense_layers=1, intermediate_size=352, num_heads=2, num_kv_heads=1, head_dim=64, q_lora_rank=64,
    kv_lora_rank=64, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64, n_routed_experts=4, num_experts_per_tok=4,
    moe_intermediate_size=64, max_position_embeddings=320,
)  # fmt: skip
KINDS = {"mla": ONE, "queries not compressed": replace(ONE, q_lora_rank=None), "gqa": replace(ONE, attention="gqa")}
KINDS["biases and head norms"] = replace(KINDS["gqa"], num_heads=4, num_kv_heads=2, attention_bias=True, head_norm=True)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("mixture", [False, True], ids=["dense", "mixture"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("path", "dtype"),
    [
        ("plain", "float32"),
        ("plain", "bfloat16"),
        ("passes", "float32"),
        ("passes", "bfloat16"),
        ("products", "float32"),
        ("products", "bfloat16"),
    ],
)
def test_a_layer_keeps_what_is_counted(path, dtype, kind, mixture):
    """The plan may be off by half of the narrowest activation (64 numbers of a token): a kernel that keeps one more, or one less, fails.

    That leaves room for what the plan does not count: statistics, a number of a token for each norm, head or expert.
    """
    kernels = {"plain": "plain", "passes": "compiled", "products": "vectors"}[path]
    if not native.can(kernels, getattr(torch, dtype)):
        pytest.skip("this machine cannot run these kernels")
    c, T = KINDS[kind], 320
    layer = layers(c)[int(mixture)]
    assert layer.mixture == mixture and not T % EXPERT_ROWS and layer.feed_forward.chosen == layer.feed_forward.experts  # no filler rows
    block = Block(c, layer).train()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)

    def kept(rows: int) -> int:
        x = torch.randn(rows, T, c.hidden_size, dtype=getattr(torch, dtype)).requires_grad_()
        counted = Kept(block)
        with native.path(kernels), counted.counting():
            block(x + x, rotary_table(c, T), want_balance=True)
        return counted.bytes

    per_token = (kept(4) - kept(2)) / (2 * T)  # without copies of weights, which do not grow with the rows
    size = 2 if dtype == "bfloat16" else 4
    planned = saved_per_token(layer, T, size, path)
    assert abs(planned - per_token) < size * NARROWEST / 2


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("path", ["plain", "passes"])
def test_experts_rows_are_filled_up_as_counted(path):
    if path == "passes" and native.passes() is None:
        pytest.skip("there is no C compiler")
    block = Block(ONE, layers(ONE)[1]).train()
    counted = Kept(block)
    with native.path("plain" if path == "plain" else "compiled"), counted.counting():
        block(torch.randn(1, 2, ONE.hidden_size, requires_grad=True), rotary_table(ONE, 2))
    rows = max(len(tensor) for _, tensor in counted.found.values() if tensor.ndim == 2)
    assert rows == ONE.n_routed_experts * EXPERT_ROWS  # each expert has two tokens


def test_the_head_keeps_a_piece_of_the_logits_at_once():
    rows = []

    class Widths(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[1] == 100:
                rows.append(len(out))
            return out

    x, weight = torch.randn(HEAD_TOKENS * 2 + 50, 8, requires_grad=True), torch.randn(100, 8, requires_grad=True)
    with native.path("plain"), Widths():
        linear_cross_entropy(x, weight, torch.zeros(len(x), dtype=torch.int64), 1.0)
    assert max(rows) == HEAD_TOKENS


@pytest.mark.parametrize("path", ["compiled", "plain"])
def test_grouped_query_attention_too(path):
    model = replace(shaped(LADDER[2], 4096, 256, False), attention="gqa", num_kv_heads=1, attention_bias=True, head_norm=True)
    config = Config(model=model, train=TrainConfig(seq_len=256, batch_size=4, device="cpu"))
    with native.path(path):
        planned = activations(config, 4, 256, path_here(config))
        assert planned == pytest.approx(kept_bytes(config, 4), rel=0.08)


@pytest.mark.parametrize(("rung", "moe"), [(1, False), (2, True)])
def test_activations_in_int8_too(rung, moe, monkeypatch):
    model = shaped(LADDER[rung], 4096, 256, moe)
    config = Config(model=model, train=TrainConfig(seq_len=256, batch_size=4, device="cpu"), precision=PrecisionConfig(activations="int8"))
    path, full = path_here(config), replace(config, precision=PrecisionConfig())
    assert activations(config, 4, 256, path) == pytest.approx(kept_bytes(config, 4, monkeypatch), rel=0.1)
    assert activations(config, 4, 256, path) < 0.62 * activations(full, 4, 256, path)


STORAGE = {
    "full": PrecisionConfig(),
    "remainders": PrecisionConfig(weights="bfloat16", compensation="kahan"),
    "small": PrecisionConfig(weights="bfloat16", moments="int8"),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("matrix", ["muon", "adamw"])
@pytest.mark.parametrize("storage", STORAGE)
def test_weights_gradients_and_moments(name, matrix, storage):
    config, precision = replace(SHAPES[name], mtp_depth=1), STORAGE[storage]
    model = Transformer(config)
    init_weights(model, 0)
    keep_as(model, Config(precision=precision))
    optimizer = Optimizer(model, OptimConfig(matrix=matrix), precision=precision)
    assert weight_bytes(config, precision) == sum(p.numel() * p.element_size() for p in model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.0, 0.9)
    state = sum(t.numel() * t.element_size() for key, t in optimizer.state().items() if "/step/" not in key and "/updates/" not in key)
    # Scales are counted as if every row were as long as the hidden size, which those of the smallest models are not.
    assert optimizer_bytes(config, matrix, precision) == pytest.approx(state, rel=0.1 if storage == "small" else 1e-9)


def test_moments_share_scales_as_counted():
    assert Average("mean/weight", torch.zeros(2, 3 * MOMENT_BLOCK), signed=True, eight_bit=True).scale.shape == (2, 3)


@pytest.mark.parametrize(
    ("dense", "vocab", "replicas", "peaks"),
    [(False, 4096, 2, (812e6, 908e6)), (True, 4096, 1, (588e6, 632e6)), (True, 2048, 2, (608e6, 617e6))],
)
def test_runs_without_a_compiler_took_about_as_much(dense, vocab, replicas, peaks):
    """Peaks of runs of 70 s to 5 minutes in bfloat16, two threads (LAB.md)."""
    model = shaped(LADDER[2], vocab, 512, not dense)
    train = TrainConfig(seq_len=512, batch_size=8, micro_batch_size=8, replicas=replicas, threads=2, device="cpu", kernels="plain")
    planned = training_memory(Config(model=model, train=train), measured=True).total
    assert 0.88 * max(peaks) < planned < 1.12 * min(peaks)


SMOLLM2 = ModelConfig(
    vocab_size=49152, hidden_size=576, num_layers=30, num_dense_layers=30, intermediate_size=1536, attention="gqa", num_heads=9,
    num_kv_heads=3, head_dim=64, tie_word_embeddings=True, mtp_depth=0, max_position_embeddings=2048,
)  # fmt: skip


@pytest.mark.parametrize(
    ("precision", "recompute", "peak"),
    [("full", False, 3195), ("full", True, 2969), ("small", False, 1879), ("small", True, 1607)],
)
def test_gradients_lie_beside_the_next_micro_batch(precision, recompute, peak):
    """Peaks in MiB of full fine-tuning, four micro-batches a step (docs/adapting.md): what the first one left is there while others run."""
    train = TrainConfig(
        seq_len=512, batch_size=8, micro_batch_size=2, replicas=2, threads=2, device="cpu", kernels="tiles", recompute=recompute
    )
    config = Config(model=SMOLLM2, train=train, precision=STORAGE[precision], optim=OptimConfig(matrix="adamw"))
    planned = training_memory(config, measured=True)
    assert planned.reused == 0 and planned.total / 2**20 == pytest.approx(peak, rel=0.08)
    assert training_memory(replace(config, train=replace(train, micro_batch_size=8)), measured=True).reused > 0


def test_few_bits_need_half():
    """100 million parameters and 2,048 tokens at a time, without what the process needs anyway; with it, a little more."""
    model = shaped(LADDER[4], 8192, 512, False)
    model = replace(model, hidden_size=768, num_layers=14, num_dense_layers=14, intermediate_size=2304, num_heads=12)
    full = Config(model=model, train=TrainConfig(seq_len=512, batch_size=4, threads=1, replicas=1, device="cpu", document_mask=False))
    small = replace(full, precision=PrecisionConfig(weights="bfloat16", moments="int8", activations="int8"))
    parts = [training_memory(config) for config in (small, full)]
    ours, theirs = (m.weights + m.gradients + m.optimizer + m.activations for m in parts)
    assert ours < 0.48 * theirs and parts[0].total < 0.58 * parts[1].total
    assert all(getattr(parts[0], name) < getattr(parts[1], name) for name in ("weights", "gradients", "optimizer", "activations"))


def test_what_makes_it_larger_and_smaller():
    base = Config(model=shaped(LADDER[3], 4096, 512, True), train=TrainConfig(seq_len=512, batch_size=8, device="cpu"))
    total = training_memory(base).total

    def with_train(**changes):
        return training_memory(replace(base, train=replace(base.train, **changes)))

    assert with_train(micro_batch_size=2).total < total
    assert with_train(recompute=True).activations < 0.6 * training_memory(base).activations
    assert with_train(replicas=2).gradients == training_memory(base).gradients  # the twins' are added up at once
    assert with_train(threads=1).activations < 0.8 * with_train(threads=2).activations  # the compiled kernels keep less
    assert with_train(dtype="float32").total > total
    parts = training_memory(base)
    assert parts.total == parts.weights + parts.gradients + parts.optimizer + parts.activations + parts.process - parts.reused


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("base", ["float32", "bfloat16", "int8", "int4"])
def test_an_adapter_and_what_it_is_beside(name, base):
    config, adapter = replace(SHAPES[name], mtp_depth=1), AdapterConfig(4, 8.0, base)
    model, whole = Transformer(config), Transformer(config)
    init_weights(whole, 0)
    fill_frozen(model, whole.state_dict().items(), None if base == "float32" else base, "here")
    held = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert held_bytes(config, adapter, "float32") == held
    add_low_rank(model, adapter, 0)
    factors = sum(t.numel() for t in learned(model).values())
    assert factor_weights(config, 4)[0] == factors
    t = TrainConfig(seq_len=512, batch_size=8, threads=1, replicas=1, device="cpu")
    full = Config(model=config, train=t, optim=OptimConfig(matrix="adamw"))
    parts, before = training_memory(replace(full, adapter=adapter)), training_memory(full)
    assert (parts.weights, parts.gradients, parts.optimizer) == (held + 4 * factors, 4 * factors, 8 * factors)
    assert parts.total < before.total


def test_the_plan_says_what_fits_beside_an_adapter():
    """A mixture of 16 B parameters on a card of 24 GB."""
    train = {"micro_batch_size": 1, "seq_len": 1024, "batch_size": 16, "recompute": True}
    fits = plan("v2-lite", budget="2h", machine="4090", wishes={"adapter": {"base": "int8"}, "train": train})
    assert 16e9 < fits["memory_bytes"]["weights"]["value"] and fits["memory_bytes"]["total"]["value"] < 0.95 * 24e9
    assert fits["bpb"]["value"] is None
    longer = train | {"micro_batch_size": 4, "seq_len": 2048}
    with pytest.raises(UserError, match=r"what fits: --adapter\.base int4"):
        plan("v2-lite", budget="2h", machine="4090", wishes={"adapter": {"base": "int8"}, "train": longer})
    fits = plan("v2-lite", budget="2h", machine="4090", wishes={"adapter": {"base": "int4"}, "train": longer})
    assert 8.8e9 < fits["memory_bytes"]["weights"]["value"] < 10.5e9
    assert fits["memory_bytes"]["total"]["value"] < 0.8 * 24e9
    with pytest.raises(UserError, match=r"what fits: --adapter\.base int8"):
        plan("v2-lite", budget="2h", machine="4090", wishes={"adapter": {"base": "bfloat16"}, "train": train})


def test_serving_counts_weights_and_cache():
    v3_cache = ModelConfig(num_layers=61, kv_lora_rank=512, qk_rope_head_dim=64)
    more = serving_memory(v3_cache, 1000) - serving_memory(v3_cache, 0)
    assert more == 1000 * 70_272
