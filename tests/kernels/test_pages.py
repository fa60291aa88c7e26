"""Memory of dead tensors for the next ones: whose it is, how much there is, and that it changes no number."""

import gc
import random
import threading

import pytest
import torch
from tests.losses import loss_of
from tests.model.shapes import TINY

from sparing.kernels import native
from sparing.kernels.native import held, new, trim
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer

pytestmark = pytest.mark.skipif(native.library("pool") is None, reason="there is no C compiler")
LIKE = torch.empty(0, dtype=torch.bfloat16)


@pytest.fixture
def opened(monkeypatch):
    """-> `held` without the tensors of other tests."""
    monkeypatch.setattr(native, "_open", True)
    gc.collect()
    trim()
    others = held()[0]

    def ours() -> tuple[int, int, int]:
        live, waiting, most = held()
        return live - others, waiting, most - others

    yield ours
    trim()
    assert ours() == (0, 0, 0)


def test_the_next_tensor_of_a_size_gets_the_memory(opened):
    x = new(LIKE, 300, 1000)
    assert x.shape == (300, 1000) and x.dtype == torch.bfloat16 and x.is_contiguous() and opened()[:2] == (655360, 0)
    address = x.data_ptr()
    view = x[1:].t()
    del x
    assert opened()[:2] == (655360, 0), "a view keeps it"
    del view
    assert opened() == (0, 655360, 655360)
    y = new(LIKE, 149, 1000, dtype=torch.float32)
    assert y.dtype == torch.float32 and y.data_ptr() == address
    z = new(y, 130, 1000, dtype=torch.int8)
    assert z.dtype == torch.int8 and z.shape == (130, 1000) and opened()[0] == 655360, "small tensors are torch's own"
    assert new(LIKE, 600, 1000, dtype=torch.int64).dtype == torch.int64 and opened()[0] == 655360, "so are those of other types"
    del y
    trim()
    assert opened() == (0, 0, 0)


def test_tensors_do_not_overlap_and_dead_ones_never_take_more_than_live_ones_did(opened):
    draw, living, most = random.Random(0), {}, 0
    for i in range(600):
        if living and draw.random() < 0.5:
            values, tensor = draw.choice(list(living.items()))
            assert bool((tensor == values).all())
            del living[values], tensor
        else:
            living[i] = new(LIKE, draw.choice((200, 230, 256, 700)), 2000, dtype=torch.float32).fill_(i)
        live, waiting, highest = opened()
        most = max(most, live)
        assert live >= sum(tensor.nbytes for tensor in living.values()) and live + waiting <= highest == most
    assert all(bool((tensor == values).all()) for values, tensor in living.items())
    living.clear()


def test_threads_share_it(opened):
    def work(number: int) -> None:
        for _ in range(50):
            tensor = new(LIKE, 256, 1024).fill_(number)
            if not bool((tensor == number).all()):
                wrong.append(number)
            handed.append(tensor)  # dies in the main thread, or in another that clears the list

    wrong, handed = [], []
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        del handed[:]
    for thread in threads:
        thread.join()
    del handed[:]
    assert wrong == [] and opened()[0] == 0


def test_no_number_changes(opened, monkeypatch):
    monkeypatch.setattr(native, "POOLED_BYTES", 1)

    def gradients(wanted: bool) -> list[torch.Tensor]:
        monkeypatch.setattr(native, "_open", wanted)
        model = Transformer(TINY)
        init_weights(model, 0)
        model.compute_dtype = torch.bfloat16
        model.set_int8_activations(True)
        tokens = torch.randint(TINY.vocab_size, (4, 33), generator=torch.Generator().manual_seed(0))
        for _ in range(2):  # the second time with used memory
            model.zero_grad()
            loss_of(model, tokens[:, :-1], tokens[:, 1:, None]).total.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with native.path("compiled"):
            plain, pooled = gradients(False), gradients(True)
        assert opened()[2] > 0
    finally:
        torch.set_num_threads(threads)
        monkeypatch.setattr(native, "_open", True)
    assert len(plain) == len(pooled) > 0 and all(map(torch.equal, plain, pooled))
