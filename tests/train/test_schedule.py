"""The shape of warm-up, stable, decay."""

import itertools

import pytest

from sparing.base.config import OptimConfig
from sparing.train.optim import decay_start, lr_scale, momentum

OPTIM = OptimConfig(warmup=0.1, decay=0.4, final_lr=0.05)


def test_shape():
    scales = [lr_scale(step, 100, OPTIM) for step in range(100)]
    assert scales[:10] == pytest.approx([0.1 * (k + 1) for k in range(10)])
    assert scales[10:60] == [1.0] * 50
    assert decay_start(100, OPTIM) == 60
    falls = [a - b for a, b in itertools.pairwise(scales[59:])]
    assert falls == pytest.approx([0.95 / 40] * 40)  # linear, beginning with the first step of the decay
    assert scales[-1] == pytest.approx(0.05, abs=1e-12)  # exactly at the end of the budget


@pytest.mark.parametrize("total", [1, 2, 3, 7, 50, 1001])
@pytest.mark.parametrize("optim", [OPTIM, OptimConfig(warmup=0.0, decay=0.0), OptimConfig(warmup=0.5, decay=1.0), OptimConfig()])
def test_any_length(total, optim):
    scales = [lr_scale(step, total, optim) for step in range(total)]
    assert all(0 < scale <= 1 for scale in scales)
    assert scales[-1] == pytest.approx(optim.final_lr if round(optim.decay * total) else 1.0)


def test_momentum_rises_over_the_first_part():
    values = [momentum(step, 100, OptimConfig(momentum=0.95)) for step in range(100)]
    assert values[0] == 0.85 and values[15:] == [0.95] * 85
    assert values[:16] == sorted(values[:16])
    assert momentum(0, 100, OptimConfig(momentum=0.5)) == 0.5
