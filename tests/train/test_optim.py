"""Muon and AdamW against independent implementations, and the bit-exactness of saved state."""

import copy
import ctypes
import subprocess
import sys
import textwrap

import pytest
import torch
from tests.losses import loss_of
from tiny import MODEL, Counting, config, steps

from sparing.base.config import Config, OptimConfig, PrecisionConfig
from sparing.base.files import DamagedError
from sparing.kernels import native
from sparing.kernels.products import orthogonalise
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer
from sparing.train.optim import AdamW, Muon, Optimizer, group_of, keep_as


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Transformer(MODEL)
    init_weights(model, 0)
    return model


def backward(model, number=0):
    batch = Counting(config(steps(1))).batch(number)
    loss_of(model, batch.tokens, batch.targets, batch.documents).total.backward()


@pytest.mark.parametrize("rows,columns", [(64, 64), (32, 96), (96, 32), (128, 16)])
def test_orthogonal(rows, columns):
    x = torch.randn(5, rows, columns, generator=torch.Generator().manual_seed(rows))
    singular = torch.linalg.svdvals(orthogonalise(x, 5))
    assert singular.min() > 0.2 and singular.max() < 1.3  # a square one has a singular value near zero to begin with
    assert torch.linalg.svdvals(orthogonalise(x[:, : min(rows, columns) // 2], 5)).min() > 0.6
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity((u @ vt).flatten(1), orthogonalise(x, 5).flatten(1))
    assert cosine.min() > 0.95


def test_zero_stays_zero():
    assert orthogonalise(torch.zeros(2, 8, 16), 5).abs().max() == 0


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (32, 32)])
@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 0.02), (torch.float32, 0.05)])
def test_muon_equals_torch(shape, dtype, tolerance):
    """torch.optim.Muon always works in bfloat16, one matrix at a time, with plain decay: compared without decay."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    muon = Muon({"w": ours}, steps=5, weight_decay=0.0, dtype=dtype)
    reference = torch.optim.Muon([theirs], lr=0.02, momentum=0.9, weight_decay=0.0)
    for _ in range(4):
        grad = torch.randn(shape, generator=generator)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        before = theirs.detach().clone()
        muon.step(0.02, 0.9)
        reference.step()
        assert (ours - theirs).norm() < tolerance * 4 * (theirs - before).norm()


def test_adamw_is_torchs_bit_for_bit():
    """Groups of their own rates, a parameter that gets its first gradient late, one that never does."""
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=generator) for shape in ((33, 70), (5,), (8, 8), (3, 2))]
    ours, theirs = ([torch.nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    groups = [([0, 2], 0.01, 0.1), ([1, 3], 0.03, 0.0)]

    def grouped(tensors):
        return [{"params": [tensors[i] for i in places], "lr": lr, "weight_decay": decay} for places, lr, decay in groups]

    mine = AdamW(grouped(ours), (0.9, 0.95), 1e-8)
    reference = torch.optim.AdamW(grouped(theirs), betas=(0.9, 0.95), eps=1e-8, fused=True)
    for step in range(4):
        for i in (0, 1, 2)[: 3 if step > 1 else 2]:
            ours[i].grad = torch.randn(start[i].shape, generator=generator)
            theirs[i].grad = ours[i].grad.clone()
        mine.step()
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)) and torch.equal(ours[3], start[3])
    for i in (0, 1, 2):
        assert mine.state[ours[i]].keys() == reference.state[theirs[i]].keys()
        assert all(torch.equal(mine.state[ours[i]][kind], tensor) for kind, tensor in reference.state[theirs[i]].items())
    assert ours[3] not in mine.state


@pytest.mark.parametrize("matrix", ["adamw", "muon"])
def test_a_step_does_not_import_torchs_compiler(matrix):
    """It takes up to 150 MB; not with recomputation either."""
    code = """
        import sys
        import torch
        from sparing.base.config import ModelConfig, OptimConfig
        from sparing.model.init import init_weights
        from sparing.model.transformer import Transformer
        from sparing.train.optim import Optimizer
        model = Transformer(ModelConfig(vocab_size=64, hidden_size=32, num_layers=1, num_dense_layers=1, intermediate_size=64))
        init_weights(model, 0)
        model.set_recompute(True)
        optimizer = Optimizer(model, OptimConfig(matrix=sys.argv[1]))
        model.train()(torch.zeros(1, 8, dtype=torch.int64)).square().mean().backward()
        optimizer.clip(float(optimizer.grad_norm()))
        optimizer.step(1.0, 0.9)
        print("torch._dynamo" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), matrix], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_each_expert_is_its_own_matrix():
    """A batched (E, 2F, D) parameter must move as its 2E matrices do when trained alone, a (E, D, F) one as its E."""
    generator = torch.Generator().manual_seed(2)
    E, F, D = 3, 16, 24
    fused, down = torch.randn(E, 2 * F, D, generator=generator), torch.randn(E, D, F, generator=generator)
    batched = {"experts.gate_up_proj": torch.nn.Parameter(fused.clone()), "experts.down_proj": torch.nn.Parameter(down.clone())}
    alone = {
        f"{half}{e}": torch.nn.Parameter(fused[e, i * F : (i + 1) * F].clone()) for e in range(E) for i, half in enumerate(("gate", "up"))
    }
    alone |= {f"down{e}": torch.nn.Parameter(down[e].clone()) for e in range(E)}
    together, separate = (
        Muon(batched, steps=5, weight_decay=0.1, dtype=torch.float32),
        Muon(alone, steps=5, weight_decay=0.1, dtype=torch.float32),
    )
    for _ in range(3):
        grads = {name: torch.randn(p.shape, generator=generator) for name, p in batched.items()}
        for name, p in batched.items():
            p.grad = grads[name].clone()
        for e in range(E):
            alone[f"gate{e}"].grad = grads["experts.gate_up_proj"][e, :F].clone()
            alone[f"up{e}"].grad = grads["experts.gate_up_proj"][e, F:].clone()
            alone[f"down{e}"].grad = grads["experts.down_proj"][e].clone()
        together.step(0.02, 0.9)
        separate.step(0.02, 0.9)
    for e in range(E):
        assert torch.allclose(batched["experts.gate_up_proj"][e, :F], alone[f"gate{e}"], atol=1e-5)
        assert torch.allclose(batched["experts.gate_up_proj"][e, F:], alone[f"up{e}"], atol=1e-5)
        assert torch.allclose(batched["experts.down_proj"][e], alone[f"down{e}"], atol=1e-5)
    assert not torch.allclose(batched["experts.down_proj"], down, atol=1e-2)


def test_scale_and_cautious_decay():
    weight = torch.nn.Parameter(torch.ones(64, 16))
    weight.data[:32] *= -1
    u, _, vt = torch.linalg.svd(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    grad = u @ vt
    plain, decayed = weight.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    for parameter, decay in ((plain, 0.0), (decayed, 0.5)):
        parameter.grad = grad.clone()
        Muon({"w": parameter}, steps=5, weight_decay=decay, dtype=torch.float32).step(0.1, 0.9)
    step = weight.detach() - plain.detach()
    assert torch.linalg.svdvals(step) == pytest.approx(torch.full((16,), 0.1 * 2.0), rel=0.35)  # sqrt(64/16) = 2
    shrinks = step * weight.detach() > 0
    assert torch.allclose((plain - decayed)[shrinks], 0.1 * 0.5 * weight.detach()[shrinks], atol=1e-6)
    assert torch.equal(plain[~shrinks], decayed[~shrinks])


def test_adamw_equals_torch(model):
    optim = OptimConfig(matrix="adamw", lr=2e-3, lr_embed=2e-3, lr_head=2e-3, lr_router=2e-3, lr_norm=2e-3, weight_decay=0.1, eps=1e-8)
    twin = copy.deepcopy(model)
    ours = Optimizer(model, optim)
    matrices = [p for name, p in twin.named_parameters() if group_of(name, p) == "matrix"]
    others = [p for name, p in twin.named_parameters() if group_of(name, p) != "matrix"]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=2e-3, betas=(optim.beta1, optim.beta2), eps=1e-8)
    for number, scale in enumerate((0.5, 1.0, 0.25)):
        backward(model, number)
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            other.grad = mine.grad.clone()  # the update is compared, not how gradients of slightly different weights differ
        for group in theirs.param_groups:
            group["lr"] = 2e-3 * scale
        ours.step(scale, 0.9)
        theirs.step()
    for (name, mine), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-7), name


def test_groups(model):
    groups = {name: group_of(name, p) for name, p in model.named_parameters()}
    assert groups["model.embed_tokens.weight"] == "embed" and groups["lm_head.weight"] == "head"
    assert groups["model.layers.1.mlp.gate.weight"] == "router" and groups["model.layers.0.mlp.gate_proj.weight"] == "matrix"
    assert groups["model.layers.1.mlp.experts.gate_up_proj"] == "matrix" and groups["model.norm.weight"] == "norm"
    assert groups["model.layers.2.eh_proj.weight"] == "matrix" and groups["model.layers.1.mlp.shared_experts.up_proj.weight"] == "matrix"


RATES = {
    "lr_embed": "model.embed_tokens.weight",
    "lr_head": "lm_head.weight",
    "lr_router": "model.layers.1.mlp.gate.weight",
    "lr_norm": "model.norm.weight",
    "lr": "model.layers.0.self_attn.o_proj.weight",
}


@pytest.mark.parametrize("group,name", RATES.items())
def test_each_group_has_its_own_rate(model, group, name):
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    rates = dict.fromkeys(("lr", "lr_embed", "lr_head", "lr_router", "lr_norm"), 0.0) | {group: 0.01}
    optimizer = Optimizer(model, OptimConfig(**rates), torch.float32)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step(1.0, 0.9)
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved == {key for key, p in model.named_parameters() if group_of(key, p) == group_of(name, p) and key in moved} and name in moved
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("matrix", ["muon", "adamw"])
def test_state_reloads_bit_for_bit(model, matrix):
    optim = OptimConfig(matrix=matrix, lr=0.01)
    first = Optimizer(model, optim)
    for number in range(3):
        backward(model, number)
        first.step(1.0, 0.9)
    twin = copy.deepcopy(model)
    second = Optimizer(twin, optim)
    for name, tensor in first.state().items():
        assert name.startswith("optimizer/")
        second.load(name, tensor.clone())
    for number in range(3, 6):
        for each, optimizer in ((model, first), (twin, second)):
            backward(each, number)
            optimizer.clip(float(optimizer.grad_norm()))
            optimizer.step(0.5, 0.95)
    for (name, mine), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_foreign_state_is_refused(model):
    optimizer = Optimizer(model, OptimConfig())
    with pytest.raises(DamagedError, match="does not belong"):
        optimizer.load("optimizer/momentum/model.layers.9.x", torch.zeros(1))
    with pytest.raises(DamagedError, match="does not belong"):
        optimizer.load("optimizer/exp_avg/lm_head.weight", torch.zeros(1))


def test_clip(model):
    optimizer = Optimizer(model, OptimConfig(clip=0.5))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    total = sum(p.numel() for p in model.parameters()) ** 0.5
    assert float(optimizer.grad_norm()) == pytest.approx(total, rel=1e-5)
    optimizer.clip(float(optimizer.grad_norm()))
    assert float(optimizer.grad_norm()) == pytest.approx(0.5, rel=1e-5)
    optimizer.clip(0.4)
    assert float(optimizer.grad_norm()) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(("kernels", "dtype"), [("vectors", torch.bfloat16), ("tiles", torch.bfloat16), ("vectors", torch.float32)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_compiled_muon_is_the_batched_one(decay, kernels, dtype):
    """Wide, tall, square and stacked matrices; three steps, within what the iterations differ by in the order of their sums.

    Cautious decay asks for a sign, which rounding can turn: a few weights may differ by the decay."""
    if not native.can(kernels, dtype):
        pytest.skip("this machine cannot run these kernels")
    results = []
    for path in (kernels, "plain"):
        torch.manual_seed(0)
        shapes = {
            "wide": (32, 96),
            "tall": (96, 32),
            "square": (64, 64),
            "experts.gate_up_proj": (3, 32, 48),
            "experts.down_proj": (3, 48, 16),
        }
        parameters = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
        muon = Muon(parameters, steps=5, weight_decay=decay, dtype=dtype)
        with native.path(path):
            for _ in range(3):
                for p in parameters.values():
                    p.grad = torch.randn(p.shape)
                muon.step(0.1, 0.9)
        results.append({**{f"weight {n}": p.detach() for n, p in parameters.items()}, **muon.momentum})
    for name, value in results[0].items():
        difference = (value - results[1][name]).abs()
        allowed = 4e-3 if dtype == torch.bfloat16 else 1e-4
        assert (difference > allowed).float().mean() <= (0.03 if decay else 0.0), (name, difference.max())


@pytest.mark.parametrize("matrix", ["muon", "adamw"])
@pytest.mark.parametrize("storage", ["float32", "few bits"])
def test_only_what_requires_a_gradient_has_state_and_moves(model, matrix, storage):
    """Decay included: frozen weights keep every bit."""
    precision = PrecisionConfig(weights="bfloat16", moments="int8") if storage == "few bits" else PrecisionConfig()
    keep_as(model, Config(precision=precision))
    learning = {name for name, _ in model.named_parameters() if "layers.1.mlp" in name or name == "model.norm.weight"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learning)
    optimizer = Optimizer(model, OptimConfig(matrix=matrix, lr=0.01, weight_decay=0.5), precision=precision)
    assert optimizer.parameters.keys() == learning
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    backward(model)
    gradients = [p.grad for name, p in model.named_parameters() if p.grad is not None]
    assert len(gradients) == len(learning)
    assert float(optimizer.grad_norm()) == pytest.approx(float(torch.stack([g.float().norm() for g in gradients]).norm()), rel=1e-3)
    optimizer.step(1.0, 0.95)
    assert {name.split("/", 2)[2] for name in optimizer.state()} - {"all"} == learning
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved <= learning and "model.norm.weight" in moved


@pytest.mark.parametrize("learning", ["experts.down_proj", "layers.0.input_layernorm.weight"])
def test_either_optimizer_may_have_nothing_to_do(model, learning):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(learning))
    optimizer = Optimizer(model, OptimConfig())
    assert (optimizer.muon is None) == ("norm" in learning)
    backward(model)
    optimizer.step(1.0, 0.95)
    assert optimizer.state()


HEAP = """
import ctypes
from types import SimpleNamespace
import torch
from sparing.kernels import native
from sparing.train.optim import Optimizer

NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
Info = type("Info", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in NAMES]})  # man 3 mallinfo
torch.set_num_threads(1)
native.give_back()
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info
learnt = {str(i): SimpleNamespace(grad=torch.ones(576, 1536, dtype=torch.bfloat16)) for i in range(90)}
before = mallinfo().arena
found = float(Optimizer.grad_norm(SimpleNamespace(parameters=learnt)))
print(found, mallinfo().arena - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_the_norm_of_narrow_gradients_leaves_no_holes_in_the_heap():
    """Small results that are kept among pieces of a gradient made the heap grow by a piece each (17 MB here)."""
    done = subprocess.run([sys.executable, "-c", HEAP], capture_output=True, text=True, check=True, timeout=120)
    norm, grown = map(float, done.stdout.split())
    assert norm == pytest.approx((90 * 576 * 1536) ** 0.5, rel=1e-5) and grown < 4e6
