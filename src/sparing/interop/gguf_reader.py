"""Reads GGUF files: metadata, where each tensor lies, and tensors as floats, one at a time.

The format: github.com/ggml-org/ggml, docs/gguf.md. The header is read by our own code, because a file from anywhere may lie about every
length in it: each is compared with what the file still has before anything is allocated. Quantised blocks become floats by the `gguf`
package, a few rows at a time.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from sparing.base.config import UserError
from sparing.base.config_file import nearest
from sparing.base.files import POINTER, POINTER_BEGINS

MAGIC = b"GGUF"
VERSIONS = (2, 3)
HEADER_BYTES = 128 << 20
"""A header has a vocabulary, its merges, a chat template and the list of tensors: 2 to 20 MB of the largest models."""
ENTRIES = 1 << 16
"""Most keys, and most tensors."""
ITEMS = 2 << 20
"""Most elements of all arrays together."""
STRING_BYTES = 16 << 20
DIMENSIONS = 4
STRING, ARRAY, BOOL = 8, 9, 7
NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
"""Types of values in the metadata that are numbers, in numpy's words."""
BLOCKS = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136),
}  # fmt: skip
"""Types of tensors that are read: number -> (name, numbers in a block, bytes of a block)."""
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SLICE = 1 << 18
"""Numbers that are dequantised at a time: the package makes several copies."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its file."""

    name: str
    shape: tuple[int, ...]
    """Rows last, as PyTorch counts; GGUF counts backwards."""
    kind: str
    """The type's name in BLOCKS."""
    offset: int
    """Bytes from the beginning of the file."""
    nbytes: int


class GgufFile:
    """An opened file: `metadata` (key -> number, bool, text, list of texts, or array of numbers) and `tensors` by name.

    Raises UserError, one line that names the file, for whatever is not a whole GGUF file with contents that can be read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                cursor = _Cursor(self.path, file)
                self.version = cursor.begin()
                count, pairs = cursor.count("tensors", 24), cursor.count("keys", 13)
                self.metadata = cursor.metadata(pairs)
                self.tensors = cursor.tensors(count, self.metadata.get("general.alignment", 32))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None

    @property
    def nbytes(self) -> int:
        """Of all tensors, as they are stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """A tensor as floats, in memory of its own: F16 and BF16 as they are, all others float32. Raises UserError for numbers that are not
        finite, and where the file has become shorter."""
        stored = self.tensors[name]
        data = np.empty(stored.nbytes, np.uint8)
        with open(self.path, "rb") as file:
            file.seek(stored.offset)
            if file.readinto(data) != stored.nbytes:
                raise UserError(f"{self.path}: ends inside {name}")
        if stored.kind in PLAIN:
            tensor = torch.from_numpy(data).view(PLAIN[stored.kind]).view(stored.shape)
        else:
            tensor = self._dequantised(stored, data)
        if not torch.stack(tensor.aminmax()).isfinite().all():
            raise UserError(f"{self.path}: {name} has numbers that are not finite: the file is damaged")
        return tensor

    def _dequantised(self, stored: StoredTensor, data: np.ndarray) -> torch.Tensor:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        _, numbers, size = next(block for block in BLOCKS.values() if block[0] == stored.kind)
        blocks, step = data.reshape(-1, size), SLICE // numbers
        values = np.empty((len(blocks), numbers), np.float32)
        with np.errstate(all="ignore"):  # what is not finite is told by `read`
            for start in range(0, len(blocks), step):
                part = blocks[start : start + step].reshape(1, -1)  # as one row: the package works on 16 rows at a time
                values[start : start + step] = dequantize(part, GGMLQuantizationType[stored.kind]).reshape(-1, numbers)
        return torch.from_numpy(values).view(stored.shape)


class _Cursor:
    """Reads a header from its beginning on, and never further than the file and HEADER_BYTES allow."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file, self.at = path, file, 0
        self.size = os.fstat(file.fileno()).st_size
        self.items = 0

    def fail(self, message: str) -> UserError:
        return UserError(f"{self.path}: {message}")

    def take(self, size: int, what: str) -> bytes:
        if size > self.size - self.at:
            raise self.fail(f"truncated, or damaged: {what} would end at byte {self.at + size:,}, the file has {self.size:,}")
        if self.at + size > HEADER_BYTES:
            raise self.fail(f"{what} is beyond {HEADER_BYTES >> 20} MiB, where no model's header reaches: the file is damaged")
        self.at += size
        data = self.file.read(size)
        if len(data) != size:
            raise self.fail(f"ends inside {what}")
        return data

    def whole(self, size: int, what: str) -> int:
        """An unsigned number of `size` bytes."""
        return int.from_bytes(self.take(size, what), "little")

    def number(self, kind: str, what: str) -> Any:
        return np.frombuffer(self.take(np.dtype(kind).itemsize, what), kind)[0].item()

    def begin(self) -> int:
        """Magic and version."""
        magic = self.take(min(4, self.size), "the beginning")
        if magic != MAGIC:
            whole = magic + self.file.read(len(POINTER_BEGINS))
            raise self.fail(POINTER if whole.startswith(POINTER_BEGINS) else "not a GGUF file (it does not begin with GGUF)")
        version = self.whole(4, "the version")
        if version & 0xFFFF == 0 and version:
            raise self.fail("is a GGUF file for machines with the other byte order, which is not read")
        if version not in VERSIONS:
            raise self.fail(f"is of GGUF version {version}, supported: {', '.join(map(str, VERSIONS))}")
        return version

    def count(self, what: str, least: int) -> int:
        """How many `what` follow, each of at least `least` bytes."""
        count = self.whole(8, f"the number of {what}")
        if count > ENTRIES or count * least > self.size:
            raise self.fail(f"says that it has {count:,} {what}, which cannot be: the file is damaged")
        return count

    def text(self, what: str) -> str:
        size = self.whole(8, what)
        if size > STRING_BYTES:
            raise self.fail(f"{what} would have {size:,} bytes, at most {STRING_BYTES:,} are read: the file is damaged")
        try:
            return self.take(size, what).decode()
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8 text: the file is damaged") from None

    def metadata(self, count: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for i in range(count):
            key = self.text(f"key {i + 1}")
            if not (key.isprintable() and 0 < len(key) <= 256):
                raise self.fail(f"key {i + 1} is no name: the file is damaged")
            if key in values:
                raise self.fail(f"has the key {key} twice: the file is damaged")
            values[key] = self.value(self.whole(4, f"the type of {key}"), key)
        return values

    def value(self, kind: int, what: str) -> Any:
        if kind in NUMBERS:
            return self.number(NUMBERS[kind], what)
        if kind == BOOL:
            return self.take(1, what) != b"\0"
        if kind == STRING:
            return self.text(what)
        if kind == ARRAY:
            return self.array(what)
        raise self.fail(f"{what} has a value of the unknown type {kind}: the file is damaged")

    def array(self, what: str) -> Any:
        kind, count = self.whole(4, f"the type of {what}"), self.whole(8, f"the length of {what}")
        sizes = {BOOL: 1, STRING: 8} | {number: np.dtype(dtype).itemsize for number, dtype in NUMBERS.items()}
        if kind not in sizes:
            raise self.fail(f"{what} is an array of the type {kind}, which is not read")
        self.items += count
        if count * sizes[kind] > self.size - self.at or self.items > ITEMS:
            raise self.fail(f"{what} would have {count:,} elements: the file is truncated or damaged")
        if kind == STRING:
            return [self.text(what) for _ in range(count)]
        return np.frombuffer(self.take(count * sizes[kind], what), "?" if kind == BOOL else NUMBERS[kind])

    def tensors(self, count: int, alignment: Any) -> dict[str, StoredTensor]:
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self.fail(f"general.alignment is {alignment!r}, expected a power of two: the file is damaged")
        listed: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for i in range(count):
            name = self.text(f"the name of tensor {i + 1}")
            if not (name.isprintable() and 0 < len(name) <= 256):
                raise self.fail(f"the name of tensor {i + 1} is none: the file is damaged")
            if name in listed:
                raise self.fail(f"has the tensor {name} twice: the file is damaged")
            dimensions = self.whole(4, f"the dimensions of {name}")
            if not 1 <= dimensions <= DIMENSIONS:
                raise self.fail(f"{name} has {dimensions:,} dimensions, at most {DIMENSIONS} are possible: the file is damaged")
            shape = struct.unpack(f"<{dimensions}Q", self.take(8 * dimensions, f"the shape of {name}"))
            if not all(shape):
                raise self.fail(f"{name} has no numbers, its dimensions are {' x '.join(map(str, shape))}: the file is damaged")
            kind, offset = self.whole(4, f"the type of {name}"), self.whole(8, f"the offset of {name}")
            if kind not in BLOCKS:
                names = [block[0] for block in BLOCKS.values()]
                called = _type_name(kind)
                raise self.fail(f"{name} is of type {called}, read are {', '.join(names)}; nearest: {nearest(called, names)}")
            listed[name] = shape[::-1], kind, offset
        begin = -(-self.at // alignment) * alignment
        return {one.name: one for one in self.placed(listed, begin, alignment)}

    def placed(self, listed: dict[str, tuple[tuple[int, ...], int, int]], begin: int, alignment: int) -> list[StoredTensor]:
        """Tensors with their places, each inside the file and apart from the others."""
        found = []
        for name, (shape, number, offset) in listed.items():
            kind, numbers, size = BLOCKS[number]
            if shape[-1] % numbers:
                raise self.fail(f"{name} has rows of {shape[-1]:,} numbers, {kind} wants a multiple of {numbers}: the file is damaged")
            nbytes = prod(shape) // numbers * size
            if offset % alignment:
                raise self.fail(f"{name} begins at {offset:,}, which is no multiple of {alignment}: the file is damaged")
            if begin + offset + nbytes > self.size:
                end = begin + offset + nbytes
                raise self.fail(f"truncated, or damaged: {name} would end at byte {end:,}, the file has {self.size:,}")
            found.append(StoredTensor(name, shape, kind, begin + offset, nbytes))
        by_place = sorted(found, key=lambda one: (one.offset, one.nbytes))
        for one, following in pairwise(by_place):
            if one.offset + one.nbytes > following.offset:
                raise self.fail(f"{one.name} and {following.name} lie over each other: the file is damaged")
        return found


def _type_name(number: int) -> str:
    """A type's name as ggml has it."""
    from gguf.constants import GGMLQuantizationType

    try:
        return GGMLQuantizationType(number).name
    except ValueError:
        return str(number)
