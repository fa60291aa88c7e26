"""Tokens of a corpus on disk: shards of raw integers, memory-mapped, with an index of their documents.

A shard is EOT t1 .. tn EOT t1 .. tn EOT: each document begins with the end-of-text token, and the token after its last, the next
document's first or the shard's last, is again end-of-text. A document's inputs and targets are therefore slices that differ by one.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from sparing.base.config import UserError
from sparing.base.files import write_atomic
from sparing.data.tokenizer import Tokenizer

FORMAT = 1
SHARD_TOKENS = 1 << 24


class TokenStore:
    """A prepared corpus. Opening it checks that every file is there and has its size.

    `starts`, `lengths` (documents,) int64: where each document's leading end-of-text token is, in positions that `take` understands, and
    how many inputs it has (its tokens and that one); `tokens` is their sum.
    """

    def __init__(self, path: str | Path):
        """Raises UserError when the folder is not a whole store."""
        self.path = Path(path)
        try:
            self.manifest = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
            sizes = {name: (self.path / name).stat().st_size for name in self.manifest["files"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is not a prepared corpus: {error}") from None
        for name, size in sizes.items():
            expected = self.manifest["files"][name]["bytes"]
            if size != expected:
                raise UserError(f"{self.path / name} has {size} bytes instead of {expected}: delete the folder to build it anew")
        self.vocab_size: int = self.manifest["vocab_size"]
        self.eot_id: int = self.manifest["eot_id"]
        self.tokens: int = self.manifest["tokens"]
        self.documents: int = self.manifest["documents"]
        dtype = np.dtype(self.manifest["dtype"])
        shards = self.manifest["shards"]
        self._shards = [np.memmap(self.path / shard["tokens"], dtype, "r") for shard in shards]
        self._bases = np.concatenate([[0], np.cumsum([len(shard) for shard in self._shards])]).astype(np.int64)
        index = [np.load(self.path / shard["index"], mmap_mode="r", allow_pickle=False) for shard in shards]
        self.lengths = np.concatenate([part[:, 0] for part in index]).astype(np.int64)
        starts = [
            base + np.cumsum(part[:, 0], dtype=np.int64) - part[:, 0].astype(np.int64)
            for base, part in zip(self._bases[:-1], index, strict=True)
        ]
        self.starts = np.concatenate(starts)
        assert int(self.lengths.sum()) == self.tokens and len(self.lengths) == self.documents

    def take(self, positions: np.ndarray) -> np.ndarray:
        """Tokens at these positions, int64, in the shape of `positions` (int64)."""
        if len(self._shards) == 1:
            return self._shards[0][positions].astype(np.int64)
        result = np.empty(positions.shape, np.int64)
        which = np.searchsorted(self._bases, positions, side="right") - 1
        for shard in np.unique(which):
            mask = which == shard
            result[mask] = self._shards[shard][positions[mask] - self._bases[shard]]
        return result

    def held_out(self) -> Iterator[str]:
        """Held-out documents as text, in the order of their hashes; at most about `prepare.HELD_OUT_BYTES` were kept."""
        with open(self.path / "held_out.jsonl", encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)["text"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.path)


class StoreWriter:
    """Writes shards into a folder. journal.json names the finished ones, so that writing can go on after a kill."""

    def __init__(self, folder: Path, dtype: np.dtype, eot_id: int):
        self.folder, self.dtype = folder, dtype
        self.eot = np.array([eot_id], dtype)
        self.shards: list[dict] = []
        self.written = 0
        """Entries (documents or sections) in whole shards."""
        self._file = None
        journal = folder / "journal.json"
        if journal.is_file():
            state = json.loads(journal.read_text(encoding="utf-8"))
            if all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in state["sizes"].items()):
                self.shards, self.written = state["shards"], state["written"]
        for path in folder.glob("shard-*"):
            if not any(path.name in (shard["tokens"], shard["index"]) for shard in self.shards):
                path.unlink()

    def add(self, parts: list[tuple[int, np.ndarray]]) -> None:
        """Append entries (hash of the document, token ids). A shard ends only between calls."""
        if self._file is None:
            self._name = f"shard-{len(self.shards):05d}"
            self._file = open(self.folder / f"{self._name}.bin", "wb")
            self._index, self._tokens = array("Q"), 0
        for hash, ids in parts:
            self._file.write(self.eot.tobytes() + ids.astype(self.dtype, copy=False).tobytes())
            self._index.extend((len(ids) + 1, hash))
            self._tokens += len(ids) + 1
        if self._tokens >= SHARD_TOKENS:
            self.end_shard()

    def end_shard(self) -> None:
        """Finish the shard in hand, sync it and write it into the journal."""
        if self._file is None:
            return
        self._file.write(self.eot.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        index = np.array(self._index, np.uint64).reshape(-1, 2)
        np.save(self.folder / f"{self._name}.npy", index)
        self.shards.append({"tokens": f"{self._name}.bin", "index": f"{self._name}.npy", "count": self._tokens, "documents": len(index)})
        self.written += len(index)
        sizes = {name: (self.folder / name).stat().st_size for shard in self.shards for name in (shard["tokens"], shard["index"])}
        write_atomic(self.folder / "journal.json", json.dumps({"shards": self.shards, "written": self.written, "sizes": sizes}))

    def close(self) -> None:
        """Close the file of an unfinished shard, after an error or a stop."""
        if self._file is not None:
            self._file.close()
