"""The tensors of a Hugging Face checkpoint: their names and where each lies in ours, and safetensors files read and written one by one.

Our names are the published ones, with two differences. Experts are fused, as `mlp.experts.gate_up_proj` (E, 2F, D) with the gate's rows
before the up projection's, and `mlp.experts.down_proj` (E, D, F); published are `mlp.experts.{j}.{gate,up,down}_proj.weight`.
MTP modules share the embedding and the head; published are copies inside the module's layer (DeepSeek-V3's layer 61).

Our rotary dimensions are interleaved pairs (2i, 2i + 1), as in DeepSeek's checkpoints; Llama's layout pairs i with i + d/2.
"""

from __future__ import annotations

import json
import operator
import os
import re
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from sparing.base.config import ModelConfig, UserError
from sparing.base.files import POINTER, is_pointer
from sparing.base.layers import EMBED, HEAD, SELECTION_BIAS, Attention, layers, shapes
from sparing.interop.hf_config import read_json
from sparing.model.rope import rotated_width

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
EIGHT_BIT = re.compile(r"(self_attn\.(q_a|q_b|q|k|v|o|kv_b)_proj|self_attn\.kv_a_proj_with_mqa|mlp\..*(gate|up|down)_proj)\.weight$")


@dataclass(frozen=True)
class Rotary:
    """Rows of a projection that are rotated: in each of `heads` heads, `dim` rows after `skip` and before `rest` that are not."""

    heads: int
    skip: int
    dim: int
    rest: int = 0

    def permute(self, weight: torch.Tensor, halves: bool) -> torch.Tensor:
        """Rows reordered from pairs to halves (`halves`), or back. `weight`: (heads * (skip + dim + rest), in), or without `in`."""
        before, rotated, after = weight.view(self.heads, -1, *weight.shape[1:]).split([self.skip, self.dim, self.rest], 1)
        split = (self.dim // 2, 2) if halves else (2, self.dim // 2)
        rotated = rotated.unflatten(1, split).transpose(1, 2).flatten(1, 2)
        return torch.cat([before, rotated, after], dim=1).view_as(weight)


@dataclass(frozen=True)
class PublishedTensor:
    """A tensor of the checkpoint: one of ours, or a part of one."""

    name: str
    ours: str
    """The name of ours."""
    shape: tuple[int, ...]
    expert: int | None = None
    rows: tuple[int, int] | None = None
    """Rows of the expert's matrix; None: all."""
    copy: bool = False
    """A second copy of a shared tensor, which an importer only checks."""
    rotary: Rotary | None = None
    """Set where the file's rotary layout is halves."""

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of our tensor that this one is."""
        if self.expert is None:
            return tensor
        matrix = tensor[self.expert]
        return matrix if self.rows is None else matrix[self.rows[0] : self.rows[1]]

    @property
    def float32(self) -> bool:
        """Selection biases keep float32 whatever the file's type: they are sums of steps of 0.001."""
        return self.name.endswith(SELECTION_BIAS)

    @property
    def eight_bit(self) -> bool:
        """Whether an FP8 checkpoint stores this tensor in 8 bits: the projections inside layers, not router, norms, `eh_proj`."""
        return EIGHT_BIT.search(self.name) is not None and not self.copy


def published_tensors(config: ModelConfig, halves: bool = False) -> list[PublishedTensor]:
    """All tensors of a model's checkpoint in our order, the parts of one of our tensors side by side. halves: see `TensorFormat`."""
    ours = shapes(config)
    tensors = []
    for name, shape in ours.items():
        match = LAYER.fullmatch(name)
        if name.endswith("mlp.experts.gate_up_proj"):
            stem, width = name.removesuffix("gate_up_proj"), shape[1] // 2
            for j in range(shape[0]):
                tensors.append(PublishedTensor(f"{stem}{j}.gate_proj.weight", name, (width, shape[2]), j, (0, width)))
                tensors.append(PublishedTensor(f"{stem}{j}.up_proj.weight", name, (width, shape[2]), j, (width, 2 * width)))
        elif name.endswith("mlp.experts.down_proj"):
            stem = name.removesuffix("down_proj")
            tensors += [PublishedTensor(f"{stem}{j}.down_proj.weight", name, shape[1:], j) for j in range(shape[0])]
        else:
            rotary = rotated_rows(config, layers(config)[int(match[1])].attention, match[2]) if halves and match else None
            tensors.append(PublishedTensor(name, name, shape, rotary=rotary))
    head = HEAD if HEAD in ours else EMBED
    for module in layers(config)[config.num_layers :]:
        tensors.append(PublishedTensor(f"model.layers.{module.index}.embed_tokens.weight", EMBED, ours[EMBED], copy=True))
        tensors.append(PublishedTensor(f"model.layers.{module.index}.shared_head.head.weight", head, ours[head], copy=True))
    return tensors


def rotated_rows(config: ModelConfig, a: Attention, name: str) -> Rotary | None:
    """Rotated rows of a layer's tensor, by its name inside the layer."""
    rotated = {
        "self_attn.q_proj.weight": (a.heads, a.nope),
        "self_attn.q_proj.bias": (a.heads, a.nope),
        "self_attn.q_norm.weight": (1, a.nope),
        "self_attn.q_b_proj.weight": (a.heads, a.nope),
        "self_attn.k_proj.weight": (a.kv_heads, a.nope),
        "self_attn.k_proj.bias": (a.kv_heads, a.nope),
        "self_attn.k_norm.weight": (1, a.nope),
        "self_attn.kv_a_proj_with_mqa.weight": (1, a.latent),
    }
    turned = rotated_width(config)
    return Rotary(*rotated[name], turned, a.rope - turned) if name in rotated else None


# safetensors files, read and written one tensor at a time, so that memory is one tensor and not one file. Layout: the length of the header
# in 8 little-endian bytes, the header (JSON: name -> dtype, shape, data_offsets), the data. The reader reads into fresh memory instead of
# mapping files, because mapped pages would count as the importer's memory.

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
class Stored:
    """A tensor in a safetensors file, and where its bytes are."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * prod(self.shape)


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file. Raises UserError when the file is missing, truncated or inconsistent."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is not a file")  # opening a named pipe would wait for a writer
    try:
        size = path.stat().st_size
        if is_pointer(path):
            raise UserError(f"{path}: {POINTER}")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise UserError(f"{path}: not a safetensors file, or truncated")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise UserError(f"{path.parent}: {path.name} is missing") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a safetensors file (its header is not JSON)") from None
    tensors = {}
    try:
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if entry["dtype"] not in DTYPES:
                raise UserError(f"{path}: {name} has the type {entry['dtype']}, which is not supported (nearest: BF16, F32)")
            shape = tuple(operator.index(size) for size in entry["shape"])
            stored = Stored(name, DTYPES[entry["dtype"]], shape, path, 8 + length + begin)
            if min(shape, default=0) < 0 or begin < 0 or end - begin != stored.nbytes:
                raise UserError(f"{path}: the header's entry of {name} is inconsistent")
            if 8 + length + end > size:
                raise UserError(f"{path}: truncated: {name} ends at byte {8 + length + end}, the file at {size}")
            tensors[name] = stored
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: malformed safetensors header ({error})") from None
    return tensors


def read_folder(folder: Path) -> dict[str, Stored]:
    """All tensors of a Hugging Face folder: of the files in its index, or of its single file. Raises UserError, also for pickles."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{folder / INDEX}: has no usable weight_map")
        tensors: dict[str, Stored] = {}
        for file in sorted(set(weight_map.values())):
            if Path(file).name != file:
                raise UserError(f"{folder / INDEX}: {file!r} points outside the folder")
            tensors.update(read_header(folder / file))
        for name, file in weight_map.items():
            if name not in tensors:
                raise UserError(f"{folder / INDEX}: {name} should be in {file} but is not")
        return tensors
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt"):
        for path in sorted(folder.glob(pattern)):
            raise UserError(f"{folder}: {path.name} is a pickle, which can run code when loaded; only safetensors weights are read")
    raise UserError(f"{folder}: there is neither {SINGLE} nor {INDEX}")


def read_tensor(stored: Stored) -> torch.Tensor:
    """One tensor, in memory of its own. Raises UserError if the file ends early."""
    buffer = torch.empty(stored.nbytes, dtype=torch.uint8)
    with stored.path.open("rb") as file:
        file.seek(stored.offset)
        if file.readinto(buffer.numpy()) != stored.nbytes:
            raise UserError(f"{stored.path}: ends inside {stored.name}")
    return buffer.view(stored.dtype).view(stored.shape)


class SafetensorsWriter:
    """Writes tensors, whose types and shapes are known beforehand, into shards; they may come in any order."""

    def __init__(self, folder: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], shard_bytes: int):
        """tensors: name -> type and shape. shard_bytes: size of a shard, but for a tensor that is larger."""
        shards: list[list[Stored]] = [[]]
        filled = 0
        for name, (dtype, shape) in tensors.items():
            stored = Stored(name, dtype, shape, folder)
            if shards[-1] and filled + stored.nbytes > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(stored)
            filled += stored.nbytes
        self.folder, self.missing = folder, set(tensors)
        self.stored: dict[str, Stored] = {}
        for number, shard in enumerate(shards, start=1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._begin(folder / name, shard)

    def _begin(self, path: Path, shard: list[Stored]) -> None:
        """A file with its header, and room for the data."""
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        end = 0
        for stored in shard:
            begin, end = end, end + stored.nbytes
            header[stored.name] = {"dtype": NAMES[stored.dtype], "shape": list(stored.shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        for stored in shard:
            self.stored[stored.name] = replace(stored, path=path, offset=8 + len(text) + header[stored.name]["data_offsets"][0])

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor (any device, any strides) of the announced shape, cast to the announced type."""
        stored = self.stored[name]
        assert tuple(tensor.shape) == stored.shape, (name, tuple(tensor.shape), stored.shape)
        data = tensor.detach().to("cpu", stored.dtype).contiguous()
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
            index = {"metadata": {"total_size": sum(stored.nbytes for stored in self.stored.values())}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
