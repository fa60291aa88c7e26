"""A Hugging Face folder out: written beside its place and renamed, tensors streamed into shards."""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from sparing.base.config import ModelConfig, UserError
from sparing.base.files import disk_errors, sync_folder
from sparing.base.layers import shapes
from sparing.interop.fp8_blocks import BLOCK, quantise, scale_shape
from sparing.interop.hf_config import hf_type, to_hf
from sparing.interop.hf_fields import read_json
from sparing.interop.hf_files import ShardWriter, Spec
from sparing.interop.hf_names import LAYER, Piece, pieces

END_OF_TEXT = "<|endoftext|>"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8": torch.bfloat16}
"""Type of what is not 8-bit."""


def export_hf(
    config: ModelConfig,
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    tokenizer: str | Path | None,
    out: str | Path,
    dtype: Literal["float32", "bfloat16", "float8"] = "float32",
    chat_template: str | None = None,
    shard_bytes: int = 5_000_000_000,
) -> list[str]:
    """Write a folder that transformers' `from_pretrained` reads; -> notes for the user.

    tensors: our state dict, in any order; one at a time is held. tokenizer: a tokenizer.json, or None. float8: projections as 128x128
    blocks of e4m3 with `weight_scale_inv`, the rest bfloat16, as DeepSeek-V3 is published. Selection biases stay float32 always.
    UserError: `out` exists and is not empty, no transformers type computes this model, tensors are not this model's, disk full.
    """
    out = Path(out)
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists{' and is not empty' if out.is_dir() else ''}: choose a new folder for --out")
    text_files, eos, notes = _tokenizer_files(config, Path(tokenizer) if tokenizer else None, chat_template)
    raw, config_notes = to_hf(config, dtype, eos)
    exported = replace(config, mtp_depth=raw.get("num_nextn_predict_layers", 0))
    plan = pieces(exported, halves=hf_type(config) != "deepseek_v3")
    if dtype == "float8" and any(piece.eight_bit and any(size > BLOCK and size % BLOCK for size in piece.shape) for piece in plan):
        notes.append("some projections are no multiple of 128 wide: without a GPU, transformers misplaces such a weight's FP8 factors")
    text_files["config.json"] = _json(raw)
    text_files["generation_config.json"] = _json({"_from_model_config": True, "bos_token_id": eos, "eos_token_id": eos})

    beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with disk_errors(out):
            beside.mkdir(parents=True)
            _write_tensors(beside, exported, tensors, plan, dtype, shard_bytes)
            for name, text in text_files.items():
                (beside / name).write_text(text, encoding="utf-8")
            if out.exists():
                out.rmdir()  # it is empty; a rename onto it works on some systems only
            os.rename(beside, out)
            sync_folder(out.parent)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return config_notes + notes


def _write_tensors(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    plan: list[Piece],
    dtype: str,
    shard_bytes: int,
) -> None:
    specs = []
    for piece in plan:
        if dtype == "float8" and piece.eight_bit:
            specs.append(Spec(piece.name, torch.float8_e4m3fn, piece.shape))
            specs.append(Spec(piece.name + "_scale_inv", torch.float32, scale_shape(piece.shape)))
        else:
            specs.append(Spec(piece.name, torch.float32 if piece.float32 else DTYPES[dtype], piece.shape))
    by_ours: dict[str, list[Piece]] = defaultdict(list)
    for piece in plan:
        by_ours[piece.ours].append(piece)
    ours = shapes(config)
    writer = ShardWriter(folder, specs, shard_bytes)
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        if name not in by_ours:
            match = LAYER.fullmatch(name)
            if match and int(match[1]) >= config.num_layers and not config.mtp_depth:
                continue  # an MTP module that this type has no place for
            raise UserError(f"{name} is not a tensor of the model that config.toml describes")
        if tuple(tensor.shape) != ours[name]:
            raise UserError(f"{name} has shape {list(tensor.shape)}, config.toml makes it {list(ours[name])}")
        for piece in by_ours[name]:
            part = piece.view(tensor.detach())
            part = piece.rotary.permute(part, halves=True) if piece.rotary else part
            if dtype == "float8" and piece.eight_bit:
                part, scale = quantise(part)
                writer.write(piece.name + "_scale_inv", scale)
            writer.write(piece.name, part)
    if writer.missing:
        more = f" and {len(writer.missing) - 1} more" if len(writer.missing) > 1 else ""
        raise UserError(f"the weights lack {min(writer.missing)}{more}")
    writer.finish()


def _tokenizer_files(config: ModelConfig, path: Path | None, chat_template: str | None) -> tuple[dict[str, str], int | None, list[str]]:
    """-> (file name -> text, id of the end-of-text token, notes)."""
    if path is None:
        return {}, None, ["there is no tokenizer: the folder has weights only"]
    raw = read_json(path)
    ids = {token["content"]: token["id"] for token in raw.get("added_tokens", [])}
    vocabulary = raw.get("model", {}).get("vocab", {})
    largest = max([*ids.values(), *(vocabulary.values() if isinstance(vocabulary, dict) else [len(vocabulary) - 1])], default=-1)
    if largest >= config.vocab_size:
        raise UserError(f"{path}: has a token with id {largest}, the model's vocabulary ends at {config.vocab_size - 1}")
    settings: dict = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    eos, notes = ids.get(END_OF_TEXT), []
    if eos is None:
        notes.append(f"the tokenizer has no {END_OF_TEXT}: generation will not know where to stop")
    else:
        settings |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    if chat_template is not None:
        settings["chat_template"] = chat_template
    return {"tokenizer.json": path.read_text(encoding="utf-8"), "tokenizer_config.json": _json(settings)}, eos, notes


def _json(value: dict) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
