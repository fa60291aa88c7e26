"""safetensors files read and written one tensor at a time, so that memory is one tensor and not one file.

Layout of a file: 8 bytes little-endian length of the header, the header (JSON: name -> dtype, shape, data_offsets), the data.
The reader reads into fresh memory instead of mapping files, because mapped pages would count as the importer's memory.
"""

from __future__ import annotations

import json
import operator
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from sparing.base.config import UserError
from sparing.interop.hf_fields import read_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format itself."""


@dataclass(frozen=True)
class Spec:
    """What a tensor will be: enough to lay out a file before any data exists."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: where its bytes are."""

    spec: Spec
    path: Path
    offset: int


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file; UserError when the file is missing, truncated or inconsistent."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise UserError(f"{path}: not a safetensors file, or truncated")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise UserError(f"{path.parent}: {path.name} is missing") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a safetensors file (its header is not JSON)") from None
    found = {}
    try:
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if entry["dtype"] not in DTYPES:
                raise UserError(f"{path}: {name} has the type {entry['dtype']}, which is not supported (nearest: BF16, F32)")
            spec = Spec(name, DTYPES[entry["dtype"]], tuple(operator.index(size) for size in entry["shape"]))
            if min(spec.shape, default=0) < 0 or begin < 0 or end - begin != spec.nbytes:
                raise UserError(f"{path}: the header's entry of {name} is inconsistent")
            if 8 + length + end > size:
                raise UserError(f"{path}: truncated: {name} ends at byte {8 + length + end}, the file at {size}")
            found[name] = Stored(spec, path, 8 + length + begin)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: malformed safetensors header ({error})") from None
    return found


def read_folder(folder: Path) -> dict[str, Stored]:
    """All tensors of a Hugging Face folder: the files of its index, or its single file. Pickled weights are refused."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{folder / INDEX}: has no usable weight_map")
        found: dict[str, Stored] = {}
        for file in sorted(set(weight_map.values())):
            if Path(file).name != file:
                raise UserError(f"{folder / INDEX}: {file!r} points outside the folder")
            found.update(read_header(folder / file))
        for name, file in weight_map.items():
            if name not in found:
                raise UserError(f"{folder / INDEX}: {name} should be in {file} but is not")
        return found
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt"):
        for path in sorted(folder.glob(pattern)):
            raise UserError(f"{folder}: {path.name} is a pickle, which can run code when loaded; only safetensors weights are read")
    raise UserError(f"{folder}: there is neither {SINGLE} nor {INDEX}")


def read_tensor(stored: Stored) -> torch.Tensor:
    """One tensor, in memory of its own; UserError if the file ends early."""
    buffer = torch.empty(stored.spec.nbytes, dtype=torch.uint8)
    with stored.path.open("rb") as file:
        file.seek(stored.offset)
        if file.readinto(buffer.numpy()) != stored.spec.nbytes:
            raise UserError(f"{stored.path}: ends inside {stored.spec.name}")
    return buffer.view(stored.spec.dtype).view(stored.spec.shape)


def same_bytes(one: Stored, other: Stored) -> bool:
    """Whether two stored tensors of one dtype and shape are equal, compared a megabyte at a time."""
    if (one.spec.dtype, one.spec.shape) != (other.spec.dtype, other.spec.shape):
        return False
    with one.path.open("rb") as a, other.path.open("rb") as b:
        a.seek(one.offset)
        b.seek(other.offset)
        left = one.spec.nbytes
        while left:
            size = min(1 << 20, left)
            if a.read(size) != b.read(size):
                return False
            left -= size
    return True


class ShardWriter:
    """Lays out shards for tensors known by their specs, then takes the tensors in any order and writes each where it belongs."""

    def __init__(self, folder: Path, specs: list[Spec], shard_bytes: int):
        groups: list[list[Spec]] = [[]]
        filled = 0
        for spec in specs:
            if groups[-1] and filled + spec.nbytes > shard_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(spec)
            filled += spec.nbytes
        self.folder = folder
        self.total = sum(spec.nbytes for spec in specs)
        self.stored: dict[str, Stored] = {}
        self.missing = {spec.name for spec in specs}
        for number, group in enumerate(groups, start=1):
            name = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            self._begin(folder / name, group)

    def _begin(self, path: Path, group: list[Spec]) -> None:
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for spec in group:
            header[spec.name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, offset + spec.nbytes]}
            offset += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)
        for spec in group:
            self.stored[spec.name] = Stored(spec, path, 8 + len(text) + header[spec.name]["data_offsets"][0])

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor (any device, any strides) of the announced shape, cast to the announced dtype."""
        stored = self.stored[name]
        assert tuple(tensor.shape) == stored.spec.shape, (name, tuple(tensor.shape), stored.spec.shape)
        data = tensor.detach().to("cpu", stored.spec.dtype).contiguous()
        with stored.path.open("r+b") as file:
            file.seek(stored.offset)
            file.write(data.flatten().view(torch.uint8).numpy())
        self.missing.discard(name)

    def finish(self) -> None:
        """Make the files durable and write the index, if there is more than one file."""
        assert not self.missing, sorted(self.missing)[:3]
        files = sorted({stored.path for stored in self.stored.values()})
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if len(files) > 1:
            weight_map = {name: stored.path.name for name, stored in sorted(self.stored.items())}
            index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
