"""Where a model came from that Sparing did not begin: publisher, licence, the file it was read from, and what was published about it.

It is `state/origin.json` in an imported run, and in every run that is derived from one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from sparing.base.files import read_text, write_atomic
from sparing.base.run import RunFolder

HUB = "https://huggingface.co/"


@dataclass(frozen=True)
class Origin:
    """What is known of an imported model. Empty and None: unknown."""

    name: str = ""
    """As its publisher calls it."""
    source: str = ""
    """What was imported: the name of a file or folder, of a package with its version, of a repository with its revision."""
    sha256: str = ""
    """Of the file that the weights were read from; of a folder: of its weights' files, one after the other."""
    licence: str = ""
    """As SPDX names it."""
    publisher: str = ""
    url: str = ""
    """Where it is published."""
    parameters: int | None = None
    """Of the model as it was imported."""
    tokens: float | None = None
    """Published: tokens that it was trained on."""
    hardware: str = ""
    """Published: what it was trained on, as "64 H100"."""
    scores: dict[str, float] = field(default_factory=dict)
    """Published: by test."""


def origin_of(run: RunFolder) -> Origin | None:
    """Where the model of `run` came from, or the imported one that it is derived from; None where it
    began as noise, or nobody noted it."""
    path = _file(run)
    if not path.exists():
        return None
    try:
        raw = json.loads(read_text(path))
        return Origin(**{one.name: raw[one.name] for one in fields(Origin) if one.name in raw})
    except (ValueError, TypeError):  # damaged: as if nobody had noted it
        return None


def write_origin(run: RunFolder, origin: Origin) -> None:
    """Note it in `run`."""
    write_atomic(_file(run), json.dumps(asdict(origin), indent=1, ensure_ascii=False))


def inherit_origin(run: RunFolder, parent: RunFolder) -> None:
    """Note in `run` where its parent's model came from."""
    if origin := origin_of(parent):
        write_origin(run, origin)


def credits(origin: Origin) -> list[str]:
    """Lines of Markdown for a model card: what its users have to know of where it came from."""
    name = f"[{origin.name or origin.url}]({origin.url})" if origin.url else origin.name or "a model of unknown name"
    lines = [f"- Made from {name}{f' by {origin.publisher}' if origin.publisher else ''}, read from {origin.source}"]
    if origin.sha256:
        lines.append(f"- SHA-256 of what was read: `{origin.sha256}`")
    lines.append(f"- Licence: {origin.licence or 'not stated in what was imported; ask its publisher before you pass it on'}")
    if origin.tokens or origin.hardware:
        parts = [f"{origin.tokens:,.0f} tokens" if origin.tokens else "", origin.hardware]
        lines.append(f"- Published about its training: {', on '.join(part for part in parts if part)}")
    if origin.scores:
        lines.append("- Published scores: " + ", ".join(f"{test} {score:g}" for test, score in origin.scores.items()))
    return lines


def hub_card(run: RunFolder) -> str | None:
    """README.md of an export, as model hubs read it: the run's model card, with the licence in its front matter. None: there is neither."""
    origin = origin_of(run)
    card = read_text(run.model_card_file) if run.model_card_file.exists() else None
    if origin is None:
        return card
    entries = [f"license: {origin.licence.lower()}"] if origin.licence else []
    if origin.url.startswith(HUB):
        entries.append(f"base_model: {origin.url.removeprefix(HUB)}")
    front = "".join(f"{line}\n" for line in ("---", *entries, "---", ""))
    return front + (card or "\n".join(["# Model card", "", *credits(origin), ""]))


def _file(run: RunFolder) -> Path:
    return run.state / "origin.json"
