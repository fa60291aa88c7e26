"""Our engine against transformers.generate and against llama.cpp, in turn, on the same threads."""

from __future__ import annotations

import argparse
import inspect
import random
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from sparing.base.config import Config, ModelConfig
from sparing.base.config_file import read_config, write_config
from sparing.base.messages import say
from sparing.base.run import RunFolder, run_tensors, tensors_of, write_tensors
from sparing.bench.engines import Ours
from sparing.bench.limit import LIMIT, Limit, Rounds
from sparing.bench.peers import available
from sparing.bench.results import row
from sparing.bench.worker import Worker
from sparing.data.tokenizer import Tokenizer, train_tokenizer
from sparing.interop.huggingface import export_hf

BIG = ModelConfig(
    vocab_size=32768, hidden_size=1024, num_layers=12, num_dense_layers=1, intermediate_size=2816, num_heads=16, q_lora_rank=512,
    kv_lora_rank=256, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=96, num_experts_per_tok=4,
    moe_intermediate_size=256, mtp_depth=1, max_position_embeddings=8192,
)  # fmt: skip
"""About 1 B parameters, 150 M of them active: random weights serve to measure kernels and memory, not drafts or routing."""
PEER = "benchmarks.transformers_generation"


def generate(run: str, rounds: int = 5, prompt_tokens: int = 32, tokens: int = 128, threads: int = 2, weights: str = "auto",
             compile: bool = True, limit: str = LIMIT) -> list[dict]:  # fmt: skip
    """Greedy decoding of one text at a time by a run's model, ours and transformers' in turn; seconds include reading the prompt.

    Prompts are pieces of the standard library's source. transformers: the fastest of its number formats, caches, attentions and (`compile`)
    compilation, tried first; formats that are far slower than float32 here are left out. limit: time of the whole figure.
    """
    until, folder = Limit.of(limit), RunFolder.open(run)
    tokenizer = Tokenizer.load(folder.tokenizer_file)
    ids = tokenizer.encode(inspect.getsource(argparse))
    prompts = [[tokenizer.first_id, *ids[i * prompt_tokens : (i + 1) * prompt_tokens - 1]] for i in range(rounds + 2)]
    sides: dict = {"ours": (Ours, run, {"weights": weights})}
    more: dict = {"threads": threads, "settings": []}
    peer = None
    with tempfile.TemporaryDirectory(prefix="sparing-bench-") as scratch:
        if available("transformers"):
            exported = str(Path(scratch, "hf"))
            with Worker(threads, until) as worker:
                worker.run(export_main, run=run, out=exported)
                arguments = {"path": exported, "threads": threads, "prompts": prompts[:2], "tokens": tokens, "compile": compile}
                best = worker.run(f"{PEER}.best", **arguments, seconds=until.left())
            sides["peer"] = (f"{PEER}.Transformers", exported, best["setting"])
            more["settings"], peer = best["trials"], f"transformers, {best['name']}"
        measured = _in_turn(sides, threads, [[p] for p in prompts[2:]], tokens, until)
    return _rows("single stream", measured, tokens, peer, **more)


def llamacpp(run: str = "", rounds: int = 5, prompt_tokens: int = 32, tokens: int = 64, prefill: int = 512, threads: int = 2,
             weights: str = "int8", type: str = "q8_0", texts: int = 8, speculate: bool = False,
             limit: str = LIMIT) -> list[dict]:  # fmt: skip
    """The engine's `weights` against llama.cpp on the same model as GGUF of `type`: decoding one text and `texts` at once, reading a
    prompt of `prefill` tokens, memory.

    run: a run folder; default: random weights of about 1 B parameters, 150 M active (a temporary folder of 5 GB). limit: time of the
    whole figure; each of the three cases has a share of it.
    """
    until, rows = Limit.of(limit), []
    with tempfile.TemporaryDirectory(prefix="sparing-bench-") as scratch:
        file = str(Path(scratch, "model.gguf"))
        path = run or random_run(Path(scratch, "run"), until)
        peer = available("llama.cpp")
        if peer:
            with Worker(threads, until) as worker:
                worker.run(export_file, run=path, out=file, type=type)
        size = Tokenizer.load(RunFolder.open(path).tokenizer_file).vocab_size
        cases = (
            ("decode, 1 text", 1, prompt_tokens, tokens),
            (f"decode, {texts} texts at once", texts, prompt_tokens, tokens),
            (f"prefill of {prefill}", 1, prefill, 1),
        )
        for number, (name, count, length, made) in enumerate(cases):
            sides: dict = {"ours": (Ours, path, {"weights": weights, "speculate": speculate, "max_batch": count})}
            if peer:
                setting = {"parallel": count, "context": prefill + tokens + 64, "type": type}
                sides["peer"] = ("benchmarks.llamacpp.LlamaCpp", file, setting)
            generator = random.Random(0)
            groups = [[[generator.randrange(5, size) for _ in range(length)] for _ in range(count)] for _ in range(rounds)]
            share = until.within(until.left() / (len(cases) - number))
            measured = _in_turn(sides, threads, groups, made, share, together=count > 1)
            per_round = length if made == 1 else count * made
            rows += _rows(name, measured, per_round, f"llama.cpp, {type}" if peer else None, threads=threads, weights=weights)
    return rows


def _in_turn(sides: dict, threads: int, groups: list, tokens: int, limit: Limit, together: bool = False) -> dict:
    """Each group of prompts on each side, (class, path, setting); who goes first changes. The first group once more beforehand, untimed."""
    result: dict = {"formats": {}}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(threads, limit)) for name in sides}
        for name, (kind, path, setting) in sides.items():
            workers[name].make(kind, path=path, threads=threads, setting=setting)
            facts = workers[name].call("facts")
            result[name], result["formats"][name] = {"seconds": [], "start": facts["seconds"], "made": []}, facts["format"]
            back = [prompt[::-1] for prompt in groups[0]]
            workers[name].call("measure", prompts=back, tokens=tokens, together=together)
        result["rounds"] = Rounds(len(groups), limit)
        for number in result["rounds"]:
            for name in list(workers)[:: 1 if number % 2 == 0 else -1]:
                answer = workers[name].call("measure", prompts=groups[number], tokens=tokens, together=together)
                result[name]["seconds"].append(answer["seconds"])
                result[name]["made"].append(answer["made"])
            last = ", ".join(f"{name} {result[name]['seconds'][-1]:.3f} s" for name in workers)
            say(f"round {number + 1} of {len(groups)}: {last}")
        for name, worker in workers.items():
            result[name]["memory"] = worker.call("memory")
        result["counts"] = workers["ours"].call("counts")
    return result


def _rows(name: str, measured: dict, tokens: int, peer_name: str | None, **more) -> list[dict]:
    sides = [side for side in ("ours", "peer") if side in measured]
    rates = {side: [tokens / seconds for seconds in measured[side]["seconds"]] for side in sides}
    same = {"peer_name": peer_name, "runs": len(rates["ours"]), "formats": measured["formats"], **measured["rounds"].more()}
    more |= {"spread": {side: [min(values), max(values)] for side, values in rates.items()}, "counts": measured["counts"]}
    if peer_name:
        pairs = zip(measured["ours"]["made"], measured["peer"]["made"], strict=True)
        ids = [(a, b) for one, two in pairs for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True)]
        more["same_tokens"] = statistics.mean(a == b for a, b in ids)
    values = {
        ("speed", "tokens/s"): {side: statistics.median(rates[side]) for side in sides},
        ("memory", "MiB"): {side: measured[side]["memory"] for side in sides},
        ("start", "s"): {side: measured[side]["start"] for side in sides},
    }
    return [
        row(f"{name}, {what}", of["ours"], unit, of.get("peer"), **same, **(more if what == "speed" else {}))
        for (what, unit), of in values.items()
    ]


def export_main(run: str, out: str) -> None:
    """Write a run's model for transformers, without MTP modules, which transformers doesn't have."""
    folder = RunFolder.open(run)
    whole = read_config(folder.config_file)
    config = replace(whole.model, mtp_depth=0)
    main = ("model.embed_tokens.", "model.norm.", "lm_head.", *(f"model.layers.{i}." for i in range(config.num_layers)))
    tensors = ((name, tensor) for name, tensor in run_tensors(folder) if name.startswith(main))
    export_hf(config, tensors, folder.tokenizer_file, out, tokens=whole.tokens)


def export_file(run: str, out: str, type: str) -> None:
    """Write a run's model for llama.cpp."""
    from sparing.interop.gguf import export_gguf

    folder = RunFolder.open(run)
    config = read_config(folder.config_file)
    export_gguf(config.model, tensors_of(folder), folder.tokenizer_file, out, type, tokens=config.tokens)


def random_run(path: Path, limit: Limit) -> str:
    """A run folder of BIG, made by a worker, so that its memory counts for no side."""
    with Worker(1, limit) as worker:
        worker.run(make_random_run, path=str(path))
    return str(path)


def make_random_run(path: str) -> None:
    """Write random weights at unit scale, and a small tokenizer."""
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
