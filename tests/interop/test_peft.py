"""Adapters to and from PEFT: both compute the same."""

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparing import api
from sparing.base.config import AdapterConfig, Config, StartConfig, UserError
from sparing.base.config_file import write_config
from sparing.base.run import RunFolder, weights_sha256, write_tensors
from sparing.data.chat import template_text
from sparing.interop.peft import import_peft
from sparing.model.low_rank import add_low_rank, learned
from sparing.model.transformer import Transformer

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=["llama", "glm4_moe", "deepseek_v3"])
def base(request, random_model, tmp_path_factory):
    """(a run, the same as a Hugging Face folder)."""
    from tests.interop.conftest import SMALL

    config = replace(SMALL, n_routed_experts=4, n_group=1, num_layers=2, yarn=None, max_position_embeddings=512)
    if request.param != "deepseek_v3":
        config = replace(config, attention="gqa", num_heads=4, num_kv_heads=2, head_dim=8)
    if request.param == "llama":
        config = replace(config, num_dense_layers=2, tie_word_embeddings=True)
    root = tmp_path_factory.mktemp(request.param)
    run = RunFolder.create(root / "base")
    write_tensors(run.weights_file, random_model(config).state_dict())
    run.config_file.write_text(write_config(Config(model=config)))
    api.export(str(run), "hf", str(root / "hf"))
    return run, root / "hf"


@pytest.fixture
def adapted(base, tmp_path):
    """An adapter run of rank 3, all of whose factors are filled."""
    parent, run, adapter = base[0], RunFolder.create(tmp_path / "run"), AdapterConfig(3, 6.0, "float32")
    config = api.read_config(parent.config_file).model
    model, generator = Transformer(config), torch.Generator().manual_seed(5)
    add_low_rank(model, adapter, 0)
    factors = {name: torch.randn(t.shape, generator=generator) * (0.3 if "lora_B" in name else 0.2) for name, t in learned(model).items()}
    run.adapter_file.parent.mkdir()
    write_tensors(run.adapter_file, factors)
    start = StartConfig(str(parent.path), weights_sha256(parent))
    run.config_file.write_text(write_config(Config(model=config, start=start, adapter=adapter)))
    return run


def peft_logits(hf, adapter, tokens) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager")
        before = model(tokens).logits
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
        trained = {name for name, _ in model.named_parameters() if "lora_" in name}
        stored = load_file(adapter / "adapter_model.safetensors")
        assert {name.replace(".default", "") for name in trained} == set(stored), "PEFT has a place for each tensor"
        logits = model(tokens).logits
    assert (logits - before).abs().max() > 0.1 * before.abs().max()
    return logits


def apart(a, b) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_out(base, adapted, tokens, tmp_path):
    result = api.export(str(adapted), "peft", str(tmp_path / "peft"))
    assert result["format"] == "peft" and not result["notes"]
    assert apart(peft_logits(base[1], tmp_path / "peft", tokens), api.load(str(adapted)).logits(tokens)) < 1e-4
    with pytest.raises(UserError, match="not empty"):
        api.export(str(adapted), "peft", str(tmp_path / "peft"))
    with pytest.raises(UserError, match="is no adapter"):
        api.export(str(base[0]), "peft", str(tmp_path / "other"))
    api.import_(str(tmp_path / "peft"), str(tmp_path / "back"), base=str(base[0]))
    before, after = (load_file(run / "adapter/adapter_model.safetensors") for run in (tmp_path / "run", tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_the_chat_template_goes_with_the_adapter(base, adapted, tmp_path):
    """PEFT's own folders have none: such an adapter was trained in the form of its base, and has to be asked in it."""
    parent, peft = base[0], tmp_path / "peft"
    template = parent.path / "chat_template.jinja"
    (adapted.path / "chat_template.jinja").write_text("own {{ messages[0].content }}")
    template.write_text("base {{ messages[0].content }}")
    try:
        api.export(str(adapted), "peft", str(peft))
        api.import_(str(peft), str(tmp_path / "own"), base=str(parent))
        (peft / "chat_template.jinja").unlink()
        api.import_(str(peft), str(tmp_path / "base's"), base=str(parent))
    finally:
        template.unlink()
    assert [template_text(RunFolder(tmp_path / name)).split()[0] for name in ("own", "base's")] == ["own", "base"]
    with pytest.raises(UserError, match=r"--dtype int8.*factors stay float32"):
        api.import_(str(peft), str(tmp_path / "x"), "int8", str(parent))


@pytest.mark.parametrize("kind", ["all", "queries", "rslora"])
def test_in(base, tokens, tmp_path, kind):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    # transformers' mixtures get gate and up as one update of twice the rank and alpha, and dense layers none.
    targets = ["q_proj", "q_b_proj"] if kind == "queries" else "all-linear"
    mixture = "moe_intermediate_size" in (base[1] / "config.json").read_text()
    targets = r".*(_proj|_mqa)" if mixture and kind != "queries" else targets
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base[1], dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_rslora=kind == "rslora"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "peft")
    result = api.import_(str(tmp_path / "peft"), str(tmp_path / "run"), base=str(base[0]))
    assert result["rank"] == (6 if mixture and kind != "queries" else 3)
    assert apart(api.load(str(tmp_path / "run")).logits(tokens), peft_logits(base[1], tmp_path / "peft", tokens)) < 1e-4
    if kind == "queries":
        assert "the others begin with none" in result["notes"][-1]
    with pytest.raises(UserError, match="--base RUN"):
        api.import_(str(tmp_path / "peft"), str(tmp_path / "run2"))


@pytest.mark.parametrize("base", ["glm4_moe"], indirect=True)
def test_single_experts_as_transformers_4_had_them(base, adapted, tokens, tmp_path):
    config = api.read_config(base[0].config_file).model
    generator, stem = torch.Generator().manual_seed(1), "model.layers.1.mlp.experts"
    D, F, E = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    stored, weights = {}, load_file(base[0].weights_file)
    for e in range(E):
        for kind, (out, columns) in {"gate": (F, D), "up": (F, D), "down": (D, F)}.items():
            a, b = torch.randn(2, columns, generator=generator), torch.randn(out, 2, generator=generator)
            stored |= {f"base_model.model.{stem}.{e}.{kind}_proj.lora_{part}.weight": t for part, t in (("A", a), ("B", b))}
            matrix = weights[f"{stem}.down_proj" if kind == "down" else f"{stem}.gate_up_proj"][e]
            rows = {"gate": slice(0, F), "up": slice(F, 2 * F), "down": slice(0, D)}[kind]
            matrix[rows] += 1.5 * b @ a
    (tmp_path / "peft").mkdir()
    save_file(stored, tmp_path / "peft/adapter_model.safetensors")
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3}))
    api.import_(str(tmp_path / "peft"), str(tmp_path / "in"), base=str(base[0]))
    whole = Transformer(config)
    whole.load_state_dict(weights)
    assert apart(api.load(str(tmp_path / "in")).logits(tokens), whole(tokens).detach()) < 1e-5


@pytest.mark.parametrize("base", ["llama"], indirect=True)
@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
        ({"lora_alpha": "x"}, "lora_alpha"),
        ({"alpha_pattern": {"[": 3}}, "alpha_pattern"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern 'q_proj': 0"),
        ({"lora_alpha": 0}, "lora_alpha is 0, expected more than 0"),
    ],
)
def test_what_is_no_plain_update_is_refused(base, adapted, tmp_path, change, complaint):
    api.export(str(adapted), "peft", str(tmp_path / "peft"))
    settings = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(UserError, match=complaint):
        api.import_(str(tmp_path / "peft"), str(tmp_path / "out"), base=str(base[0]))
    assert not (tmp_path / "out").exists()


def test_tensors_that_have_no_place_are_refused(base, adapted, tmp_path):
    config = api.read_config(base[0].config_file).model
    api.export(str(adapted), "peft", str(tmp_path / "peft"))
    file = tmp_path / "peft/adapter_model.safetensors"
    whole = load_file(file)
    some = "base_model.model.model.layers.0.self_attn.o_proj.lora_{}.weight"
    for stored, complaint in (
        (whole | {f"base_model.model.lm_head.lora_{part}.weight": torch.ones(3, 3) for part in "AB"}, "updates lm_head"),
        (whole | {some.format("A"): torch.ones(3, 40)}, "another base"),
        ({name: t for name, t in whole.items() if name != some.format("A")}, "lora_B alone"),
        (whole | {"base_model.model.model.norm.weight": torch.ones(32)}, "no factor"),
        (whole | {some.format("A"): torch.ones(3, 32, dtype=torch.int8)}, "floats"),
        (whole | {some.format("A"): torch.ones(0, 32)}, "is empty"),
        (whole | {some.format("A"): torch.full((3, 32), torch.nan)}, "has NaN or infinity"),
    ):  # fmt: skip
        save_file(stored, file)
        with pytest.raises(UserError, match=complaint):
            import_peft(tmp_path / "peft", config)
    file.write_bytes(file.read_bytes()[:900])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        import_peft(tmp_path / "peft", config)
    shutil.move(file, tmp_path / "peft/adapter_model.bin")
    with pytest.raises(UserError, match="a pickle, which is not loaded"):
        import_peft(tmp_path / "peft", config)
    with pytest.raises(UserError, match="is no PEFT adapter"):
        api.import_(str(base[1]), str(tmp_path / "out"), base=str(base[0]))
