"""Golden losses: short runs of small configurations, whose numbers must stay as they are when the program is rewritten.

`tools/golden.py` computes them here and compares them with those in tests/golden; `--save` stores them there. `--rev COMMIT` computes them
with the source of COMMIT as well and compares bit for bit. It needs torch: `make golden` runs it with the tests' environment.

A run is started through `sparing.api` and read from its run folder, so this file works with older and newer source. Whatever a run would
choose by measuring is set here. The numbers depend on the key alone: torch, compiler, instruction set and processor. Smaller
instruction sets are had by setting ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and MKL_ENABLE_INSTRUCTIONS as the "limits" of a stored key say.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "tests" / "golden"
STEPS, ROWS, LENGTH = 20, 8, 64
SERIES = ("loss", "grad_norm", "mtp_loss", "balance_loss")
"""What is kept of every step, where the run has it."""
INTERRUPTED_AFTER = 6
"""Steps of the run that is interrupted and resumed."""
WITHOUT_AMX, WITHOUT_COMPILER = "without AMX: ", "without a compiler: "
"""Runs whose names begin so find no matrix unit, or no C compiler. The first then take our own bfloat16 products, the second PyTorch's
operations alone."""
EARLY = 5
TOLERANCE = {"float32": (5e-5, 5e-4), "bfloat16": (2e-4, 2e-3)}
"""By type: the largest relative difference between the losses of two keys, up to step EARLY and later. Measured between instruction
sets: 4e-6 and 1.2e-4 in float32, where one token went to another expert; 4e-5 and 5e-4 in bfloat16."""
LOOSER = {"loss": 1, "mtp_loss": 2, "grad_norm": 20}
"""What is compared within the tolerance, and how many times that is allowed."""

# The configurations.

BASE = {
    "model": {
        "vocab_size": 512, "hidden_size": 64, "num_layers": 2, "num_dense_layers": 2, "intermediate_size": 128, "attention": "mla",
        "num_heads": 2, "num_kv_heads": 2, "head_dim": 32, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16, "v_head_dim": 32, "mtp_depth": 0, "max_position_embeddings": LENGTH,
    },
    "data": {"max_tokens": 20_000, "workers": 1},
    "optim": {"matrix": "muon", "lr": 0.03},
    "train": {
        "seq_len": LENGTH, "batch_size": ROWS, "micro_batch_size": ROWS, "dtype": "bfloat16", "device": "cpu", "threads": 1, "replicas": 1,
        "compile": False, "evals": 0, "eval_bytes": 2000, "checkpoint_interval_s": 1e6, "bias_update_rate": 0.01,
    },
    "precision": {"linear": "none", "measure_every": 8},
}  # fmt: skip


def merged(*wishes: dict) -> dict:
    """Nested wishes, of which later ones win."""
    result: dict = {}
    for more in wishes:
        for section, fields in more.items():
            result[section] = result.get(section, {}) | fields
    return result


FLOAT32 = {"train": {"dtype": "float32", "kernels": "compiled"}}
MIXTURE = {
    "model": {
        "num_layers": 3, "num_dense_layers": 1, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    }
}  # fmt: skip
GROUPS = {"model": {"n_group": 4, "topk_group": 2}, "train": {"sequence_balance": 0.02}}
GATES = {"model": {"n_shared_experts": 0, "scoring_func": "softmax", "norm_topk_prob": False}}
MTP = {"model": {"mtp_depth": 1}}
GQA = {"model": {"attention": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}}
REPLICAS = {"train": {"threads": 2, "replicas": 2}}
TWO_THREADS = {"train": {"threads": 2, "kernels": "plain"}}
STORAGE = {"precision": {"weights": "bfloat16", "moments": "int8", "activations": "int8"}}
# A budget of errors so small that some products move to finer blocks and to 16 bits.
FEW_BITS = merged(STORAGE, {"precision": {"linear": "int8", "error_budget": 0.0115, "measure_every": 4}})
YARN = {"yarn": {"factor": 4.0, "original_max_position_embeddings": 16}}
RUNS: dict[str, dict] = {
    "dense": {},
    "dense, float32": FLOAT32,
    "no q compression, deepseek init": merged(FLOAT32, {"model": {"q_lora_rank": None, "init": "deepseek"}}),
    "tied embeddings": merged(FLOAT32, {"model": {"tie_word_embeddings": True}}),
    "gqa": GQA,
    "adamw, yarn": merged(FLOAT32, {"optim": {"matrix": "adamw", "lr": 0.004}, "model": YARN}),
    "short rows first": merged(FLOAT32, {"train": {"short_seq_len": LENGTH // 4, "document_mask": False}}),
    "mixture": MIXTURE,
    "mixture in groups": merged(MIXTURE, GROUPS, FLOAT32),
    "mixture, softmax gate": merged(MIXTURE, GATES, FLOAT32),
    "mtp": merged(MIXTURE, MTP, FLOAT32),
    "accumulation": merged(MIXTURE, {"train": {"micro_batch_size": 3}}),
    "recomputation": merged(MIXTURE, MTP, {"train": {"recompute": True}}),
    "two replicas": merged(MIXTURE, MTP, REPLICAS),
    "two threads": merged(MIXTURE, MTP, TWO_THREADS),
    "two threads, float32": merged(GQA, FLOAT32, TWO_THREADS),
    "few bits": merged(MIXTURE, FEW_BITS),
    "few bits, resumed": merged(MIXTURE, FEW_BITS),
    "few bits, two replicas": merged(MIXTURE, FEW_BITS, REPLICAS),
    "fp8, kahan": {"precision": {"linear": "fp8", "weights": "bfloat16", "compensation": "kahan"}},
    WITHOUT_AMX + "mixture": merged(MIXTURE, MTP),
    WITHOUT_AMX + "two replicas": merged(GQA, REPLICAS),
    WITHOUT_AMX + "few bits": merged(MIXTURE, FEW_BITS),
    WITHOUT_COMPILER + "few bits": merged(GQA, STORAGE, {"precision": {"linear": "fp8"}}),
}
SAME = {"few bits, resumed": "few bits"}
"""Runs whose numbers must be those of another one, on any machine."""

# Text.

WORDS = """a about above across after again all and any away back bell below between bird boat book bread bridge bright by came clear close
cold could day deep door down early earth empty evening every far field find fire first fish flower from full garden gave gold grass
great green ground hand harbour hear heavy hill home horse hour house in into iron island it keep lamp land last leaf letter light
little long made market meadow milk moon morning narrow near never new night north of old on open orchard over paper path quiet rain
ring river road roof room rope sail salt sand sea seed seven shadow ship short silver sky slow small snow soft south spring star stone
story street summer sun table tall ten that the then there three time tower town tree two under until upon valley village voice wall
warm was water well went west where white wide wind window winter with wood yellow""".split()


def write_corpus(folder: Path) -> None:
    """150 documents of 1 to 3 kB. A word is mostly one of a few that follow the last two, so that there is something to learn."""
    rng = random.Random(1)
    folder.mkdir()
    for number in range(150):
        a, b, words = 0, rng.randrange(len(WORDS)), []
        for _ in range(rng.randrange(200, 600)):
            likely = 3 * a + 5 * b + rng.randrange(3)
            a, b = b, (likely if rng.random() < 0.8 else int(len(WORDS) * rng.random() ** 2)) % len(WORDS)
            words.append(WORDS[b] + rng.choice(("", "", "", "", "", "", ",", ".", f" {rng.randrange(100)}", "\n")))
        (folder / f"{number}.txt").write_text(" ".join(words))


# In the process that trains.


def key() -> dict[str, str]:
    """What the last bit of a number depends on, besides the program."""
    import torch

    processor, flags = {}, set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            processor.setdefault(name.strip(), value.strip())
        flags = set((processor.get("flags") or processor.get("Features") or "").split())
    model = [processor[name] for name in ("vendor_id", "cpu family", "model") if name in processor]
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    version = compiler and subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    sets = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16") if name in flags]
    limits = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "SPARING_PROCESSOR")
    return {
        "torch": torch.__version__,
        "kernels": f"compiled by {version}" if compiler else "plain",
        "instructions": " ".join([torch.backends.cpu.get_cpu_capability(), *sets]),
        "limits": " ".join(f"{name}={os.environ[name]}" for name in limits if name in os.environ),
        "processor": " ".join(model) or platform.processor() or platform.machine(),
        "system": " ".join((platform.system(), *platform.libc_ver())),
    }


def hide_amx() -> None:
    """Whoever asks for the processor's flags from here on is told of no matrix unit."""
    read_text = Path.read_text

    def without(path: Path, *arguments, **options) -> str:
        text = read_text(path, *arguments, **options)
        return re.sub(r" amx_\w+", "", text) if str(path) == "/proc/cpuinfo" else text

    Path.read_text = without


def measure_no_peak() -> None:
    """The machine's peak is only shown beside the speed; to measure it takes a minute where bfloat16 is emulated.

    Older source takes a number for it, newer source a `Peak`."""
    for name, module in list(sys.modules.items()):
        if name.startswith("sparing.") and hasattr(module, "measure_peak"):
            peak = sys.modules["sparing.train.peak"].Peak(1e11, 0) if "sparing.train.peak" in sys.modules else 1e11
            module.measure_peak = lambda *_arguments, peak=peak, **_options: peak


def interrupt_after(steps: int, metrics: Path, finished: threading.Event) -> None:
    """SIGTERM to this process once a run has written down so many steps."""
    while not finished.wait(0.002):
        if metrics.exists() and metrics.read_text().count('"loss"') >= steps:
            os.kill(os.getpid(), signal.SIGTERM)
            return


def train(name: str, corpus: Path, out: Path) -> None:
    """One of RUNS into the run folder `out`."""
    import sparing.api

    def start() -> None:
        sparing.api.train([str(corpus)], f"{STEPS * ROWS * LENGTH}tok", str(out), merged(BASE, RUNS[name]), seed=1, samples=0)

    if "resumed" not in name:
        start()
        return
    finished = threading.Event()
    watch = threading.Thread(target=interrupt_after, args=(INTERRUPTED_AFTER, out / "metrics.jsonl", finished))
    old = signal.signal(signal.SIGTERM, lambda *_: None)  # a signal that comes when the run is over must not end this process
    watch.start()
    try:
        start()
        raise RuntimeError("the run was over before it could be interrupted")
    except KeyboardInterrupt:
        pass
    finally:
        finished.set()
        watch.join()
        signal.signal(signal.SIGTERM, old)
    sparing.api.resume(str(out), samples=0)


def sha256_of_weights(folder: Path) -> str:
    """Of all tensors by name, whatever their order in the files: name, type, shape, numbers."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                first, end = entry["data_offsets"]
                tensors[name] = json.dumps([name, entry["dtype"], entry["shape"]]).encode(), data[start + first : start + end]
    found = hashlib.sha256()
    for name in sorted(tensors):
        for part in tensors[name]:
            found.update(part)
    return found.hexdigest()


def numbers_of(run: Path) -> dict:
    """What a finished run folder has to say."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    if [line["step"] for line in steps] != list(range(1, STEPS + 1)):
        raise ValueError(f"not steps 1 to {STEPS}: {[line['step'] for line in steps]}")
    series = {name: [line[name] for line in steps] for name in SERIES if name in steps[0]}
    bpb = next(line["eval_bpb"] for line in reversed(lines) if "eval_bpb" in line)
    return {**series, "bpb": bpb, "weights": sha256_of_weights(run / "weights")}


def work(folder: Path, names: list[str]) -> None:
    """Train `names` one after the other and write folder/report.json; what a run prints goes to standard error."""
    if names[0].startswith(WITHOUT_AMX):
        hide_amx()
    if names[0].startswith(WITHOUT_COMPILER):
        os.environ["PATH"] = ""
    import torch

    import sparing.api
    from sparing.kernels import native, products

    if hasattr(products, "fastest"):
        kinds = [] if names[0].startswith(WITHOUT_AMX) else ["tiles", "vectors", "compiled"]
        products.fastest = lambda dtype=torch.bfloat16, *_: (next((k for k in kinds if native.can(k, dtype)), "vectors"), "not measured")

    measure_no_peak()
    write_corpus(folder / "corpus")
    runs, took = {}, {}
    for number, name in enumerate(names):
        before, run = time.monotonic(), folder / f"run-{number}"
        print(f"\n== {name}", file=sys.stderr)
        try:
            train(name, folder / "corpus", run)
            runs[name] = numbers_of(run)
        except Exception as error:
            traceback.print_exc()
            runs[name] = {"error": f"{type(error).__name__}: {error}"}
        took[name] = time.monotonic() - before
    tokenizer = next((hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("run-*/tokenizer.json")), "none")
    report = {"source": str(Path(sparing.api.__file__).parent), "key": key(), "tokenizer": tokenizer, "runs": runs, "took": took}
    (folder / "report.json").write_text(json.dumps(report))


# In the process that compares.


def compute(source: Path, names: list[str] | None = None) -> dict:
    """Train with the package in `source`, the folder that has `sparing` in it. -> {"key", "tokenizer", "runs", "took"}."""
    result: dict = {}
    kinds: dict[str, list[str]] = {}
    for name in names or RUNS:
        kinds.setdefault(next((kind for kind in (WITHOUT_AMX, WITHOUT_COMPILER) if name.startswith(kind)), ""), []).append(name)
    for of_a_kind in kinds.values():
        report = _in_a_process(source, of_a_kind)
        result = {**report, **result, "runs": result.get("runs", {}) | report["runs"], "took": result.get("took", {}) | report["took"]}
    return result


def _in_a_process(source: Path, names: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "home").mkdir()
        environment = os.environ | {"SPARING_HOME": str(folder / "home"), "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
        if names[0].startswith(WITHOUT_AMX):
            environment.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
        # What this machine has compiled before need not be compiled again: a library's name is a hash of its source.
        built = Path(os.environ.get("SPARING_HOME") or Path.home() / ".local/share/sparing").expanduser() / "native"
        if built.is_dir():
            (folder / "home/native").symlink_to(built.resolve())
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(folder), *names]
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        if not (folder / "report.json").exists():
            raise SystemExit(f"no golden losses:\n{process.stderr[-4000:]}")
        report = json.loads((folder / "report.json").read_text())
    if Path(report.pop("source")).resolve() != source.resolve() / "sparing":
        raise SystemExit(f"another package than that in {source} was trained with")
    for name, run in report["runs"].items():
        if "error" in run:
            print(process.stderr.partition(f"== {name}\n")[2].partition("\n== ")[0][-2000:], file=sys.stderr)
    return report


def stored(folder: Path = STORED) -> list[dict]:
    """Every result that is stored, one a key."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def save(result: dict, folder: Path = STORED) -> Path:
    """Store a result under its key, a run a line; -> the file."""
    key = result["key"]
    name = f"{key['instructions'].split()[0]}-torch-{key['torch']}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:8]}".lower()
    head = "".join(f" {json.dumps(name)}: {json.dumps(result[name])},\n" for name in ("key", "tokenizer"))
    runs = ",\n".join(f"  {json.dumps(name)}: {json.dumps(run)}" for name, run in result["runs"].items())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{re.sub('[^a-z0-9.]+', '-', name)}.json"
    path.write_text(f'{{\n{head} "runs": {{\n{runs}\n }}\n}}\n')
    return path


def difference(mine: dict, theirs: dict | None) -> str:
    """The first difference between two runs' numbers, in words; empty where every bit is the same."""
    if wrong := _not_comparable(mine, theirs):
        return wrong
    for step in range(STEPS):
        for name in SERIES:
            if name in mine and mine[name][step] != theirs[name][step]:
                return f"{name} of step {step + 1} is {mine[name][step]}, not {theirs[name][step]}"
    return next((f"{name}: {mine[name]}, not {theirs[name]}" for name in ("bpb", "weights") if mine[name] != theirs[name]), "")


def departure(name: str, mine: dict, theirs: dict | None) -> str:
    """The first number of run `name` that is further from another key's than the tolerance, in words; empty where none is."""
    if wrong := _not_comparable(mine, theirs):
        return wrong
    early, late = TOLERANCE[merged(BASE, RUNS[name])["train"]["dtype"]]
    for step in range(STEPS):
        for series, looser in LOOSER.items():
            if series not in mine:
                continue
            now, before, allowed = mine[series][step], theirs[series][step], looser * (early if step < EARLY else late)
            if not abs(now - before) <= allowed * abs(before):
                return f"{series} of step {step + 1} is {now}, not {before} within {allowed:g} of it"
    if not abs(mine["bpb"] - theirs["bpb"]) <= late * theirs["bpb"]:
        return f"bpb is {mine['bpb']}, not {theirs['bpb']} within {late:g} of it"
    return ""


def _not_comparable(mine: dict, theirs: dict | None) -> str:
    if "error" in mine or theirs is None:
        return mine.get("error", "no numbers to compare with")
    if "error" in theirs:
        return f"to be compared with a run that failed: {theirs['error']}"
    return "" if mine.keys() == theirs.keys() else f"has {', '.join(mine)}, not {', '.join(theirs)}"


def judged(result: dict, known: list[dict]) -> tuple[bool, dict[str, str]]:
    """(whether `known` has this key, what is wrong with each run and with the tokenizer; empty words: nothing).

    With the key, every bit must be the same. Without, a run must be within the tolerance of that run of some other key."""
    same_key = [other for other in known if other["key"] == result["key"]]
    wrong = {}
    for name, mine in result["runs"].items():
        theirs = [other["runs"].get(name) for other in same_key or known]
        found = [difference(mine, other) if same_key else departure(name, mine, other) for other in theirs]
        wrong[name] = next((words for words in found if not words), found[0]) if found else "no numbers to compare with"
        if name in SAME and not wrong[name] and SAME[name] in result["runs"]:
            wrong[name] = difference(mine, result["runs"][SAME[name]])
    tokenizers = {other["tokenizer"] for other in same_key or known}
    wrong["tokenizer"] = "" if result["tokenizer"] in tokenizers else "its file is another one: see the version of `tokenizers`"
    return bool(same_key), wrong


def of_commit(rev: str) -> dict:
    """`compute` with the source of a commit, in a worktree that is removed again."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        added = subprocess.run(["git", "worktree", "add", "--detach", tree, rev], cwd=ROOT, capture_output=True, text=True)
        if added.returncode:
            raise SystemExit(f"--rev {rev}: {added.stderr.strip().splitlines()[-1]}")
        try:
            return compute(tree / "src")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)


def table(result: dict, wrong: dict[str, str], fine: str) -> str:
    """A line a run: first and last loss, the weights' hash, what is wrong. fine: what to say where nothing is."""
    lines = [f"{'run':31s}  {'loss':6s}  {'last':6s}  weights"]
    for name, run in result["runs"].items():
        numbers = "" if "error" in run else f"{run['loss'][0]:.4f}  {run['loss'][-1]:.4f}  {run['weights'][:8]}"
        lines.append(f"{name:31s}  {numbers:24s}  {wrong[name] or fine}")
    return "\n".join([*lines, f"{'tokenizer':31s}  {result['tokenizer'][:8]:24s}  {wrong['tokenizer'] or 'the same'}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--rev", help="compare with what this commit computes here, instead of with what is stored")
    what.add_argument("--save", action="store_true", help="store the numbers under this machine's key")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(Path(arguments.worker[0]), arguments.worker[1:])
        return 0
    before = [of_commit(arguments.rev)] if arguments.rev else stored()
    result = compute(ROOT / "src")
    print(f"torch {'; '.join(filter(None, result['key'].values()))}")
    same_key, wrong = judged(result, before)
    with_what = f"as in {arguments.rev}" if arguments.rev else "as stored"
    print(table(result, wrong, with_what if same_key else "within the tolerance"))
    bad = sum(map(bool, wrong.values()))
    print(f"{sum(result['took'].values()):.0f} s; " + (f"{bad} of {len(wrong)} differ" if bad else "nothing differs"))
    if not same_key:
        print("no golden losses are stored for this machine; --save stores them")
    if arguments.save:
        print(f"stored in {save(result).relative_to(ROOT)}")
    return int(bool(bad) and not arguments.save)


if __name__ == "__main__":
    sys.exit(main())
