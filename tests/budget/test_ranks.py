"""What ranks send in a step: formulas, and what is counted at the collectives."""

from dataclasses import replace

import pytest

from benchmarks.collectives import step
from benchmarks.scaling import count
from sparing.base.config import Config, ModelConfig, ParallelConfig, PrecisionConfig, TrainConfig, UserError
from sparing.base.config_file import build, read_recipe
from sparing.base.config_limits import checked
from sparing.budget.memory import PROCESS_BYTES
from sparing.budget.ranks import held, sent, sent_by_all

MODEL = ModelConfig(
    vocab_size=96, hidden_size=32, num_layers=2, num_dense_layers=1, intermediate_size=64, num_heads=2, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, n_routed_experts=8, moe_intermediate_size=32, mtp_depth=1,
    n_group=4, topk_group=2,
)  # fmt: skip
TRAIN = TrainConfig(
    seq_len=16,
    batch_size=8,
    micro_batch_size=1,
    dtype="float32",
    kernels="plain",
    threads=1,
    replicas=1,
    compile=False,
    document_mask=False,
)


CONFIG = Config(model=MODEL, train=TRAIN)
LAYOUTS = {
    "nothing": (ParallelConfig("nothing"), {}),
    "optimizer": (ParallelConfig("optimizer"), {}),
    "experts": (ParallelConfig("optimizer", 2), {"dtype": "bfloat16", "recompute": True}),
    "each alone": (ParallelConfig("optimizer", 4), {}),
    "weights": (ParallelConfig("weights"), {"micro_batch_size": 2}),
    "weights and experts": (ParallelConfig("weights", 2), {"recompute": True}),
    "stages": (ParallelConfig("optimizer", stages=2), {"dtype": "bfloat16"}),
    "stages and experts": (ParallelConfig("optimizer", 2, 2, "zbv"), {"recompute": True}),
}


def model_of(layout: ParallelConfig) -> ModelConfig:
    """Two layers, or one for each chunk of a pipeline."""
    return replace(MODEL, num_layers=2 if layout.stages == 1 else 4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_a_rank_sends_and_holds(name):
    """The last of four ranks, on the meta device: at the collectives what the formula says, to the byte; as many weights; and no more
    moments than the rank that has most."""
    layout, change = LAYOUTS[name]
    config = replace(CONFIG, model=model_of(layout), parallel=layout, train=replace(TRAIN, **change))
    last = layout.stages - 1
    one, memory = step(config, 3, 4), held(config, 4, "plain", last)
    assert one.counter.by_name() == pytest.approx(sent(config, 4, last), abs=0.5)
    assert one.moments <= memory.optimizer + 4 * 64  # numbers of steps
    masters = layout.shard == "weights"  # of which this rank has its own
    assert memory.weights == pytest.approx(one.weights, rel=0.2 if masters else 0.01)


WIDE = replace(
    MODEL, hidden_size=512, intermediate_size=2048, moe_intermediate_size=512, num_heads=8, vocab_size=4096, q_lora_rank=128,
    kv_lora_rank=128, max_position_embeddings=512,
)  # fmt: skip
"""Wide enough that what layers keep is most of the memory."""


@pytest.mark.slow
@pytest.mark.parametrize(("shard", "experts"), [("nothing", 1), ("optimizer", 1), ("optimizer", 4), ("weights", 1), ("weights", 4)])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_peak(shard, experts, recompute):
    """Of rank 0, with the plain kernels, which are what runs on the meta device; it owns the largest tensors."""
    model = replace(WIDE, num_layers=6, n_routed_experts=32)
    train = replace(TRAIN, seq_len=512, dtype="bfloat16", recompute=recompute)
    config = Config(model=model, train=train, parallel=ParallelConfig(shard, experts))
    planned = held(config, 4, "plain").total - PROCESS_BYTES["cpu"]
    assert planned == pytest.approx(step(config, 0, 4).peak, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "rank", "recompute"), [("1f1b", 0, False), ("1f1b", 3, True), ("zbv", 0, False), ("interleaved", 0, True)]
)
def test_the_peak_of_a_pipeline(schedule, rank, recompute):
    """Of four ranks that are two stages, whose chunks are one or two layers wide."""
    model = replace(WIDE, num_layers=5, n_routed_experts=8)
    train = replace(TRAIN, seq_len=512, dtype="bfloat16", recompute=recompute)
    config = Config(model=model, train=train, parallel=ParallelConfig("optimizer", stages=2, schedule=schedule))
    planned = held(config, 4, "plain", rank // 2).total - PROCESS_BYTES["cpu"]
    assert planned == pytest.approx(step(config, rank, 4).peak, rel=0.2)


@pytest.mark.slow
def test_what_two_real_ranks_send():
    """By gloo, both together; experts are chosen by their routers."""
    configs = [
        replace(CONFIG, model=model_of(layout), parallel=layout, train=replace(TRAIN, **change)) for layout, change in LAYOUTS.values()
    ]
    configs += [
        replace(CONFIG, model=model_of(layout), parallel=layout, train=TRAIN)
        for layout in (ParallelConfig("optimizer", stages=2, schedule=schedule) for schedule in ("interleaved", "dualpipev"))
    ]
    fitting = [config for config in configs if config.parallel.experts * config.parallel.stages <= 2]
    for config, counted in zip(fitting, count(fitting), strict=True):
        assert counted == {kind: pytest.approx(bytes_) for kind, bytes_ in sent_by_all(config, 2).items()}


def test_weights_in_pieces_are_float32():
    """FSDP2 cannot put a layer of two types together."""
    with pytest.raises(UserError, match="weights that are cut into pieces are float32; or shard = optimizer"):
        checked(replace(CONFIG, precision=PrecisionConfig(weights="bfloat16"), parallel=ParallelConfig("weights")))


def test_a_cluster_of_deepseek_v3():
    """Nothing but formulas: what fits into 80 GB without stages, and what ranks send."""
    read = read_recipe("cluster")
    config = build(Config, dict(read.wishes))
    config = replace(config, train=replace(config.train, device="cuda"), parallel=ParallelConfig("weights", 256))
    assert 55e9 < held(config, 2048).total < 75e9
    whole = replace(config, parallel=ParallelConfig("optimizer", 64))
    assert held(whole, 2048).total > 200e9
    tokens = config.train.batch_size * config.train.seq_len / 2048
    rows = 59 * tokens * 8  # mixtures, the module that drafts among them; experts of a token
    there_and_back = 3 * 2 * rows * 7168 * 2  # forward, forward again, backward
    assert sent(whole, 2048)["all_to_all"] == pytest.approx(there_and_back, rel=0.01)
    assert (
        sent(whole, 2048)["reduce"]
        == sent(whole, 2048)["broadcast"]
        == pytest.approx(4 * (671.03e9 + 11.61e9 - 59 * 63 / 64 * 11.274e9), rel=1e-3)
    )
