"""A GGUF file out: what llama.cpp and the programs built on it run. Written beside its place and renamed, one tensor at a time."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from sparing.base.config import ModelConfig, UserError
from sparing.base.files import atomic_path
from sparing.base.layers import shapes
from sparing.interop.gguf_fields import add_shape, add_tokenizer, exportable
from sparing.interop.gguf_tensors import Piece, pieces

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")


def export_gguf(
    config: ModelConfig,
    weights: str | Path,
    tokenizer: str | Path | None,
    out: str | Path,
    type: str = "f32",
    chat_template: str | None = None,
    name: str = "",
) -> list[str]:
    """Write the model as one GGUF file of the `deepseek2` architecture, MTP module included; -> notes for the user.

    weights: a run's safetensors file. tokenizer: a tokenizer.json, or None. type: of the matrices; norms, routers and selection biases
    stay float32. UserError: `out` exists, llama.cpp computes no such model, rows no multiple of 32 (q8_0, q4_0), the `gguf` package is
    missing, weights are not this model's, disk full.
    """
    out = Path(out)
    if type not in TYPES:
        raise UserError(f"--type {type}: choose one of {', '.join(TYPES)}")
    if out.exists():
        raise UserError(f"{out} already exists: choose a new file for --out")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder for --out")
    try:
        from gguf import GGMLQuantizationType, GGUFWriter
    except ImportError:
        raise UserError("--format gguf needs the gguf package: pip install 'sparing[gguf]'") from None
    exported, notes = exportable(config)
    plan = pieces(exported)
    types = {piece.name: GGMLQuantizationType.F32 if piece.float32 else GGMLQuantizationType[type.upper()] for piece in plan}
    for piece in plan:
        if types[piece.name].name.startswith("Q") and piece.shape[-1] % 32:
            raise UserError(f"--type {type} needs rows of a multiple of 32 numbers; {piece.name} has rows of {piece.shape[-1]}: use f16")

    try:
        with atomic_path(out) as beside, _closing(GGUFWriter(beside, "deepseek2")) as writer:
            writer.add_type("model")
            writer.add_name(name or out.stem)
            writer.add_file_type({"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}[type])  # LLAMA_FTYPE_*
            writer.add_quantization_version(2)
            add_shape(writer, exported)
            if tokenizer is None:
                writer.add_tokenizer_model("none")
                notes.append("there is no tokenizer: the file has weights only")
            else:
                add_tokenizer(writer, Path(tokenizer), config.vocab_size, chat_template)
            _write_tensors(writer, plan, types, config, Path(weights))
            writer.close()
    except PermissionError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    return notes


@contextlib.contextmanager
def _closing(writer: GGUFWriter) -> Iterator[GGUFWriter]:
    try:
        yield writer
    finally:
        with contextlib.suppress(OSError):  # a full disk again: what was in its buffer
            writer.close()


def _write_tensors(
    writer: GGUFWriter, plan: list[Piece], types: dict[str, GGMLQuantizationType], config: ModelConfig, weights: Path
) -> None:
    import numpy as np
    from gguf.quants import quant_shape_to_byte_shape, quantize

    for piece in plan:
        shape, type = piece.shape, types[piece.name]
        if type.name not in ("F32", "F16"):
            shape = quant_shape_to_byte_shape(shape, type)
        dtype = {"F32": np.float32, "F16": np.float16}.get(type.name, np.uint8)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        writer.add_tensor_info(piece.name, shape, np.dtype(dtype), size, type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    expected = shapes(config)
    ours, tensor = None, None
    try:
        with safe_open(weights, framework="pt") as file:
            for piece in plan:
                if piece.ours != ours:
                    ours, tensor = piece.ours, file.get_tensor(piece.ours).float()
                    if tuple(tensor.shape) != expected[ours]:
                        raise UserError(f"{weights}: {ours} has shape {list(tensor.shape)}, config.toml makes it {list(expected[ours])}")
                writer.write_tensor_data(quantize(piece.make(tensor).contiguous().numpy(), types[piece.name]))
    except SafetensorError as error:
        raise UserError(f"{weights}: {error}") from None
    except OSError as error:  # numpy's tofile tells a short write without its number
        raise error if error.errno else OSError(errno.ENOSPC, "a tensor was not written whole") from None
