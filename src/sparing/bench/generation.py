"""Figures of `sparing bench infer`: the engine against transformers.generate and against llama.cpp, in turn, on the same threads."""

from __future__ import annotations

import itertools
import random
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sparing.base.config import Config, ModelConfig
from sparing.base.config_file import read_config, write_config
from sparing.base.run import RunFolder, read_tensors, write_tensors
from sparing.bench.limit import LIMIT, Limit, Rounds
from sparing.bench.report import row, say
from sparing.bench.trials import Task, fastest, try_settings
from sparing.bench.worker import Worker
from sparing.data.tokenizer import Tokenizer, train_tokenizer
from sparing.interop.huggingface import export_hf
from sparing.kernels.formats import this_machine

BIG = ModelConfig(
    vocab_size=32768, hidden_size=1024, num_layers=12, num_dense_layers=1, intermediate_size=2816, num_heads=16, q_lora_rank=512,
    kv_lora_rank=256, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=96, num_experts_per_tok=4,
    moe_intermediate_size=256, mtp_depth=1, max_position_embeddings=8192,
)  # fmt: skip
"""About 1 B parameters, 150 M of them active: random weights serve to measure kernels and memory, not drafts or routing."""
DTYPES = ("float32", "bfloat16")
PART = 4
"""Tokens that a setting of transformers writes before it is known to be fast enough for all."""


@dataclass(frozen=True)
class GenerateSetting:
    """How transformers generates."""

    dtype: str
    cache: str
    attention: str
    compile: bool = False

    @property
    def format(self) -> str:
        return self.dtype

    def __str__(self) -> str:
        return f"{self.dtype}, {self.cache} cache, {self.attention} attention" + (", compiled" if self.compile else "")


def all_settings(compile: bool) -> list[GenerateSetting]:
    """The grid that transformers' best is taken from, on every processor."""
    grid = itertools.product(DTYPES, ("dynamic", "static"), ("sdpa", "eager"))
    return [GenerateSetting(*point) for point in grid] + [GenerateSetting(d, "static", "sdpa", True) for d in DTYPES if compile]


def generate(run: str, rounds: int = 5, prompt_tokens: int = 32, tokens: int = 128, threads: int = 2, weights: str = "auto",
             compile: bool = True, limit: str = LIMIT) -> list[dict]:  # fmt: skip
    """Single-stream greedy decoding of a run's model, ours and transformers' in turn. run: a trained run folder.

    transformers: the fastest of its number formats, caches, attentions and (`compile`) compilation, tried first; formats that are far
    slower than float32 here are left out. Prompts are pieces of the standard library's source. Seconds include reading the prompt, on
    both sides. limit: of all that in time.
    """
    until, folder = Limit.of(limit), RunFolder.open(run)
    prompts = _prompts(folder, rounds + 2, prompt_tokens)
    with tempfile.TemporaryDirectory(prefix="sparing-bench-") as scratch:
        exported = str(Path(scratch, "hf"))
        with Worker(threads, until) as worker:
            worker.ask("run", function="generation.export_main", run=run, out=exported)

        def measure(worker: Worker, number: int, count: int) -> float:
            return worker.ask("run", function="engines.measure", prompts=prompts[number : number + 1], tokens=count)["seconds"]

        task = Task(
            build=lambda worker, setting: worker.ask(
                "run", function="engines.build", kind="transformers", path=exported, threads=threads, setting=asdict(setting)
            ),
            part=lambda worker: tokens / min(PART, tokens) * measure(worker, 0, min(PART, tokens)),
            whole=lambda worker, number: measure(worker, number, tokens),
            tokens=tokens,
        )
        trials = try_settings("transformers", all_settings(compile), task, 1, threads, until, this_machine())
        best = fastest(trials, "generates")
        sides = {"ours": ("ours", run, {"weights": weights}), "peer": ("transformers", exported, best)}
        measured = _in_turn(sides, threads, [[p] for p in prompts[2:]], tokens, until)
    return _rows("single stream", measured, tokens, f"transformers, {GenerateSetting(**best)}", threads=threads, settings=trials)


def llamacpp(run: str = "", rounds: int = 5, prompt_tokens: int = 32, tokens: int = 64, prefill: int = 512, threads: int = 2,
             weights: str = "int8", type: str = "q8_0", texts: int = 8, speculate: bool = False,
             limit: str = LIMIT) -> list[dict]:  # fmt: skip
    """The engine's `weights` against llama.cpp on the same model as GGUF of `type`: decoding alone and `texts` at once, prefill, memory.

    run: a run folder; default: random weights of about 1 B parameters, 150 M active (made in a temporary folder of 5 GB). limit: of all
    that in time; each of the three cases has a share of it.
    """
    until = Limit.of(limit)
    with tempfile.TemporaryDirectory(prefix="sparing-bench-") as scratch:
        file = Path(scratch, "model.gguf")
        path = run or random_run(Path(scratch, "run"), until)
        with Worker(threads, until) as worker:
            worker.ask("run", function="generation.export_file", run=path, out=str(file), type=type)
        size = Tokenizer.load(RunFolder.open(path).tokenizer_file).vocab_size
        context = prefill + tokens + 64
        rows = []
        cases = (
            ("decode, 1 text", 1, prompt_tokens, tokens),
            (f"decode, {texts} texts at once", texts, prompt_tokens, tokens),
            (f"prefill of {prefill}", 1, prefill, 1),
        )
        for number, (name, count, length, made) in enumerate(cases):
            sides = {
                "ours": ("ours", path, {"weights": weights, "speculate": speculate, "max_batch": count}),
                "peer": ("llamacpp", str(file), {"parallel": count, "context": context}),
            }
            generator = random.Random(0)
            groups = [[[generator.randrange(5, size) for _ in range(length)] for _ in range(count)] for _ in range(rounds)]
            share = until.within(until.left() / (len(cases) - number))
            measured = _in_turn(sides, threads, groups, made, share, together=count > 1)
            measured["formats"]["peer"] = type
            per_round = length if made == 1 else count * made
            rows += _rows(name, measured, per_round, f"llama.cpp, {type}", threads=threads, weights=weights)
    return rows


def _in_turn(sides: dict, threads: int, groups: list, tokens: int, limit: Limit, together: bool = False) -> dict:
    """Each group of prompts on each side, who goes first changing; the first group once more beforehand, untimed."""
    result: dict = {"formats": {}}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(threads, limit)) for name in sides}
        for name, (kind, path, setting) in sides.items():
            asked = {"kind": kind, "path": path, "threads": threads, "setting": setting}
            built = workers[name].ask("run", function="engines.build", **asked)
            result[name], result["formats"][name] = {"seconds": [], "start": built["seconds"], "made": []}, built["format"]
            back = [prompt[::-1] for prompt in groups[0]]
            workers[name].ask("run", function="engines.measure", prompts=back, tokens=tokens, together=together)
        result["rounds"] = Rounds(len(groups), limit)
        for number in result["rounds"]:
            for name in list(workers)[:: 1 if number % 2 == 0 else -1]:
                asked = {"prompts": groups[number], "tokens": tokens, "together": together}
                answer = workers[name].ask("run", function="engines.measure", **asked)
                result[name]["seconds"].append(answer["seconds"])
                result[name]["made"].append(answer["made"])
            last = ", ".join(f"{name} {result[name]['seconds'][-1]:.3f} s" for name in workers)
            say(f"round {number + 1} of {len(groups)}: {last}")
        for name, worker in workers.items():
            result[name]["bytes"] = worker.ask("run", function="engines.memory")["bytes"]
        result["counts"] = workers["ours"].ask("run", function="engines.counts")
    return result


def _rows(name: str, measured: dict, tokens: int, peer_name: str, **more) -> list[dict]:
    ours, peer = ([tokens / seconds for seconds in measured[side]["seconds"]] for side in ("ours", "peer"))
    pairs = list(zip(measured["ours"]["made"], measured["peer"]["made"], strict=True))
    same = statistics.mean(a == b for one, two in pairs for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True))
    runs = {"peer_name": peer_name, "runs": len(ours), "formats": measured["formats"], **measured["rounds"].said()}
    spread = {"spread": {"ours": [min(ours), max(ours)], "peer": [min(peer), max(peer)]}, "same_tokens": same, "counts": measured["counts"]}
    return [
        row(f"{name}, speed", statistics.median(ours), "tokens/s", statistics.median(peer), **runs, **spread, **more),
        row(f"{name}, memory", measured["ours"]["bytes"] / 2**20, "MiB", measured["peer"]["bytes"] / 2**20, **runs),
        row(f"{name}, start", measured["ours"]["start"], "s", measured["peer"]["start"], **runs),
    ]


def _prompts(folder: RunFolder, count: int, length: int) -> list[list[int]]:
    import argparse
    import inspect

    tokenizer = Tokenizer.load(folder.tokenizer_file)
    ids = tokenizer.encode(inspect.getsource(argparse))
    return [[tokenizer.eot_id, *ids[i * length : (i + 1) * length - 1]] for i in range(count)]


def read_main(folder: RunFolder, config: ModelConfig):
    """A run's tensors without those of its MTP modules."""
    for name, tensor in read_tensors(folder.weights_file):
        parts = name.split(".")
        if parts[1] != "layers" or int(parts[2]) < config.num_layers:
            yield name, tensor


def export_main(run: str, out: str) -> None:
    """For transformers, without MTP modules, which it has none of."""
    folder = RunFolder.open(run)
    config = replace(read_config(folder.config_file).model, mtp_depth=0)
    export_hf(config, read_main(folder, config), folder.tokenizer_file, out)


def export_file(run: str, out: str, type: str) -> None:
    """For llama.cpp."""
    from sparing.interop.gguf import export_gguf

    folder = RunFolder.open(run)
    export_gguf(read_config(folder.config_file).model, folder.weights_file, folder.tokenizer_file, out, type)


def random_run(path: Path, limit: Limit) -> str:
    """A run folder of BIG, made by a process of its own: its memory is nobody's."""
    with Worker(1, limit) as worker:
        worker.ask("run", function="generation.make_random_run", path=str(path))
    return str(path)


def make_random_run(path: str) -> None:
    """Random weights at unit scale, with a small tokenizer."""
    import inspect

    import torch

    from sparing.model.transformer import Transformer

    run = RunFolder.create(path)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(BIG).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        plain = torch.ones(shape) if len(shape) == 1 and "bias" not in name else torch.zeros(shape)
        tensors[name] = plain if len(shape) == 1 else plain.normal_(0, shape[-1] ** -0.5, generator=generator)
    write_tensors(run.weights_file, tensors)
    run.config_file.write_text(write_config(replace(Config(), model=BIG)))
    train_tokenizer([inspect.getsource(inspect)], 1000).save(run.tokenizer_file)
