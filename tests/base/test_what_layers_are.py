"""`sparing.base.layers` against the module that is built from it, and what it says of kinds of layers."""

import subprocess
import sys
from dataclasses import replace

import pytest
from tests.model.shapes import SHAPES, TINY

from sparing.base.layers import layers, mixtures, shapes
from sparing.model.experts import MoE
from sparing.model.transformer import Transformer


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("mtp", [0, 2])
def test_the_module_has_these_tensors(name, mtp):
    config = replace(SHAPES[name], mtp_depth=mtp)
    model = Transformer(config)
    assert list(shapes(config).items()) == [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    for layer, block in zip(layers(config), model.model.layers, strict=True):
        assert layer.parameters == sum(p.numel() for p in block.parameters())
        assert layer.common == sum(p.numel() for p in block.parameters() if p.ndim == 2)
        assert layer.mixture == isinstance(block.mlp, MoE) and layer.mtp == hasattr(block, "eh_proj")
        assert all(layer.attention.shapes[name][1] == config.hidden_size for name in layer.attention.inputs)


@pytest.mark.parametrize(
    ("leading", "mtp", "dense"),
    [(1, 0, "d.."), (1, 2, "d...."), (0, 1, "...."), (3, 0, "ddd"), (3, 1, "dddd"), (1000, 1, "dddd"), (2, 1, "dd..")],
)
def test_dense_layers_come_first_and_modules_are_mixtures_unless_all_are_dense(leading, mtp, dense):
    config = replace(TINY, num_dense_layers=leading, mtp_depth=mtp)
    assert "".join("." if layer.mixture else "d" for layer in layers(config)) == dense
    assert [layer.mtp for layer in layers(config)] == [False] * 3 + [True] * mtp
    assert [layer.index for layer in mixtures(config)] == [i for i, kind in enumerate(dense) if kind == "."]


def test_what_a_plan_reads_comes_without_torch():
    code = "import sys, sparing.base.layers, sparing.kernels.sizes, sparing.budget.cluster; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
