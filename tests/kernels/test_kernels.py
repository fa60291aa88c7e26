"""Each fast path against the plain PyTorch reference in its file: values and gradients, in float32 and in bfloat16."""

import pytest
import torch

from sparing.kernels import native, vocabulary
from sparing.kernels.attention import DocumentMask, attention_reference, causal_attention
from sparing.kernels.feed_forward import mixture, mixture_reference, swiglu, swiglu_reference
from sparing.kernels.norm import rms_norm, rms_norm_reference
from sparing.kernels.products import Plain, Weight
from sparing.kernels.vocabulary import IGNORE, linear_cross_entropy, linear_cross_entropy_reference, token_nll
from sparing.model.linear import Linear


@pytest.fixture(autouse=True, params=["compiled", "plain"])
def path(request):
    """Compiled passes serve single threads; without a compiler both runs are the plain one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with native.path(request.param):
        yield
    torch.set_num_threads(threads)


TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12))


def compare(fast, reference, inputs, dtype):
    """Values and all gradients of fast(inputs) in `dtype` against reference(inputs) in float64-like precision (float32)."""
    results = []
    for function, cast in ((fast, dtype), (reference, torch.float32)):
        leaves = [x.detach().to(cast).requires_grad_() if x.is_floating_point() else x for x in inputs]
        y = function(*leaves)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        y.backward(grad)
        results.append([y.detach()] + [x.grad for x in leaves if x.is_floating_point()])
    for ours, theirs in zip(*results, strict=True):
        assert relative(ours, theirs) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rms_norm(dtype):
    torch.manual_seed(0)
    x, w = torch.randn(3, 5, 32) * 4, torch.rand(32) + 0.5
    compare(lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: rms_norm_reference(x, w, 1e-6), (x, w), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_swiglu(dtype):
    torch.manual_seed(0)
    compare(swiglu, swiglu_reference, (torch.randn(7, 3, 64),), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [1, 100, 128, 300])
@pytest.mark.parametrize("documents", [False, True])
def test_causal_attention(dtype, length, documents):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, length, 24), torch.randn(2, 3, length, 24), torch.randn(2, 3, length, 16)
    mask = None
    if documents:
        ids = (torch.arange(length) // 37).expand(2, -1).contiguous()
        mask = DocumentMask.of(ids, torch.float32)
        assert (mask is None) == (length == 1)
    bias = None if mask is None else mask.bias
    compare(lambda q, k, v: causal_attention(q, k, v, 0.2, mask), lambda q, k, v: attention_reference(q, k, v, 0.2, bias), (q, k, v), dtype)


def test_attention_with_a_cache_sees_all_earlier_positions():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    whole = causal_attention(q, k, v, 0.3)
    assert torch.allclose(causal_attention(q[:, :, 6:], k, v, 0.3), whole[:, :, 6:], atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("scale, ignored", [(0.02, 7), (1.0, 7), (1.0, 50)])
def test_linear_cross_entropy(dtype, scale, ignored):
    """1,500 tokens: two chunks, the second partial; confident (scale 1) and uncertain predictions; many and few ignored targets."""
    torch.manual_seed(0)
    x, w = torch.randn(1500, 32), torch.randn(50, 32) * scale
    targets = (x @ w.T + torch.randn(1500, 50)).argmax(-1)
    targets[::ignored] = IGNORE
    fast, slow = (lambda x, w, f=f: f(x, w, targets, 700) for f in (linear_cross_entropy, linear_cross_entropy_reference))
    compare(fast, slow, (x, w), dtype)
    nll = token_nll(x, w, targets)
    assert not nll[targets == IGNORE].any() and (nll[targets != IGNORE] > 0).float().mean() > 0.99
    assert float(nll.sum() / 700) == pytest.approx(float(linear_cross_entropy_reference(x, w, targets, 700)), rel=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_head_whose_rows_have_no_targets_gets_zeros(dtype, monkeypatch):
    """Not what was in the memory before."""
    kernels = "tiles" if native.can("tiles", dtype) else "vectors" if native.can("vectors", dtype) else "compiled"
    monkeypatch.setattr(vocabulary, "new_like", lambda like, dtype=None: torch.full(like.shape, 7.0, dtype=dtype or like.dtype))
    x, w = torch.randn(40, 32, dtype=dtype, requires_grad=True), torch.randn(50, 32, requires_grad=True)
    with native.path(kernels):
        loss = linear_cross_entropy(x, w, torch.full((40,), IGNORE), 1)
        loss.backward()
    assert loss.item() == 0 and not x.grad.any() and not w.grad.any()


@pytest.mark.parametrize("kernels", ["plain", "compiled", "vectors", "tiles"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_several_targets_in_a_row(dtype, kernels):
    """Draws from a distribution: the same word more than once, words that are ignored, rows without any; weights that differ."""
    if not native.can(kernels, dtype):
        pytest.skip(f"{kernels} kernels cannot run here in {dtype}")
    torch.manual_seed(0)
    x, w, weights = torch.randn(700, 32), torch.randn(64, 32) * 0.3, torch.rand(700, 5)
    targets = torch.randint(0, 64, (700, 5))
    targets[:, 3] = targets[:, 1]
    targets[::3, 2], targets[::50] = IGNORE, IGNORE
    fast, slow = (lambda x, w, f=f: f(x, w, targets, 300, weights) for f in (linear_cross_entropy, linear_cross_entropy_reference))
    with native.path(kernels):
        compare(fast, slow, (x, w), dtype)
        frozen = w.to(dtype)  # rows without a target are left out
        compare(lambda x: fast(x, frozen), lambda x: slow(x, frozen), (x,), dtype)
    alone, ones = targets[:, 0], torch.ones(700, 1)
    with native.path(kernels):
        one = linear_cross_entropy(x.to(dtype), w, alone[:, None], 300, ones)
        assert float(one) == pytest.approx(float(linear_cross_entropy(x.to(dtype), w, alone, 300)), rel=1e-4)


def test_cross_entropy_gradient_near_certainty():
    """Where p(target) rounds to 1 in bfloat16 the target's gradient must still be minus the others' sum, not 0."""
    x = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    w = torch.tensor([[8.0], [0.0]], requires_grad=True)
    loss = linear_cross_entropy(x, w, torch.tensor([0]), 1)
    loss.backward()
    p_other = float(torch.sigmoid(torch.tensor(-8.0)))
    assert loss.item() == pytest.approx(p_other, rel=2e-2)
    assert float(w.grad[0]) == pytest.approx(-p_other, rel=2e-2)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_mixture_of_experts(dtype, top_k):
    """Random routing with an expert that receives nothing."""
    torch.manual_seed(0)
    E, F, D, N = 5, 12, 16, 40
    x, gate_up, down = torch.randn(N, D), torch.randn(E, 2 * F, D) * 0.3, torch.randn(E, D, F) * 0.3
    scores = torch.rand(N, E)
    scores[:, 3] = -1
    experts = scores.topk(top_k, -1).indices
    weights = torch.rand(N, top_k)
    assert 3 not in experts
    compare(
        lambda x, g, d, w: mixture(x, Weight(g, Plain), Weight(d, Plain), w, experts),
        lambda x, g, d, w: mixture_reference(x, g, d, w, experts),
        (x, gate_up, down, weights), dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_target_outside_the_vocabulary_is_an_error(dtype):
    x, w = torch.randn(4, 8, dtype=dtype), torch.randn(6, 8)
    with pytest.raises(IndexError, match="target 6"):
        linear_cross_entropy(x, w, torch.tensor([0, 6, 1, 2]), 4)


@pytest.mark.parametrize("kernels", ["vectors", "plain"])
def test_a_target_outside_the_vocabulary_is_an_error_where_text_is_scored_too(kernels):
    head = Linear(8, 6)
    torch.nn.init.normal_(head.weight)
    head.freeze("int8")
    with native.path(kernels), pytest.raises(IndexError):
        token_nll(torch.randn(4, 8), head.operand, torch.tensor([0, 6, 1, 2]))
