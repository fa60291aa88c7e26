"""Sides of `sparing bench infer`, each in a process of its own (`worker`): our engine, transformers.generate, llama.cpp.

`build` one, then `measure` it as often as wanted. Texts are greedy and of a fixed length, prompts are token ids.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from sparing.bench.worker import forget_peak, resident_bytes

SLACK = 100 << 20
"""Resident bytes for the engine's own working memory, tokenizer and Python objects."""
_side: Ours | Transformers | LlamaCpp
_baseline = 0


def build(kind: str, path: str, threads: int, setting: dict) -> dict:
    """kind: ours, transformers or llamacpp; path: a run, a Hugging Face folder or a GGUF file. -> {"seconds": until it can answer,
    "format": of its weights}."""
    global _side, _baseline
    make = {"ours": Ours, "transformers": Transformers, "llamacpp": LlamaCpp}[kind]
    make.libraries()
    _baseline = resident_bytes("VmRSS")
    forget_peak()
    start = time.perf_counter()
    _side = make(path, threads, **setting)
    return {"seconds": time.perf_counter() - start, "format": _side.format}


def measure(prompts: Sequence[Sequence[int]], tokens: int, together: bool = False) -> dict:
    """Continue every prompt by `tokens` tokens, all at once or one after the other. -> seconds, tokens (made, all texts)."""
    start = time.perf_counter()
    if together:
        made: list[list[int]] = [[] for _ in prompts]

        def one(i: int) -> None:
            made[i] = _side.generate(prompts[i], tokens)

        each = [threading.Thread(target=one, args=(i,)) for i in range(len(prompts))]
        for thread in each:
            thread.start()
        for thread in each:
            thread.join()
    else:
        made = [_side.generate(prompt, tokens) for prompt in prompts]
    seconds = time.perf_counter() - start
    assert all(len(text) == tokens for text in made), [len(text) for text in made]
    return {"seconds": seconds, "made": made}


def memory() -> dict:
    """`bytes`: the most that was resident over what the libraries alone take."""
    return {"bytes": resident_bytes("VmHWM") - _baseline}


def forecast() -> dict:
    """What `infer.predict` says of our engine with its limit for experts, `experts` (all of them, bytes) and `cap` (bytes)."""
    from dataclasses import asdict

    from sparing.infer import predict

    assert isinstance(_side, Ours)
    engine = _side.engine
    made = asdict(predict.forecast(engine.config, engine.packed_weights, _side.limit, engine.threads))
    return made | {"experts": _side.experts, "cap": engine.packed_weights.bytes - _side.experts + _side.limit + engine.cache_bytes + SLACK}


def measure_cold(prompt: Sequence[int], tokens: int) -> dict:
    """`measure` of one text, experts read from the disk."""
    from sparing.infer.predict import drop_cached

    assert isinstance(_side, Ours)
    drop_cached(_side.engine.packed_weights)
    return measure([prompt], tokens)


def counts() -> dict:
    """Our engine's counters, and `decoding`: seconds between the first tokens of all texts and their last."""
    return _side.engine.metrics() | {"decoding": _side.decoding} if isinstance(_side, Ours) else {}


class Ours:
    @staticmethod
    def libraries() -> None:
        import sparing.infer.engine  # noqa: F401

    def __init__(self, path: str, threads: int, weights: str = "auto", speculate: bool | None = None, temperature: float = 0.0,
                 expert_share: float = 0.0, **more):  # fmt: skip
        """expert_share: of the experts' bytes, how much may be in memory; 0: no limit."""
        from sparing.base.config_file import read_config
        from sparing.base.run import RunFolder
        from sparing.infer.engine import Engine
        from sparing.infer.packed_weights import open_packed

        self.temperature = temperature
        self.decoding = 0.0
        """Seconds between the first tokens of texts and their last."""
        if expert_share:
            packed = open_packed(RunFolder.open(path), read_config(RunFolder.open(path).config_file).model, weights)
            self.experts = sum(part.bytes for name, part in packed.parts.items() if name.endswith("expert_gate_up"))
            self.limit = more["expert_bytes"] = int(self.experts * expert_share)
        self.engine = Engine(path, weights=weights, speculate=speculate, threads=threads, **more)
        self.format = self.engine.weights

    def generate(self, prompt: Sequence[int], tokens: int) -> list[int]:
        from sparing.infer.request import Sampling

        s = Sampling(max_tokens=tokens, temperature=self.temperature, seed=0, ignore_eos=True)
        made: list[int] = []
        times: list[float] = []
        done = threading.Event()

        def arrived(piece) -> None:
            times.append(time.perf_counter())
            made.extend(piece.tokens if piece else ())
            if piece is None:
                done.set()

        self.engine.submit(prompt, s, arrived)
        done.wait()
        self.decoding += times[-1] - times[0]
        return made


class Transformers:
    @staticmethod
    def libraries() -> None:
        from sparing.bench.peer import import_transformers

        import_transformers().AutoModelForCausalLM  # noqa: B018

    def __init__(self, path: str, threads: int, dtype: str, cache: str, attention: str, compile: bool):
        import torch

        from sparing.bench.peer import import_transformers

        self.format = dtype
        load = import_transformers().AutoModelForCausalLM.from_pretrained
        self.model = load(path, dtype=getattr(torch, dtype), attn_implementation=attention).eval()
        if compile:
            self.model.forward = torch.compile(self.model.forward)
        self.options = {"do_sample": False, "cache_implementation": None if cache == "dynamic" else cache, "pad_token_id": 0}

    def generate(self, prompt: Sequence[int], tokens: int) -> list[int]:
        import torch

        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            made = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, **self.options
            )
        return made[0, len(prompt) :].tolist()


class LlamaCpp:
    @staticmethod
    def libraries() -> None:
        from sparing.base.config import UserError

        try:
            import xllamacpp  # noqa: F401
        except ImportError as error:
            raise UserError("this figure compares with llama.cpp: pip install xllamacpp") from error

    format = "its file's"

    def __init__(self, path: str, threads: int, parallel: int = 1, context: int = 1024, mtp: bool = False, flash: bool = True):
        import xllamacpp as xlc

        params = xlc.CommonParams()
        params.model.path = path
        params.n_ctx, params.n_parallel, params.n_batch, params.n_ubatch = context * parallel, parallel, 512, 512
        kinds = xlc.llama_flash_attn_type
        params.flash_attn_type = kinds.LLAMA_FLASH_ATTN_TYPE_AUTO if flash else kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.n_gpu_layers, params.fit_params, params.cache_ram_mib = 0, False, 0
        if mtp:
            params.load_mtp = True
            params.speculative.types = [xlc.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
            params.speculative.draft.n_max = 1
        self.server = xlc.Server(params)

    def generate(self, prompt: Sequence[int], tokens: int) -> list[int]:
        body = {"prompt": list(prompt), "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
        return self.server.handle_completions(body | {"return_tokens": True, "verbose": True})["__verbose"]["tokens"]
