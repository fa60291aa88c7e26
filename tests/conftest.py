"""What tests in several folders share."""

import os
import time
from pathlib import Path

import pytest
from tests.clock import ManualClock

# Many tests have a home of their own: what is compiled is the same in all of them.
os.environ.setdefault("SPARING_NATIVE", str(Path(__file__).parent.parent / ".pytest_cache" / "native"))
os.environ["SPARING_CLOUD"] = "none"  # a test on a cloud's machine, as those of GitHub are, must not ask for its notices


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
