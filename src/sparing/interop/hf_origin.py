"""Reads what a Hugging Face folder says about itself: the model's name and publisher, and its licence."""

from __future__ import annotations

import re
from pathlib import Path

from sparing.interop.hf_config import read_json

MOST_BYTES = 1 << 16
"""Of a text file that is looked into: the head of a README, the first lines of a licence."""
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TITLES = {
    r"apache license\s+version 2\.0": "Apache-2.0",
    r"^\W*(the )?mit license": "MIT",
    r"permission is hereby granted, free of charge": "MIT",
    r"gnu affero general public license\s+version 3": "AGPL-3.0",
    r"gnu general public license\s+version 3": "GPL-3.0",
    r"gnu lesser general public license\s+version 3": "LGPL-3.0",
    r"mozilla public license,? version 2\.0": "MPL-2.0",
    r"cc0 1\.0 universal": "CC0-1.0",
}
"""How well-known licences begin -> their SPDX names."""


def folder_origin(folder: Path) -> dict[str, str]:
    """`name`, `publisher`, `licence` and `url` of a folder's model; "" for what it does not say.

    The name is that of the repository, from README.md's header or config.json. The licence is what README.md's header declares, else what a
    file LICENSE begins with. Both are what the folder claims: nothing is asked of a hub.
    """
    header = _header(_head(folder / "README.md"))
    raw = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    named = [header.get("model_id", ""), str(raw.get("_name_or_path") or "")]  # `base_model` is another one, which this was made from
    repository = next((name for name in named if REPOSITORY.fullmatch(name)), "")
    publisher, _, name = repository.partition("/")
    licence = header.get("license", "")
    if licence in ("", "other"):
        licence = header.get("license_name") or _licence_file(folder) or licence
    url = f"https://huggingface.co/{repository}" if repository else header.get("license_link", "")
    return {"name": name or header.get("model_name", ""), "publisher": publisher, "licence": licence, "url": url}


def _head(path: Path) -> str:
    """The beginning of a text; "" where there is none that can be read."""
    try:
        with path.open("rb") as file:
            return file.read(MOST_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def _header(text: str) -> dict[str, str]:
    """The plain `key: value` lines of the YAML between a README's first two lines of dashes; of a list, its first item."""
    parts = re.split(r"^---\s*$", text.lstrip("\ufeff"), maxsplit=2, flags=re.MULTILINE)
    if len(parts) < 3 or parts[0].strip():
        return {}
    found: dict[str, str] = {}
    key = ""
    for line in parts[1].splitlines():
        if match := re.fullmatch(r"(\w+):\s*(.*?)\s*", line):
            key, value = match.groups()
        elif match := re.fullmatch(r"\s*-\s+(.*?)\s*", line):
            value = match[1]
        else:
            continue
        if value and not found.get(key):
            found[key] = value.strip("'\"")
    return found


def _licence_file(folder: Path) -> str:
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "COPYING"):
        if text := _head(folder / name):
            start = text[:4000].lower()
            known = next((spdx for title, spdx in TITLES.items() if re.search(title, start)), "")
            return known or next((line.strip(" #*\t")[:100] for line in text.splitlines() if line.strip(" #*\t")), "")
    return ""
