"""Data sets of the hub as folders: `hf:OWNER/NAME`, or one folder of them, `hf:OWNER/NAME/FOLDER`."""

from __future__ import annotations

import functools

from sparing.base.config import UserError
from sparing.base.hub import snapshot
from sparing.base.messages import say

HUB = "hf:"
FILES = ("*.parquet", "*.jsonl", "*.jsonl.gz", "*.jsonl.zst", "*.json", "*.json.gz", "*.json.zst")
"""What is fetched of a data set: rows, and no program that would make them."""


@functools.cache
def data_set(path: str) -> str:
    """The folder on this disk, fetched where it is not there. Once for each process, so that a run reads one revision.

    Raises UserError for a name that cannot be or that the hub does not have, CannotGoOn where the hub cannot be reached.
    """
    owner, _, rest = path.removeprefix(HUB).strip("/").partition("/")
    name, _, folder = rest.partition("/")
    if not owner or not name or ".." in folder.split("/"):
        raise UserError(f"{path}: a data set of the hub is hf:OWNER/NAME or hf:OWNER/NAME/FOLDER")
    say(f"{path}: looking for it on the hub and in its cache")
    patterns = [f"{folder}/{pattern}" if folder else pattern for pattern in FILES]
    found = snapshot(f"{owner}/{name}", patterns, "dataset") / folder
    if not found.is_dir():
        raise UserError(f"{path}: no Parquet or JSON lines in it")
    return str(found)
