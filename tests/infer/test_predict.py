"""What is expected of experts that do not fit: how many come from the disk, and how the speed follows."""

import pytest

from sparing.base.layers import mixtures
from sparing.infer import predict
from sparing.infer.engine import Engine
from sparing.infer.predict import STEP, forecast
from sparing.kernels.decode import library
from sparing.serve.server import speed_message

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")


def test_reads_and_speed_follow_the_limit(make_run, monkeypatch):
    with Engine(make_run(), weights="int8", speculate=False, threads=1) as engine:
        c, stacks = engine.config, [p for name, p in engine.packed_weights.parts.items() if name.endswith("expert_gate_up")]
        chosen = (c.num_layers - c.num_dense_layers) * c.num_experts_per_tok
        main = sum(part.bytes for part in stacks[: c.num_layers - c.num_dense_layers])
        found = {share: forecast(c, engine.packed_weights, int(main * share), 1) for share in (0.25, 0.75, 1.0)}
        assert found[0.25].reads == pytest.approx(0.75 * chosen, rel=0.05) and found[1.0].reads == 0
        assert found[0.25].tokens_per_s < found[1.0].tokens_per_s
        assert found[0.25].expert_bytes == stacks[0].stride and found[0.25].disk_rate > 0 < found[0.25].memory_rate
        assert found[1.0].tokens_per_s < 1 / STEP
        # Twice the threads read memory twice as fast, and the disk no faster.
        monkeypatch.setattr(predict, "_memory_rate", lambda: 1e10)  # not measured twice: it moves with the machine
        one, two = (1 / forecast(c, engine.packed_weights, main, threads).tokens_per_s - STEP for threads in (1, 2))
        assert two < one / 1.2


def test_it_is_said_at_the_start_of_a_server(make_run):
    with Engine(make_run(), weights="int8", speculate=False, threads=1, expert_bytes=1 << 20) as engine:
        assert "tokens/s are to be expected of one text" in speed_message(engine, 1 << 20)
    with Engine(make_run(seed=1, num_dense_layers=3, mtp_depth=0), weights="int8", threads=1, expert_bytes=1 << 20) as engine:
        assert not mixtures(engine.config) and speed_message(engine, 1 << 20) == "the model has no experts: --expert-mb changes nothing"
