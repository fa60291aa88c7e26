"""Prompts in int8 on the tiles of a matrix unit: sums of integers, which must be the same with tiles and without."""

import numpy as np
import pytest
import torch
from tests.infer.test_network import compiled

from sparing.base.hardware import cpu_flags
from sparing.infer.network import Rows
from sparing.kernels import decode


@pytest.mark.skipif("amx_int8" not in cpu_flags() or decode.library() is None, reason="no matrix unit here")
@pytest.mark.parametrize(
    "changes", [{}, {"attention": "gqa", "hidden_size": 80, "intermediate_size": 112}], ids=["mixture", "gqa, odd widths"]
)
def test_prompts_in_int8_have_the_same_bits_with_tiles(make_run, changes):
    network, library, found = compiled(make_run(**changes), "int8"), decode.library(), []
    ids = torch.randint(0, network.c.vocab_size, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    try:
        for on in (0, 1):
            library.use_tiles(on)
            rows = Rows()
            rows.add([3, 1, 4, 5], ids, 0, len(ids))
            found.append(network.forward(rows).copy())
    finally:
        library.choose_tiles()
    assert np.array_equal(*found) and np.abs(found[0]).max() > 0.1
