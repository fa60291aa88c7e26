"""What tests in several folders share."""

import pytest


@pytest.fixture
def one_thread():
    """The compiled kernels are for single threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
