"""transformers.generate: greedy decoding in every setting that it can run in on this machine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from benchmarks.trials import Task, fastest, import_transformers, try_settings
from sparing.bench.engines import EngineSide
from sparing.bench.limit import Limit
from sparing.kernels.formats import this_machine

DTYPES = ("float32", "bfloat16")
PART = 4
"""Tokens that a setting writes before it is known to be fast enough for all."""


@dataclass(frozen=True)
class GenerateSetting:
    """How transformers generates."""

    dtype: str
    cache: str
    """`dynamic` or `static`."""
    attention: str
    """`eager` or `sdpa`."""
    compile: bool = False

    @property
    def format(self) -> str:
        return self.dtype

    def __str__(self) -> str:
        return f"{self.dtype}, {self.cache} cache, {self.attention} attention" + (", compiled" if self.compile else "")


def all_settings(compile: bool) -> list[GenerateSetting]:
    """The grid that the fastest setting is taken from, on every processor."""
    grid = itertools.product(DTYPES, ("dynamic", "static"), ("sdpa", "eager"))
    return [GenerateSetting(*point) for point in grid] + [GenerateSetting(d, "static", "sdpa", True) for d in DTYPES if compile]


def best(path: str, threads: int, prompts: list[list[int]], tokens: int, compile: bool, seconds: float) -> dict:
    """The fastest setting -> {"setting", "name", "trials": of all settings}. path: a Hugging Face folder. prompts: one to warm up, one to
    be timed. seconds: the time that is left for the whole figure. Raises UserError where no setting runs."""

    def measure(worker, number: int, count: int) -> float:
        return worker.call("measure", prompts=prompts[number : number + 1], tokens=count)["seconds"]

    task = Task(
        build=lambda worker, setting: worker.make(Transformers, path=path, threads=threads, setting=asdict(setting)),
        part=lambda worker: tokens / min(PART, tokens) * measure(worker, 0, min(PART, tokens)),
        whole=lambda worker, number: measure(worker, number, tokens),
        tokens=tokens,
    )
    trials = try_settings("transformers", all_settings(compile), task, 1, threads, Limit(seconds), this_machine())
    setting = fastest(trials, "generates")
    return {"setting": setting, "name": str(GenerateSetting(**setting)), "trials": trials}


class Transformers(EngineSide):
    """AutoModelForCausalLM of a Hugging Face folder."""

    def import_libraries(self) -> None:
        import_transformers().AutoModelForCausalLM  # noqa: B018

    def load(self, path: str, threads: int, dtype: str, cache: str, attention: str, compile: bool) -> None:
        self.format = dtype
        load = import_transformers().AutoModelForCausalLM.from_pretrained
        self.model = load(path, dtype=getattr(torch, dtype), attn_implementation=attention).eval()
        if compile:
            self.model.forward = torch.compile(self.model.forward)
        self.options = {"do_sample": False, "cache_implementation": None if cache == "dynamic" else cache, "pad_token_id": 0}

    def generate(self, prompt: Sequence[int], tokens: int) -> list[int]:
        ids = torch.tensor([list(prompt)])
        length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        with torch.inference_mode():
            made = self.model.generate(ids, attention_mask=torch.ones_like(ids), **length, **self.options)
        return made[0, len(prompt) :].tolist()
