"""The open models that `sparing fetch` knows by name: models.toml beside this file."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path

from sparing.base.config import UserError
from sparing.base.config_file import nearest
from sparing.base.origin import Origin


@dataclass(frozen=True)
class Package:
    """A wheel of the package index that holds a GGUF file."""

    name: str
    version: str
    bytes: int
    sha256: str
    member: str
    """The file in it."""
    member_bytes: int
    member_sha256: str


@dataclass(frozen=True)
class KnownModel:
    """A model, where it is to be had, and what is published about it."""

    name: str
    publisher: str
    licence: str
    url: str
    hub: str
    """Its repository on the hub."""
    tokens: float | None = None
    hardware: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    package: Package | None = None


@cache
def known_models() -> dict[str, KnownModel]:
    """By the names that users say."""
    raw = tomllib.loads((Path(__file__).parent / "models.toml").read_text(encoding="utf-8"))
    return {
        name: KnownModel(**entry | {"package": Package(**entry["package"]) if "package" in entry else None}) for name, entry in raw.items()
    }


def known_model(name: str) -> KnownModel:
    """Raises UserError for an unknown name, with the nearest one."""
    models = known_models()
    if name not in models:
        raise UserError(
            f"fetch: no model is called {name!r}; nearest: {nearest(name, models)}; known: {', '.join(models)}; "
            "others: sparing import OWNER/NAME, or a folder or GGUF file"
        )
    return models[name]


def recognised(origin: Origin) -> Origin:
    """`origin` with what is published about the model, where its file or repository is that of a known one."""
    for known in known_models().values():
        file = known.package is not None and known.package.member_sha256 == origin.sha256
        if file or origin.source.startswith(f"{known.hub}@"):
            said = {one.name: getattr(known, one.name) for one in fields(Origin) if hasattr(known, one.name)}
            return replace(origin, **said)
    return origin
