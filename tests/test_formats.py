"""On a processor that is slow at 16 bits and at 8, nothing multiplies in them unless somebody asked for it by name."""

import json
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparing import api
from sparing.base.config_file import read_config
from sparing.base.hardware import load_calibration, machine, save_calibration
from sparing.cli import main as cli
from sparing.kernels import formats

SLOW = {"float32": 1e11, "bfloat16": 1.4e9, "float16": 1.4e9, "int8": 2.5e9}
FAST = {"float32": 1e11, "bfloat16": 4e11, "float16": 1e11, "int8": 8e11}
NARROW = {torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2}
MULTIPLIES = (
    "mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot", "linear", "matmul", "einsum", "_int_mm", "_scaled_mm", "_grouped_mm",
    "_scaled_grouped_mm", "_weight_int8pack_mm", "_weight_int4pack_mm", "convolution",
    "_scaled_dot_product_flash_attention_for_cpu",
)  # fmt: skip


class NarrowProducts(TorchDispatchMode):
    """Notes every matrix product on the CPU of numbers of 16 bits or fewer."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in MULTIPLIES:
            narrow = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor) and x.dtype in NARROW]
            self.found += [f"{name} of {x.dtype} {tuple(x.shape)}" for x in narrow if x.device.type == "cpu"]
        return function(*args, **(kwargs or {}))


@pytest.fixture
def narrow_products(monkeypatch):
    """What `NarrowProducts` notes, in this thread and in every one that is started."""
    found: list[str] = []
    run = threading.Thread.run

    def watched(thread):
        with NarrowProducts(found):
            run(thread)

    monkeypatch.setattr(threading.Thread, "run", watched)
    with NarrowProducts(found):
        yield found


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARING_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(40):
        lines = [f"The {word} number {j} of book {i} went to the sea and came back." for j, word in enumerate(["cat", "dog", "ship"] * 20)]
        (folder / f"{i:02d}.txt").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_the_watch_sees_products_in_any_thread(narrow_products, dtype):
    a = torch.ones(32, 32).to(dtype)
    multiply = torch._int_mm if dtype == torch.int8 else torch.mm
    multiply(a, a)
    thread = threading.Thread(target=multiply, args=(a, a))
    thread.start()
    thread.join()
    assert len(narrow_products) == 4 and str(dtype) in narrow_products[0]
    torch.mm(a.float(), a.float())
    assert len(narrow_products) == 4


def test_the_main_job_multiplies_in_float32_where_narrow_formats_are_slow(home, corpus, tmp_path, narrow_products):
    save_calibration(machine(), {"formats": SLOW})
    out = tmp_path / "run"
    model = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 512, "n_routed_experts": 4, "mtp_depth": 1}
    api.train([str(corpus)], "10ktok", str(out), {"model": model, "train": {"seq_len": 64, "batch_size": 8}})
    assert read_config(out / "config.toml").train.dtype == "float32"
    api.evaluate(str(out), [str(corpus)])
    api.generate(str(out), "The cat", max_tokens=8)
    api.generate(str(out), "The cat", max_tokens=8, weights="auto")
    api.plan(data=[str(corpus)], budget="1m")
    assert narrow_products == []
    values = load_calibration(machine())
    assert values["peak_flops_cpu_float32"] > 0 and "peak_flops_cpu_bfloat16" not in values


def test_where_bfloat16_is_fast_training_is_in_it(home, corpus, tmp_path):
    save_calibration(machine(), {"formats": FAST})
    api.train([str(corpus)], "4096tok", str(tmp_path / "run"), {"train": {"seq_len": 64, "batch_size": 8}}, samples=0)
    assert read_config(tmp_path / "run" / "config.toml").train.dtype == "bfloat16"


@pytest.mark.parametrize(
    "option, line",
    [
        (["--train.dtype", "bfloat16"], "train.dtype bfloat16: this processor multiplies it 71.4 times slower than float32 (measured)"),
        (["--precision.linear", "fp8"], "precision.linear: fp8 products run in their plain form here: the same numbers, "),
    ],
)
def test_whoever_asks_for_a_slow_format_gets_it_and_is_told(home, corpus, tmp_path, capsys, option, line):
    save_calibration(machine(), {"formats": SLOW})
    command = ["train", "--data", str(corpus), "--budget", "2048tok", "--out", str(tmp_path / "run"), "--samples", "0"]
    small = ["--model.hidden-size", "32", "--model.num-layers", "1", "--train.seq-len", "64", "--train.batch-size", "8"]
    assert cli.main([*command, *small, *option, "--json"]) == 0
    printed = capsys.readouterr()
    assert line in printed.err
    json.loads(printed.out)


def test_formats_are_measured_once_and_kept(home, monkeypatch):
    calls = []
    monkeypatch.setattr(formats, "_measure_once", lambda: calls.append(1) or SLOW)
    here = formats.this_machine()
    assert here.formats == SLOW and not here.fast("bfloat16") and here.training_dtype("cpu") == "float32"
    assert here.training_dtype("cuda") == "bfloat16"
    assert machine().formats == SLOW and formats.this_machine().formats == SLOW and len(calls) == 1
    assert not formats.fast("int8") and formats.fast("float32")
    assert formats.warning("int8", here) == "int8: this processor multiplies it 40 times slower than float32 (measured)"
    assert formats.warning("float32", here) is None


def test_measuring_formats_finds_a_rate_for_each_in_well_under_a_second():
    found = formats.measure()
    assert set(found) <= set(formats.NAMES) and found["float32"] > 1e8 and found["bfloat16"] > 1e6
