"""What is measured before a run is what the run does."""

import torch
from tests.train import tiny

from sparing.base.hardware import machine
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer
from sparing.train import calibrate


def test_all_replicas_compute_as_in_training(monkeypatch):
    chosen = tiny.config(tiny.steps(1), dtype="bfloat16", recompute=True, threads=2, replicas=None)
    model = Transformer(chosen.model)
    init_weights(model, 0)
    real, seen = calibrate._speed, []

    def speed(model, config, batch, micro, device, replicas, *rest, **more):
        seen.extend(replicas.models)
        return real(model, config, batch, micro, device, replicas, *rest, **more)

    monkeypatch.setattr(calibrate, "_speed", speed)
    before = torch.get_num_threads()
    try:
        calibrate.choose(model, chosen, machine(), tiny.Counting(chosen).batch(0), 30.0)
    finally:
        torch.set_num_threads(before)
    assert seen and {twin.compute_dtype for twin in seen} == {torch.bfloat16}
    assert all(block.recompute for twin in seen for block in twin.model.layers)
