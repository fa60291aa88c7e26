"""Frozen and quantised weights and low-rank updates in whole models: what is kept, what is computed, what learns."""

from dataclasses import replace

import pytest
import torch
from tests.losses import loss_of
from tests.model.shapes import TINY
from tests.model.test_frozen import filled, gradients

from sparing.base.config import AdapterConfig, OptimConfig, PrecisionConfig
from sparing.base.layers import is_matrix, layers, shapes
from sparing.base.run import AdaptedTensors, fill
from sparing.data.loader import Batch
from sparing.kernels import native
from sparing.kernels.products import Frozen
from sparing.kernels.vocabulary import IGNORE, linear_cross_entropy, linear_cross_entropy_reference, token_nll
from sparing.model.experts import Experts
from sparing.model.linear import Adaptable, Linear
from sparing.model.low_rank import add_low_rank, fill_frozen, learned
from sparing.model.transformer import Transformer
from sparing.precision.activations import kept_in_int8
from sparing.precision.eight_bit import install
from sparing.train.objective import NextToken
from sparing.train.optim import FACTORS, Optimizer, group_of
from sparing.train.replicas import Replicas

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {
    "mixture": replace(TINY, mtp_depth=1),
    "dense": replace(TINY, q_lora_rank=None, num_dense_layers=3),
    "gqa": replace(TINY, attention="gqa", num_heads=4, num_kv_heads=2, head_dim=16),
    "biases and head norms": replace(TINY, attention="gqa", num_kv_heads=1, head_dim=16, attention_bias=True, head_norm=True),
}


def adaptable(model) -> dict[str, Adaptable]:
    left_out = ("lm_head", "model.embed_tokens")
    return {name: module for name, module in model.named_modules() if isinstance(module, Adaptable) and name not in left_out}


def adapted(config, kind: str | None = "int8", rank: int = 4) -> Transformer:
    """A model in which only low-rank factors learn; both factors are filled, so that both have gradients."""
    model, generator = filled(config), torch.Generator().manual_seed(3)
    model.requires_grad_(False)
    for module in adaptable(model).values():
        module.freeze(kind)
        module.add_low_rank(rank, 8.0, generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.weight"):
                parameter.normal_(std=0.05, generator=generator)
    return model


def merged(model) -> Transformer:
    """An ordinary model of the adapted one's weights."""
    plain = Transformer(model.config).train()
    weights = {name: tensor for name, tensor in model.state_dict().items() if name in plain.state_dict()}
    for name, module in adaptable(model).items():
        operands = module.operands() if isinstance(module, Experts) else (module.operand,)
        weights |= {f"{name}.{part}": operand.whole().detach() for part, operand in zip(module.weights, operands, strict=True)}
    plain.load_state_dict(weights)
    plain.compute_dtype = model.compute_dtype
    return plain


def batch(c):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(c.vocab_size, (2, 30), generator=generator)
    return tokens, torch.randint(c.vocab_size, (2, 30, 1 + c.mtp_depth), generator=generator)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-9))


def test_an_ordinary_model_has_the_same_tensors_as_ever():
    names = set(filled(SHAPES["mixture"]).state_dict())
    assert not [name for name in names if "lora" in name or "scale" in name]
    frozen = filled(SHAPES["mixture"])
    for module in adaptable(frozen).values():
        module.freeze()
    assert set(frozen.state_dict()) == names


@pytest.mark.parametrize("kind", ["int4", "int8", "bfloat16"])
def test_what_a_frozen_weight_takes(kind):
    linear = Linear(256, 128)
    torch.nn.init.normal_(linear.weight)
    experts = Experts(layers(replace(TINY, hidden_size=256, moe_intermediate_size=128))[1].feed_forward)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    for module in (linear, experts):
        before = {name: weight.detach().clone() for name, weight in module.named_parameters()}
        module.freeze(kind)
        assert not list(module.parameters())
        kept = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
        share = {"int4": 0.15, "int8": 0.3, "bfloat16": 0.5}[kind]
        assert kept <= share * 4 * sum(weight.numel() for weight in before.values())
        operands = module.operands() if module is experts else (module.operand,)
        for operand, weight in zip(operands, before.values(), strict=True):
            assert distance(operand.whole(), weight) < (0.1 if kind == "int4" else 0.01)
            assert torch.equal(operand.values.abs().amax(-1), torch.full(weight.shape[:-1], 127)) or kind != "int8"
        with pytest.raises(ValueError, match="already"):
            module.freeze(kind)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["int4", "int8", "bfloat16", None])
@pytest.mark.parametrize("path", ["compiled", "plain"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_an_adapted_model_is_the_merged_one(shape, kind, path, dtype, tolerance):
    model = adapted(SHAPES[shape], kind)
    model.compute_dtype = dtype
    with native.path("plain" if path == "plain" else "compiled"):
        ours, theirs = loss_of(model, *batch(model.config)).total, loss_of(merged(model), *batch(model.config)).total
        assert ours.item() == pytest.approx(theirs.item(), rel=tolerance)
        model.eval()
        assert distance(model(batch(model.config)[0]), merged(model).eval()(batch(model.config)[0])) < 10 * tolerance


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["int4", "int8", "bfloat16", None])
def test_only_factors_have_gradients_and_they_are_autograds(shape, kind):
    """Against the merged model's weight gradient G: those of A and B are scale · Bᵀ G and scale · G Aᵀ. Experts in PEFT's layout."""
    model = adapted(SHAPES[shape], kind)
    reference = gradients(merged(model))
    for plain in (False, True):
        with native.path("plain" if plain else "compiled"):
            found = gradients(model)
        assert found.keys() == {name for name, _ in model.named_parameters() if "lora_" in name}
        for at, module in adaptable(model).items():
            for name in module.weights:
                stem = f"{at}." if name == "weight" else f"{at}.{name}_"
                a, b = (module.get_parameter(f"{stem.removeprefix(at + '.')}lora_{part}.weight") for part in "AB")
                whole = reference[f"{at}.{name}"]
                grad_a, grad_b = (found[f"{stem}lora_{part}.weight"] for part in "AB")
                if whole.ndim == 2:
                    assert a.shape == (4, whole.shape[1]) and b.shape == (whole.shape[0], 4)
                    expected = 2.0 * b.T @ whole, 2.0 * whole @ a.T
                else:
                    E, out, columns = whole.shape
                    assert a.shape == (E * 4, columns) and b.shape == (out, 4 * E)
                    a, b = a.view(E, 4, columns), b.view(out, 4, E)
                    expected = (
                        torch.einsum("ore,eoi->eri", b, whole).flatten(0, 1) * 2,
                        torch.einsum("eoi,eri->ore", whole, a).flatten(1) * 2,
                    )
                assert distance(grad_a, expected[0]) < 1e-4 and distance(grad_b, expected[1]) < 1e-4, (at, name)


@pytest.mark.parametrize("matrix", ["muon", "adamw"])
@pytest.mark.parametrize("precision", [PrecisionConfig(), PrecisionConfig(moments="int8")])
def test_factors_alone_have_state_and_learn(matrix, precision):
    model = adapted(SHAPES["mixture"])
    optimizer = Optimizer(model, OptimConfig(matrix=matrix, lr=0.02 if matrix == "muon" else 1e-3), precision=precision)
    assert {group_of(name, parameter) for name, parameter in optimizer.parameters.items()} == {"factor"} and optimizer.muon is None
    assert [group["peak"] for group in optimizer.adamw.param_groups] == [pytest.approx(1e-3)] and FACTORS * 0.02 == pytest.approx(1e-3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = []
    for _ in range(20):
        out = loss_of(model, *batch(model.config))
        out.total.backward()
        losses.append(float(out.total))
        assert all((p.grad is not None) == ("lora_" in name) for name, p in model.named_parameters())
        optimizer.step(1.0, 0.95)
    assert losses[-1] < losses[0] - 0.02
    assert {name.split("/", 2)[2] for name in optimizer.state()} - {"all"} == {name for name in before if "lora_" in name}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("lora_" not in name), name


def test_nothing_changes_at_first():
    model = filled(SHAPES["mixture"])
    before = loss_of(model, *batch(model.config)).total.detach()
    for module in adaptable(model).values():
        module.add_low_rank(4, 8.0, torch.Generator().manual_seed(0))
        with pytest.raises(ValueError, match="already"):
            module.add_low_rank(4, 8.0)
    assert torch.allclose(loss_of(model, *batch(model.config)).total, before, rtol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_replicas_share_codes_and_agree(kind):
    found = []
    for count in (1, 2):
        model = adapted(SHAPES["mixture"], kind)
        replicas = Replicas(model, NextToken(model.config), count, kernels="compiled")
        few = torch.int8, torch.uint8
        codes = [{buffer.data_ptr() for buffer in twin.buffers() if buffer.dtype in few} for twin in replicas.models]
        assert codes[0] and all(codes[0] == others for others in codes)
        tokens, targets = batch(model.config)
        replicas.gradients(Batch(tokens, targets, None, None))
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(grad, found[1][name], atol=2e-5, rtol=1e-3) for name, grad in found[0].items())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", ["compiled", "plain"])
def test_recomputation_has_the_same_gradients(shape, path):
    model = adapted(SHAPES[shape])
    with native.path("plain" if path == "plain" else "compiled"):
        before = gradients(model)
        model.set_recompute(True)
        after = gradients(model)
    assert all(torch.equal(after[name], gradient) for name, gradient in before.items())


@pytest.mark.parametrize("kind", ["bfloat16", None])
@pytest.mark.parametrize("path", ["compiled", "plain"])
def test_packing_activations_leaves_frozen_weights_alone(kind, path):
    """A hook sees what a layer saves; a frozen weight among it would be rounded to 8 bits."""
    model = filled(replace(SHAPES["dense"], hidden_size=128, intermediate_size=128, num_layers=1, num_dense_layers=1))
    model.compute_dtype = torch.bfloat16
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    for module in adaptable(model).values():
        module.freeze(kind)
    weights = {tuple(w.shape) for module in adaptable(model).values() for w in (module.weight, module.weight.T)}
    shapes, x = [], torch.randn(2, 300, 128).bfloat16().requires_grad_()
    recording = torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t)
    with native.path("plain" if path == "plain" else "compiled"):
        with recording:
            model.model.layers[0](x, model._table(300)[:300])
        assert not weights & set(shapes)
        with kept_in_int8():
            model.model.layers[0](x, model._table(300)[:300])[0].sum().backward()


def test_eight_bit_products_of_a_frozen_weight_and_its_update():
    model = adapted(SHAPES["dense"], None)
    model.compute_dtype = torch.bfloat16
    before = gradients(model)
    sites = install(model, "int8")
    assert sites and not [site.name for site in sites if "lora" in site.name]
    after = gradients(model)
    far = {name: distance(after[name], gradient) for name, gradient in before.items()}
    assert 1e-3 < max(far.values()) < 0.1
    quantised = adapted(SHAPES["dense"], "int8")
    assert not install(quantised, "int8") and all(module.eight_bit is None for module in adaptable(quantised).values())


@pytest.mark.parametrize("kind", ["int4", "int8", "bfloat16", None])
@pytest.mark.parametrize("rank", [0, 4])
def test_the_head_too(kind, rank):
    model = filled(SHAPES["dense"])
    model.lm_head.freeze(kind)
    if rank:
        model.lm_head.add_low_rank(rank, 8.0, torch.Generator().manual_seed(0))
    before = filled(SHAPES["dense"])
    before.lm_head.weight.data = model.lm_head.operand.whole().detach()
    found, expected = gradients(model), gradients(before)
    assert {name for name in found if "lm_head" in name} == ({"lm_head.lora_A.weight", "lm_head.lora_B.weight"} if rank else set())
    assert all(distance(found[name], expected[name]) < 1e-5 for name in found if "lm_head" not in name)
    if rank:
        a, whole = model.lm_head.lora_A.weight, expected["lm_head.weight"]
        assert distance(found["lm_head.lora_B.weight"], 2.0 * whole @ a.T) < 1e-5
    tokens, _ = batch(model.config)
    assert distance(model.eval()(tokens), before.eval()(tokens)) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["int4", "int8", "bfloat16", None])
def test_a_model_is_frozen_as_it_is_read(shape, tied, kind):
    c = replace(SHAPES[shape], tie_word_embeddings=tied)
    whole, model = filled(c), Transformer(c)
    fill_frozen(model, whole.state_dict().items(), kind, "here")
    assert not learned(model)
    types = {name: t.dtype for name, t in model.state_dict().items() if name in shapes(c) and is_matrix(name, t.ndim)}
    held = {"int4": {torch.uint8, torch.int8}, "int8": {torch.int8}, "bfloat16": {torch.bfloat16}, None: {torch.float32}}
    assert set(types.values()) == held[kind] and types["model.embed_tokens.weight"] != torch.uint8
    merged, held = Transformer(c), AdaptedTensors(whole.state_dict(), {}, AdapterConfig(4, 8.0, kind or "float32"))
    fill(merged.state_dict(), held.items(), "here")  # what merging makes of the weights is what is trained beside
    tokens, _ = batch(c)
    assert distance(model.eval()(tokens), merged.eval()(tokens)) < 1e-5
    assert (distance(merged.model.embed_tokens.weight, whole.model.embed_tokens.weight) > 1e-4) == (kind is not None)
    add_low_rank(model, AdapterConfig(4, 8.0), 0)
    names = learned(model).keys()
    mtp = f"layers.{c.num_layers}."
    assert names and all("lora_" in name and mtp not in name and "embed" not in name and "mlp.gate." not in name for name in names)
    loss_of(model.train(), *batch(c)).total.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(names)
    with pytest.raises(ValueError, match="no low-rank update"):
        model.model.embed_tokens.add_low_rank(4, 8.0)


FLOATS = (torch.float32, torch.bfloat16)
OWN_HEADS = [("tiles", torch.bfloat16), ("vectors", torch.bfloat16), ("vectors", torch.float32)]
"""Our own products, and the types that they multiply."""


@pytest.mark.parametrize("kind", ["floats", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("path,dtype", OWN_HEADS)
def test_a_head_goes_through_in_parts(dtype, path, kind):
    """Of tokens, and of a vocabulary whose last part is small and no multiple of a block; floats learn, and their gradient too is the sum
    of the chunks'."""
    if not native.can(path, dtype):
        pytest.skip("this machine cannot run these kernels")
    torch.manual_seed(0)
    x, w = torch.randn(600, 64).to(dtype), torch.randn(1126, 64) * 0.3
    targets = torch.randint(0, len(w), (600,))
    targets[::7] = IGNORE
    head = w if kind == "floats" else Linear(64, len(w))
    if isinstance(head, Linear):
        head.weight.data.copy_(w)
        head.freeze(kind)
        head = head.operand
        w = head.whole()
    found = []
    for function, weight in ((linear_cross_entropy, head), (linear_cross_entropy_reference, w)):
        rows, weight = x.clone().requires_grad_(), weight.clone().requires_grad_() if kind == "floats" else weight
        with native.path(path):
            loss = function(rows, weight, targets, 500.0)
        loss.backward()
        found.append((loss.detach(), rows.grad, weight.grad if kind == "floats" else rows.grad))
    with native.path(path):
        nll = token_nll(x, head, targets)
    assert torch.equal(nll == 0, targets == IGNORE) and float(nll.sum()) / 500 == pytest.approx(float(found[1][0]), rel=1e-4)
    for mine, theirs in zip(*found, strict=True):
        assert float((mine - theirs).float().norm()) <= (1e-5 if dtype == torch.float32 else 1e-2) * float(theirs.float().norm())


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("path,dtype", [*OWN_HEADS, *((path, dtype) for path in ("compiled", "plain") for dtype in FLOATS)])
def test_a_head_of_few_bits_is_the_same_as_floats(kind, path, dtype):
    """Training's loss and an evaluation's. Our own products read the codes; others get one copy, for all who need it at
    the same time."""
    if not native.can(path, dtype):
        pytest.skip("this machine cannot run these kernels")
    model = filled(replace(SHAPES["dense"], tie_word_embeddings=True))
    model.requires_grad_(False)
    model.model.embed_tokens.freeze(kind)
    head, floats = model.head_weight, model.head_weight.whole()
    assert isinstance(head, Frozen) and head.shared(dtype) is head.shared(dtype)
    x = torch.randn(60, head.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    targets = torch.arange(60) - 1
    targets[0] = IGNORE
    found = []
    with native.path(path):
        for weight in (head, floats):
            rows = x.clone().requires_grad_()
            loss = linear_cross_entropy(rows, weight, targets, 59.0)
            loss.backward()
            found.append((loss, rows.grad, token_nll(x, weight, targets)))
    for mine, theirs in zip(*found, strict=True):
        assert distance(mine, theirs) < (1e-5 if dtype == torch.float32 else 5e-3)
