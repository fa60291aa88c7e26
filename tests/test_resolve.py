"""Deriving a configuration: every derived value has a reason, wishes win, more budget never buys a smaller model."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from sparing.base.config import Budget, ParallelConfig, TokensConfig, UserError
from sparing.base.config_file import Wishes, options
from sparing.base.hardware import Machine
from sparing.budget.flops import parameters, train_flops
from sparing.budget.ranks import bubble_of, chunk_spans, fitting_stages, needed
from sparing.interop.hf_config import to_hf
from sparing.parallel.schedules import idle
from sparing.planning.places import Place
from sparing.resolve import resolve

LAPTOP = Machine("Linux", "some CPU", 2, 4, 16 << 30, formats={"float32": 1e11, "bfloat16": 2e11})
BOOKS = SimpleNamespace(train_bytes=78e6, bytes=80e6)
PEAK = 6e11


def derive(budget="300s", wishes=None, machine=LAPTOP, facts=BOOKS, ranks=1):
    from sparing.budget.units import parse_budget

    def speed(config):
        return 0.42 * PEAK / train_flops(config.model, config.train.seq_len)

    return resolve(Wishes.of(wishes), parse_budget(budget), machine, facts, speed, ranks)


def test_more_time_never_buys_a_smaller_model():
    sizes = [parameters(derive(budget).config.model).active for budget in ("60s", "5m", "20m", "2h", "20h", "100h")]
    assert sizes == sorted(sizes) and sizes[-1] > 10 * sizes[0]


def test_several_ranks_have_as_many_rows_each_and_divide_the_optimizer():
    alone, three = derive("20m"), derive("20m", ranks=3)
    assert alone.config.parallel.shard == "nothing" and "parallel.shard" not in alone.reasons
    assert three.config.parallel.shard == "optimizer" and three.config.train.batch_size % 3 == 0
    assert {"parallel.shard", "train.batch_size"} <= three.reasons.keys()
    assert derive("20m", {"parallel": {"shard": "weights"}}, ranks=2).config.train.replicas == 1


@pytest.mark.parametrize(
    ("wishes", "says"),
    [
        ({"train": {"batch_size": 2}}, "train.batch_size 2: 4 ranks need a row each; nearest: 4"),
        (
            {"parallel": {"experts": 3}, "model": {"num_dense_layers": 1}},
            "must divide 4 ranks and 16 experts of a layer; nearest: 2",
        ),
        ({"parallel": {"experts": 2}, "model": {"num_dense_layers": 99}}, "experts 2: this model is dense"),
        ({"parallel": {"experts": 2, "shard": "nothing"}}, "choose shard = optimizer"),
        ({"parallel": {"stages": 3}}, "stages 3 with schedule = 1f1b must divide 4 ranks, and needs 2 layers or more of 4; nearest: 2"),
        ({"parallel": {"stages": 4, "schedule": "zbv"}}, "must divide 4 ranks, and needs 7 layers or more of 4; nearest: 2"),
        ({"parallel": {"stages": 2}, "train": {"batch_size": 5}}, "batch_size 5: .* on 4 ranks cannot divide so many rows; nearest: 6"),
        (
            {"parallel": {"stages": 2, "schedule": "dualpipev"}, "train": {"batch_size": 16, "micro_batch_size": 4}},
            "micro_batch_size 4: .* cannot cut 8 rows into micro-batches of so many; nearest: 2",
        ),
        (
            {"parallel": {"stages": 2, "experts": 4}, "model": {"num_dense_layers": 1}},
            "must divide 2 ranks that hold the same layers and 16 experts of a layer; nearest: 2",
        ),
        ({"parallel": {"stages": 2, "shard": "weights"}}, "stages 2 goes with shard = optimizer, not weights"),
        ({"parallel": {"stages": 2}, "distill": {"on_policy": True}}, "a student that writes its own texts needs all weights"),
        ({"parallel": {"stages": 2}, "train": {"compile": True}}, "compile = true compiles the model as a whole"),
        ({"parallel": {"stages": 2}, "train": {"replicas": 2}}, "leave out train.replicas = 2"),
        ({"parallel": {"stages": 2}, "precision": {"linear": "int8"}}, "nearest: none, or stages = 1"),
    ],
)
def test_impossible_layouts_are_refused_with_the_nearest(wishes, says):
    with pytest.raises(UserError, match=says):
        derive("20m", wishes, ranks=4)


def test_pipelines_cut_layers_by_their_operations_and_batches_by_their_schedule():
    wishes = {"parallel": {"stages": 2, "schedule": "dualpipev"}, "train": {"batch_size": 32}, "model": {"num_layers": 8}}
    resolved = derive("20m", wishes, ranks=4)
    train = resolved.config.train
    assert (train.micro_batch_size, train.replicas, train.compile) == (2, 1, False) and "train.micro_batch_size" in resolved.reasons
    found = chunk_spans(resolved.config, 2)
    assert len(found) == 4 and len(found[-1]) < len(found[0])  # the last one has the head
    assert fitting_stages(resolved.config, 4) == fitting_stages(resolved.config, 2) == 2
    assert fitting_stages(resolved.config, 3) == fitting_stages(resolved.config, 1) == 1
    rows = derive("20m", {"parallel": {"stages": 4, "schedule": "zbv"}, "model": {"num_layers": 8}}, ranks=12).config.train.batch_size
    assert rows % 3 == 0 and rows >= 24
    waiting, longest = bubble_of(resolved.config, 4)
    assert waiting == idle("dualpipev", 2, 8) > 0 and 1 < longest < 1.5 and bubble_of(derive("20m", ranks=4).config, 4) == (0, 1)
    four, rows = Place(LAPTOP, None, "own", None, None, PEAK, ranks=4), replace(resolved.config, parallel=ParallelConfig("optimizer"))
    share = four.tokens_per_second(resolved.config) / four.tokens_per_second(rows)
    assert share == pytest.approx((1 - waiting) / longest)


def test_a_layout_is_chosen_where_a_rank_has_too_little_memory():
    """Nothing changes where it fits. Else one that does, with its reason; what the user says stands; and where none fits, one line."""
    wishes = {"model": {"n_routed_experts": 16, "num_layers": 7, "hidden_size": 512}, "train": {"dtype": "float32"}}
    smallest = {"train": {"micro_batch_size": 1, **wishes["train"]}}
    whole = derive("20m", wishes, ranks=4).config
    assert (whole.parallel.shard, whole.parallel.experts, whole.parallel.stages) == ("optimizer", 1, 1)
    least = needed(derive("20m", wishes | smallest, ranks=4).config, 4).total
    tight = replace(LAPTOP, memory_bytes=int(0.97 * least / 0.95))
    chosen = derive("20m", wishes, tight, ranks=4)
    p, reasons = chosen.config.parallel, chosen.reasons
    assert p.shard == "weights" or p.experts > 1 or p.stages > 1
    divided = [f"parallel.{name}" for name, value in vars(p).items() if value not in (1, "1f1b")]
    assert all(re.search(r"a rank needs .* GB, and .* GB are there for each of 4 ranks", reasons[name]) for name in divided)
    assert needed(replace(chosen.config, train=replace(chosen.config.train, micro_batch_size=1)), 4).total <= 0.97 * least
    assert derive("20m", wishes | {"parallel": {"shard": "optimizer"}}, tight, ranks=4).config.parallel == ParallelConfig("optimizer")
    with pytest.raises(UserError, match=r"^training needs .* with .* no layout fits; nearest: (--train.recompute true|more ranks, .*)$"):
        derive("20m", wishes, replace(LAPTOP, memory_bytes=int(4.4e8)), ranks=4)


def test_reasons_name_real_fields_and_spare_what_was_wished():
    everything = derive().reasons
    assert everything and all(name in options() for name in everything)
    wished = derive(wishes={"model": {"hidden_size": 96, "vocab_size": 1024}, "train": {"batch_size": 4}})
    assert wished.config.model.hidden_size == 96 and wished.config.model.vocab_size == 1024 and wished.config.train.batch_size == 4
    assert not {"model.hidden_size", "model.vocab_size", "train.batch_size"} & wished.reasons.keys()


@pytest.mark.parametrize("budget", ["2m", "20m", "5h"])
@pytest.mark.parametrize("moe", [False, True])
def test_every_export_stays_open(budget, moe):
    """Row lengths multiples of 32 (GGUF), queries compressed, one group, and a config.json that can be written."""
    wishes = {"model": {"n_routed_experts": 8, "mtp_depth": 1}} if moe else {}
    m = derive(budget, wishes).config.model
    assert (m.num_dense_layers < m.num_layers) == moe or not moe
    widths = (m.hidden_size, m.q_lora_rank, m.kv_lora_rank, m.num_heads * m.v_head_dim, m.moe_intermediate_size, m.intermediate_size)
    assert all(width % 32 == 0 for width in widths)
    assert m.n_group == 1
    assert to_hf(m, "float32", TokensConfig())[0]["model_type"] == "deepseek_v3"


def test_a_token_budget_and_a_flop_budget_buy_what_they_say():
    config = derive("7Mtok").config
    assert config.data.max_tokens is None or config.data.max_tokens >= 7e6
    flops = train_flops(config.model, config.train.seq_len)
    assert parameters(derive(f"{7e6 * flops:.4g}flop").config.model).active == parameters(config.model).active


@pytest.mark.parametrize("budget", ["1tok", "4095tok", "1e6flop", "1e9flop"])
def test_a_budget_below_one_step_is_refused_with_the_least_that_is_not(budget):
    with pytest.raises(UserError, match=f"^budget {budget.replace('e6', 'M').replace('e9', 'G')} is less than one batch; ") as error:
        derive(budget)
    least = str(error.value).rsplit(" ", 1)[1]
    assert derive(least).config.train.batch_size * derive(least).config.train.seq_len == 4096


def test_only_as_many_tokens_as_the_plan_can_consume():
    config = derive("60s").config
    assert config.data.max_tokens and config.data.max_tokens < 10e6
    assert derive("20h").config.data.max_tokens is None  # the whole corpus is less than that


def test_hardware_decides_the_arithmetic():
    old = Machine("Linux", "old CPU", 2, 2, 8 << 30, formats={"float32": 1e11, "bfloat16": 1e9})
    assert derive(machine=old).config.train.dtype == "float32" and derive().config.train.dtype == "bfloat16"
    with pytest.raises(UserError, match="no CUDA device"):
        derive(wishes={"train": {"device": "cuda"}})


def test_money_is_refused_in_one_line():
    with pytest.raises(UserError, match="prices"):
        resolve(Wishes(), Budget(5.0, "usd"), LAPTOP, BOOKS, lambda config: 1e4)
