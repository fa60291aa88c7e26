"""Writes ledgers: SQLite files with one row per stage of each attempt, the run's ledger.sqlite and the workspace's ($SPARING_HOME).

Rows are replaced by their newer selves while a stage runs, so a kill loses the seconds since the last write, and nothing is counted
twice: an attempt only ever writes rows of its own. What cannot be written now (no room, another writer) is kept and tried again; a
damaged file is moved aside and begun anew; each is said once, in one line.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from sparing.base.config import UserError
from sparing.base.hardware import home

VERSION = 2
"""1: rows had no `core_s`."""
WAIT_S = 2.0
"""For another writer's transaction; they take milliseconds."""


@dataclass
class Entry:
    """A row: what one stage of one attempt has cost so far. Money and CO2e are rates times what was metered (`rates` names them)."""

    uid: str
    run_id: str
    run: str
    """The run folder's path; empty for verbs without one."""
    verb: str
    stage: str
    status: str = "running"
    """running, done, interrupted, failed; readers see killed for a running row whose process is gone."""
    started: float = 0.0
    """Unix time."""
    updated: float = 0.0
    wall_s: float = 0.0
    device_s: float = 0.0
    cpu_s: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    memory_bytes: int = 0
    """Peak of main memory."""
    gpu_memory_bytes: int = 0
    """Peak of CUDA's allocator."""
    kwh: float = 0.0
    """With the building's share (PUE); the parts below without."""
    kwh_cpu: float = 0.0
    kwh_gpu: float = 0.0
    energy_how: str = "estimated"
    """measured: all of it; estimated: some or all."""
    energy_source: str = ""
    co2e_g: float = 0.0
    usd: float = 0.0
    machine: str = ""
    host: str = ""
    pid: int = 0
    rates: str = "{}"
    """JSON: usd_per_hour usd_per_kwh gco2e_per_kwh pue watts_idle watts_busy sources, as they were last."""
    error: str = ""
    core_s: float = 0.0
    """Wall time times the cores that this process may use: what `cpu_s` would be if none was ever idle."""


@dataclass
class Ancestor:
    """A run that this one was derived from, with its whole cost at that time: the receipt holds even when its folder is gone."""

    run_id: str
    """Of the derived run."""
    ancestor_id: str
    name: str
    relation: str
    """fine-tuned, teacher, grown, ..."""
    generation: int
    """1: a parent, 2: a parent's parent, ..."""
    wall_s: float
    device_s: float
    tokens: int
    flops: float
    kwh: float
    energy_how: str
    co2e_g: float
    usd: float


_KIND = {"str": "TEXT", "int": "INTEGER", "float": "REAL"}


def _table(name: str, kind: type, key: str) -> str:
    columns = ", ".join(f"{field.name} {_KIND[field.type]} NOT NULL" for field in fields(kind))
    return f"CREATE TABLE IF NOT EXISTS {name} ({columns}, PRIMARY KEY ({key}))"


def complain(text: str) -> None:
    print(f"sparing: {text}", file=sys.stderr, flush=True)


class Ledger:
    """One ledger file, open for writing. Used by one thread at a time."""

    def __init__(self, path: Path, say: Callable[[str], None] = complain, known_as: Callable[[], str] = str):
        """Never raises for a file that is full, locked, damaged or not writable: it says so and keeps the rows.

        known_as: the run's id as others have it, asked for when the file that says it is damaged.
        """
        self.path, self.say, self.known_as = path, say, known_as
        self._db: sqlite3.Connection | None = None
        self._mine: dict[tuple, Entry | Ancestor] = {}
        self._unwritten: set[tuple] = set()
        self._said: set[str] = set()
        self.run_id = ""
        self._attempt(self._open)
        self.run_id = self.run_id or uuid.uuid4().hex

    def put(self, row: Entry | Ancestor) -> None:
        """Write a row, in place of the one with its key. What failed before is tried again with it."""
        key = ("stages", row.uid) if isinstance(row, Entry) else ("ancestors", row.run_id, row.ancestor_id)
        self._mine[key] = row
        self._unwritten.add(key)
        self._attempt(self._write)

    def close(self) -> None:
        if self._unwritten:
            self._attempt(self._write)
        if self._db:
            self._db.close()  # it may know pages that the file has lost meanwhile: look at the file itself
            self._db = None
            self._attempt(self._open)
        if self._unwritten:
            self.say(f"{len(self._unwritten)} rows could not be written to {self.path}; what it held before is intact")
        if self._db:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
            self._db = None

    # SQLite, and what goes wrong with it

    def _open(self) -> None:
        db = sqlite3.connect(self.path, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
        try:
            if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("its check failed")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                raise UserError(f"{self.path} was written by a newer Sparing (format {version}, this one knows {VERSION}): update this one")
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            db.execute(_table("stages", Entry, "uid"))
            db.execute(_table("ancestors", Ancestor, "run_id, ancestor_id"))
            if version == 1 and not any(row[1] == "core_s" for row in db.execute("PRAGMA table_info(stages)")):
                db.execute("ALTER TABLE stages ADD COLUMN core_s REAL NOT NULL DEFAULT 0")
            db.execute("CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
            db.execute("INSERT OR IGNORE INTO meta VALUES ('run_id', ?)", (self.run_id or uuid.uuid4().hex,))
            db.execute(f"PRAGMA user_version={VERSION}")
            self.run_id = db.execute("SELECT value FROM meta WHERE key = 'run_id'").fetchone()[0]
        except BaseException:
            db.close()
            raise
        self._db = db

    def _write(self) -> None:
        if self._db is None:
            self._open()
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for key in self._unwritten:
                values = asdict(self._mine[key])
                self._db.execute(f"REPLACE INTO {key[0]} VALUES ({', '.join(':' + name for name in values)})", values)
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise
        self._unwritten.clear()

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            return work()
        except sqlite3.OperationalError as error:  # locked, full, read-only: the file is sound
            return self._once(f"the ledger {self.path} cannot be written now ({error}): its rows are kept and tried again")
        except OSError as error:
            return self._once(f"the ledger {self.path} cannot be written ({error.strerror})")
        except sqlite3.DatabaseError as error:  # malformed, not a database
            reason = str(error)
        self._move_aside(reason)
        self._unwritten = set(self._mine)
        try:
            self._open()
            self._write()
        except (sqlite3.Error, OSError) as error:
            self._once(f"the ledger {self.path} cannot be begun anew ({error}): its rows are kept and tried again")

    def _move_aside(self, reason: str) -> None:
        if self._db:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
            self._db = None
        stamp = time.strftime("%Y%m%d-%H%M%S") + f"-{os.getpid()}"
        aside = self.path.with_name(f"ledger.damaged-{stamp}.sqlite")
        for end in ("-wal", "-shm", ""):
            with contextlib.suppress(OSError):
                os.replace(f"{self.path}{end}", f"{aside}{end}")
        self.run_id = self.run_id or self.known_as()
        self._once(f"the ledger {self.path} was damaged ({reason}): moved aside to {aside.name}, a new one is begun")

    def _once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.say(text)


def workspace_file() -> Path:
    return home() / "ledger.sqlite"
