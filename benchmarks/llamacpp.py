"""llama.cpp: through xllamacpp, whose wheel serves every processor, or a build for this one (`llamacpp_build`)."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Sequence

import numpy as np

from sparing.base.config import UserError
from sparing.bench.engines import EngineSide


class LlamaCpp(EngineSide):
    """llama.cpp's server, without HTTP, on a GGUF file."""

    def import_libraries(self) -> None:
        try:
            import xllamacpp  # noqa: F401
        except ImportError as error:
            raise UserError("this figure compares with llama.cpp: pip install xllamacpp") from error

    def load(self, path: str, threads: int, parallel: int = 1, context: int = 1024, type: str = "") -> None:
        """parallel: texts at once. context: tokens of each. type: of the file's weights, for `facts`."""
        import xllamacpp as xlc

        self.format = type
        params = xlc.CommonParams()
        params.model.path = path
        params.n_ctx, params.n_parallel, params.n_batch, params.n_ubatch = context * parallel, parallel, 512, 512
        params.flash_attn_type = xlc.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_AUTO
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.n_gpu_layers, params.fit_params, params.cache_ram_mib = 0, False, 0
        self.server = xlc.Server(params)

    def generate(self, prompt: Sequence[int], tokens: int) -> list[int]:
        body = {"prompt": list(prompt), "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
        return self.server.handle_completions(body | {"return_tokens": True, "verbose": True})["__verbose"]["tokens"]


BUILD = "LLAMA_CPP_BUILD"
"""The environment variable that names a folder of `llamacpp_build.build`."""


class LlamaCppBuild(EngineSide):
    """llama.cpp's library itself, by the least there can be around it: one call a step, and the largest logit of each text."""

    def import_libraries(self) -> None:
        folder = os.environ[BUILD]
        for name in ("ggml-base", "ggml-cpu", "ggml"):  # this build's, whichever libllama would find first
            ctypes.CDLL(os.path.join(folder, "llama_cpp", "lib", f"lib{name}.so"), ctypes.RTLD_GLOBAL)
        sys.path.insert(0, folder)
        import llama_cpp.llama_cpp as library

        self.library = library
        library.llama_backend_init()

    def load(self, path: str, threads: int, parallel: int = 1, context: int = 1024, type: str = "") -> None:
        """As `LlamaCpp.load`."""
        lib, self.format = self.library, type
        self._log = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self._log, None)
        self.model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        self.size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch, params.n_ubatch = context * parallel, parallel, 4096, 512
        params.n_threads = params.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self.model, params)
        self.batch = lib.llama_batch_init(4096, 0, 1)

    def facts(self) -> dict:
        return super().facts() | {"system": self.library.llama_print_system_info().decode()}

    def generate(self, prompt: Sequence[int], tokens: int) -> list[int]:
        return self._together([prompt], tokens)[0]

    def measure(self, prompts: Sequence[Sequence[int]], tokens: int, together: bool = False) -> dict:
        if not together:
            return super().measure(prompts, tokens)
        start = time.perf_counter()
        made = self._together(prompts, tokens)
        return {"seconds": time.perf_counter() - start, "made": made}

    def _together(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        lib = self.library
        lib.llama_memory_clear(lib.llama_get_memory(self.context), False)
        rows = [(token, i, text) for text, prompt in enumerate(prompts) for i, token in enumerate(prompt)]
        wanted = {(len(prompt) - 1, text) for text, prompt in enumerate(prompts)}
        made: list[list[int]] = [[] for _ in prompts]
        for step in range(tokens):
            batch, ends = self.batch, [row[1:] in wanted for row in rows] if step == 0 else [True] * len(rows)
            batch.n_tokens = len(rows)
            for i, (token, position, text) in enumerate(rows):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, text
                batch.logits[i] = ends[i]
            if status := lib.llama_decode(self.context, batch):
                raise RuntimeError(f"llama_decode gave {status}")
            logits = ctypes.cast(lib.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float))
            best = np.ctypeslib.as_array(logits, (len(prompts), self.size)).argmax(1).tolist()
            for text, token in enumerate(best):
                made[text].append(token)
            rows = [(token, len(prompts[text]) + step, text) for text, token in enumerate(best)]
        return made
