"""Work divided among threads: the results of one thread, in their order, and as many shares as threads."""

import threading

import pytest
import torch
from tests.model.shapes import TINY

from sparing.base.config import OptimConfig
from sparing.kernels import native
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer
from sparing.train.optim import Optimizer
from sparing.train.threads import divided, shares


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    with native.path("compiled"):
        yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_and_the_first_error_is_raised(threads):
    barrier = threading.Barrier(threads, timeout=60)  # all at once, or not at all

    def job(number):
        barrier.wait()
        return number, torch.get_num_threads(), torch.is_grad_enabled(), native.chosen()

    found = divided([lambda number=number: job(number) for number in range(threads)])
    assert [number for number, *_ in found] == list(range(threads))
    assert {tuple(rest) for _, *rest in found} == {(1, False, "compiled")}
    assert torch.is_grad_enabled() and torch.get_num_threads() == threads
    with pytest.raises(ValueError, match="no"):
        divided([lambda: 1, lambda: int("no")])


def test_shares_have_about_as_many_numbers(threads):
    tensors = [torch.zeros(size) for size in (5, 100, 1, 60, 50, 7, 2)]
    found = shares(tensors)
    assert len(found) == threads and sorted(place for share in found for place in share) == list(range(7))
    assert max(sum(len(tensors[place]) for place in share) for share in found) <= max(100, 225 / threads + 5)
    assert shares([]) == []


@pytest.mark.parametrize("matrix", ["adamw", "muon"])
def test_updates_are_the_same_on_any_number_of_threads(matrix):
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        model = Transformer(TINY)
        init_weights(model, 0)
        optimizer = Optimizer(model, OptimConfig(matrix=matrix, clip=0.5))
        generator = torch.Generator().manual_seed(0)
        norms = []
        with native.path("compiled"):
            for _ in range(3):
                for parameter in model.parameters():
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
                norms.append(float(optimizer.grad_norm()))
                optimizer.clip(norms[-1])
                optimizer.step(1.0, 0.9)
        found.append((norms, list(model.parameters())))
    torch.set_num_threads(before)
    for norms, parameters in found[1:]:
        assert norms == found[0][0] and all(torch.equal(a, b) for a, b in zip(parameters, found[0][1], strict=True))
