"""Keeps a copy of a run folder where it outlives the machine, such as a bucket, while the run is written.

A bucket is no place for a run itself: it takes whole files, but no appending and no database. Here each file is written at once, in an
order in which the copy can be gone on with whenever it ends: what a checkpoint needs before it, a checkpoint's checksums as its last file,
and what is no longer there is removed at the end. Where the copy is, fsspec reads and writes: a folder, a mounted bucket, s3://, gs://.
"""

from __future__ import annotations

import re
import sqlite3
import threading
from contextlib import closing, suppress
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from sparing.base.config import UserError
from sparing.base.messages import say
from sparing.base.run import CHECKSUMS, RunFolder

POLL_S = 5.0
"""Between two looks whether there is a new checkpoint."""
CONFIG = PurePosixPath("config.toml")


class Place:
    """A folder of a file system of fsspec's."""

    def __init__(self, url: str):
        """url: a path, or what fsspec takes. Raises UserError where it cannot be read."""
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        self.url = re.sub("//[^/@]*@", "//", url)  # as it may be told
        try:
            self.files, self.root = fsspec.url_to_fs(url)
            self.local = isinstance(self.files, LocalFileSystem)
            self.names()
        except Exception as error:  # each file system has its own
            raise UserError(f"--mirror {self.url}: {_in_words(error)}") from None

    def names(self) -> list[PurePosixPath]:
        """Relative paths of all files."""
        self.files.invalidate_cache()
        found = (PurePosixPath(path).relative_to(self.root) for path in self.files.find(self.root))
        return [name for name in found if not _hidden(name)]

    def put(self, file: Path, name: PurePosixPath) -> None:
        """Write a file under a name, at once: an object of a store appears when it is whole."""
        target = PurePosixPath(self.root) / name
        beside = target.with_name(f".{target.name}.tmp") if self.local else target
        if self.local:
            self.files.makedirs(str(target.parent), exist_ok=True)
        self.files.put_file(str(file), str(beside))
        if self.local:
            Path(beside).replace(target)

    def get(self, name: PurePosixPath, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f".{file.name}.tmp")
        self.files.get_file(f"{self.root}/{name}", str(beside))
        beside.replace(file)

    def remove(self, names: list[PurePosixPath]) -> None:
        """Remove files; of a folder on a disk also what is empty then."""
        for name in names:
            with suppress(FileNotFoundError):
                self.files.rm_file(f"{self.root}/{name}")
        if self.local:
            for folder in sorted((path for path in Path(self.root).rglob("*") if path.is_dir()), reverse=True):
                with suppress(OSError):  # there are files in it; or it went with its last one, as in mounted buckets
                    folder.rmdir()


class Mirror:
    """The run folder `run` and its copy. As a context manager: fetched before, copied at each checkpoint, and whole at the end."""

    def __init__(self, run: Path, url: str):
        """Raises UserError where there is something else than a run, and where it cannot be read."""
        self.run, self.kept = RunFolder(run), Place(url)
        self._sent: dict[PurePosixPath, tuple[int, int]] = {}
        """(bytes, time of change) of the files that were copied."""
        there = self.kept.names()
        if there and CONFIG not in there:
            raise UserError(f"--mirror {self.kept.url}: is not empty and holds no run; name a folder of its own for this one")

    def fetch(self) -> bool:
        """Where there is no run yet, but a copy of it: bring it here. -> whether."""
        names = [] if self.run.config_file.exists() else self.kept.names()
        if CONFIG not in names:
            return False
        for name in sorted(names, key=lambda name: name == CONFIG):  # last: what has none is no run
            self.kept.get(name, self.run.path / name)
        return True

    def publish(self, whole: bool = False) -> None:
        """Copy what has changed. whole: also the model for others, which is the newest checkpoint's once more."""
        if not self.run.config_file.exists():
            return
        names = self._names()
        for name in names:
            if not whole and name.parts[0] in ("weights", "adapter"):
                continue
            try:
                stat = (self.run.path / name).stat()
                if self._sent.get(name) != (stat.st_size, stat.st_mtime_ns):
                    self._send(name)
                    self._sent[name] = stat.st_size, stat.st_mtime_ns
            except FileNotFoundError:  # an older checkpoint, removed meanwhile
                continue
        gone = [name for name in self.kept.names() if name not in names]
        self.kept.remove(gone)
        for name in gone:
            self._sent.pop(name, None)

    def _names(self) -> list[PurePosixPath]:
        """The files to copy, relative to the run, in their order."""
        root = self.run.path
        found = (PurePosixPath(path.relative_to(root).as_posix()) for path in root.rglob("*") if path.is_file())
        names = [name for name in found if not _hidden(name) and not name.name.endswith(("-wal", "-shm"))]

        def order(name: PurePosixPath) -> tuple:
            saved = name.parts[0] == "state" and len(name.parts) > 2
            return name.parts[0] in ("weights", "adapter"), saved, name.parent, name.name == CHECKSUMS, name.name

        return sorted(names, key=order)

    def _send(self, name: PurePosixPath) -> None:
        if name.name != self.run.ledger_file.name:
            return self.kept.put(self.run.path / name, name)
        with TemporaryDirectory() as folder:  # a database that is being written: as it is at one moment
            file = Path(folder, name)
            try:
                with closing(sqlite3.connect(self.run.path / name)) as source, closing(sqlite3.connect(file)) as target:
                    source.backup(target)
            except sqlite3.Error:
                return None  # the next time
            self.kept.put(file, name)

    def __enter__(self) -> Mirror:
        try:
            if self.fetch():
                say(f"{self.run}: brought back from {self.kept.url}; goes on")
        except Exception as error:
            raise UserError(f"--mirror {self.kept.url}: the run there could not be brought back: {_in_words(error)}") from None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True, name="sparing-mirror")
        self._thread.start()
        return self

    def __exit__(self, *_exc: Any) -> None:
        self._stop.set()
        self._thread.join()
        self._attempt(whole=True)

    def _follow(self) -> None:
        known: list[Path] = []
        while not self._stop.wait(POLL_S):
            checkpoints = sorted(self.run.state.glob("step-*"))
            if checkpoints != known and self._attempt():
                known = checkpoints

    def _attempt(self, whole: bool = False) -> bool:
        try:
            self.publish(whole)
        except Exception as error:  # of a network, a quota, rights: the run goes on, and the next checkpoint is tried again
            say(f"--mirror {self.kept.url}: {_in_words(error)}: this checkpoint is not there")
            return False
        return True


def _hidden(name: PurePosixPath) -> bool:
    """Locks, and what is being written beside its place."""
    return any(part.startswith(".") for part in name.parts)


def _in_words(error: Exception) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return text.strip().splitlines()[0][:200]
