"""Reads ledgers: what a run has cost in all its attempts, and what the runs cost that it was derived from."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil

from sparing.account.ledger import WAIT_S, Ancestor, Entry, Ledger, complain, workspace_file
from sparing.base.config import UserError
from sparing.base.run import RunFolder

STAGES = "stages.jsonl"
"""In a run's state folder: what each of its stages may spend (`adapt/reason.py`); other runs have none."""
STALE_S = 60.0
"""A row that says it is running and was not written for so long belongs to a process that died."""
TRAINING = ("train", "sft", "dpo", "grpo", "distill", "grow", "adapt", "reason", "resume")
"""Verbs whose cost a run's budget covers; evaluating the result later is not part of it."""
ADDS_UP = ("wall_s", "device_s", "tokens", "flops", "kwh", "co2e_g", "usd")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A ledger to read from; where it or its folder can't be written (WAL wants to), a copy. Raises UserError when it is damaged."""
    with contextlib.ExitStack() as stack:
        source = path
        if not (os.access(path.parent, os.W_OK) and os.access(path, os.W_OK)):
            source = Path(stack.enter_context(tempfile.TemporaryDirectory())) / path.name
            for end in ("", "-wal"):
                if os.path.exists(f"{path}{end}"):
                    shutil.copyfile(f"{path}{end}", f"{source}{end}")
        db = sqlite3.connect(source, timeout=WAIT_S)
        db.row_factory = sqlite3.Row
        try:
            yield db
        except sqlite3.OperationalError as error:
            raise UserError(f"the ledger {path} cannot be read now: {error}") from None
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"the ledger {path} is damaged ({error}): the next verb that meters moves it aside and begins a new one"
            ) from None
        finally:
            db.close()


def _rows(path: Path, table: str, kind: type) -> list:
    if not path.exists():
        return []
    with _reading(path) as db:
        if db.execute("SELECT name FROM sqlite_master WHERE name = ?", (table,)).fetchone() is None:
            return []  # made, but killed before its tables were
        return [kind(**row) for row in db.execute(f"SELECT * FROM {table} ORDER BY rowid")]


def entries(path: Path) -> list[Entry]:
    """All rows of a ledger, those of dead processes marked killed."""
    rows = _rows(path, "stages", Entry)
    for row in rows:
        if row.status == "running" and not _alive(row):
            row.status = "killed"
    return rows


def _alive(row: Entry) -> bool:
    return time.time() - row.updated < STALE_S and (row.host != socket.gethostname() or psutil.pid_exists(row.pid))


def run_id_of(run: RunFolder) -> str:
    """A run's name in all ledgers: from its own ledger, or, where it has none, from its path."""
    if run.ledger_file.exists():
        with _reading(run.ledger_file) as db, contextlib.suppress(sqlite3.OperationalError):
            if row := db.execute("SELECT value FROM meta WHERE key = 'run_id'").fetchone():
                return row[0]
    return _path_id(str(run.path.resolve()))


def books(run: RunFolder | None, say: Callable[[str], None]) -> tuple[list[Ledger], str]:
    """(the ledgers to write about `run`, its name in them): its own where its folder can be written, and the workspace's."""
    ledgers, name = [], ""
    if run and os.access(run.path, os.W_OK):
        here = str(run.path.resolve())
        ledgers.append(Ledger(run.ledger_file, say, lambda: _last_id(here)))
        name = ledgers[0].run_id
    elif run:
        name = run_id_of(run)
    workspace = workspace_file()
    try:
        workspace.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        say(f"{workspace.parent}: {error.strerror}: this is not in the workspace's ledger")
        return ledgers, name
    if os.access(workspace.parent, os.W_OK):
        try:
            return [*ledgers, Ledger(workspace, say)], name
        except UserError as error:  # a newer version has been at work here: no reason to stop a run that this one began
            say(f"{error}; until then this is not in the workspace's ledger")
            return ledgers, name
    say(f"{workspace.parent} cannot be written: this is not in the workspace's ledger")
    return ledgers, name


def entries_of(run: RunFolder) -> list[Entry]:
    """All rows about a run: its own ledger's, and the workspace's from when its folder (or the ledger in it) could not be used."""
    here = str(run.path.resolve())
    try:
        own, names = entries(run.ledger_file), {run_id_of(run), _path_id(here)}
    except UserError as error:
        complain(f"{error}; what the workspace's ledger knows of this run is used")
        own, names = [], {_last_id(here), _path_id(here)}
    known = {row.uid for row in own}
    elsewhere = [
        row
        for row in entries(workspace_file())
        if row.uid not in known and row.run_id in names and (row.run == here or not os.path.exists(row.run))  # not a copy's
    ]
    return sorted(own + elsewhere, key=lambda row: row.started)


def whole(run: RunFolder) -> list[Entry]:
    """All rows about a run, and those about the runs inside its folder that it was made by (`reason`): their stages have the names of
    these before them. Runs that a user put into another one's folder are none of its stages."""
    rows = entries_of(run)
    for stage in stages_of(run):
        rows += [replace(row, stage=f"{stage.path.name}: {row.stage}") for row in entries_of(stage)]
    return sorted(rows, key=lambda row: row.started)


def stages_of(run: RunFolder) -> list[RunFolder]:
    """The runs inside its folder that a run was made by (`reason`), in their order; of any other run none."""
    return [RunFolder(file.parent) for file in sorted(run.path.glob("[1-9]-*/config.toml"))] if (run.state / STAGES).exists() else []


def _path_id(path: str) -> str:
    return "path-" + hashlib.sha256(path.encode()).hexdigest()[:16]


def _last_id(path: str) -> str:
    """The id of the run that was last at `path`, as the workspace's ledger has it; empty where it has none."""
    with contextlib.suppress(UserError):
        return next((row.run_id for row in reversed(entries(workspace_file())) if row.run == path), "")
    return ""


def bill(rows: list[Entry]) -> dict:
    """What these rows add up to: cost_usd, energy_kwh, energy_how, co2e_g."""
    return {
        "cost_usd": sum(row.usd for row in rows),
        "energy_kwh": sum(row.kwh for row in rows),
        "energy_how": how(rows),
        "co2e_g": sum(row.co2e_g for row in rows),
    }


def how(rows: list[Entry]) -> str:
    """measured: the energy of all of them was."""
    return "measured" if rows and all(row.energy_how == "measured" for row in rows) else "estimated"


def ancestors_of(run: RunFolder) -> list[Ancestor]:
    """The runs that `run` was derived from, nearest first, each once."""
    try:
        rows, name = _rows(run.ledger_file, "ancestors", Ancestor), run_id_of(run)
    except UserError:  # `entries_of` says it
        rows, name = [], _last_id(str(run.path.resolve()))
    rows += [row for row in _rows(workspace_file(), "ancestors", Ancestor) if row.run_id == name]
    nearest: dict[str, Ancestor] = {}
    for row in sorted(rows, key=lambda row: row.generation):
        nearest.setdefault(row.ancestor_id, row)  # reached by two ways: counted once, as the nearer
    return list(nearest.values())


def inherit(run: RunFolder, parent: RunFolder, relation: str) -> None:
    """Note that `run` was derived from `parent` (as `relation`), with what that and its own ancestors had cost by now."""
    descend(run, lineage(parent, relation))


def lineage(parent: RunFolder, relation: str) -> list[Ancestor]:
    """What a run that is derived from `parent` (as `relation`) notes of it and of its own ancestors; `run_id` is empty."""
    rows = entries_of(parent)
    totals = {name: sum(getattr(row, name) for row in rows) for name in ADDS_UP}
    nearest = Ancestor("", run_id_of(parent), parent.path.resolve().name, relation, 1, energy_how=how(rows), **totals)
    return [nearest, *(replace(row, run_id="", generation=row.generation + 1) for row in ancestors_of(parent))]


def descend(run: RunFolder, rows: list[Ancestor]) -> None:
    """Note ancestors of `run`, as `lineage` has them."""
    ledgers, name = books(run, complain)
    made = [replace(row, run_id=name) for row in rows]
    known = {row.ancestor_id: row.generation for row in ancestors_of(run)}
    for ledger in ledgers:
        for row in made:
            if known.get(row.ancestor_id, 99) > row.generation:
                ledger.put(row)
        ledger.close()
