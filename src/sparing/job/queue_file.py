"""Reads a queue's file: TOML with a `[[job]]` table for each command line. All of it is checked before anything starts."""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from sparing.base.config import UserError
from sparing.base.config_file import nearest
from sparing.base.files import read_text
from sparing.base.hardware import Machine
from sparing.budget.units import parse_budget, parse_size
from sparing.job.schedule import LEAST_RUN_S, Job, Room
from sparing.planning.needs import LEARNING, Command, Need, Needs, needs

DONE = Needs({1: Need(0.0, 0.0)}, 0, "it is done")
MEMORY_SHARE = 0.95
"""Of the machine's, that jobs may be expected to fill together."""
NO_PATHS = ("out", "prompt", "system", "domain", "name", "method", "budget", "by", "form", "format", "dtype", "type", "quantize", "engine")
"""Options whose values are no paths, or are what a job makes."""
GOES_ON = ("data stats", "data curate", "data dedup", "data select")
"""Verbs, besides those that learn, whose command goes on where it was interrupted; so does `data synth` with a teacher."""


@dataclass(frozen=True)
class Entry:
    """A `[[job]]` table."""

    name: str
    command: Command
    deadline: float | datetime | None = None
    """Seconds from the start of the queue, or a moment."""
    priority: int = 0
    preemptible: bool = False
    cores: int | None = None
    memory: float | None = None
    """Bytes."""
    time: float | None = None
    """Seconds."""

    @property
    def makes(self) -> str | None:
        """Absolute path of the run, folder or file that it writes."""
        values = self.command.values
        path = values.get("run") if self.command.verb == "resume" else values.get("out")
        return os.path.abspath(path) if path else None

    @property
    def learns(self) -> bool:
        """Whether it makes a run, with which `resume` goes on. (What is launched goes on by itself.)"""
        return self.command.verb in LEARNING and self.command.verb != "resume" and not self.command.ranks

    @property
    def keeps(self) -> bool:
        """Whether little is lost when it is stopped."""
        verb = self.command.verb
        return verb in (*LEARNING, *GOES_ON) or (verb == "data synth" and self.command.values["teacher"] is not None)

    def reads(self) -> Iterator[str]:
        """Absolute paths of what may be files or folders that it reads."""
        for name, value in {**self.command.values, **self.command.overrides}.items():
            if name not in NO_PATHS:
                words = value if isinstance(value, list | tuple) else [value]
                yield from (os.path.abspath(word) for word in words if isinstance(word, str) and word and "\0" not in word)


@dataclass(frozen=True)
class QueueFile:
    """What a file says."""

    path: str
    entries: tuple[Entry, ...]
    least_run_s: float

    def where(self, entry: Entry) -> str:
        return f"{self.path}: job {self.entries.index(entry) + 1} ({entry.name})"


def read_queue(path: str, parse: Callable[[list[str]], Command]) -> QueueFile:
    """The file at `path`. parse: checks the words of a command line.

    Raises UserError, one line that names the job, for what is no queue, for a command that would be refused, and for two jobs that write
    the same folder."""
    try:
        values = tomllib.loads(read_text(path, "--queue"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"--queue {path}: not TOML: {error}") from None
    for key in values.keys() - {"job", "least_run"}:
        raise UserError(f"--queue {path}: unknown key {key}; nearest: {nearest(key, ('[[job]]', 'least_run'))}")
    tables = values.get("job")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UserError(f'--queue {path}: no jobs; a job is a [[job]] table with command = "train --budget 20m --out RUN"')
    least_run = _time(values["least_run"], f"--queue {path}: least_run") if "least_run" in values else LEAST_RUN_S
    entries: list[Entry] = []
    for number, table in enumerate(tables, 1):
        entry = _entry(table, number, f"{path}: job {number}", parse)
        for other in entries:
            if entry.makes and entry.makes == other.makes and "resume" not in (entry.command.verb, other.command.verb):
                raise UserError(f"{path}: job {number} ({entry.name}): writes {entry.makes}, which job {other.name} writes too")
            if entry.name == other.name and "name" in table:
                raise UserError(f"{path}: job {number}: name {entry.name!r} is that of another job")
        taken = {other.name for other in entries}
        entries.append(entry if entry.name not in taken else replace(entry, name=f"{entry.name}-{number}"))
    return QueueFile(path, tuple(entries), least_run)


def _entry(table: Mapping[str, Any], number: int, where: str, parse: Callable[[list[str]], Command]) -> Entry:
    kinds = {
        "command": ((str, list), 'text or a list of words, as "train --budget 20m --out RUN"'),
        "name": (str, "text"),
        "deadline": ((str, datetime), 'a time from the start, as "2h", or a moment, as 2027-01-31T18:00:00'),
        "priority": (int, "a whole number"),
        "preemptible": (bool, "true or false"),
        "cores": (int, "a whole number"),
        "memory": (str, 'a size, as "4GB"'),
        "time": (str, 'a time, as "20m"'),
    }
    for key, value in table.items():
        if key not in kinds:
            raise UserError(f"{where}: unknown key {key}; nearest: {nearest(key, kinds)}")
        kind, what = kinds[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UserError(f"{where}: {key} = {value!r}: expected {what}")
    words = table.get("command")
    if not words or not all(isinstance(word, str) for word in words):
        raise UserError(f"{where}: needs command, {kinds['command'][1]}")
    try:
        words = shlex.split(words) if isinstance(words, str) else list(words)
    except ValueError as error:
        raise UserError(f"{where}: command: {str(error).lower()}") from None
    try:
        command = parse(words[1:] if words[:1] == ["sparing"] else words)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    name = table.get("name") or Path(command.values.get("out") or "").name or f"{command.verb.replace(' ', '-')}-{number}"
    if not re.fullmatch(r"[\w][\w.+ -]{0,99}", name):
        if "name" in table:
            raise UserError(f"{where}: name {name!r}: letters, digits, dots, dashes, at most 100 (a log is called so)")
        name = f"{command.verb.replace(' ', '-')}-{number}"
    deadline = table.get("deadline")
    entry = Entry(
        name, command, _time(deadline, f"{where}: deadline") if isinstance(deadline, str) else deadline, table.get("priority", 0),
        table.get("preemptible", False), table.get("cores"), _size(table["memory"], where) if "memory" in table else None,
        _time(table["time"], f"{where}: time") if "time" in table else None,
    )  # fmt: skip
    if entry.preemptible and not entry.keeps:
        raise UserError(f"{where} ({name}): `{command.verb}` loses all when it is stopped: preemptible is for what learns, and for `data`")
    if entry.cores is not None and entry.cores < max(1, command.ranks):
        least = f"{command.ranks}, one a rank" if command.ranks else "1"
        raise UserError(f"{where} ({name}): cores = {entry.cores}: at least {least}")
    return entry


def _time(text: Any, where: str) -> float:
    try:
        budget = parse_budget(text) if isinstance(text, str) else None
    except UserError:
        budget = None
    if budget is None or budget.unit != "s":
        raise UserError(f'{where} {text!r}: is no time; write "30m", "2h" or "1d"')
    return budget.amount


def _size(text: str, where: str) -> float:
    try:
        return parse_size(text)
    except UserError as error:
        raise UserError(f"{where}: memory: {error}") from None


def dependencies(entries: Sequence[Entry]) -> dict[str, tuple[str, ...]]:
    """The names of the jobs that each one waits for, because it reads what they make: those before it in the file, else those behind it.

    Raises UserError for jobs that wait for each other."""
    found: dict[str, tuple[str, ...]] = {}
    for at, entry in enumerate(entries):
        reads = set(entry.reads())
        makers = [other for other in entries if other is not entry and other.makes and any(_inside(path, other.makes) for path in reads)]
        before = [other for other in makers if entries.index(other) < at]
        behind = [other for other in makers if other.command.verb != "resume"]
        found[entry.name] = tuple(other.name for other in before or behind)
    left = dict(found)
    while ready := [name for name, after in left.items() if not set(after) & left.keys()]:
        for name in ready:
            del left[name]
    if left:
        raise UserError(f"jobs {', '.join(left)} wait for each other: each reads what another one makes")
    return found


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + os.sep)


def all_needs(queue: QueueFile, after: Mapping[str, tuple[str, ...]], machine: Machine, done: Collection[str] = ()) -> dict[str, Needs]:
    """What each job takes, by name: as the file says, else as is predicted. done: jobs that take nothing any more. Raises UserError for
    another one that cannot work, or that is too large for the machine."""
    found: dict[str, Needs] = {}
    named = {entry.name: entry for entry in queue.entries}

    def need(name: str) -> None:
        if name in found:
            return
        for other in after[name]:
            need(other)
        entry = named[name]
        if name in done:
            found[name] = DONE
            return
        made = {named[other].makes: found[other] for other in _all_before(name, after) if other not in done}
        try:
            found[name] = _as_said(entry, needs(entry.command, machine, made))
        except UserError as error:
            raise UserError(f"{queue.where(entry)}: {error}") from None

    for entry in queue.entries:
        need(entry.name)
        too_large(queue, entry, found[entry.name], machine)
    return found


def _all_before(name: str, after: Mapping[str, tuple[str, ...]]) -> list[str]:
    return [other for direct in after[name] for other in (*_all_before(direct, after), direct)]


def _as_said(entry: Entry, found: Needs) -> Needs:
    """With what the file says of cores, memory and time."""
    by_cores = dict(found.by_cores)
    if entry.cores is not None:
        nearest_count = min(by_cores, key=lambda cores: abs(cores - entry.cores))
        by_cores = {entry.cores: by_cores[nearest_count]}
    by_cores = {
        cores: Need(seconds if entry.time is None else entry.time, memory if entry.memory is None else entry.memory)
        for cores, (seconds, memory) in by_cores.items()
    }
    said = [key for key in ("cores", "memory", "time") if getattr(entry, key) is not None]
    source = found.source if not said else f"{' and '.join(said)} of the file" + ("" if len(said) == 3 else f"; else {found.source}")
    return replace(found, by_cores=by_cores, source=source)


def room_of(machine: Machine) -> Room:
    return Room(machine.cores_physical, MEMORY_SHARE * machine.memory_bytes, len(machine.gpus))


def too_large(queue: QueueFile, entry: Entry, found: Needs, machine: Machine) -> None:
    """Raises UserError where no number of cores fits the machine."""
    room = room_of(machine)
    fits = [cores for cores, need in found.by_cores.items() if room.holds(Room(cores, need.memory, found.gpus))]
    if fits:
        return
    cores, need = min(found.by_cores.items())
    short = [
        f"{cores} cores; {room.cores} are there" if cores > room.cores else "",
        f"{need.memory / 1e9:.1f} GB of memory ({found.source}); {room.memory / 1e9:.1f} GB are there" if need.memory > room.memory else "",
        f"{found.gpus} GPUs; {room.gpus} are there" if found.gpus > room.gpus else "",
    ]
    raise UserError(f"{queue.where(entry)}: needs {', and '.join(filter(None, short))}")


def job_of(entry: Entry, found: Needs, after: tuple[str, ...], room: Room, started: float) -> Job:
    """The job as the scheduler sees it. started: when the queue was first started, in seconds of the epoch, as its deadline is then."""
    by_cores = {cores: need for cores, need in found.by_cores.items() if room.holds(Room(cores, need.memory, found.gpus))}
    deadline = entry.deadline
    if isinstance(deadline, datetime):
        deadline = deadline.timestamp()
    elif deadline is not None:
        deadline += started
    return Job(entry.name, by_cores, found.gpus, float("inf") if deadline is None else deadline, entry.priority, entry.preemptible, after)
