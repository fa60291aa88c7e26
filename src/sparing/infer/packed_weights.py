"""Weights packed for the compiled network: quantised, in the order its products read them, in one memory-mapped file.

The file is written once per run and format, in the run folder or, if that is read-only, under $SPARING_HOME; and again when the weights
change. It has the header's length in 8 bytes, a JSON header, then the parts, each from a page boundary. kernels/decode_products.inc
describes the panels.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparing.base.config import ModelConfig, UserError
from sparing.base.files import DamagedError, DiskFullError, atomic_file, read_text
from sparing.base.hardware import home
from sparing.base.held import BLOCK_BYTES, GROUP, PANEL
from sparing.base.int4_groups import to_int4
from sparing.base.layers import EMBED, HEAD, SELECTION_BIAS, Layer, layers, shapes
from sparing.base.run import RunFolder, tensors_of

VERSION = 2
PAGE = 4096


def pack_matrix(w_NK: Tensor, format: str) -> Tensor:
    """(N, K) floats -> (bytes,) uint8 in panels of 16 outputs; N is padded with zeros. K: a multiple of 16 (int4: 32)."""
    w = torch.nn.functional.pad(w_NK.float(), (0, 0, 0, -len(w_NK) % PANEL))
    N, K = w.shape
    if format == "float32":
        return w.view(N // PANEL, PANEL, K).transpose(1, 2).contiguous().view(torch.uint8).flatten()
    if format == "bfloat16":
        return w.bfloat16().view(N // PANEL, PANEL, K // 2, 2).transpose(1, 2).contiguous().view(torch.uint8).flatten()
    if format == "int8":
        scale = w.abs().amax(1) / 127
        q = (w / scale.clamp(min=1e-30)[:, None]).round_().add_(128).to(torch.uint8)
        panels = q.view(N // PANEL, PANEL, K // 4, 4).transpose(1, 2).contiguous().flatten()
        return torch.cat((panels, scale.view(torch.uint8)))
    return to_int4(w).flatten()


@dataclass
class Part:
    """A part of the file: a packed matrix, a stack of `count` matrices `stride` bytes apart, or `inner` plain numbers (`outputs` is 0)."""

    format: str
    outputs: int
    inner: int
    count: int
    stride: int
    offset: int = 0
    make: Callable[[], Iterator[Tensor]] | None = None
    """Yields the bytes to write; None: the part lies inside the one before it, or the file exists."""

    @property
    def bytes(self) -> int:
        return self.stride * self.count if self.stride else _bytes(self.format, self.outputs, self.inner)


def _bytes(format: str, N: int, K: int) -> int:
    per_number = {"float32": 4, "bfloat16": 2, "int8": 1}
    if N == 0:
        return K * per_number[format]
    N = -(-N // PANEL) * PANEL
    if format == "int4":
        return N // PANEL * (K // GROUP) * BLOCK_BYTES
    return N * K * per_number[format] + (4 * N if format == "int8" else 0)


class Writer:
    """Lists a model's parts and how to make them. get: a weight by name. words: among which MTP modules choose; none: all."""

    def __init__(self, c: ModelConfig, format: str, get: Callable[[str], Tensor], words: list[int]):
        self.format, self.get, self.shapes = format, get, shapes(c)
        self.parts: dict[str, Part] = {}
        if not c.tie_word_embeddings:  # the step reads a tied embedding's rows from the head
            self.numbers("embed", EMBED, format="float32" if format == "float32" else "bfloat16")
        self.numbers("norm", "model.norm.weight")
        head = EMBED if c.tie_word_embeddings else HEAD
        self.matrix("head", [head], fine=True)
        if words:
            rows = torch.tensor(words)
            fine = "int8" if format == "int4" else format
            make = lambda: iter([pack_matrix(get(head)[rows], fine)])  # noqa: E731
            self.parts["draft_head"] = Part(fine, len(words), c.hidden_size, 1, 0, make=make)
            numbers = lambda: iter([rows.int().view(torch.uint8)])  # noqa: E731
            self.parts["draft_words"] = Part("float32", 0, len(words), 1, 0, make=numbers)
        for layer in layers(c):
            self.layer(layer)

    def numbers(self, name: str, *sources: str, format: str = "float32") -> None:
        """Tensors that are not packed, one behind the other."""
        dtype = getattr(torch, format)
        make = lambda: (self.get(source).to(dtype).contiguous().flatten().view(torch.uint8) for source in sources)  # noqa: E731
        self.parts[name] = Part(format, 0, sum(math.prod(self.shapes[source]) for source in sources), 1, 0, make=make)

    def matrix(self, name: str, sources: list[str], fine: bool = False, format: str | None = None) -> None:
        """Matrices with the same input, stacked along their outputs. fine: int8 instead of int4, which would cost more than it saves."""
        rows, columns = sum(self.shapes[source][0] for source in sources), self.shapes[sources[0]][1]
        format = format or self.format
        format = "int8" if format == "int4" and (fine or columns % GROUP) else format

        def make() -> Iterator[Tensor]:
            whole = self.get(sources[0]) if len(sources) == 1 else torch.cat([self.get(source) for source in sources])
            yield pack_matrix(whole, format)

        self.parts[name] = Part(format, rows, columns, 1, 0, make=make)

    def heads(self, name: str, count: int, get: Callable[[], Tensor], shape: tuple[int, int]) -> None:
        """A matrix for each head."""
        format = "int8" if self.format == "int4" else self.format
        self.parts[name] = Part(format, *shape, count, _bytes(format, *shape), make=lambda: (pack_matrix(w, format) for w in get()))

    def layer(self, layer: Layer) -> None:
        i, at, attention = layer.index, f"model.layers.{layer.index}.", layer.attention
        a = at + "self_attn."
        self.numbers(f"{i}.input_norm", at + "input_layernorm.weight")
        self.numbers(f"{i}.post_norm", at + "post_attention_layernorm.weight")
        if attention.kind == "mla":
            H, N, V, C = attention.heads, attention.nope, attention.value, attention.latent
            self.numbers(f"{i}.kv_norm", a + "kv_a_layernorm.weight")
            if attention.query_rank is not None:
                self.numbers(f"{i}.q_norm", a + "q_a_layernorm.weight")
                self.matrix(f"{i}.q_b", [a + "q_b_proj.weight"])
            kv_b = lambda: self.get(a + "kv_b_proj.weight").unflatten(0, (H, N + V))  # noqa: E731
            self.heads(f"{i}.k_b", H, lambda: kv_b()[:, :N].transpose(1, 2), (C, N))
            self.heads(f"{i}.v_b", H, lambda: kv_b()[:, N:], (V, C))
        elif attention.head_norm:
            self.numbers(f"{i}.q_norm", a + "q_norm.weight")
            self.numbers(f"{i}.kv_norm", a + "k_norm.weight")
        self.matrix(f"{i}.first", [a + name for name in attention.inputs], fine=True)
        if attention.bias:
            self.numbers(f"{i}.first_bias", *(a + name.replace("weight", "bias") for name in attention.inputs))
        self.matrix(f"{i}.o", [a + "o_proj.weight"])
        if layer.feed_forward.common_width:
            mlp = at + ("mlp.shared_experts." if layer.mixture else "mlp.")
            self.matrix(f"{i}.gate_up", [mlp + "gate_proj.weight", mlp + "up_proj.weight"])
            self.matrix(f"{i}.down", [mlp + "down_proj.weight"])
        if layer.mixture:
            if layer.feed_forward.selection_bias:
                self.numbers(f"{i}.bias", f"{at}mlp.gate.{SELECTION_BIAS}")
            self.matrix(f"{i}.router", [at + "mlp.gate.weight"], format="float32")
            self.experts(i, at + "mlp.experts.")
        if layer.mtp:
            for name, source in (("enorm", "enorm"), ("hnorm", "hnorm"), ("head_norm", "shared_head.norm")):
                self.numbers(f"{i}.{name}", f"{at}{source}.weight")
            self.matrix(f"{i}.join", [at + "eh_proj.weight"])

    def experts(self, i: int, at: str) -> None:
        """Both matrices of each expert together, in whole pages, so that experts can be read from disk one by one."""
        (count, *up), (_, *down) = (self.shapes[at + name] for name in ("gate_up_proj", "down_proj"))
        formats = ["int8" if self.format == "int4" and shape[1] % GROUP else self.format for shape in (up, down)]
        sizes = [-(-_bytes(f, *shape) // 64) * 64 for f, shape in zip(formats, (up, down), strict=True)]
        stride = -(-sum(sizes) // PAGE) * PAGE

        def make() -> Iterator[Tensor]:
            for up, down in zip(self.get(at + "gate_up_proj"), self.get(at + "down_proj"), strict=True):
                whole = torch.zeros(stride, dtype=torch.uint8)
                for start, w, f in ((0, up, formats[0]), (sizes[0], down, formats[1])):
                    data = pack_matrix(w, f)
                    whole[start : start + len(data)] = data
                yield whole

        self.parts[f"{i}.expert_gate_up"] = Part(formats[0], *up, count, stride, make=make)
        self.parts[f"{i}.expert_down"] = Part(formats[1], *down, count, stride, offset=sizes[0])


class PackedWeights:
    """A file of packed weights, mapped into memory."""

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
            self.bytes = os.fstat(file.fileno()).st_size
            self.file = os.dup(file.fileno())  # reads experts without mapping them
            weakref.finalize(self, os.close, self.file).atexit = False
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch asks for a writable map
        self.source = header["source"]
        self.parts = {name: Part(**part) for name, part in header["parts"].items()}
        self.data = torch.frombuffer(self._map, dtype=torch.uint8)

    def address(self, name: str) -> int:
        return self.data.data_ptr() + self.parts[name].offset


def fingerprint(weights: Path) -> str:
    """Hash of the file's size and of 64 samples of 4 KiB: the same after copying, another after training."""
    size, digest = weights.stat().st_size, hashlib.blake2b(digest_size=16)
    digest.update(size.to_bytes(8, "little"))
    with open(weights, "rb") as file:
        for i in range(64):
            file.seek(max(0, size - PAGE) * i // 63)
            digest.update(file.read(PAGE))
    return digest.hexdigest()


def derived_paths(run: RunFolder, source: str, name: str) -> tuple[Path, Path]:
    """Where a file derived from weights may be: in the run folder, or under $SPARING_HOME if that is read-only."""
    return run.path / "packed" / name, home() / "packed" / source.split()[1] / name


def draft_words(run: RunFolder, c: ModelConfig) -> list[int]:
    """The words among which the run's MTP module chooses (draft_words.json); empty: all. Raises UserError for what names no words."""
    if not (c.mtp_depth and run.draft_words_file.exists()):
        return []
    try:
        words = json.loads(read_text(run.draft_words_file))
    except ValueError:
        words = None
    known = isinstance(words, list) and words and all(type(word) is int and 0 <= word < c.vocab_size for word in words)
    if not known or len(set(words)) < len(words):
        raise UserError(f"{run.draft_words_file}: expected a list of different token ids from 0 to {c.vocab_size - 1}")
    return words


def open_packed(run: RunFolder, c: ModelConfig, format: str) -> PackedWeights:
    """The run's weights in a format, packed first if need be. Raises UserError for weights that are missing or damaged."""
    if not run.learned_file.exists():
        raise UserError(f"{run} has no usable weights: {run.weights_file} is missing")
    words = draft_words(run, c)
    source = f"{VERSION} {fingerprint(run.learned_file)}" + (f" {hashlib.sha256(repr(words).encode()).hexdigest()[:16]}" if words else "")
    paths = derived_paths(run, source, f"{format}.bin")
    for path in paths:
        try:
            packed = PackedWeights(path)
        except (OSError, ValueError, KeyError, TypeError, struct.error):
            continue
        if packed.source == source:
            return packed
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, run, c, format, source, words)
            return PackedWeights(path)
        except DiskFullError:
            raise
        except OSError as error:  # read-only
            problem = error
    folders = f"neither {paths[0].parent} nor {paths[1].parent} can be written"
    raise UserError(f"no place for the packed weights: {folders} ({problem.strerror})")


def _write(path: Path, run: RunFolder, c: ModelConfig, format: str, source: str, words: list[int]) -> None:
    try:
        stored, expected = tensors_of(run), shapes(c)

        def get(name: str) -> Tensor:
            tensor = stored[name]
            if tuple(tensor.shape) != expected[name]:
                raise UserError(f"{run.learned_file}: {name} does not belong to the model of config.toml")
            return tensor

        parts = Writer(c, format, get, words).parts
        room = end = -(-(300 * len(parts) + 300) // PAGE) * PAGE
        start = room
        for part in parts.values():
            if part.make:
                start, end = end, end + -(-part.bytes // PAGE) * PAGE
            part.offset += start
        listed = {name: {k: v for k, v in vars(part).items() if k != "make"} for name, part in parts.items()}
        header = json.dumps({"source": source, "parts": listed}).encode().ljust(room - 8)
        assert len(header) == room - 8
        with atomic_file(path) as out:
            out.write(struct.pack("<Q", len(header)) + header)
            for part in parts.values():
                if part.make:
                    for data in part.make():
                        out.write(data.numpy())
                    out.write(b"\0" * (-part.bytes % PAGE))
                    part.make = None  # it leads to the mapped weights, and they to it: they would stay in memory
    except DamagedError as error:
        raise UserError(f"{run} has no usable weights: {error}") from None
