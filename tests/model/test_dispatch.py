"""Experts behind another dispatcher: two ranks in one process, each with half of the experts, compute what one rank with all does."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import pytest
import torch
from tests.model.shapes import TINY
from tests.model.test_frozen import filled

from sparing.base.layers import layers
from sparing.kernels import native
from sparing.kernels.feed_forward import LOCAL, Dispatched
from sparing.model.experts import Experts

pytestmark = pytest.mark.usefixtures("one_thread")
RANKS, E, K = 2, TINY.n_routed_experts, TINY.num_experts_per_tok


class Wire:
    """An all-to-all between threads. What is handed over keeps its history, so gradients go back by themselves."""

    def __init__(self):
        self.barrier, self.sent = Barrier(RANKS), {}

    def exchange(self, rank: int, parts: list) -> list:
        """parts: for each rank -> from each rank."""
        self.sent[rank] = parts
        self.barrier.wait()
        received = [self.sent[other][rank] for other in range(RANKS)]
        self.barrier.wait()
        return received


class AllToAll:
    """The dispatcher of a rank that holds every RANKS-th part of the experts; it groups what it received as if that were all there is."""

    def __init__(self, wire: Wire, rank: int):
        self.wire, self.rank = wire, rank

    def dispatch(self, x_ND, weights_NK, experts_NK, held):
        flat, tokens = experts_NK.flatten(), torch.arange(len(x_ND)).repeat_interleave(K)
        chosen = [(flat // held == rank).nonzero().squeeze(1) for rank in range(RANKS)]
        parts = [(x_ND[tokens[mine]], weights_NK.flatten()[mine, None], flat[mine, None] % held) for mine in chosen]
        received = self.wire.exchange(self.rank, parts)
        local = LOCAL.dispatch(*(torch.cat(each) for each in zip(*received, strict=True)), held)
        return Dispatched(*local[:3], (local, [len(part[0]) for part in received], chosen, experts_NK.shape))

    def combine(self, y_SD, sent):
        local, sizes, chosen, shape = sent.back
        parts = self.wire.exchange(self.rank, list(LOCAL.combine(y_SD, local).split(sizes)))
        rows = torch.cat(parts)[torch.cat(chosen).argsort()].view(*shape, -1)
        total = rows[:, 0]
        for k in range(1, K):
            total = total + rows[:, k]
        return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "int8 with an update"])
def test_two_ranks_compute_what_one_does(dtype, kind):
    config, generator = replace(TINY, hidden_size=32), torch.Generator().manual_seed(0)
    feed_forward = layers(config)[1].feed_forward
    whole = Experts(feed_forward)
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    halves, wire = [], Wire()
    for rank in range(RANKS):
        half, mine = Experts(feed_forward, AllToAll(wire, rank)), slice(rank * E // RANKS, (rank + 1) * E // RANKS)
        half.gate_up_proj, half.down_proj = (torch.nn.Parameter(p.detach()[mine].clone()) for p in (whole.gate_up_proj, whole.down_proj))
        halves.append(half)
    if kind != "plain":
        for module in (whole, *halves):
            module.freeze("int8")
            module.add_low_rank(2, 4.0, generator)
        with torch.no_grad():
            for name in whole.weights:
                a, b = (getattr(whole, f"{name}_lora_{part}").weight for part in "AB")
                b.normal_(generator=generator)
                for rank, half in enumerate(halves):
                    getattr(half, f"{name}_lora_A").weight.copy_(a.chunk(RANKS)[rank])
                    getattr(half, f"{name}_lora_B").weight.copy_(b.unflatten(1, (2, E)).chunk(RANKS, 2)[rank].flatten(1))
    N = 22
    x = torch.randn(N, 32, generator=generator).to(dtype)
    weights = torch.rand(N, K, generator=generator)
    experts = torch.rand(N, E, generator=generator).topk(K).indices
    grad = torch.randn(N, 32, generator=generator).to(dtype)

    def run(module, part: slice):
        inputs = [tensor[part].clone().requires_grad_() for tensor in (x, weights)]
        return module(*inputs, experts[part]), inputs

    y, inputs = run(whole, slice(None))
    y.backward(grad)
    cuts = [slice(0, 9), slice(9, N)]  # the ranks have different numbers of tokens
    with ThreadPoolExecutor(RANKS) as pool:
        results = list(pool.map(run, halves, cuts))
    together = torch.cat([result for result, _ in results])
    together.backward(grad)
    assert torch.equal(together, y)
    for mine, theirs in zip(zip(*(inputs for _, inputs in results), strict=True), inputs, strict=True):
        assert torch.allclose(
            torch.cat([part.grad for part in mine]), theirs.grad, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5
        )
    for name, parameter in whole.named_parameters():
        parts = [half.get_parameter(name).grad for half in halves]
        if "lora_B" in name:
            found = torch.cat([part.unflatten(1, (2, -1)) for part in parts], 2).flatten(1)
        else:
            found = torch.cat(parts)
        assert torch.equal(found, parameter.grad), name


@pytest.mark.skipif(native.passes() is None, reason="no C compiler here")
def test_the_compiled_sub_layer_is_for_ranks_that_hold_all_experts():
    """Another dispatcher is asked even where the compiled passes are usable."""
    model, asked = filled(TINY), []

    class Asked:
        def dispatch(self, *arguments):
            asked.append(len(arguments[0]))
            return LOCAL.dispatch(*arguments)

        combine = staticmethod(LOCAL.combine)

    tokens = torch.randint(TINY.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    before = model.hidden(tokens)
    model.model.layers[1].mlp.experts.dispatcher = Asked()
    assert torch.allclose(model.hidden(tokens), before, atol=1e-4) and asked == [18]
