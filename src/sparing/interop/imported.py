"""What other programs' files are read as, and the run folder made of it.

`huggingface.read_hf` and `gguf_model.read_gguf` give an `Imported`; `save` writes it, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch
from torch import Tensor

from sparing.base.config import Config, ModelConfig, TokensConfig, UserError
from sparing.base.config_file import write_config
from sparing.base.config_limits import in_range
from sparing.base.files import write_atomic
from sparing.base.int8_rows import to_int8
from sparing.base.layers import EMBED, Shapes, mixtures, shapes
from sparing.base.origin import Origin, credits, write_origin
from sparing.base.run import SCALE, RunFolder, stream_tensors
from sparing.data.chat import MAX_BYTES, ChatTemplate

DTYPES = ("float32", "bfloat16", "int8")
FLOAT32_BYTES = 2_000_000_000
"""Weights that take more than this in float32 are kept in bfloat16 where nobody chose."""
ROW_TOKENS = 4096
"""Longest row that an imported model is scored and trained with where nobody chose."""
LICENCES = (
    "Apache-2.0", "MIT", "BSD-3-Clause", "BSD-2-Clause", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "CC0-1.0",
    "GPL-3.0", "AGPL-3.0", "LGPL-3.0", "MPL-2.0", "OpenRAIL", "Unlicense",
)  # fmt: skip


@dataclass
class Imported:
    """A model that was opened and checked. Its tensors are read when they are asked for."""

    config: ModelConfig
    tensors: Iterator[tuple[str, Tensor]]
    """(our name, floats), in the order of `base.layers.shapes`."""
    tokenizer: str | None
    """tokenizer.json."""
    tokens: TokensConfig | None
    chat_template: str | None
    origin: Origin
    notes: list[str] = field(default_factory=list)
    """For the user."""


def spdx(licence: str) -> str:
    """A licence as SPDX spells it, where it is a well-known one; otherwise as it is."""
    return next((name for name in LICENCES if name.lower() == licence.strip().lower()), licence.strip())


def chosen_dtype(numbers: int, dtype: str | None) -> str:
    """What `numbers` weights are kept in. Raises UserError for a type that is none of DTYPES."""
    if dtype not in (None, *DTYPES):
        raise UserError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    return dtype or ("float32" if 4 * numbers <= FLOAT32_BYTES else "bfloat16")


def save(model: Imported, run: str, dtype: Literal["float32", "bfloat16", "int8"]) -> None:
    """Make the run folder `run`. Raises UserError; then, and when it is interrupted, nothing of the model stays there."""
    _check(model)
    folder = RunFolder.create(run)
    with folder.making():
        _write(model, folder, dtype)


def _check(model: Imported) -> None:
    """What would make a run that cannot be used. Raises UserError."""
    for one in fields(ModelConfig):
        in_range(ModelConfig, one.name, getattr(model.config, one.name), f"{model.origin.source}: the model's {one.name}")
    if model.chat_template is not None and len(model.chat_template.encode()) > MAX_BYTES:
        raise UserError(f"{model.origin.source}: its chat template is larger than {MAX_BYTES >> 20} MiB")
    ChatTemplate(model.chat_template)


def _write(model: Imported, run: RunFolder, dtype: str) -> None:
    """All files; config.toml, which makes a run of the folder, last."""
    kinds = {name: _kind(name, shape, dtype) for name, shape in shapes(model.config).items()}
    stream_tensors(run.weights_file, _layout(shapes(model.config), kinds), _stored(model.tensors, kinds))
    if model.tokenizer is not None:
        write_atomic(run.tokenizer_file, model.tokenizer)
    if model.chat_template is not None:
        write_atomic(run.path / "chat_template.jinja", model.chat_template)
    write_origin(run, model.origin)
    write_atomic(run.model_card_file, _model_card(model, dtype))
    base = Config()
    rows = replace(base.train, seq_len=min(ROW_TOKENS, model.config.max_position_embeddings))
    write_atomic(run.config_file, write_config(replace(base, model=model.config, train=rows, tokens=model.tokens)))


def _kind(name: str, shape: tuple[int, ...], dtype: str) -> torch.dtype:
    """Type of a stored tensor. Vectors and routers stay float32; an embedding is looked up, not multiplied: it is never int8."""
    if len(shape) == 1 or name.endswith("mlp.gate.weight"):
        return torch.float32
    return torch.bfloat16 if dtype == "int8" and name == EMBED else getattr(torch, dtype)


def _layout(all_shapes: Shapes, kinds: dict[str, torch.dtype]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    layout = {}
    for name, shape in all_shapes.items():
        layout[name] = kinds[name], shape
        if kinds[name] == torch.int8:
            layout[name + SCALE] = torch.float32, shape[:-1]
    return layout


def _stored(tensors: Iterable[tuple[str, Tensor]], kinds: dict[str, torch.dtype]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        if kinds[name] != torch.int8:
            yield name, tensor.to(kinds[name])
            continue
        codes, scale = to_int8(tensor)
        yield name, codes
        yield name + SCALE, scale


def _model_card(model: Imported, dtype: str) -> str:
    """MODEL_CARD.md of an import."""
    c, origin = model.config, model.origin
    kind = f"mixture of {c.n_routed_experts} experts, {c.num_experts_per_tok} a token" if mixtures(c) else "dense"
    lines = "\n".join(credits(origin))
    return f"""# Model card

A {kind} language model of {origin.parameters:,} parameters, imported by Sparing. Nothing was trained.

{lines}
- Vocabulary {c.vocab_size:,}, {c.num_layers} layers of width {c.hidden_size}, context {c.max_position_embeddings:,} tokens
- Weights kept in {dtype}

What it says may be false.
"""
