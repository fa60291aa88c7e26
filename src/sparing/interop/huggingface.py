"""A Hugging Face folder out and in: `export_hf` writes one, `import_hf` reads one tensor by tensor."""

from __future__ import annotations

import difflib
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Literal

import torch

from sparing.base.config import ModelConfig, TokensConfig, UserError
from sparing.base.files import disk_errors, name_beside, new_folder, read_text, sync_folder
from sparing.base.layers import EMBED, HEAD, shapes
from sparing.base.origin import Origin
from sparing.base.run import RunFolder
from sparing.data.chat import template_text
from sparing.interop.families import FAMILIES
from sparing.interop.fp8_blocks import BLOCK, dequantise, quantise, scale_shape
from sparing.interop.hf_config import from_hf, read_json, to_hf
from sparing.interop.hf_tensors import LAYER, PublishedTensor, SafetensorsWriter, published_tensors, read_folder, read_tensor
from sparing.interop.hf_tokenizer import generation_config, read_tokenizer, read_tokens, to_json, tokenizer_files
from sparing.interop.imported import Imported, spdx

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8": torch.bfloat16}
"""Types of the tensors that are not in 8 bits, by `dtype`."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CARD_BYTES = 4 << 20
"""A longer model card or licence is none."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
DERIVED = re.compile(r".*rotary_emb\.inv_freq")
"""Stored by some old versions of transformers; a function of the config."""


def export_hf(
    config: ModelConfig,
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    tokenizer: str | Path | None,
    out: str | Path,
    dtype: Literal["float32", "bfloat16", "float8"] = "float32",
    chat_template: str | None = None,
    shard_bytes: int = 5_000_000_000,
    tokens: TokensConfig | None = None,
    card: str | None = None,
) -> list[str]:
    """Write a folder that transformers' `from_pretrained` reads; -> notes for the user.

    tensors: our state dict, in any order; one at a time is held. tokenizer: a tokenizer.json, or None. tokens: what
    begins and ends a text; None: what the tokenizer's names say. card: README.md. float8: projections as 128x128
    blocks of e4m3 with `weight_scale_inv`, the rest bfloat16, as DeepSeek-V3 is published. Selection biases stay float32 always.
    Raises UserError: `out` exists and is not empty, no transformers type computes this model, tensors are not this model's, disk full.
    """
    out = new_folder(out, "--out")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    text_files, ends, notes = tokenizer_files(config, Path(tokenizer) if tokenizer else None, tokens, chat_template)
    raw, config_notes = to_hf(config, dtype, ends)
    exported = replace(config, mtp_depth=raw.get("num_nextn_predict_layers", 0))
    published = published_tensors(exported, FAMILIES[raw["model_type"]].halves)
    if dtype == "float8" and any(one.eight_bit and any(size > BLOCK and size % BLOCK for size in one.shape) for one in published):
        notes.append("some projections are no multiple of 128 wide: without a GPU, transformers misplaces such a weight's FP8 factors")
    text_files["config.json"] = to_json(raw)
    text_files["generation_config.json"] = to_json(generation_config(ends))
    if card is not None:
        text_files["README.md"] = card

    beside = name_beside(out)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with disk_errors(out):
            beside.mkdir(parents=True)
            _write_tensors(beside, exported, tensors, published, dtype, shard_bytes)
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
    published: list[PublishedTensor],
    dtype: str,
    shard_bytes: int,
) -> None:
    stored = {}
    by_ours: dict[str, list[PublishedTensor]] = defaultdict(list)
    for one in published:
        by_ours[one.ours].append(one)
        if dtype == "float8" and one.eight_bit:
            stored[one.name] = torch.float8_e4m3fn, one.shape
            stored[one.name + "_scale_inv"] = torch.float32, scale_shape(one.shape)
        else:
            stored[one.name] = torch.float32 if one.float32 else DTYPES[dtype], one.shape
    ours = shapes(config)
    writer = SafetensorsWriter(folder, stored, shard_bytes)
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        if name not in by_ours:
            match = LAYER.fullmatch(name)
            if match and int(match[1]) >= config.num_layers and not config.mtp_depth:
                continue  # an MTP module that this type has no place for
            raise UserError(f"{name} is not a tensor of the model that config.toml describes")
        if tuple(tensor.shape) != ours[name]:
            raise UserError(f"{name} has shape {list(tensor.shape)}, config.toml makes it {list(ours[name])}")
        for one in by_ours[name]:
            part = one.view(tensor.detach())
            part = one.rotary.permute(part, halves=True) if one.rotary else part
            if dtype == "float8" and one.eight_bit:
                part, scale = quantise(part)
                writer.write(one.name + "_scale_inv", scale)
            writer.write(one.name, part)
    if writer.missing:
        more = f" and {len(writer.missing) - 1} more" if len(writer.missing) > 1 else ""
        raise UserError(f"the weights lack {min(writer.missing)}{more}")
    writer.finish()


def import_hf(folder: str | Path) -> tuple[ModelConfig, Iterator[tuple[str, torch.Tensor]], list[str]]:
    """-> (config, float32 tensors by our state-dict names, notes for the user).

    Everything that can be wrong with the folder's config, names, types and shapes raises UserError here, before any tensor is read.
    The iterator holds one of our tensors at a time, besides one published one while it puts a layer's experts together.
    """
    checkpoint = Checkpoint(Path(folder))
    return checkpoint.config, checkpoint.tensors(), checkpoint.notes


def read_hf(folder: str | Path) -> Imported:
    """A folder, checked before the first tensor is read. Raises UserError."""
    checkpoint = Checkpoint(Path(folder))
    tokens, notes = read_tokens(checkpoint.folder, checkpoint.config)
    file = checkpoint.folder / "tokenizer.json"
    tokenizer, left_out = read_tokenizer(file, checkpoint.config.vocab_size) if file.exists() else (None, [])
    chat = template_text(RunFolder(folder))
    origin = _origin(checkpoint.folder)
    return Imported(checkpoint.config, checkpoint.tensors(), tokenizer, tokens, chat, origin, [*checkpoint.notes, *notes, *left_out])


def _origin(folder: Path) -> Origin:
    """What a folder says of its model: a model card's front matter, the name in config.json, the first line of a licence's file."""
    card, licence = folder / "README.md", next((file for file in sorted(folder.glob("LICENSE*")) if file.is_file()), None)
    front = re.match(r"---\n(.*?)\n---\n", read_text(card, limit=CARD_BYTES), re.DOTALL) if card.is_file() else None

    def said(key: str) -> str:
        found = re.search(rf"^{key}:[ \t]*([^\n\[{{]+)$", front[1], re.MULTILINE) if front else None
        return found[1].strip().strip("\"'") if found else ""

    name = read_json(folder / "config.json").get("_name_or_path")
    name = name if isinstance(name, str) and HUB_NAME.fullmatch(name) else said("base_model")
    named = spdx(said("license"))
    if named.lower() in ("", "other"):
        first = next((line.strip() for line in read_text(licence, limit=CARD_BYTES).splitlines() if line.strip()), "") if licence else ""
        named = said("license_name") or first[:80]
    publisher, _, short = name.rpartition("/")
    return Origin(short or folder.resolve().name, str(folder), licence=named, publisher=publisher)


class Checkpoint:
    """An opened and checked folder: `config`, `notes`, the tensors `to_read`, and `read` for one of them."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        self.folder = folder
        self.config, self.format = from_hf(read_json(folder / "config.json"), folder / "config.json")
        self.stored = {name: stored for name, stored in read_folder(folder).items() if not DERIVED.fullmatch(name)}
        self.notes: list[str] = []
        self._switch_absent_mtp_off()
        self.to_read = self._checked()
        if not (folder / "tokenizer.json").exists():
            self.notes.append("the folder has no tokenizer.json: logits work, whatever needs text does not")
            if (folder / "tokenizer.model").exists():
                self.notes.append("tokenizer.model is not read: transformers (AutoTokenizer, save_pretrained) makes a tokenizer.json of it")

    def _switch_absent_mtp_off(self) -> None:
        """Import without MTP where the weights have none: transformers announces MTP modules in config.json even then."""
        first, depth = self.config.num_layers, self.config.mtp_depth
        layers = {int(match[1]) for name in self.stored if (match := LAYER.fullmatch(name))}
        if depth and not any(first <= layer < first + depth for layer in layers):
            self.config = replace(self.config, mtp_depth=0)
            self.notes.append(f"config.json announces {depth} MTP module(s), the folder has none of their tensors: imported with MTP off")

    def _checked(self) -> list[PublishedTensor]:
        """The tensors to read. Raises UserError unless the folder has them all, in the right shape, and nothing else."""
        ours = shapes(self.config)
        wanted: dict[str, PublishedTensor] = {}
        for one in published_tensors(self.config, self.format.halves):
            if one.expert is not None and one.ours in self.stored:  # experts stored fused, as transformers holds them in memory
                wanted[one.ours] = PublishedTensor(one.ours, one.ours, ours[one.ours])
            else:
                wanted[one.name] = one
        if self.config.tie_word_embeddings:
            wanted[HEAD] = PublishedTensor(HEAD, EMBED, ours[EMBED], copy=True)
        scales = {name + "_scale_inv" for name in wanted if name in self.stored and self.stored[name].dtype == torch.float8_e4m3fn}
        unexpected = [name for name, stored in self.stored.items() if name not in wanted and name not in scales and prod(stored.shape)]
        missing = [name for name, one in wanted.items() if name not in self.stored and not one.copy]
        missing += [name for name in sorted(scales) if name not in self.stored]
        self._complain("is missing", missing, unexpected)
        self._complain("is not part of this model", unexpected, list(wanted))
        for name, one in wanted.items():
            if name in self.stored:
                self._check(one)
        return [one for one in wanted.values() if not one.copy]

    def _complain(self, what: str, names: list[str], candidates: list[str]) -> None:
        if not names:
            return
        near = difflib.get_close_matches(names[0], candidates[:20_000], n=1, cutoff=0.8)
        hint = f" (nearest {'present' if what == 'is missing' else 'expected'}: {near[0]})" if near else ""
        more = f", and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(f"{self.folder}: tensor {names[0]} {what}{hint}{more}")

    def _check(self, one: PublishedTensor) -> None:
        """Shape and type of a stored tensor, its FP8 factors, and equality where it is a second copy."""
        stored = self.stored[one.name]
        if stored.shape != one.shape:
            raise UserError(f"{self.folder}: tensor {one.name} has shape {list(stored.shape)}, config.json makes it {list(one.shape)}")
        if stored.dtype == torch.float8_e4m3fn:
            scale = self.stored[one.name + "_scale_inv"]
            wanted = scale_shape(stored.shape, self.format.block) if len(stored.shape) == 2 else None
            if wanted is None or (scale.shape != wanted and prod(scale.shape) != 1):
                raise UserError(f"{self.folder}: tensor {scale.name} has shape {list(scale.shape)}, expected {wanted and list(wanted)}")
        elif stored.dtype not in FLOATS:
            raise UserError(f"{self.folder}: tensor {one.name} is of type {stored.dtype}, expected a floating-point one such as bfloat16")
        if one.copy:
            copy, original = read_tensor(stored), read_tensor(self.stored[one.ours])
            if copy.dtype == original.dtype:
                same = torch.equal(copy.view(torch.uint8), original.view(torch.uint8))
            else:
                same = torch.equal(copy.float(), original.float())
            if not same:
                raise UserError(f"{self.folder}: tensor {one.name} differs from {one.ours}, which this model shares with it")

    def read(self, one: PublishedTensor) -> torch.Tensor:
        """A tensor with rotary dimensions in our order, dequantised where it is 8-bit, otherwise of the stored type.

        Raises UserError for numbers that are not finite: they would make every answer of the model NaN."""
        tensor = read_tensor(self.stored[one.name])
        if tensor.dtype == torch.float8_e4m3fn:
            tensor = dequantise(tensor, read_tensor(self.stored[one.name + "_scale_inv"]), self.format.block)
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise UserError(f"{self.folder}: tensor {one.name} has numbers that are not finite: the file is damaged, or training diverged")
        return one.rotary.permute(tensor, halves=False) if one.rotary else tensor

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(our name, float32 tensor), a layer's experts put together."""
        ours = shapes(self.config)
        for name, parts in groupby(self.to_read, key=lambda one: one.ours):
            tensor = torch.empty(ours[name])
            for part in parts:
                part.view(tensor).copy_(self.read(part))
            yield name, tensor
            del tensor  # before the next one is allocated
