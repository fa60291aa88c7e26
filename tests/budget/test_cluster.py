"""Published runs: from configuration and kernel figures alone, and after one scalar was fitted on DeepSeek-V3's pre-training."""

from dataclasses import replace

import pytest

from sparing.base.config import ModelConfig, UserError
from sparing.base.config_file import build, presets, read_recipe
from sparing.budget.cluster import (
    EFFICIENCY,
    Layout,
    all_to_all,
    bubble_time,
    device_hours,
    kernels,
    layer_time,
    layout_of,
    memory_of,
    plan_stages,
    step_time,
)
from sparing.budget.flops import train_flops


def published(name):
    """(model, sequence, batch, [plan] section, layout) of a preset."""
    wishes, _, section = read_recipe(name)
    return (
        build(ModelConfig, wishes["model"]),
        wishes["train"]["seq_len"],
        wishes["train"]["batch_size"],
        section,
        layout_of(section["layout"], ""),
    )


def hours_a_trillion(name, efficiency=1.0):
    c, seq_len, batch, _, layout = published(name)
    return device_hours(c, 1e12, seq_len, batch, layout, efficiency)


def pretraining_v3(efficiency=1.0):
    c, seq_len, batch, section, layout = published("deepseek-v3")
    ramp = section["stage"][0]
    rest = device_hours(c, section["tokens"] - ramp["tokens"], seq_len, batch, layout, efficiency)
    return rest + device_hours(c, ramp["tokens"], seq_len, ramp["batch_size"], layout, efficiency)


def test_v3_with_nothing_fitted():
    """2.664 M H800-hours (arXiv 2412.19437 table 1), to 20 %."""
    assert pretraining_v3() == pytest.approx(2.664e6, rel=0.20)


def test_the_efficiency_is_what_v3_says():
    assert pretraining_v3(EFFICIENCY) == pytest.approx(2.664e6, rel=0.002)


@pytest.mark.parametrize(
    ("name", "hours"),
    [("deepseek-v2", 172.8e3), ("deepseek-67b", 300.6e3), ("llama-3.1-405b", 30.84e6 / 15.6)],
)
def test_other_published_runs_after_the_fit(name, hours):
    """GPU-hours per trillion tokens: arXiv 2405.04434 §3.2.3; Llama 3.1's model card."""
    assert hours_a_trillion(name, EFFICIENCY) == pytest.approx(hours, rel=0.25)


def test_v3s_bill():
    """2.788 M hours, $5.576 M; the context extension's 119 K on its own (table 1). Arithmetic after the fit; post-training is an input."""
    c, seq_len, batch, section, _ = published("deepseek-v3")
    plan = plan_stages(c, seq_len, batch, section)
    assert plan["device_hours"]["value"] == pytest.approx(2.788e6, rel=0.05)
    assert plan["cost_usd"]["value"] == pytest.approx(5.576e6, rel=0.05)
    extension = sum(row["device_hours"]["value"] for name, row in plan["stages"].items() if name.startswith("context"))
    assert extension == pytest.approx(119e3, rel=0.40)
    assert plan["parameters"]["total"]["value"] == pytest.approx(671.03e9, rel=1e-3)
    assert plan["kv_cache_bytes_per_token"]["value"] == 70_272
    assert plan["memory_bytes"]["total"]["value"] < 80e9  # it ran there


def test_two_thousand_instead_of_sixteen_thousand():
    """A dense 405 B model in the days that V3 took, on the same tokens, needs about eight times as many devices."""
    c, seq_len, _, section, layout = published("deepseek-v3")
    days = pretraining_v3(EFFICIENCY) / layout.devices / 24
    dense = hours_a_trillion("llama-3.1-405b", EFFICIENCY) * section["tokens"] / 1e12
    assert 40 < days < 70
    assert dense / 24 / days == pytest.approx(16_000, rel=0.5)
    llama = published("llama-3.1-405b")[0]
    assert train_flops(llama, 8192) / train_flops(c, seq_len) == pytest.approx(2448 / 250, rel=0.1)  # arXiv 2505.09343 table 2


def test_bubbles():
    """DeepSeek-V3 table 2, with F = 1, B = 2 (weights 1 of it)."""
    shape = Layout(devices=64, pipeline=8)
    assert bubble_time(shape, 1, 2, 1) == 7 * 3
    assert bubble_time(replace(shape, virtual=4), 1, 2, 1) == 7 * 3 / 4
    assert bubble_time(replace(shape, schedule="zb"), 1, 2, 1) == 7 * (1 + 2 - 2)
    assert bubble_time(replace(shape, schedule="dualpipe"), 1, 2, 1) == 3 * (3 + 2 - 3)
    assert bubble_time(Layout(devices=1), 1, 2, 1) == 0


def test_more_micro_batches_less_bubble():
    c, seq_len, batch, _, layout = published("deepseek-v3")
    many, few = step_time(c, seq_len, batch, layout), step_time(c, seq_len, batch / 5, layout)
    assert few.bubble / few.work == pytest.approx(5 * many.bubble / many.work)
    assert layer_time(c, seq_len, layout).exposed == 0  # hidden behind computation, as the report says
    assert layer_time(c, seq_len, replace(layout, schedule="zb")).exposed > 0


def test_all_to_all_goes_to_at_most_the_allowed_nodes():
    c, _, _, _, layout = published("deepseek-v3")
    rates = kernels("h800")
    four = all_to_all(c, layout, rates, 1.0)
    assert four == pytest.approx(2 * 4 * 7168 * (1 / 51e9 + 2 / 50e9))
    anywhere = all_to_all(replace(c, n_group=1, topk_group=1), layout, rates, 1.0)
    assert anywhere == pytest.approx(2 * four)  # eight experts on eight nodes
    assert all_to_all(c, replace(layout, expert=1), rates, 1.0) == 0


def test_faster_devices_and_more_of_them():
    c, seq_len, batch, _, layout = published("deepseek-67b")
    assert device_hours(c, 1e12, seq_len, batch, replace(layout, machine="b200")) < 0.6 * device_hours(c, 1e12, seq_len, batch, layout)
    assert step_time(c, seq_len, batch, replace(layout, devices=1024)).total < 0.7 * step_time(c, seq_len, batch, layout).total


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"devices": 2047}, "2047 devices cannot hold 16 stages x 64; nearest: 2048"),
        ({"machine": "a100"}, "a100 has no fp8 products"),
        ({"machine": "h900"}, "unknown machine 'h900'; nearest: h[18]00"),
    ],
)
def test_layouts_that_cannot_be(change, says):
    c, seq_len, batch, _, layout = published("deepseek-v3")
    with pytest.raises(UserError, match=says):
        step_time(c, seq_len, batch, replace(layout, **change))


def test_plans_that_cannot_be():
    c, seq_len, batch, section, layout = published("deepseek-v3")
    with pytest.raises(UserError, match=r"no micro-batch for each of 128 ranks; nearest batch: 128"):
        step_time(c, seq_len, 64, layout)
    with pytest.raises(UserError, match="unknown key layot; nearest: layout"):
        plan_stages(c, seq_len, batch, {**section, "layot": {}})
    with pytest.raises(UserError, match="lacks tokens"):
        plan_stages(c, seq_len, batch, {"layout": section["layout"]})
    with pytest.raises(UserError, match=r"on a device of 80 GB; nearest: .* devices"):
        plan_stages(c, seq_len, batch, {**section, "layout": {"machine": "h800", "devices": 64, "expert": 8, "format": "fp8"}})


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_a_recipe(name):
    section = read_recipe(name).plan
    if "layout" in section:
        c, seq_len, batch, section, layout = published(name)
        plan = plan_stages(c, seq_len, batch, section)
        assert plan["device_hours"]["low"] < plan["device_hours"]["value"] < plan["device_hours"]["high"]
        assert sum(memory_of(c, seq_len, layout).values()) == pytest.approx(plan["memory_bytes"]["total"]["value"])
