import dataclasses
import math
import sys
import tomllib
from dataclasses import replace
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.base.config import Config, DataConfig, ModelConfig, UserError, YarnConfig
from sparing.base.config_file import Wishes, nearest, nested, options, parse_text, read_config, read_recipe, unwrap, write_config
from sparing.base.config_limits import RANGES

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def scalars(kind, least=-math.inf, most=math.inf):
    if kind is int:
        return st.integers(max(least, -(2**62)), min(most, 2**62))
    floats = st.floats(max(least, -sys.float_info.max), min(most, sys.float_info.max), allow_nan=False)
    return {bool: st.booleans(), float: floats, str: TEXT}[kind]


def values(hint, bounds=()):
    kind, optional = unwrap(hint)
    if dataclasses.is_dataclass(kind):
        some = configs(kind)
    elif get_origin(kind) is Literal:
        some = st.sampled_from(get_args(kind))
    elif get_origin(kind) is tuple:
        some = st.lists(scalars(get_args(kind)[0]), max_size=3).map(tuple)
    else:
        some = scalars(kind, *bounds)
    return st.none() | some if optional else some


def configs(kind):
    ranges = RANGES.get(kind.__name__, {})
    return st.builds(kind, **{name: values(hint, ranges.get(name, ())) for name, hint in get_type_hints(kind).items()})


@settings(deadline=None)
@given(configs(Config), st.dictionaries(st.sampled_from(sorted(options())), TEXT))
def test_every_config_survives_the_file(tmp_path_factory, config, reasons):
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(write_config(config, reasons), encoding="utf-8")
    read = read_recipe(path).wishes.config()
    assert replace(read, budget=config.budget) == config  # sizes drawn at random are no model: `read_config` would say so


def test_reasons_stand_behind_their_values():
    text = write_config(Config(), {"model.num_layers": "6: the widest that\nfits", "optim.lr": "LAB 3"})
    assert "num_layers = 6  # 6: the widest that fits\n" in text
    assert "lr = 0.02  # LAB 3\n" in text
    assert tomllib.loads(text)["model"]["num_layers"] == 6


def test_none_is_written_where_it_is_not_the_default(tmp_path):
    config = Config(model=ModelConfig(q_lora_rank=None, yarn=YarnConfig(factor=2)), data=DataConfig(paths=("a b", 'ü"\\\n')))
    path = tmp_path / "config.toml"
    path.write_text(write_config(config), encoding="utf-8")
    assert 'q_lora_rank = "none"' in path.read_text(encoding="utf-8")
    assert read_config(path) == config
    assert read_recipe(path).wishes["model"]["q_lora_rank"] is None


def test_wishes_are_what_was_set_and_nothing_else(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('budget = "20m"\n[model]\nnum_layers = 8\nyarn.factor = 4\n[optim]\nlr = 1\n[data]\npaths = ["x"]\n')
    wishes, budget, _ = read_recipe(path)
    assert budget == "20m"
    assert wishes == {"model": {"num_layers": 8, "yarn": {"factor": 4.0}}, "optim": {"lr": 1.0}, "data": {"paths": ("x",)}}
    assert type(wishes["optim"]["lr"]) is float


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[modle]\n", "r.toml: modle: unknown key; nearest: model"),
        ("[model]\nnum_layer = 3\n", "r.toml: model.num_layer: unknown key; nearest: num_layers"),
        ("[model.yarn]\nfaktor = 3\n", "model.yarn.faktor: unknown key; nearest: factor"),
        ("[model]\nnum_layers = 3.0\n", "model.num_layers: 3.0 is not a whole number"),
        ("[model]\nnum_layers = true\n", "model.num_layers: True is not a whole number"),
        ('[model]\nnum_layers = "none"\n', "model.num_layers: 'none' is not a whole number"),
        ('[model]\nattention = "mha"\n', "model.attention: 'mha' is not one of mla, gqa; nearest: mla"),
        ("[optim]\nlr = nan\n", "optim.lr: nan is not a number"),
        ("[train]\ncompile = 1\n", "train.compile: 1 is not a true|false|none"),
        ("[data]\npaths = [1]\n", "data.paths: [1] is not a list of text"),
        ("[data]\ntext_key = 3\n", "data.text_key: 3 is not text"),
        ("model = 3\n", "model: 3 is not a section"),
        ("budget = 3\n", "budget: 3 is not a section"),
        ("[model\n", "not valid TOML"),
        (None, "No such file"),
    ],
)
def test_a_bad_recipe_is_one_clear_line(tmp_path, text, says):
    path = tmp_path / "r.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_recipe(path)
    assert says in str(caught.value)
    assert "r.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_utf8(tmp_path):
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is UTF-16 text; save it as UTF-8"):
        read_recipe(tmp_path / "r.toml")


def test_a_path_that_no_toml_can_hold_is_the_users_error():
    with pytest.raises(UserError, match=r"data\.paths"):
        write_config(Config(data=DataConfig(paths=("\udcff",))))


@pytest.mark.parametrize(
    ("name", "words", "value"),
    [
        ("model.num_layers", ["8"], 8),
        ("data.max_tokens", ["50e6"], 50_000_000),
        ("data.max_tokens", ["1_000"], 1000),
        ("model.q_lora_rank", ["none"], None),
        ("model.yarn", ["none"], None),
        ("train.compile", ["False"], False),
        ("optim.lr", ["3e-4"], 3e-4),
        ("data.paths", ["a", "b"], ("a", "b")),
        ("data.tokenizer", ["none"], None),
        ("model.attention", ["gqa"], "gqa"),
    ],
)
def test_words_of_the_command_line(name, words, value):
    got = parse_text(words, options()[name][0], name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("word", ["x", "1.5", "inf", "nan", "1e400", "", "--"])
def test_words_that_are_no_whole_number(word):
    with pytest.raises(UserError, match="is not a whole number"):
        parse_text([word], int, "--x")


def test_options_carry_the_explanations_of_config():
    assert options()["model.num_layers"][2].startswith("Decoder layers")
    assert options()["model.yarn.factor"][1] == 40.0
    assert "model" not in options()


def test_dotted_names_replace_what_is_no_section():
    assert nested({"model.yarn": None, "model.yarn.factor": 2.0}) == {"model": {"yarn": {"factor": 2.0}}}


def test_wishes_are_merged_the_later_winning_and_checked_where_they_were_not():
    recipe = Wishes.of({"model": {"num_layers": 3, "yarn": {"factor": 2}}, "train": {"seed": 1}}, where="r.toml: ")
    wishes = Wishes.of(recipe, {"model": {"num_layers": 4, "yarn": {"beta_fast": 16.0}}}, None)
    assert wishes == {"model": {"num_layers": 4, "yarn": {"factor": 2.0, "beta_fast": 16.0}}, "train": {"seed": 1}}
    assert recipe.value("model.num_layers") == 3 and not recipe.sets("model.hidden_size") and recipe.value("optim.lr", 7) == 7
    with pytest.raises(UserError, match=r"^train\.seq_len must be at least 1"):
        Wishes.of(recipe, {"train": {"seq_len": 0}})
    with pytest.raises(UserError, match=r"^modle: unknown key"):
        Wishes.of({"modle": {}})


def test_nearest():
    assert nearest("leraning_rate", ["lr", "learning_rate", "rate"]) == "learning_rate"
