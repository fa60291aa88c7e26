"""Figures of `sparing bench infer`: the engine against transformers.generate and against llama.cpp, in turn, on the same threads."""

from __future__ import annotations

import itertools
import random
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from sparing.bench.report import row, say
from sparing.bench.worker import Worker, WorkerError
from sparing.config import Config, ModelConfig, UserError
from sparing.config_file import read_config, write_config
from sparing.data.tokenizer import Tokenizer, train_tokenizer
from sparing.interop.huggingface import export_hf
from sparing.run import RunFolder, read_tensors, write_tensors

BIG = ModelConfig(
    vocab_size=32768, hidden_size=1024, num_layers=12, num_dense_layers=1, intermediate_size=2816, num_heads=16, q_lora_rank=512,
    kv_lora_rank=256, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=96, num_experts_per_tok=4,
    moe_intermediate_size=256, mtp_depth=1, max_position_embeddings=8192,
)  # fmt: skip
"""About 1 B parameters, 150 M of them active: random weights serve to measure kernels and memory, not drafts or routing."""


def generate(run: str, rounds: int = 5, prompt_tokens: int = 32, tokens: int = 128, threads: int = 2, weights: str = "auto",
             compile: bool = True) -> list[dict]:  # fmt: skip
    """Single-stream greedy decoding of a run's model, ours and transformers' in turn. run: a trained run folder.

    transformers: the fastest of its types, caches, attentions and (`compile`) compilation, tried first. Prompts are pieces of the standard
    library's source. Seconds include reading the prompt, on both sides.
    """
    folder = RunFolder.open(run)
    prompts = _prompts(folder, rounds + 2, prompt_tokens)
    with tempfile.TemporaryDirectory(prefix="sparing-bench-") as scratch, ExitStack() as stack:
        exported = Path(scratch, "hf")
        config = replace(read_config(folder.config_file).model, mtp_depth=0)
        export_hf(config, read_main(folder, config), folder.tokenizer_file, exported)
        grid = itertools.product(("float32", "bfloat16"), ("dynamic", "static"), ("sdpa", "eager"), (False,))
        settings = [*grid, *((d, "static", "sdpa", True) for d in ("float32", "bfloat16") if compile)]
        trials = []
        for values in settings:
            setting = dict(zip(("dtype", "cache", "attention", "compile"), values, strict=True))
            with Worker(threads) as worker:
                try:
                    worker.ask("run", function="engines.build", kind="transformers", path=str(exported), threads=threads, setting=setting)
                    worker.ask("run", function="engines.measure", prompts=prompts[:1], tokens=tokens)
                    took = worker.ask("run", function="engines.measure", prompts=prompts[1:2], tokens=tokens)["seconds"]
                    trials.append((tokens / took, setting))
                    say(f"transformers {setting}: {tokens / took:.0f} tokens/s")
                except WorkerError as error:
                    say(f"transformers {setting}: skipped, {error}")
        if not trials:
            raise UserError("no setting of transformers generates here")
        _, best = max(trials, key=lambda trial: trial[0])
        sides = {"ours": ("ours", run, {"weights": weights}), "peer": ("transformers", str(exported), best)}
        measured = _in_turn(stack, sides, threads, [[p] for p in prompts[2:]], tokens)
    return _rows("single stream", measured, tokens, "transformers, " + ", ".join(map(str, best.values())), threads=threads)


def llamacpp(run: str = "", rounds: int = 5, prompt_tokens: int = 32, tokens: int = 64, prefill: int = 512, threads: int = 2,
             weights: str = "int8", type: str = "q8_0", texts: int = 8, speculate: bool = False) -> list[dict]:  # fmt: skip
    """The engine's `weights` against llama.cpp on the same model as GGUF of `type`: decoding alone and `texts` at once, prefill, memory.

    run: a run folder; default: random weights of about 1 B parameters, 150 M active (made in a temporary folder of 5 GB).
    """
    from sparing.interop.gguf import export_gguf

    with tempfile.TemporaryDirectory(prefix="sparing-bench-") as scratch:
        folder = RunFolder.open(run) if run else random_run(Path(scratch, "run"), BIG)
        config = read_config(folder.config_file).model
        file = Path(scratch, "model.gguf")
        export_gguf(config, folder.weights_file, folder.tokenizer_file, file, type)
        context = prefill + tokens + 64
        rows = []
        cases = (
            ("decode, 1 text", 1, prompt_tokens, tokens),
            (f"decode, {texts} texts at once", texts, prompt_tokens, tokens),
            (f"prefill of {prefill}", 1, prefill, 1),
        )
        for name, count, length, made in cases:
            sides = {
                "ours": ("ours", str(folder), {"weights": weights, "speculate": speculate, "max_batch": count}),
                "peer": ("llamacpp", str(file), {"parallel": count, "context": context}),
            }
            generator = random.Random(0)
            size = Tokenizer.load(folder.tokenizer_file).vocab_size
            groups = [[[generator.randrange(5, size) for _ in range(length)] for _ in range(count)] for _ in range(rounds)]
            with ExitStack() as stack:
                measured = _in_turn(stack, sides, threads, groups, made, together=count > 1)
            per_round = length if made == 1 else count * made
            rows += _rows(name, measured, per_round, f"llama.cpp, {type}", threads=threads, weights=weights)
    return rows


def _in_turn(stack: ExitStack, sides: dict, threads: int, groups: list, tokens: int, together: bool = False) -> dict:
    """Each group of prompts on each side, who goes first changing; the first group once more beforehand, untimed."""
    workers, result = {}, {}
    for name, (kind, path, setting) in sides.items():
        workers[name] = stack.enter_context(Worker(threads))
        start = workers[name].ask("run", function="engines.build", kind=kind, path=path, threads=threads, setting=setting)["seconds"]
        result[name] = {"seconds": [], "start": start}
        workers[name].ask("run", function="engines.measure", prompts=[p[::-1] for p in groups[0]], tokens=tokens, together=together)
    for number, prompts in enumerate(groups):
        for name in list(workers)[:: 1 if number % 2 == 0 else -1]:
            answer = workers[name].ask("run", function="engines.measure", prompts=prompts, tokens=tokens, together=together)
            result[name]["seconds"].append(answer["seconds"])
            result[name].setdefault("made", []).append(answer["made"])
        say(f"round {number + 1} of {len(groups)}: " + ", ".join(f"{name} {result[name]['seconds'][-1]:.3f} s" for name in workers))
    for name, worker in workers.items():
        result[name]["bytes"] = worker.ask("run", function="engines.memory")["bytes"]
    result["counts"] = workers["ours"].ask("run", function="engines.counts")
    return result


def _rows(name: str, measured: dict, tokens: int, peer_name: str, **more) -> list[dict]:
    ours, peer = ([tokens / seconds for seconds in measured[side]["seconds"]] for side in ("ours", "peer"))
    pairs = list(zip(measured["ours"]["made"], measured["peer"]["made"], strict=True))
    same = statistics.mean(a == b for one, two in pairs for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True))
    runs = {"peer_name": peer_name, "runs": len(ours)}
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


def random_run(path: Path, c: ModelConfig) -> RunFolder:
    """A run folder of random weights at unit scale, with a small tokenizer."""
    import inspect

    import torch

    from sparing.model.transformer import Transformer

    run = RunFolder.create(path)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(c).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        plain = torch.ones(shape) if len(shape) == 1 and "bias" not in name else torch.zeros(shape)
        tensors[name] = plain if len(shape) == 1 else plain.normal_(0, shape[-1] ** -0.5, generator=generator)
    write_tensors(run.weights_file, tensors)
    run.config_file.write_text(write_config(replace(Config(), model=c)))
    train_tokenizer([inspect.getsource(inspect)], 1000).save(run.tokenizer_file)
    return run
