"""Numbers that no run can have are refused in one line that names them."""

from dataclasses import fields, replace

import pytest

from sparing.base.config import Config, DataConfig, ModelConfig, OptimConfig, PrecisionConfig, TrainConfig, UserError
from sparing.base.config_file import check_section, read_config, write_config
from sparing.base.config_limits import RANGES, checked, contradiction


@pytest.mark.parametrize(
    "section, key, value, said",
    [
        ("model", "hidden_size", 0, "model.hidden_size must be at least 1, not 0"),
        ("model", "rope_theta", 0.0, "model.rope_theta must be more than 0, not 0.0"),
        ("train", "batch_size", -4, "train.batch_size must be at least 1, not -4"),
        ("optim", "decay", 2.0, "optim.decay must be at most 1, not 2.0"),
        ("data", "holdout_fraction", 1.0, "data.holdout_fraction must be at most 0.5, not 1.0"),
    ],
)
def test_ranges(section, key, value, said):
    with pytest.raises(UserError, match=f"^{said}$"):
        check_section({section: {key: value}}, Config, "")
    assert check_section({section: {key: 0.5 if isinstance(value, float) else 3}}, Config, "")


def test_every_range_is_of_a_field_whose_default_is_inside():
    for kind in (ModelConfig, OptimConfig, TrainConfig, DataConfig, PrecisionConfig):
        defaults = {field.name: field.default for field in fields(kind)}
        for key, (least, most) in RANGES[kind.__name__].items():
            assert defaults[key] is None or least <= defaults[key] <= most, key


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"n_routed_experts": 0}, "n_routed_experts is 0, expected at least 1; .*num_dense_layers 6"),
        ({"num_experts_per_tok": 17}, "17.*more than the 16 experts"),
        ({"n_group": 3}, "16 experts in 3 groups of which 1"),
        ({"n_group": 4, "num_experts_per_tok": 5}, "more than the 4 experts"),
        ({"attention": "gqa", "num_heads": 3, "num_kv_heads": 2}, r"num_heads \(3\) is not a multiple of .*num_kv_heads \(2\)"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7, expected an even"),
    ],
)
def test_contradictions(changes, said, tmp_path):
    config = Config(model=replace(ModelConfig(), **changes))
    with pytest.raises(UserError, match=said):
        checked(config)
    (tmp_path / "config.toml").write_text(write_config(config))
    with pytest.raises(UserError, match=f"config.toml: .*{said}"):
        read_config(tmp_path / "config.toml")


def test_what_goes_together():
    assert contradiction(ModelConfig()) is None
    assert contradiction(replace(ModelConfig(), num_dense_layers=6, n_routed_experts=0)) is None
    for changes in ({"seq_len": 1024}, {"seq_len": 512, "short_seq_len": 300}):
        with pytest.raises(UserError, match=r"^train\.seq_len"):
            checked(Config(train=replace(TrainConfig(), **changes)))
