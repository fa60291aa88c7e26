"""Engines that write text, each in a worker: what is common to all, and ours. Texts are greedy and of a fixed length, prompts are ids."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from sparing.account.power import peak_memory, reset_peak_memory, resident_memory

SLACK = 100 << 20
"""Bytes for the engine's working memory, tokenizer and Python objects."""


class EngineSide:
    """One model that continues prompts. Subclasses set `format`, the number format of the weights, when they load it."""

    format: str

    def __init__(self, path: str, threads: int, setting: dict):
        """path: a run, a Hugging Face folder or a GGUF file, as the subclass says. setting: more arguments of its `load`."""
        self.import_libraries()
        self.baseline = resident_memory()
        reset_peak_memory()
        start = time.perf_counter()
        self.load(path, threads, **setting)
        self.seconds = time.perf_counter() - start

    def import_libraries(self) -> None:
        """Import what the engine needs: that memory isn't the model's."""
        raise NotImplementedError

    def load(self, path: str, threads: int, **setting) -> None:
        raise NotImplementedError

    def generate(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """Continue the prompt by exactly `tokens` ids."""
        raise NotImplementedError

    def facts(self) -> dict:
        """`seconds` until it could answer, and the `format` of its weights."""
        return {"seconds": self.seconds, "format": self.format}

    def measure(self, prompts: Sequence[Sequence[int]], tokens: int, together: bool = False) -> dict:
        """Continue every prompt by `tokens` ids, all at once or one after the other -> {"seconds", "made": all ids}."""
        made: list[list[int]] = [[] for _ in prompts]

        def one(i: int) -> None:
            made[i] = self.generate(prompts[i], tokens)

        start = time.perf_counter()
        if together:
            each = [threading.Thread(target=one, args=(i,)) for i in range(len(prompts))]
            for thread in each:
                thread.start()
            for thread in each:
                thread.join()
        else:
            for i in range(len(prompts)):
                one(i)
        seconds = time.perf_counter() - start
        assert all(len(text) == tokens for text in made), [len(text) for text in made]
        return {"seconds": seconds, "made": made}

    def memory(self) -> float:
        """MiB: the most that was resident beyond what the libraries alone take."""
        return (peak_memory()[0] - self.baseline) / 2**20

    def counts(self) -> dict:
        """Our engine's counters; of other engines none."""
        return {}


class Ours(EngineSide):
    """`infer.engine.Engine` on a run folder."""

    decoding_s = 0.0
    """Seconds between the first tokens of all texts and their last."""

    def import_libraries(self) -> None:
        import sparing.infer.engine  # noqa: F401

    def load(self, path: str, threads: int, weights: str = "auto", temperature: float = 0.0, expert_share: float = 0.0, **options) -> None:
        """expert_share: share of the experts' bytes that may be in memory; 0: no limit. options: more of `infer.engine.Engine`."""
        from sparing.base.config_file import read_config
        from sparing.base.run import RunFolder
        from sparing.infer.engine import Engine
        from sparing.infer.packed_weights import open_packed

        self.temperature = temperature
        if expert_share:
            packed = open_packed(RunFolder.open(path), read_config(RunFolder.open(path).config_file).model, weights)
            self.experts = sum(part.bytes for name, part in packed.parts.items() if name.endswith("expert_gate_up"))
            self.limit = options["expert_bytes"] = int(self.experts * expert_share)
        self.engine = Engine(path, weights=weights, threads=threads, **options)
        self.format = self.engine.weights

    def generate(self, prompt: Sequence[int], tokens: int) -> list[int]:
        from sparing.infer.request import Sampling

        made: list[int] = []
        times: list[float] = []
        done = threading.Event()

        def arrived(piece) -> None:
            times.append(time.perf_counter())
            made.extend(piece.tokens if piece else ())
            if piece is None:
                done.set()

        self.engine.submit(prompt, Sampling(max_tokens=tokens, temperature=self.temperature, seed=0, ignore_eos=True), arrived)
        done.wait()
        self.decoding_s += times[-1] - times[0]
        return made

    def counts(self) -> dict:
        return self.engine.metrics() | {"decoding": self.decoding_s}

    def forecast(self) -> dict:
        """What `infer.predict` says beforehand of the engine with its limit for experts; `experts`: bytes of all of them; `cap`: bytes that
        the process should stay below."""
        from dataclasses import asdict

        from sparing.infer import predict

        e = self.engine
        cap = e.packed_weights.bytes - self.experts + self.limit + e.cache_bytes + SLACK
        return asdict(predict.forecast(e.config, e.packed_weights, self.limit, e.threads)) | {"experts": self.experts, "cap": cap}

    def measure_cold(self, prompt: Sequence[int], tokens: int) -> float:
        """Seconds of one text whose experts are all read from the disk."""
        from sparing.infer.predict import drop_cached

        drop_cached(self.engine.packed_weights)
        return self.measure([prompt], tokens)["seconds"]
