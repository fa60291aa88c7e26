"""Runs the jobs of a file on this machine: each in a process of its own, bound to its share of the cores, as `schedule` decides.

What has happened is kept in FILE.queue/state.json, so the same command goes on after a kill: what is done is not done again, and runs that
were interrupted are resumed. FILE.queue/NAME.log has what each job says.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from sparing.base.config import UserError
from sparing.base.files import from_json, write_atomic
from sparing.base.hardware import Machine, cpus_of_cores
from sparing.base.lock import folder_lock
from sparing.base.messages import say
from sparing.base.notices import notices
from sparing.base.preempt import Interrupted
from sparing.base.run import RunFolder
from sparing.job.queue_file import Entry, QueueFile, all_needs, dependencies, job_of, read_queue, room_of
from sparing.job.queue_screen import RULE, Screen, clock, last_line, ranges, table
from sparing.job.schedule import Job, Piece, Start, State, busy, decide, simulate
from sparing.planning.needs import Command, Needs
from sparing.planning.places import this_machine

POLL_S = 0.05
"""Between looks at the processes."""
LOOK_S = 1.0
"""Between looks at the schedule, where no job ends meanwhile: what takes longer than was predicted changes it."""
SEEN_S = 30.0
"""Between two notes that the queue is still there."""
KILL_S = 45.0
"""After which a job that was told to stop is killed. It has 9 s to save, and ranks that train together 25 s."""
STOPPED = (130, -signal.SIGTERM, -signal.SIGINT)
"""Exit statuses of what was told to stop: after it has saved, and before it was there to hear it."""
MAKES_RUN = ("merge", "import", "fetch", "retire", "slice", "rollback")
"""Verbs that make a run without learning: `--out` must be new."""
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass
class Record:
    """What has happened to a job, as it is kept on disk."""

    name: str
    command: list[str]
    phase: str = "waiting"
    """waiting, running, stopping; done; failed; stopped (by somebody else); skipped (what it needs has failed)."""
    cores: int = 0
    """Settled at its first start; 0: open."""
    pieces: list[list[Any]] = field(default_factory=list)
    """[start, end (None: it runs), cores, CPU seconds], moments in seconds of the epoch."""
    preemptions: int = 0
    exit: int | None = None
    predicted: list[float] | None = None
    """Seconds and bytes that it was expected to take, when it started last."""
    peak_bytes: int = 0
    """Of its largest process."""
    process: list[float] | None = None
    """Process id and the moment in which it was made, of one that runs."""


@dataclass
class _Process:
    """A job at work."""

    popen: subprocess.Popen
    slots: tuple[int, ...]
    """Cores, by their number among those of this machine."""
    gpus: tuple[int, ...]
    told: float | None = None
    """When it was told to stop."""
    stopped_for: str | None = None


def run_queue(file: str, parse: Callable[[list[str]], Command], start: bool = True) -> dict[str, Any]:
    """Run the jobs of `file`, or go on with them; -> what each took, and how busy the machine was (`summary`).

    parse: checks the words of a command line, and raises UserError. start: False: only show when each would run.
    Raises UserError, before anything starts, for whatever is wrong with the file; Interrupted on a signal, when all jobs have saved."""
    if os.name != "posix":
        raise UserError("launch: --queue needs Linux, macOS, or another system on which a process can be told to stop")
    queue, machine = read_queue(file, parse), this_machine()
    try:
        after = dependencies(queue.entries)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    folder = Path(file).with_name(f"{Path(file).name}.queue")
    running = Queue(queue, folder, after, machine)
    running.check()
    with ExitStack() as held:
        if start:
            try:
                folder.mkdir(exist_ok=True)
                (folder / ".gitignore").write_text("*\n")  # so no corpus that the folder lies in has logs and state for texts
            except OSError as error:
                raise UserError(f"--queue {file}: {folder}, which keeps its state, cannot be made: {error.strerror}") from None
            held.enter_context(folder_lock(folder))
            running.load()  # nobody else changes it any more
        running.settle(leftovers=start)
        pieces = running.plan()
        for line in running.plan_lines(pieces):
            say(line) if start else print(line)
        if start:
            running.run()
            return running.summary()
        return running.summary() | {"plan": [piece._asdict() for piece in pieces]}


class Queue:
    """The jobs of a file with their records and processes."""

    def __init__(self, queue: QueueFile, folder: Path, after: dict[str, tuple[str, ...]], machine: Machine):
        """folder: keeps the state. after: the jobs that each one waits for. Raises UserError as `load`."""
        self.queue, self.folder, self.after, self.machine, self.room = queue, folder, after, machine, room_of(machine)
        self.entries = {entry.name: entry for entry in queue.entries}
        self.cpus = cpus_of_cores()
        self.processes: dict[str, _Process] = {}
        self.needs: dict[str, Needs] = {}
        self.jobs: list[Job] = []
        self.signals = 0
        """How many signals to stop have been passed on."""
        self.load()

    def load(self) -> None:
        """Read the state that the folder keeps. Raises UserError where it is damaged, or of another folder."""
        kept = self._read()
        self.started: float | None = kept.get("started")
        """When it was first started, which deadlines count from."""
        self.sessions: list[list[float]] = kept.get("sessions", [])
        """[start, end]: when the queue itself was there."""
        records = [Record(**record) for record in kept.get("jobs", [])]
        self.records: dict[str, Record] = {}
        for entry in self.queue.entries:  # a job is known by its command, also where others were added or it was renamed
            command = list(entry.command.words)
            record = next((record for record in records if record.command == command), None) or Record(entry.name, command)
            records = [other for other in records if other is not record]
            record.name = entry.name
            self.records[entry.name] = record

    @property
    def file(self) -> Path:
        return self.folder / "state.json"

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _read(self) -> dict[str, Any]:
        if not self.file.exists():
            return {}
        try:
            kept = from_json(self.file.read_bytes())
            [Record(**record) for record in kept["jobs"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.file} is damaged ({error}): take it away, and the queue begins anew") from None
        if kept["cwd"] != os.getcwd():
            raise UserError(f"{self.queue.path} was begun in {kept['cwd']}, where its paths are from: go there")
        return kept

    def _write(self) -> None:
        self.sessions[-1][1] = time.time()
        records = [asdict(record) for record in self.records.values()]
        state = {"cwd": os.getcwd(), "started": self.started, "sessions": self.sessions, "jobs": records}
        write_atomic(self.file, json.dumps(state, indent=1))

    # before the start

    def check(self) -> None:
        """Find what each job takes. Raises UserError for what cannot work, and where --out holds a run that another command began."""
        say(f"{self.queue.path}: {len(self.entries)} jobs for {self.machine.describe()}, {self.room.memory / 1e9:.1f} GB")
        for name, record in self.records.items():
            entry = self.entries[name]
            if not record.pieces and (entry.learns or entry.command.verb in MAKES_RUN):
                try:
                    RunFolder.vacant(entry.command.values["out"])
                except UserError as error:
                    raise UserError(f"{self.queue.where(entry)}: {error}") from None
        done = {name for name, record in self.records.items() if record.phase == "done"}
        self.needs = all_needs(self.queue, self.after, self.machine, done)

    def settle(self, leftovers: bool) -> None:
        """Make of the records of a queue that was killed those of one that begins: what was at work waits again, what had failed too.

        leftovers: wait for processes that are still there."""
        for record in self.records.values():
            if leftovers and record.process:
                _await_end(record.process)
            if record.pieces and record.pieces[-1][1] is None:
                record.pieces[-1][1] = max(record.pieces[-1][0], self.sessions[-1][1])
            record.process = None
            entry = self.entries[record.name]
            at_work = record.phase in ("running", "stopping")
            if at_work and entry.learns and (RunFolder(entry.makes).state / "summary.json").exists():
                record.phase, record.exit = "done", 0  # it ended when nobody looked
            if record.phase != "done":
                record.phase, record.exit = "waiting", None
        self.started = self.started or time.time()
        self.jobs = [job_of(entry, self.needs[name], self.after[name], self.room, self.started) for name, entry in self.entries.items()]
        for job in self.jobs:
            record = self.records[job.name]
            if record.phase == "waiting" and record.cores not in job.needs:  # another machine, or another number in the file
                record.cores = 0

    def states(self) -> dict[str, State]:
        """As the scheduler sees them."""
        found = {}
        for name, record in self.records.items():
            phase = record.phase if record.phase in ("waiting", "running", "stopping", "done") else "failed"
            at_work = phase in ("running", "stopping")
            ended = record.pieces[:-1] if at_work else record.pieces
            ran = sum(end - start for start, end, *_ in ended) if self._kept(name) else 0.0
            found[name] = State(phase, record.cores, record.pieces[-1][0] if at_work else 0.0, ran)
        return found

    def _kept(self, name: str) -> bool:
        """Whether what a job has done so far counts when it starts again: of a run that has no configuration yet, nothing stays."""
        entry = self.entries[name]
        return entry.keeps and (not entry.learns or (Path(entry.makes) / "config.toml").exists())

    def plan(self) -> list[Piece]:
        """When each job is to run, if all takes what is predicted; in seconds from now."""
        now = time.time()
        pieces = simulate(self.jobs, self.room, self.states(), now, self.queue.least_run_s)
        return [piece._replace(start=piece.start - now, end=piece.end - now) for piece in pieces]

    def plan_lines(self, pieces: Sequence[Piece]) -> list[str]:
        """The same for people."""
        if not pieces:
            return ["nothing is left to do: all jobs are done"]
        now, rows, free_from = time.time(), [], [0.0] * self.room.cores
        for piece in pieces:
            slots = sorted(range(self.room.cores), key=lambda slot: (free_from[slot] > piece.start + 1e-6, slot))[: piece.cores]
            for slot in slots:
                free_from[slot] = piece.end
            need, last = self.needs[piece.name], max(other.end for other in pieces if other.name == piece.name)
            job = next(job for job in self.jobs if job.name == piece.name)
            notes = [need.source if piece.end == last else "stopped for a while"]
            notes += [f"priority {job.priority}"] * bool(job.priority) + ["preemptible"] * job.preemptible
            notes += [f"after {', '.join(job.after)}"] * bool(job.after)
            if piece.end == last and math.isfinite(job.deadline):
                late = now + last - job.deadline
                notes.append(f"due at {clock(job.deadline - now)}: " + (f"LATE by {clock(late)}" if late > 0 else "in time"))
            memory = f"{need.by_cores[piece.cores].memory / 1e9:.1f} GB" + (f", {need.gpus} GPUs" if need.gpus else "")
            rows.append((piece.name, clock(piece.start), clock(piece.end), ranges(slots), memory, "; ".join(notes)))
        lines = table(("job", "start", "end", "cores", "memory", "from"), rows)
        share, last = busy(pieces, self.room.cores), max(piece.start for piece in pieces)
        end = max(piece.end for piece in pieces)
        return [*lines, f"planned: the last job starts at {clock(last)}, cores {share:.0%} busy until then; all are done at {clock(end)}"]

    # running

    def run(self) -> None:
        """Until no job can start any more. Raises Interrupted on a signal."""
        self.sessions.append([time.time()] * 2)
        self._write()
        with _Signals() as signals, notices(signals.leave_by), Screen() as self.screen:
            looked = seen = 0.0
            while True:
                ended, now = self._reap(), time.time()
                if signals.count:
                    self._stop_all(signals.count)
                    if not self.processes:
                        break
                elif ended or now >= looked + LOOK_S:
                    looked = now
                    changed = self._act(decide(self.jobs, self.room, self.states(), now, self.queue.least_run_s), now)
                    if not self.processes:
                        break
                    self.screen.show(self._progress)
                    if changed or ended or now >= seen + SEEN_S:
                        seen = now
                        self._write()
                self._kill_deaf(now)
                time.sleep(POLL_S)
            self._write()
        left = [name for name, record in self.records.items() if record.phase == "waiting"]
        if signals.count:
            raise Interrupted("interrupted")
        assert not left, f"{left} never started"

    def _act(self, actions: Sequence, now: float) -> bool:
        for action in actions:
            if isinstance(action, Start):
                self._start(action.name, action.cores, now)
            else:
                self.screen.tell(f"{action.name}: stops, and is saved, because {action.instead} needs its place")
                self.processes[action.name].stopped_for = action.instead
                self._tell_to_stop(action.name, now)
        return bool(actions)

    def _words(self, entry: Entry, record: Record) -> list[str]:
        """The command line: of a run that was begun `resume`."""
        words, values = list(entry.command.words), entry.command.values
        run = entry.makes
        if not record.pieces or run is None or entry.command.ranks or not (Path(run) / "config.toml").exists():
            return words
        going_on = entry.learns or (entry.command.verb == "resume" and not (Path(run) / "state" / "summary.json").exists())
        return ["resume", values["out" if entry.learns else "run"], *(["--json"] if values["json"] else [])] if going_on else words

    def _start(self, name: str, cores: int, now: float) -> None:
        entry, record = self.entries[name], self.records[name]
        words = self._words(entry, record)
        busy_slots = {slot for process in self.processes.values() for slot in process.slots}
        busy_gpus = {gpu for process in self.processes.values() for gpu in process.gpus}
        slots = tuple(slot for slot in range(self.room.cores) if slot not in busy_slots)[:cores]
        gpus = tuple(gpu for gpu in range(self.room.gpus) if gpu not in busy_gpus)[: self.needs[name].gpus]
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // max(1, entry.command.ranks)))}
        if self.room.gpus:
            seen = [number for number in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if number] or range(self.room.gpus)
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(seen[gpu]) for gpu in gpus)
        with open(self.log(name), "ab") as log:
            log.write(f"{RULE}{datetime.now():%Y-%m-%d %H:%M:%S} {shlex.join(['sparing', *words])}\n".encode())
            log.flush()
            with self._bound(slots):
                popen = subprocess.Popen(
                    [sys.executable, "-m", "sparing", *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                    start_new_session=True, preexec_fn=_ends_with_us,
                )  # fmt: skip
        self.processes[name] = _Process(popen, slots, gpus)
        with suppress(psutil.Error):
            record.process = [popen.pid, psutil.Process(popen.pid).create_time()]
        record.phase, record.cores, record.predicted = "running", cores, list(self.needs[name].by_cores[cores])
        again = " again" if record.pieces else ""
        record.pieces.append([now, None, cores, 0.0])
        where = f"core{'s' * (cores > 1)} {ranges(slots)}" + (f", GPU {ranges(gpus)}" if gpus else "")
        self.screen.tell(f"{name}: starts{again} on {where}; {self.log(name)}")

    def _bound(self, slots: tuple[int, ...]) -> AbstractContextManager:
        """While it lasts, what this thread starts is bound to these cores."""
        if not self.cpus:
            return nullcontext()
        stack, before = ExitStack(), os.sched_getaffinity(0)
        os.sched_setaffinity(0, {cpu for slot in slots for cpu in self.cpus[slot]})
        stack.callback(os.sched_setaffinity, 0, before)
        return stack

    def _tell_to_stop(self, name: str, now: float) -> None:
        process = self.processes[name]
        process.told = now
        self.records[name].phase = "stopping"
        with suppress(ProcessLookupError):
            os.kill(process.popen.pid, signal.SIGTERM)

    def _stop_all(self, count: int) -> None:
        """count: of signals; at the second one nothing is saved any more."""
        again, self.signals = count > max(1, self.signals), count
        waited_for = [name for name, process in self.processes.items() if process.told is None or again]
        if waited_for:
            self.screen.tell(f"stopping {', '.join(waited_for)}" + ("" if again else ", which save first; again: at once"))
        for name in waited_for:
            self._tell_to_stop(name, time.time())

    def _kill_deaf(self, now: float) -> None:
        for name, process in self.processes.items():
            if process.told is not None and now > process.told + KILL_S:
                process.told = now
                self.screen.tell(f"{name}: does not stop, and is killed; what it has saved stays")
                with suppress(ProcessLookupError):
                    os.killpg(process.popen.pid, signal.SIGKILL)

    def _reap(self) -> bool:
        """Take note of the processes that have ended; whether there were any."""
        ended = False
        for name, process in list(self.processes.items()):
            pid, status, usage = os.wait4(process.popen.pid, os.WNOHANG)
            if pid:
                ended = True
                process.popen.returncode = os.waitstatus_to_exitcode(status)
                del self.processes[name]
                self._ended(name, process, usage)
        return ended

    def _ended(self, name: str, process: _Process, usage: Any) -> None:
        record, status, now = self.records[name], process.popen.returncode, time.time()
        start, _, cores, _ = record.pieces[-1]
        record.pieces[-1] = [start, now, cores, usage.ru_utime + usage.ru_stime]
        record.peak_bytes = max(record.peak_bytes, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
        record.process, record.exit = None, status
        took = f"after {clock(sum(end - start for start, end, *_ in record.pieces))}"
        if status == 0:
            record.phase = "done"
            due = next(job.deadline for job in self.jobs if job.name == name)
            self.screen.tell(f"{name}: done {took}" + (f", {clock(now - due)} LATE" if now > due else ""))
        elif process.told is not None and (status in STOPPED or status == -signal.SIGKILL):
            record.phase = "waiting"
            record.preemptions += process.stopped_for is not None
            self.screen.tell(f"{name}: stopped {took}")
        elif status in STOPPED:
            record.phase = "stopped"
            self.screen.tell(f"{name}: was stopped by somebody else {took}; it goes on when this command is given again")
        else:
            record.phase = "failed"
            why = f"killed by signal {-status}" + (", as the system does when memory is short" if status == -signal.SIGKILL else "")
            self.screen.tell(f"{name}: FAILED {took}, {f'status {status}' if status > 0 else why}: {last_line(self.log(name))}")
        if record.phase in ("failed", "stopped"):
            self._skip_after(name)

    def _skip_after(self, name: str) -> None:
        for other, after in self.after.items():
            if name in after and self.records[other].phase == "waiting":
                self.records[other].phase = "skipped"
                self.screen.tell(f"{other}: not started, because it needs {name}")
                self._skip_after(other)

    def _progress(self) -> list[tuple[str, ...]]:
        """Rows of the table on a terminal: those at work, those that wait, how many are done."""
        now, rows, states = time.time(), [], self.states()
        for job in self.jobs:
            record, state = self.records[job.name], states[job.name]
            if job.name in self.processes:
                slots = ranges(self.processes[job.name].slots)
                ran, left = clock(state.ran + now - state.since), f"about {clock(state.left(job, now))}"
                rows.append((job.name, record.phase, slots, ran, left, last_line(self.log(job.name))))
            else:
                rows.append((job.name, record.phase, "", clock(state.ran) if state.ran else "", "", ""))
        return rows

    # after it

    def summary(self) -> dict[str, Any]:
        """What each job took, and how busy the machine was; times are seconds since the queue was first started, less those in which it was
        not there."""
        rows, pieces = [], []
        for job in self.jobs:
            record = self.records[job.name]
            spans = [Piece(job.name, int(cores), self._at(start), self._at(end)) for start, end, cores, _ in record.pieces]
            pieces += spans
            end = record.pieces[-1][1] if record.pieces else None
            cpu_s = sum(piece[3] for piece in record.pieces)
            predicted_s, memory = record.predicted or job.needs[min(job.needs)]
            rows.append({
                "name": job.name, "command": shlex.join(record.command), "status": record.phase, "exit": record.exit,
                "start": spans[0].start if spans else None, "end": spans[-1].end if spans else None,
                "seconds": sum(span.end - span.start for span in spans), "cores": record.cores,
                "core_s": sum(span.cores * (span.end - span.start) for span in spans), "cpu_s": cpu_s,
                "predicted_s": predicted_s, "memory_bytes": memory, "peak_bytes": record.peak_bytes,
                "deadline": datetime.fromtimestamp(job.deadline).astimezone().isoformat() if math.isfinite(job.deadline) else None,
                "deadline_met": None if math.isinf(job.deadline) else record.phase == "done" and end <= job.deadline,
                "preemptions": record.preemptions, "log": str(self.log(job.name)),
            })  # fmt: skip
        return {
            "jobs": rows,
            "cores": self.room.cores,
            "seconds": max((piece.end for piece in pieces), default=0.0),
            "last_start": max((piece.start for piece in pieces), default=None),
            "busy": busy(pieces, self.room.cores) if pieces else None,
            "done": sum(row["status"] == "done" for row in rows),
            "failed": sum(row["status"] in ("failed", "skipped", "stopped") for row in rows),
            "missed": [row["name"] for row in rows if row["deadline_met"] is False],
        }

    def _at(self, moment: float) -> float:
        """Seconds of the queue's own time until `moment`."""
        return sum(max(0.0, min(moment, end) - start) for start, end in self.sessions)


class _Signals:
    """Counts the signals that mean to stop; a notice that the machine goes away is one (`base.notices`)."""

    def __init__(self):
        self.count = 0

    def __enter__(self) -> _Signals:
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._take) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_exc) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _take(self, _number, _frame) -> None:
        self.count += 1

    def leave_by(self, _seconds: float) -> None:
        self.count = max(1, self.count)


def _ends_with_us() -> None:
    """In a new process, on Linux: it gets SIGTERM, and saves, when the queue ends in whatever way (prctl(2), PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        LIBC.prctl(1, int(signal.SIGTERM))


def _await_end(process: Sequence[float]) -> None:
    """Of a process that an earlier queue has left: tell it to stop, and wait until it has."""
    number, created = int(process[0]), process[1]
    with suppress(psutil.Error):
        there = psutil.Process(number)
        if abs(there.create_time() - created) < 1.0:
            say(f"waiting for process {number}, which was left by an earlier start of this queue")
            there.terminate()
            try:
                there.wait(KILL_S)
            except psutil.TimeoutExpired:
                there.kill()
                there.wait()
