"""Figures of `sparing bench infer`: self-speculation against plain decoding of the same engine, the second turn of a conversation, the
cache of a long one, and experts that do not fit into memory."""

from __future__ import annotations

import statistics
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from sparing.base.config import UserError
from sparing.base.config_file import read_config
from sparing.base.run import RunFolder
from sparing.bench.generation import random_run
from sparing.bench.limit import LIMIT, Limit, Rounds
from sparing.bench.report import row, say
from sparing.bench.worker import Worker
from sparing.data.prepare import prepare
from sparing.data.sources import documents
from sparing.data.tokenizer import Tokenizer

GRAM = 8
TOGETHER = 10
"""Prompts of a round."""


def drafts(run: str, data: str = "", prompts: int = 200, prompt_tokens: int = 64, tokens: int = 128, temperature: float = 0.8,
           weights: str = "auto", threads: int = 2, limit: str = LIMIT) -> list[dict]:  # fmt: skip
    """Decoding speed, from a text's first token to its last, with drafts over without; acceptance, and repeated 8-grams beside the held-out
    text's.

    data: held-out text; default: what the run itself held out. Ten prompts at a time on either side, one after the other; equal texts
    are required. limit: of all that in time.
    """
    until = Limit.of(limit)
    if not read_config(RunFolder.open(run).config_file).model.mtp_depth:
        raise UserError(f"bench infer drafts: {run} has no MTP module: train with --model.mtp-depth 1")
    with Worker(threads, until) as worker:
        size = {"prompts": prompts, "prompt_tokens": prompt_tokens, "tokens": tokens}
        found = worker.ask("run", function="drafting.held_out", run=run, data=data, **size)
    starts, eot = found["starts"], found["eot"]
    with ExitStack() as stack:
        sides = {speculate: stack.enter_context(Worker(threads, until)) for speculate in (False, True)}
        seconds: dict[bool, list[float]] = {False: [], True: []}
        made: list[list[int]] = []
        for speculate, worker in sides.items():
            setting = {"weights": weights, "speculate": speculate, "temperature": temperature}
            built = worker.ask("run", function="engines.build", kind="ours", path=run, threads=threads, setting=setting)
            worker.ask("run", function="engines.measure", prompts=[ids[:prompt_tokens] for ids in starts[:2]], tokens=tokens)
        rounds = Rounds(-(-len(starts) // TOGETHER), until)
        for number in rounds:
            group = [[eot, *ids[: prompt_tokens - 1]] for ids in starts[number * TOGETHER : (number + 1) * TOGETHER]]
            found = {}
            for speculate in list(sides)[:: -1 if number % 2 else 1]:
                before = sides[speculate].ask("run", function="engines.counts")["decoding"]
                found[speculate] = sides[speculate].ask("run", function="engines.measure", prompts=group, tokens=tokens)
                after = sides[speculate].ask("run", function="engines.counts")["decoding"]
                seconds[speculate].append((after - before) / len(group))
            if found[True]["made"] != found[False]["made"]:
                raise AssertionError("drafts changed a text")
            made += found[True]["made"]
            say(f"{len(made)} of {len(starts)}: {seconds[False][-1] / seconds[True][-1]:.2f}x")
        counts = sides[True].ask("run", function="engines.counts")
    speed = {speculate: (tokens - 1) / statistics.median(values) for speculate, values in seconds.items()}
    ratios = [plain / drafted for plain, drafted in zip(seconds[False], seconds[True], strict=True)]
    accepted = counts["accepted_total"] / max(1.0, counts.get("drafted_total", 0.0))
    repeated = [statistics.mean(map(repeats, texts)) for texts in (made, [ids[prompt_tokens:] for ids in starts])]
    both = {"formats": dict.fromkeys(("ours", "peer"), built["format"]), **rounds.said()}
    more = {"spread": [min(ratios), max(ratios)], "counts": counts, "threads": threads, "temperature": temperature}
    more |= {"ratio": statistics.median(ratios)}  # of groups side by side: the machine's moods cancel
    return [
        row("drafts, speed", speed[True], "tokens/s", speed[False], "the same engine without", len(ratios), **more, **both),
        row("drafts, accepted", accepted, "of those drafted", 0.5, "required", len(made), **both),
        row("repeated 8-grams", repeated[0], "of all", repeated[1], "the held-out text", len(made), **both),
    ]


def held_out(run: str, data: str, prompts: int, prompt_tokens: int, tokens: int) -> dict:
    """`starts`: pieces of held-out text, `prompt_tokens` + `tokens` long each; `eot`: the token that ends a text."""
    folder = RunFolder.open(run)
    config = read_config(folder.config_file)
    tokenizer = Tokenizer.load(folder.tokenizer_file)
    texts = (d.text for d in documents([data], config.data.text_key)) if data else prepare(config.data, config.model.vocab_size).held_out()
    encoded = [ids for text in texts if len(ids := tokenizer.encode(text)) >= prompt_tokens + tokens]
    if not encoded:
        raise UserError(f"bench infer drafts: no held-out document has {prompt_tokens + tokens} tokens")
    starts = [encoded[i % len(encoded)][i // len(encoded) * tokens :][: prompt_tokens + tokens] for i in range(prompts)]
    return {"starts": [ids for ids in starts if len(ids) == prompt_tokens + tokens], "eot": tokenizer.eot_id}


def repeats(ids: list[int]) -> float:
    """Share of a text's 8-grams that stood in it before."""
    counts = Counter(tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1))
    return 1 - len(counts) / max(1, counts.total())


def turns(run: str = "", rounds: int = 5, first: int = 1024, second: int = 64, threads: int = 2, weights: str = "int8",
          limit: str = LIMIT) -> list[dict]:  # fmt: skip
    """Seconds to the first token of a second turn of `second` tokens after a prompt of `first`, against those of the first turn.

    run: default: random weights of about 1 B parameters. limit: of all that in time.
    """
    until = Limit.of(limit)
    with tempfile.TemporaryDirectory(prefix="sparing-bench-") as scratch, Worker(threads, until) as worker:
        path = run or random_run(Path(scratch, "run"), until)
        setting = {"weights": weights, "max_batch": 1}
        built = worker.ask("run", function="engines.build", kind="ours", path=path, threads=threads, setting=setting)
        took: list[list[float]] = [[], []]
        made = Rounds(rounds + 1, until)
        for number in made:  # the first one warms up
            ids = [5 + (7919 * number + 31 * i * i) % 300 for i in range(first + second)]
            for turn, prompt in enumerate((ids[:first], ids)):
                took[turn].append(worker.ask("run", function="engines.measure", prompts=[prompt], tokens=1)["seconds"])
    one, two = (statistics.median(_timed(seconds)) for seconds in took)
    more = {"threads": threads, "formats": dict.fromkeys(("ours", "peer"), built["format"]), **made.said()}
    peer = "the first turn (0.15 of it allowed)"
    return [row("time to the first token, second turn", two, "s", one, peer, len(_timed(took[0])), **more)]


def _timed(values: list[float]) -> list[float]:
    """Without the first one, which warms up, where there are more."""
    return values[1:] or values


def cache(run: str = "", context: int = 8192, limit: str = LIMIT) -> list[dict]:
    """Bytes that the engine allocates for one text of `context` tokens, against keys and values of every head (multi-head attention) of the
    same model in the same type. run: default: random weights of about 1 B parameters with 16 heads of 128 + 64 and 128. limit: in time."""
    until = Limit.of(limit)
    with tempfile.TemporaryDirectory(prefix="sparing-bench-") as scratch, Worker(1, until) as worker:
        path = run or random_run(Path(scratch, "run"), until)
        ours = worker.ask("run", function="drafting.cache_bytes", run=path, context=context)["bytes"]
        c = read_config(RunFolder.open(path).config_file).model
    heads = 4 * c.num_layers * c.num_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim) * context
    more = {"allowed": 0.07, "heads": c.num_heads, "latent": c.kv_lora_rank + c.qk_rope_head_dim}
    more |= {"formats": {"ours": "float32", "peer": "float32"}}
    return [row(f"cache of {context} tokens", ours / 2**20, "MiB", heads / 2**20, "multi-head attention (0.07 of it allowed)", 1, **more)]


def cache_bytes(run: str, context: int) -> dict:
    """`bytes`: of the engine's cache, by its share of one full context."""
    from sparing.infer.engine import Engine

    with Engine(run, weights="int8", max_batch=1) as engine:
        if engine.config.attention != "mla" or context > engine.context:
            raise UserError(f"bench infer cache: {run}: needs latent attention and a context of {context} tokens")
        return {"bytes": engine.metrics()["cache_bytes"] * context / engine.context}


def experts(run: str = "", share: float = 0.25, rounds: int = 5, tokens: int = 8, threads: int = 2, limit: str = LIMIT) -> list[dict]:
    """Decoding with only `share` of the experts' bytes allowed in memory, the page cache emptied before every text, against what was
    predicted beforehand; and the resident memory, with every mapped page, against its cap: everything else and that share.

    Texts are short because the page cache fills again while they are written. run: default: random weights of about 1 B parameters.
    limit: of all that in time.
    """
    until = Limit.of(limit)
    with tempfile.TemporaryDirectory(prefix="sparing-bench-") as scratch, Worker(threads, until) as worker:
        path = run or random_run(Path(scratch, "run"), until)
        setting = {"weights": "int8", "max_batch": 1, "speculate": False, "expert_share": share}
        built = worker.ask("run", function="engines.build", kind="ours", path=path, threads=threads, setting=setting)
        made = worker.ask("run", function="engines.forecast")
        rates = []
        turns = Rounds(rounds + 1, until)
        for number in turns:  # the first one warms up
            prompt = [5 + 7919 * (number + 1) % 293]  # one token: reading a prompt is no part of it
            rates.append(tokens / worker.ask("run", function="engines.measure_cold", prompt=prompt, tokens=tokens)["seconds"])
        held = worker.ask("run", function="engines.memory")["bytes"]
    say(f"predicted {made['tokens_per_s']:.1f} tokens/s, measured {', '.join(f'{rate:.1f}' for rate in rates)}")
    both = {"formats": {"ours": built["format"]}, **turns.said()}
    speed, timed = "decoding, experts from disk", _timed(rates)
    return [
        row(speed, statistics.median(timed), "tokens/s", made["tokens_per_s"], "as predicted", len(timed), **made, **both),
        row("resident memory", held / 2**20, "MiB", made["cap"] / 2**20, "its cap", 1, experts=made["experts"], **both),
    ]
