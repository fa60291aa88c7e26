"""What other programs' files are read as, whatever they are: `huggingface.read_hf` and `gguf_model.read_gguf` give it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from sparing.base.config import ModelConfig, TokensConfig
from sparing.base.origin import Origin

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
