"""Compares our engine with itself: with and without drafts, in a conversation's second turn; its cache; experts larger than memory."""

from __future__ import annotations

import statistics
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from sparing.base.config import UserError
from sparing.base.config_file import read_config
from sparing.base.messages import say
from sparing.base.run import RunFolder
from sparing.bench.engines import Ours
from sparing.bench.generation import random_run
from sparing.bench.limit import LIMIT, Limit, Rounds
from sparing.bench.results import row
from sparing.bench.worker import Worker
from sparing.data.prepare import prepare
from sparing.data.sources import documents
from sparing.data.tokenizer import Tokenizer
from sparing.job.texts import with_own_tokenizer

GRAM = 8
TOGETHER = 10
"""Prompts of a round."""


def drafts(run: str, data: str = "", prompts: int = 200, prompt_tokens: int = 64, tokens: int = 128, temperature: float = 0.8,
           weights: str = "auto", threads: int = 2, limit: str = LIMIT) -> list[dict]:  # fmt: skip
    """Rows: decoding speed from a text's first token to its last, with drafts and without; the share of drafts that are accepted; repeated
    8-grams beside those of the held-out text.

    data: held-out text; default: what the run itself held out. Each side continues ten prompts, then the other does; both must write the
    same texts. limit: time of the whole figure.
    """
    until = Limit.of(limit)
    if not read_config(RunFolder.open(run).config_file).model.mtp_depth:
        raise UserError(f"bench infer drafts: {run} has no MTP module: train with --model.mtp-depth 1")
    with Worker(threads, until) as worker:
        size = {"prompts": prompts, "prompt_tokens": prompt_tokens, "tokens": tokens}
        starts, eot = worker.run(held_out, run=run, data=data, **size)
    with ExitStack() as stack:
        sides = {speculate: stack.enter_context(Worker(threads, until)) for speculate in (False, True)}
        seconds: dict[bool, list[float]] = {False: [], True: []}
        made: list[list[int]] = []
        for speculate, worker in sides.items():
            setting = {"weights": weights, "speculate": speculate, "temperature": temperature}
            worker.make(Ours, path=run, threads=threads, setting=setting)
            worker.call("measure", prompts=[ids[:prompt_tokens] for ids in starts[:2]], tokens=tokens)
        rounds = Rounds(-(-len(starts) // TOGETHER), until)
        for number in rounds:
            group = [[eot, *ids[: prompt_tokens - 1]] for ids in starts[number * TOGETHER : (number + 1) * TOGETHER]]
            texts = {}
            for speculate in list(sides)[:: -1 if number % 2 else 1]:
                before = sides[speculate].call("counts")["decoding"]
                texts[speculate] = sides[speculate].call("measure", prompts=group, tokens=tokens)["made"]
                after = sides[speculate].call("counts")["decoding"]
                seconds[speculate].append((after - before) / len(group))
            if texts[True] != texts[False]:
                raise AssertionError("drafts changed a text")
            made += texts[True]
            say(f"{len(made)} of {len(starts)}: {seconds[False][-1] / seconds[True][-1]:.2f}x")
        counts, format = sides[True].call("counts"), sides[True].call("facts")["format"]
    speed = {speculate: (tokens - 1) / statistics.median(values) for speculate, values in seconds.items()}
    ratios = [plain / drafted for plain, drafted in zip(seconds[False], seconds[True], strict=True)]
    accepted = counts["accepted_total"] / max(1.0, counts.get("drafted_total", 0.0))
    repeated = [statistics.mean(map(repeats, texts)) for texts in (made, [ids[prompt_tokens:] for ids in starts])]
    both = {"formats": dict.fromkeys(("ours", "peer"), format), **rounds.more()}
    more = {"spread": [min(ratios), max(ratios)], "counts": counts, "threads": threads, "temperature": temperature}
    more |= {"ratio": statistics.median(ratios)}  # of groups side by side: the machine's moods cancel
    return [
        row("drafts, speed", speed[True], "tokens/s", speed[False], "the same engine without", len(ratios), **more, **both),
        row("drafts, accepted", accepted, "of those drafted", 0.5, "required", len(made), **both),
        row("repeated 8-grams", repeated[0], "of all", repeated[1], "the held-out text", len(made), **both),
    ]


def held_out(run: str, data: str, prompts: int, prompt_tokens: int, tokens: int) -> tuple[list[list[int]], int]:
    """-> (pieces of held-out text, `prompt_tokens` + `tokens` ids each; the id that ends a text)."""
    folder = RunFolder.open(run)
    config = read_config(folder.config_file)
    tokenizer = Tokenizer.load(folder.tokenizer_file)
    if data:
        texts = (document.text for document in documents([data], config.data.text_key))
    else:
        texts = prepare(with_own_tokenizer(folder, config.data), config.model.vocab_size).held_out()
    encoded = [ids for text in texts if len(ids := tokenizer.encode(text)) >= prompt_tokens + tokens]
    if not encoded:
        raise UserError(f"bench infer drafts: no held-out document has {prompt_tokens + tokens} tokens")
    starts = [encoded[i % len(encoded)][i // len(encoded) * tokens :][: prompt_tokens + tokens] for i in range(prompts)]
    return [ids for ids in starts if len(ids) == prompt_tokens + tokens], tokenizer.eot_id


def repeats(ids: list[int]) -> float:
    """Share of a text's 8-grams that stood in it before."""
    counts = Counter(tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1))
    return 1 - len(counts) / max(1, counts.total())


def turns(run: str = "", rounds: int = 5, first: int = 1024, second: int = 64, threads: int = 2, weights: str = "int8",
          limit: str = LIMIT) -> list[dict]:  # fmt: skip
    """One row: seconds to the first token of a second turn of `second` tokens after a prompt of `first`, beside those of the first turn.

    run: default: random weights of about 1 B parameters. limit: time of the whole figure.
    """
    until = Limit.of(limit)
    with tempfile.TemporaryDirectory(prefix="sparing-bench-") as scratch, Worker(threads, until) as worker:
        worker.make(
            Ours, path=run or random_run(Path(scratch, "run"), until), threads=threads, setting={"weights": weights, "max_batch": 1}
        )
        seconds: list[list[float]] = [[], []]
        made = Rounds(rounds + 1, until)
        for number in made:  # the first one warms up
            ids = [5 + (7919 * number + 31 * i * i) % 300 for i in range(first + second)]
            for turn, prompt in enumerate((ids[:first], ids)):
                seconds[turn].append(worker.call("measure", prompts=[prompt], tokens=1)["seconds"])
        format = worker.call("facts")["format"]
    one, two = (statistics.median(_timed(values)) for values in seconds)
    more = {"threads": threads, "formats": dict.fromkeys(("ours", "peer"), format), **made.more()}
    peer = "the first turn (0.15 of it allowed)"
    return [row("time to the first token, second turn", two, "s", one, peer, len(_timed(seconds[0])), **more)]


def _timed(values: list[float]) -> list[float]:
    """`values` without the first one, which warms up, where there are more."""
    return values[1:] or values


def cache(run: str = "", context: int = 8192, limit: str = LIMIT) -> list[dict]:
    """One row: MiB that the engine allocates for one text of `context` tokens, beside keys and values of every head (multi-head attention)
    of the same model in the same type. run: default: random weights of about 1 B parameters, 16 heads of 128 + 64 and 128. limit: time."""
    until = Limit.of(limit)
    with tempfile.TemporaryDirectory(prefix="sparing-bench-") as scratch, Worker(1, until) as worker:
        path = run or random_run(Path(scratch, "run"), until)
        ours = worker.run(cache_bytes, run=path, context=context)
        c = read_config(RunFolder.open(path).config_file).model
    heads = 4 * c.num_layers * c.num_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim) * context
    more = {"allowed": 0.07, "heads": c.num_heads, "latent": c.kv_lora_rank + c.qk_rope_head_dim}
    more |= {"formats": {"ours": "float32", "peer": "float32"}}
    return [row(f"cache of {context} tokens", ours / 2**20, "MiB", heads / 2**20, "multi-head attention (0.07 of it allowed)", 1, **more)]


def cache_bytes(run: str, context: int) -> float:
    """Bytes of the engine's cache for `context` tokens, as a share of one full context."""
    from sparing.infer.engine import Engine

    with Engine(run, weights="int8", max_batch=1) as engine:
        if engine.config.attention != "mla" or context > engine.context:
            raise UserError(f"bench infer cache: {run}: needs latent attention and a context of {context} tokens")
        return engine.metrics()["cache_bytes"] * context / engine.context


def experts(run: str = "", share: float = 0.25, rounds: int = 5, tokens: int = 8, threads: int = 2, limit: str = LIMIT) -> list[dict]:
    """Rows: decoding with only `share` of the experts' bytes allowed in memory, the page cache emptied before every text, beside what was
    predicted; resident memory, mapped pages included, beside its cap: that share and everything else.

    Texts are short because the page cache fills again while they are written. run: default: random weights of about 1 B parameters.
    limit: time of the whole figure.
    """
    until = Limit.of(limit)
    with tempfile.TemporaryDirectory(prefix="sparing-bench-") as scratch, Worker(threads, until) as worker:
        setting = {"weights": "int8", "max_batch": 1, "speculate": False, "expert_share": share}
        worker.make(Ours, path=run or random_run(Path(scratch, "run"), until), threads=threads, setting=setting)
        predicted = worker.call("forecast")
        rates = []
        turns = Rounds(rounds + 1, until)
        for number in turns:  # the first one warms up
            prompt = [5 + 7919 * (number + 1) % 293]  # one token: reading a prompt is no part of it
            rates.append(tokens / worker.call("measure_cold", prompt=prompt, tokens=tokens))
        resident, format = worker.call("memory"), worker.call("facts")["format"]
    say(f"predicted {predicted['tokens_per_s']:.1f} tokens/s, measured {', '.join(f'{rate:.1f}' for rate in rates)}")
    both, timed = {"formats": {"ours": format}, **turns.more()}, _timed(rates)
    speed = statistics.median(timed), "tokens/s", predicted["tokens_per_s"], "as predicted", len(timed)
    return [
        row("decoding, experts from disk", *speed, **predicted, **both),
        row("resident memory", resident, "MiB", predicted["cap"] / 2**20, "its cap", 1, experts=predicted["experts"], **both),
    ]
