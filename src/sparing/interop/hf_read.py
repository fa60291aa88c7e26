"""A Hugging Face folder in: checked as a whole before the first tensor is read, then streamed tensor by tensor."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch

from sparing.base.config import ModelConfig, UserError
from sparing.base.layers import EMBED, HEAD, shapes
from sparing.interop.fp8_blocks import dequantise, scale_shape
from sparing.interop.hf_config import from_hf
from sparing.interop.hf_fields import read_json
from sparing.interop.hf_files import read_folder, read_tensor, same_bytes
from sparing.interop.hf_names import LAYER, Piece, pieces

PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DERIVED = re.compile(r".*rotary_emb\.inv_freq")
"""Stored by some old versions of transformers; a function of the config."""


def import_hf(folder: str | Path) -> tuple[ModelConfig, Iterator[tuple[str, torch.Tensor]], list[str]]:
    """-> (config, float32 tensors by our state-dict names, notes for the user).

    Everything that can be wrong with the folder's config, names, types and shapes raises UserError here, before any tensor is read.
    The iterator holds one of our tensors at a time, besides one published one while it puts a layer's experts together.
    """
    checkpoint = Checkpoint(Path(folder))
    return checkpoint.config, checkpoint.tensors(), checkpoint.notes


class Checkpoint:
    """An opened and checked folder: `config`, `notes`, the `plan` of what to read, and `read` for one piece of it."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        self.folder = folder
        self.config, self.layout = from_hf(read_json(folder / "config.json"), folder / "config.json")
        stored = read_folder(folder)
        self.stored = {name: entry for name, entry in stored.items() if not DERIVED.fullmatch(name)}
        self.notes: list[str] = []
        self._find_mtp()
        self.plan = self._make_plan()
        if not (folder / "tokenizer.json").exists():
            self.notes.append("the folder has no tokenizer.json: logits work, whatever needs text does not")

    def _find_mtp(self) -> None:
        """Switch MTP off where none of its tensors exist: transformers announces the modules in config.json and leaves them out."""
        first, depth = self.config.num_layers, self.config.mtp_depth
        layers = {int(match[1]) for name in self.stored if (match := LAYER.fullmatch(name))}
        if depth and not any(first <= layer < first + depth for layer in layers):
            self.config = replace(self.config, mtp_depth=0)
            self.notes.append(f"config.json announces {depth} MTP module(s), the folder has none of their tensors: imported with MTP off")

    def _make_plan(self) -> list[Piece]:
        """The pieces to read, after checking that the folder has them all, in the right shape, and nothing else."""
        ours = shapes(self.config)
        wanted: dict[str, Piece] = {}
        for piece in pieces(self.config, self.layout.halves):
            if piece.expert is not None and piece.ours in self.stored:  # experts stored fused, as transformers holds them in memory
                wanted[piece.ours] = Piece(piece.ours, piece.ours, ours[piece.ours])
            else:
                wanted[piece.name] = piece
        if self.config.tie_word_embeddings:
            wanted[HEAD] = Piece(HEAD, EMBED, ours[EMBED], copy=True)
        scales = {name + "_scale_inv" for name in wanted if name in self.stored and self.stored[name].spec.dtype == torch.float8_e4m3fn}
        unexpected = [n for n, s in self.stored.items() if n not in wanted and n not in scales and math.prod(s.spec.shape)]
        missing = [n for n, piece in wanted.items() if n not in self.stored and not piece.copy]
        missing += [n for n in sorted(scales) if n not in self.stored]
        self._complain("is missing", missing, unexpected)
        self._complain("is not part of this model", unexpected, list(wanted))
        for name, piece in wanted.items():
            if name in self.stored:
                self._check(piece)
        return [piece for piece in wanted.values() if not piece.copy]

    def _complain(self, what: str, names: list[str], candidates: list[str]) -> None:
        if not names:
            return
        near = difflib.get_close_matches(names[0], candidates[:20_000], n=1, cutoff=0.8)
        hint = f" (nearest {'present' if what == 'is missing' else 'expected'}: {near[0]})" if near else ""
        more = f", and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(f"{self.folder}: tensor {names[0]} {what}{hint}{more}")

    def _check(self, piece: Piece) -> None:
        """Shape and type of one stored tensor, its FP8 factors, and equality where it is a second copy."""
        spec = self.stored[piece.name].spec
        if spec.shape != piece.shape:
            raise UserError(f"{self.folder}: tensor {piece.name} has shape {list(spec.shape)}, config.json makes it {list(piece.shape)}")
        if spec.dtype == torch.float8_e4m3fn:
            scale = self.stored[piece.name + "_scale_inv"].spec
            wanted = scale_shape(spec.shape, self.layout.block) if len(spec.shape) == 2 else None
            if wanted is None or (scale.shape != wanted and math.prod(scale.shape) != 1):
                raise UserError(f"{self.folder}: tensor {scale.name} has shape {list(scale.shape)}, expected {wanted and list(wanted)}")
        elif spec.dtype not in PLAIN:
            raise UserError(f"{self.folder}: tensor {piece.name} is of type {spec.dtype}, expected a floating-point one such as bfloat16")
        if piece.copy and not self._same(piece):
            raise UserError(f"{self.folder}: tensor {piece.name} differs from {piece.ours}, which this model shares with it")

    def _same(self, piece: Piece) -> bool:
        one, other = self.stored[piece.name], self.stored[piece.ours]
        if one.spec.dtype == other.spec.dtype:
            return same_bytes(one, other)
        return torch.equal(read_tensor(one).float(), read_tensor(other).float())

    def read(self, piece: Piece) -> torch.Tensor:
        """One published tensor in our rotary layout, dequantised where it is 8-bit, otherwise of the stored type."""
        tensor = read_tensor(self.stored[piece.name])
        if tensor.dtype == torch.float8_e4m3fn:
            tensor = dequantise(tensor, read_tensor(self.stored[piece.name + "_scale_inv"]), self.layout.block)
        return piece.rotary.permute(tensor, halves=False) if piece.rotary else tensor

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(our name, float32 tensor), a layer's experts put together."""
        ours = shapes(self.config)
        for name, group in groupby(self.plan, key=lambda piece: piece.ours):
            tensor = torch.empty(ours[name])
            for piece in group:
                piece.view(tensor).copy_(self.read(piece))
            yield name, tensor
            del tensor  # before the next one is allocated
