import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import sparing
from sparing.base.files import to_json
from sparing.cli.arguments import choose, parse, ways_of
from sparing.cli.main import _way_on, main
from sparing.cli.output import show
from sparing.cli.verbs import VERBS

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(sparing.__file__).parent.parent)}


def python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=120, **options)


def assert_one_line(capsys, status, says):
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert err.startswith("sparing: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert says in err


def test_help_is_cheap_and_names_every_verb():
    heavy = "print(sorted({'torch', 'tyro', 'numpy', 'rich'} & set(sys.modules)))"
    result = python("-c", f"import sys; from sparing.cli.main import main; main(['--help']); {heavy}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
    for verb in VERBS:
        assert f"sparing {verb}" in result.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_without_torch(verb):
    program = "import sys; from sparing.cli.main import main; code = main(sys.argv[1:]); print('torch' in sys.modules); sys.exit(code)"
    result = python("-c", program, *verb.split(), "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("False\n")
    assert f"usage: sparing {verb}" in result.stdout
    assert "--json" in result.stdout or verb == "launch"  # whose verb has its own


def test_a_verb_with_ways_lists_them_and_each_has_its_own_options(capsys):
    assert main(["data", "--help"]) == 0
    listed = capsys.readouterr().out
    ways = ways_of("data", VERBS)
    assert list(ways) == ["stats", "curate", "dedup", "select", "synth"]
    for way, kind in ways.items():
        assert f"sparing data {way}" in listed and " ".join(kind.__doc__.split()) in listed
    assert main(["data", "curate", "--help"]) == 0
    own = capsys.readouterr().out
    assert "--rules" in own and "--count" not in own and "--budget" not in own


@pytest.mark.parametrize(
    "line, says",
    [
        ("data", "data: no way given; choose: stats, curate, dedup, select, synth"),
        ("data curat a --out b", "data: unknown way 'curat'; nearest: curate; all: stats, curate, dedup, select, synth"),
        ("data --json a", "data: unknown way 'a'; nearest: stats"),
        ("data curate a --cout b", "data curate: unknown option --cout; nearest: --out"),
        ("data curate a --for b", "data curate: unknown option --for"),
        ("data synth words --rules b", "data synth: unknown option --rules"),
        ("daat curate a", "unknown verb 'daat'; nearest: data"),
    ],
)
def test_a_wrong_way_and_an_option_of_another_way_are_one_line(capsys, line, says):
    assert_one_line(capsys, main(line.split()), says)


def test_options_may_stand_before_the_way():
    assert choose("data --out stats --json --workers=2 curate a".split(), VERBS) == (
        "data curate",
        "--out stats --json --workers=2 a".split(),
    )


def test_train_help_lists_the_fields_of_a_recipe(capsys):
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    for option in ("--budget", "--text-key", "--model.num-layers", "--model.yarn.factor", "--optim.lr", "--data.text-key"):
        assert option in out
    assert "--budget.amount" not in out
    assert "--model.num-dense-layers whole number [1]" in out and "--train.recompute true|false [false]" in out


def test_python_dash_m_and_version():
    result = python("-m", "sparing", "--version")
    assert (result.returncode, result.stdout) == (0, f"sparing {sparing.__version__}\n")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "no verb given"),
        ("trian", "unknown verb 'trian'; nearest: train"),
        ("--verbose", "unknown verb '--verbose'"),
        ("train --budgt 5m", "unknown option --budgt; nearest: --budget"),
        ("train --budget", "--budget needs a value"),
        ("train --budget --out x", "--budget needs a value"),
        ("train --data --budget 5m --out x", "--data needs a value"),
        ("train --out x", "train needs --budget"),
        ("train --budget 5m", "train needs --out"),
        ("train --budget 5 --out x", "has no unit"),
        ("train --budget 5parsec --out x", "unknown unit 'parsec'"),
        ("train --budget -5m --out x", "must be positive"),
        ("train --budget 0m --out x", "is zero"),
        ("train --budget nan --out x", "not a finite number"),
        ("train --budget 90000d --out x", "out of range"),
        ("train --budget +5m --out x", "sparing resume"),
        ("train a.toml b.toml --budget 5m --out x", "unexpected 'b.toml'"),
        ("train missing.toml --budget 5m --out x", "missing.toml: No such file"),
        ("train --seed five --budget 5m --out x", "--seed: 'five' is not a whole number"),
        ("train --seed 1.5 --budget 5m --out x", "--seed: '1.5' is not a whole number"),
        (f"train --seed {2**64} --budget 5m --out x", f"train.seed must be at most {2**64 - 1}, not {2**64}"),
        (f"train --seed {-(2**63) - 1} --budget 5m --out x", f"train.seed must be at least {-(2**63)}"),
        ("train --data.holdout-fraction 0 --budget 5m --out x", "data.holdout_fraction must be more than 0, not 0.0"),
        ("train --json=yes", "--json takes no value"),
        ("receipt r --csv=", "--csv needs a value, not an empty one"),
        ("train --out= --budget 5m", "--out needs a value, not an empty one"),
        ("train --model.num-layer 8", "unknown option --model.num-layer; nearest: --model.num-layers"),
        ("train --model.num-layers eight", "--model.num-layers: 'eight' is not a whole number"),
        ("train --model.num-layers", "--model.num-layers needs a value"),
        ("train --model.attention mha", "'mha' is not one of mla, gqa"),
        ("train --train.compile maybe", "'maybe' is not a true|false|none"),
        ("train --optim.lr nan", "--optim.lr: nan is not a number"),
        ("train --samples -1 --budget 5m --out x", "--samples -1"),
        ("resume", "resume needs RUN"),
        ("resume r --budget 20m", "plus sign"),
        ("resume r --seed 3", "unknown option --seed"),
        ("resume r --data", "--data needs a value"),
        ("eval", "eval needs RUN"),
        ("eval r", "eval needs --data"),
        ("eval r --tasks x --limit 0", "--limit 0: must be 1 or more"),
        ("eval r --data x --quantize int8", "--limit and --quantize are for --tasks"),
        ("eval r --tasks x --quantize fp8", "--quantize fp8: not available; choose auto or none"),
        ("eval r --data x --context long", "--context: 'long' is not a whole number"),
        ("generate r", "generate needs --prompt"),
        ("generate r --prompt a --temperature hot", "--temperature: 'hot' is not a number"),
        ("generate r --prompt a --model.num-layers 3", "unknown option --model.num-layers"),
        ("generate r --prompt \udcff", "not UTF-8"),
        ("export r", "export needs --out"),
        ("export r --format onnx --out x", "--format onnx: not available; choose hf or gguf"),
        ("export r --format gguf --type q5_0 --out x", "--type q5_0: not available; choose f32 or f16"),
        ("serve r --quantize fp8", "--quantize fp8: not available; choose auto or none"),
        ("serve r --device tpu", "--device tpu: not available; choose auto or cpu or cuda"),
        ("serve r --speculate maybe", "--speculate maybe: not available; choose auto or on or off"),
        ("serve r --host 0.0.0.0", "--host 0.0.0.0 lets others on the network in"),
        ("export r --dtype int4 --out x", "--dtype int4: not available; choose float32 or bfloat16"),
        ("import", "import needs SOURCE"),
        ("import f", "import needs --out"),
        ("bench", "bench needs NAME"),
        ("bench train --steps", "--steps needs a value"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, line, says):
    assert_one_line(capsys, main(line.split()), says)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("train --data {tmp}/missing --budget 5m --out {tmp}/run", "missing"),
        ("train --budget 5m --out {tmp}/taken", "choose a new folder"),
        ("train --budget 5m --out {tmp}/taken/file", "file"),
        ("resume {tmp}/missing", "missing: no such run folder"),
        ("eval {tmp}/missing --data {tmp}", "no such run folder"),
        ("eval {tmp}/taken --data {tmp}", "is not a run folder"),
        ("generate {tmp}/missing --prompt a", "no such run folder"),
        ("generate {tmp}/missing --prompt a --json", "no such run folder"),
        ("export {tmp}/missing --out {tmp}/x", "no such run folder"),
        ("import {tmp}/missing --out {tmp}/x", "missing: no such folder or file; a model on the hub"),
        ("import {tmp}/takne --out {tmp}/x", "takne: no such folder or file (did you mean {tmp}/taken?)"),
        ("import {tmp}/missing --base {tmp}/taken --out {tmp}/x", "missing: no such folder or file"),
        ("train --from {tmp}/takne --budget 5m --out {tmp}/x", "takne: no such run folder; did you mean {tmp}/taken?"),
        ("sft {tmp}/takne --data {tmp}/taken --budget 5m --out {tmp}/x", "takne: no such run folder; did you mean {tmp}/taken?"),
        ("bench tarin", "bench tarin: not available; choose train"),
        ("bench train througput", "throughput"),
        ("bench train --rounnds 3", "--rounnds"),
        ("bench train throughput extra", "unexpected 'extra'"),
    ],
)
def test_mistakes_that_only_the_verb_itself_can_see(capsys, tmp_path, line, says):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    assert_one_line(capsys, main(line.format(tmp=tmp_path).split()), says.format(tmp=tmp_path))
    assert not (tmp_path / "x").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[model]\nnum_layer = 3", "unknown key; nearest: num_layers"),
        ("[model]\nnum_layers = 'x'", "not a whole number"),
        ("[model", "not valid TOML"),
        ("[budget]\namount = 3.0", "needs amount and unit"),
        ("budget = '5 parsec'", "unknown unit"),
    ],
)
def test_a_bad_recipe_is_one_line(capsys, tmp_path, text, says):
    recipe = tmp_path / "r.toml"
    recipe.write_text(text)
    assert_one_line(capsys, main(["train", str(recipe), "--out", str(tmp_path / "run")]), says)


def words(verb, *line):
    return parse(verb, VERBS[verb], list(line))


def test_options_in_every_spelling():
    verb, overrides = words(
        "train", "r.toml", "--data", "a", "b", "--budget=5m", "--data=c", "--text_key", "t", "--model.num_layers=8", "--json"
    )
    assert (verb.recipe, verb.data, verb.budget, verb.text_key, verb.json) == ("r.toml", ["a", "b", "c"], "5m", "t", True)
    assert overrides == {"model.num_layers": 8}


def test_a_setting_that_is_a_list_takes_words_until_the_next_option():
    verb, overrides = words("sft", "r", "--esft.experts", "1: 3 7", "2: 0", "--data", "a", "--esft.experts=3: 1", "--budget", "5m")
    assert (verb.run, verb.data, verb.budget) == ("r", ["a"], "5m")
    assert overrides == {"esft.experts": ("1: 3 7", "2: 0", "3: 1")}


def test_the_last_of_two_counts_and_dashes_may_begin_a_value():
    verb, _ = words("generate", "run", "--prompt", "a", "--prompt=--help me", "--temperature", "1e-1", "--seed", "-3")
    assert (verb.run, verb.prompt, verb.temperature, verb.seed) == ("run", "--help me", 0.1, -3)
    assert words("generate", "run", "--prompt", "-- a dash and words")[0].prompt == "-- a dash and words"


def test_overrides_are_typed():
    line = "--model.q-lora-rank none --train.compile false --optim.lr 3e-4 --model.yarn.factor 8 --data.max-tokens 5e6".split()
    _, overrides = words("train", *line)
    assert overrides == {
        "model.q_lora_rank": None, "train.compile": False, "optim.lr": 3e-4, "model.yarn.factor": 8.0, "data.max_tokens": 5_000_000,
    }  # fmt: skip


def test_a_benchmark_takes_options_of_its_own():
    bench, options = words("bench", "train", "--steps", "20", "--lr=0.5", "--compile", "true", "--peer-name", "hf", "--json")
    assert (bench.name, bench.json) == ("train", True)
    assert options == {"steps": 20, "lr": 0.5, "compile": True, "peer_name": "hf"}


def test_json_of_what_json_cannot_say():
    value = {"a": math.nan, "b": (np.float32(0.5), np.int64(3)), "c": Path("x"), 4: [True, None, math.inf]}
    assert json.loads(json.dumps(to_json(value), allow_nan=False)) == {"a": None, "b": [0.5, 3], "c": "x", "4": [True, None, None]}


def test_what_people_see(capsys):
    show({"bpb": 1.23456789, "run": "runs/a", "rows": [{"name": "x", "ratio": 2.5}], "samples": [{"prompt": "def ", "text": "f(x):"}]})
    out = capsys.readouterr().out
    assert "1.23457" in out and "runs/a" in out and "name x  ratio 2.5" in out and out.endswith("def f(x):\n")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_an_interruption_says_how_to_go_on(how):
    process = subprocess.Popen(
        [sys.executable, "-m", "sparing", "generate", "a run", "--prompt", "-"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs begin with it ignored
    )  # fmt: skip
    # It waits for its prompt once the handler is in place.
    deadline = time.monotonic() + 300
    while Path(f"/proc/{process.pid}").exists() and not waits_for_input(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(how)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (130, "")
    assert err == "sparing: interrupted; go on with: sparing generate 'a run' --prompt -\n"


@pytest.mark.parametrize(
    ("line", "finished", "way_on"),
    [
        ("train --data x --budget 5m --out {run}", False, "sparing resume {run}"),
        ("resume {run}", False, "sparing resume {run}"),
        ("resume {run} --data x", False, "sparing resume {run} --data x"),
        ("resume {run} --budget +5m --data x", True, "sparing resume {run} --budget +5m --data x"),  # the extension has not begun
        ("resume {run} --budget +5m --data x", False, "sparing resume {run}"),
    ],
)
def test_the_way_on_repeats_what_has_not_taken_effect(tmp_path, line, finished, way_on):
    (tmp_path / "state").mkdir()
    (tmp_path / "config.toml").write_text("")
    if finished:
        (tmp_path / "state/summary.json").write_text("{}")
    argv = line.format(run=tmp_path).split()
    arguments, _ = parse(argv[0], VERBS[argv[0]], argv[1:])
    assert _way_on(argv[0], arguments, argv) == way_on.format(run=tmp_path)


def waits_for_input(pid):
    """Asleep with no imports left to do: tyro is loaded and the process blocks."""
    state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    used = int(state[11]) + int(state[12])
    time.sleep(0.3)
    after = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return after[0] == "S" and used > 5 and int(after[11]) + int(after[12]) == used


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the process's start is read from /proc")
def test_the_budget_counts_from_the_start_of_the_process():
    result = python("-c", "import time; time.sleep(0.5); import sparing.cli.main as cli; print(cli._IMPORTED - cli.process_start())")
    assert 0.45 < float(result.stdout) < 30


STUCK = """
import sys
import torch
from sparing.cli import main as cli

def stuck(self, call):
    a = torch.ones(12000, 12000)
    print("begun", file=sys.stderr, flush=True)
    for _ in range(1000):  # each of them comes back after seconds
        a.to(torch.float64) @ a.to(torch.float64)

cli.VERBS["receipt"].__call__ = stuck
sys.argv = ["sparing", "receipt", "run"]
sys.exit(cli.main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_answered_while_a_product_does_not_come_back(number):
    process = subprocess.Popen([sys.executable, "-c", STUCK], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"})
    assert process.stderr.readline() == "begun\n"
    time.sleep(0.5)
    process.send_signal(number)
    said = process.communicate(timeout=600)[1]  # the products would take hours
    assert process.returncode == 130
    assert said.strip().splitlines()[-1] == "sparing: interrupted; go on with: sparing receipt run"


@pytest.mark.parametrize(
    "options, says",
    [
        ("--train.compile true --precision.activations int8", "train.compile = true packs no activations"),
        ("--train.compile true --precision.linear int8", "train.compile = true compiles no 8-bit products"),
        ("--train.compile true --train.replicas 2", "train.compile = true divides no rows"),
        ("--train.seq-len 64 --train.short-seq-len 48", "not a multiple of train.short_seq_len 48"),
        ("--model.num-experts-per-tok 40", "num_experts_per_tok (40) is more than the 16 experts"),
        ("--train.device cuda", "torch sees no CUDA device"),
    ],
)
def test_what_does_not_go_together_is_refused_before_text_is_read(tmp_path, monkeypatch, capsys, options, says):
    import torch

    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("SPARING_HOME", str(tmp_path / "home"))
    (tmp_path / "text.txt").write_text("some text\n" * 1000)
    command = ["train", "--data", str(tmp_path / "text.txt"), "--budget", "8192tok", "--out", str(tmp_path / "run"), *options.split()]
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert says in err and out == "" and "reading" not in err
    assert not (tmp_path / "home" / "data").exists() and not (tmp_path / "run" / "config.toml").exists()


def test_a_run_that_diverges_is_nobodys_mistake(tmp_path, monkeypatch, capsys):
    from sparing.train.guard import Guard

    monkeypatch.setenv("SPARING_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Guard, "verdict", lambda *_arguments, **_options: "loss is nan")
    (tmp_path / "text.txt").write_text("some text that is long enough to train a little on\n" * 2000)
    small = "--model.hidden-size 32 --model.num-layers 1 --train.seq-len 64 --train.batch-size 8".split()
    command = ["train", "--data", str(tmp_path / "text.txt"), "--budget", "4096tok", "--out", str(tmp_path / "run"), *small]
    assert main(command) == 3
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("sparing: training diverged at step 1 (loss is nan)") and "Traceback" not in err
