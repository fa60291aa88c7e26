"""Keeps a copy of a run folder where it outlives the machine, such as a mounted bucket, while the run is written.

A bucket is no place for a run itself: mounted, it takes whole files, but no appending and no database. Here each file is written at once
and renamed, in an order in which the copy can be gone on with whenever it ends: what a checkpoint needs before it, a checkpoint's
checksums as its last file, and what is no longer there is removed at the end.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from contextlib import closing, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from sparing.base.config import UserError
from sparing.base.messages import say
from sparing.base.run import CHECKSUMS, RunFolder

POLL_S = 5.0
"""Between two looks whether there is a new checkpoint."""


class Mirror:
    """The run folder `run` and its copy `kept`. As a context manager: fetched before, copied at each checkpoint, and whole at the end."""

    def __init__(self, run: Path, kept: Path):
        """Raises UserError where `kept` holds something else than a run."""
        self.run, self.kept = RunFolder(run), kept
        self._sent: dict[Path, tuple[int, int]] = {}
        """(bytes, time of change) of the files that were copied."""
        if kept.is_dir() and not (kept / "config.toml").exists() and any(not path.name.startswith(".") for path in kept.iterdir()):
            raise UserError(f"--mirror {kept}: is not empty and holds no run; name a folder of its own for this one")

    def fetch(self) -> bool:
        """Where there is no run yet, but a copy of it: bring it here. -> whether."""
        if self.run.config_file.exists() or not (self.kept / "config.toml").exists():
            return False
        files = [path.relative_to(self.kept) for path in self.kept.rglob("*") if path.is_file() and not _hidden(path, self.kept)]
        for name in sorted(files, key=lambda name: name == Path("config.toml")):  # last: what has none is no run
            _copy(self.kept / name, self.run.path / name)
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
        for path in list(self.kept.rglob("*")):
            if path.is_file() and path.relative_to(self.kept) not in names:
                path.unlink(missing_ok=True)
                self._sent.pop(path.relative_to(self.kept), None)
        for folder in sorted((path for path in self.kept.rglob("*") if path.is_dir()), reverse=True):
            with suppress(OSError):  # there are files in it; or it went with its last one, as in buckets
                folder.rmdir()

    def _names(self) -> list[Path]:
        """The files to copy, relative to the run, in their order."""
        found = (
            path.relative_to(self.run.path) for path in self.run.path.rglob("*") if path.is_file() and not _hidden(path, self.run.path)
        )
        names = [name for name in found if not name.name.endswith(("-wal", "-shm"))]

        def order(name: Path) -> tuple:
            saved = name.parts[0] == "state" and len(name.parts) > 2
            return name.parts[0] in ("weights", "adapter"), saved, name.parent, name.name == CHECKSUMS, name.name

        return sorted(names, key=order)

    def _send(self, name: Path) -> None:
        if name != Path(self.run.ledger_file.name):
            return _copy(self.run.path / name, self.kept / name)
        with TemporaryDirectory() as folder:  # a database that is being written: as it is at one moment
            file = Path(folder, name)
            try:
                with closing(sqlite3.connect(self.run.path / name)) as source, closing(sqlite3.connect(file)) as target:
                    source.backup(target)
            except sqlite3.Error:
                return None  # the next time
            _copy(file, self.kept / name)

    def __enter__(self) -> Mirror:
        if self.fetch():
            say(f"{self.run}: brought back from {self.kept}; goes on")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True, name="sparing-mirror")
        self._thread.start()
        return self

    def __exit__(self, *_exc) -> None:
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
        except OSError as error:
            say(f"--mirror {self.kept}: {error.strerror or error}: this checkpoint is not there")
            return False
        return True


def _hidden(path: Path, root: Path) -> bool:
    """Locks, and what is being written beside its place."""
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.tmp")
    shutil.copyfile(source, beside)
    os.replace(beside, target)
