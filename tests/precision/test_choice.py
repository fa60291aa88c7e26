"""precision.linear from the command line to the run: auto measures, wrong combinations are one line; FP8 blocks load in transformers."""

import json
from dataclasses import replace

import pytest
import torch
from tests.train import tiny

from sparing.base.config import PrecisionConfig, UserError
from sparing.base.hardware import machine
from sparing.kernels import int8
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer
from sparing.precision.eight_bit import install
from sparing.train import calibrate


def untrained(chosen) -> Transformer:
    model = Transformer(chosen.model)
    init_weights(model, 0)
    return model


def test_auto_takes_what_is_faster_and_within_the_budget(monkeypatch):
    if not int8.built():
        pytest.skip("no AVX512_VNNI here")
    chosen = replace(tiny.config(tiny.steps(1), dtype="bfloat16"), precision=PrecisionConfig(linear="auto"))
    model, batch = untrained(chosen), tiny.Counting(chosen).batch(0)
    speeds = iter([90.0, 120.0, 1.0, 1.0, 100.0, 100.0, 106.0, 1.0, 1.0, 102.0, 100.0, 120.0, 1.0, 1.0, 100.0])
    real = calibrate._speed
    monkeypatch.setattr(calibrate, "_speed", lambda *a, **k: (real(*a, **k), next(speeds))[1])  # its clock alone is replaced
    precision, why = calibrate.choose_products(model, chosen, batch)
    assert precision.linear == "int8" and "120 in int8, 100 in 16 bits" in why and "100% within" in why
    assert calibrate.choose_products(model, chosen, batch)[0].linear == "none"
    strict = replace(chosen, precision=replace(chosen.precision, error_budget=1e-6))
    precision, why = calibrate.choose_products(model, strict, batch)
    assert precision.linear == "none" and "within" in why and "100%" not in why
    assert all(getattr(m, "eight_bit", None) is None for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_nothing_faster_here(monkeypatch):
    chosen = replace(tiny.config(tiny.steps(1)), precision=PrecisionConfig(linear="auto"))
    precision, why = calibrate.choose_products(untrained(chosen), chosen, None)  # float32
    assert precision.linear == "none" and "no 8-bit arithmetic" in why


def test_what_does_not_go_together(tmp_path):
    run = tiny.new_run(tmp_path / "run")
    for changes, precision, words in [({"compile": True}, "int8", "train.compile"), ({}, "auto", "auto")]:
        chosen = replace(tiny.config(tiny.steps(1), **changes), precision=PrecisionConfig(linear=precision))
        with pytest.raises(UserError, match=words):
            tiny.fit(run, chosen, evaluate=None)


def test_calibration_does_not_compile_eight_bits():
    chosen = replace(tiny.config(tiny.steps(1), compile=None), precision=PrecisionConfig(linear="int8"))
    batch = tiny.Counting(chosen).batch(0)
    train, reasons = calibrate.choose(untrained(chosen), chosen, machine(), batch, 1.0)
    assert train.compile is False and "8-bit" in reasons["train.compile"]


@pytest.mark.slow
def test_the_command_line_to_the_end(tmp_path):
    """train with auto, then export in FP8 blocks, which transformers loads and reads as we do."""
    from transformers import AutoModelForCausalLM

    from sparing.cli import main as cli

    model = ["--model.hidden-size", "128", "--model.num-layers", "2", "--model.q-lora-rank", "128", "--model.kv-lora-rank", "64",
             "--model.num-heads", "2", "--model.qk-nope-head-dim", "64", "--model.qk-rope-head-dim", "64", "--model.v-head-dim", "64",
             "--model.intermediate-size", "128", "--model.moe-intermediate-size", "128", "--model.n-routed-experts", "4"]  # fmt: skip
    run, out = str(tmp_path / "run"), str(tmp_path / "hf")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of a text that is easy to learn\n" for i in range(4000)))
    line = ["train", "--data", str(text), "--budget", "40ktok", "--out", run, "--precision.linear", "auto", *model]
    assert cli.main(line) == 0
    config = (tmp_path / "run" / "config.toml").read_text()
    assert 'linear = "' in config and "tokens/s" in config.split('linear = "')[1].splitlines()[0]
    assert cli.main(["export", run, "--out", out, "--dtype", "float8"]) == 0
    quantisation = json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]
    assert quantisation["weight_block_size"] == [128, 128] and quantisation["quant_method"] == "fp8"
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    from sparing import load

    ours = load(run)
    tokens = torch.arange(20, 52).view(1, -1)
    mine, other = ours.logits(tokens).log_softmax(-1), theirs(tokens).logits.float().log_softmax(-1)
    assert float((mine - other).abs().mean()) < 0.1


def test_uninstalled_is_as_before():
    chosen = tiny.config(tiny.steps(1))
    model = untrained(chosen)
    assert install(model, "int8") and install(model, None) == []
