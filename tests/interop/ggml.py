"""llama.cpp's own functions, called in its library: the quantiser of rows; in programs of their own, tokenizer and quantiser of files."""

import ctypes
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

PARAMS = 1024
"""Bytes for `llama_model_params` and `llama_model_quantize_params`, which are handed on as llama.cpp fills them; they are smaller in every
version."""
FILES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}
"""Kinds of files (llama.h, llama_ftype)."""


@cache
def library() -> ctypes.CDLL:
    import xllamacpp.xllamacpp

    return ctypes.CDLL(xllamacpp.xllamacpp.__file__)


def quantised(values: np.ndarray, number: int, row_bytes: int) -> np.ndarray:
    """(rows, columns) float32 -> the blocks of ggml's type `number`, (rows, row_bytes)."""
    rows, columns = values.shape
    found = np.zeros((rows, row_bytes), np.uint8)
    chunk = library().ggml_quantize_chunk
    chunk.restype, chunk.argtypes = ctypes.c_size_t, [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    values = np.ascontiguousarray(values, np.float32)
    assert chunk(number, values.ctypes.data, found.ctypes.data, 0, rows, columns, None) == found.nbytes
    return found


def dequantised(blocks: np.ndarray, kind: str, numbers: int) -> np.ndarray:
    """Blocks of the type called `kind` -> `numbers` float32."""
    found = np.zeros(numbers, np.float32)
    prefix, _, rest = kind.partition("_")
    row = library()[f"dequantize_row_{prefix.lower()}_{rest if rest == 'K' else rest.lower()}"]
    row.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    blocks = np.ascontiguousarray(blocks)
    row(blocks.ctypes.data, found.ctypes.data, numbers)
    return found


def token_ids(model: str, texts: list[str]) -> list[list[int]]:
    """Token ids of texts by the vocabulary of a GGUF file; names of special tokens are ordinary text, nothing is put before."""
    return _by_itself([model], texts)


def requantised(source: Path, target: Path, kind: str) -> Path:
    """`target`, which llama.cpp's quantiser makes of another file. kind: of FILES; F32 of a quantised one is what it dequantises."""
    assert _by_itself([str(source), str(target), kind], None) == 0
    return target


def _by_itself(arguments: list[str], given) -> Any:
    done = subprocess.run([sys.executable, __file__, *arguments], input=json.dumps(given).encode(), capture_output=True, timeout=600)
    assert done.returncode == 0, f"llama.cpp ended with {done.returncode}: {done.stderr[-3000:].decode(errors='replace')}"
    return json.loads(done.stdout.splitlines()[-1])


class Params(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_char * PARAMS),)


def quantise(source: str, target: str, kind: str) -> int:
    class Begins(ctypes.Structure):
        """How `llama_model_quantize_params` begins."""

        _fields_ = (
            ("threads", ctypes.c_int32),
            ("kind", ctypes.c_int),
            ("output_tensor", ctypes.c_int),
            ("token_embedding", ctypes.c_int),
            ("allow_requantize", ctypes.c_bool),
        )

    llama = library()
    llama.llama_model_quantize_default_params.restype = Params
    params = llama.llama_model_quantize_default_params()
    begins = Begins.from_buffer(params)
    begins.threads, begins.kind, begins.allow_requantize = 1, FILES[kind], True
    llama.llama_model_quantize.restype = ctypes.c_uint32
    llama.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p]
    return llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))


def main() -> None:
    given, answer = json.load(sys.stdin), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp's log goes where logs go
    library().llama_backend_init()
    answer.write(json.dumps(tokens(sys.argv[1], given) if given is not None else quantise(*sys.argv[1:])) + "\n")
    answer.flush()
    os._exit(0)  # without waiting for its threads


def tokens(path: str, texts: list[str]) -> list[list[int]]:
    llama = library()
    llama.llama_model_default_params.restype = Params
    llama.llama_model_load_from_file.restype, llama.llama_model_load_from_file.argtypes = ctypes.c_void_p, [ctypes.c_char_p, Params]
    llama.llama_model_get_vocab.restype, llama.llama_model_get_vocab.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    llama.llama_tokenize.argtypes = [*[ctypes.c_void_p] * 2, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool]
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    assert model, "not loaded"
    vocabulary, found = llama.llama_model_get_vocab(model), []
    for text in texts:
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        count = llama.llama_tokenize(vocabulary, data, len(data), ids, len(ids), False, False)
        assert count >= 0
        found.append(list(ids[:count]))
    return found


if __name__ == "__main__":
    main()
