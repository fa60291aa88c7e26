"""llama.cpp, through xllamacpp."""

from __future__ import annotations

from collections.abc import Sequence

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
