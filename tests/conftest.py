"""What tests in several folders share."""

import time

import pytest
from tests.clock import ManualClock


@pytest.fixture
def clock(monkeypatch):
    """`time.monotonic` as this test moves it."""
    clock = ManualClock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


@pytest.fixture
def one_thread():
    """The compiled kernels, which are for single threads."""
    import torch

    from sparing.kernels import native

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with native.path("compiled"):
        yield
    torch.set_num_threads(threads)
