"""llama.cpp's own functions, called in its library: its quantiser, and its tokenizer in a program of its own."""

import ctypes
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np

PARAMS = 1024
"""Bytes for `llama_model_params`, which is handed on as llama.cpp fills it; it is smaller in every version."""


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


def requantised(source: Path, target: Path, kind: str) -> Path:
    """`target`: the file `source` with its matrices in blocks of the kind, as llama.cpp quantises rows; or F32: as it dequantises them.

    As in its own mixtures, rows whose length is no multiple of a block are Q8_0, and each second matrix of Q4_K and Q5_K is Q6_K.
    """
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for place, tensor in enumerate(reader.tensors):
        shape, stored = tuple(reversed(tensor.shape.tolist())), tensor.tensor_type.name
        values = tensor.data if stored == "F32" else dequantised(tensor.data.reshape(-1), stored, int(np.prod(shape))).reshape(shape)
        if kind == "F32" or len(shape) == 1 or shape[-1] % 32 or tensor.name.endswith("ffn_gate_inp.weight"):
            writer.add_tensor(tensor.name, np.ascontiguousarray(values, np.float32))
            continue
        chosen = "Q8_0" if shape[-1] % 256 else "Q6_K" if kind in ("Q4_K", "Q5_K") and place % 2 else kind
        number = gguf.GGMLQuantizationType[chosen]
        numbers, size = gguf.GGML_QUANT_SIZES[number]
        blocks = quantised(values.reshape(-1, shape[-1]), int(number), shape[-1] // numbers * size)
        writer.add_tensor(tensor.name, blocks.reshape(*shape[:-1], -1), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def token_ids(model: str, texts: list[str]) -> list[list[int]]:
    """Token ids of texts by the vocabulary of a GGUF file; names of special tokens are ordinary text, nothing is put before."""
    done = subprocess.run([sys.executable, __file__, model], input=json.dumps(texts).encode(), capture_output=True, timeout=300)
    assert done.returncode == 0, f"llama.cpp ended with {done.returncode}: {done.stderr[-3000:].decode(errors='replace')}"
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    class Params(ctypes.Structure):
        _fields_ = (("bytes", ctypes.c_char * PARAMS),)

    texts, answer = json.load(sys.stdin), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp's log goes where logs go
    llama = library()
    llama.llama_backend_init()
    llama.llama_model_default_params.restype = Params
    llama.llama_model_load_from_file.restype, llama.llama_model_load_from_file.argtypes = ctypes.c_void_p, [ctypes.c_char_p, Params]
    llama.llama_model_get_vocab.restype, llama.llama_model_get_vocab.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    llama.llama_tokenize.argtypes = [*[ctypes.c_void_p] * 2, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool]
    model = llama.llama_model_load_from_file(sys.argv[1].encode(), llama.llama_model_default_params())
    assert model, "not loaded"
    vocabulary, found = llama.llama_model_get_vocab(model), []
    for text in texts:
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        count = llama.llama_tokenize(vocabulary, data, len(data), ids, len(ids), False, False)
        assert count >= 0
        found.append(list(ids[:count]))
    answer.write(json.dumps(found) + "\n")
    answer.flush()
    os._exit(0)  # without waiting for its threads


if __name__ == "__main__":
    main()
