"""Decides which jobs of a queue start and stop: a pure function of jobs, machine, their states and the time. It runs nothing itself.

Jobs go by priority, and within one by deadline, the earliest first (EDF: Liu and Layland, Journal of the ACM 20, 1973). The first one that
does not fit gets a reservation; others start before it only where they do not delay it (EASY backfilling: Lifka, The ANL/IBM SP Scheduling
System, JSSPP 1995). Preemptible jobs fill what is left, because they can be stopped when their place is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from sparing.planning.needs import Need

LEAST_RUN_S = 60.0
"""A preemptible job runs so long before it may be stopped: starting costs seconds, and who is stopped again and again gets nowhere."""
SHORT_S = 15.0
"""What ends so soon is waited for: saving a run and starting it again takes about as long."""
STOP_S = 3.0
"""What saving a run is expected to take."""
LATE = 0.1
"""A job that is not done when it was to be is expected to take this share of its time more."""
SLACK = 0.1
"""By this share of its time a prediction may be wrong without a deadline being missed."""

Phase = Literal["waiting", "running", "stopping", "done", "failed"]


class Room(NamedTuple):
    """What a machine has, or what a job takes of it."""

    cores: int
    memory: float
    """Bytes."""
    gpus: int = 0

    def holds(self, other: Room) -> bool:
        return all(mine >= theirs for mine, theirs in zip(self, other, strict=True))

    def plus(self, other: Room, sign: int = 1) -> Room:
        return Room(*(mine + sign * theirs for mine, theirs in zip(self, other, strict=True)))

    def minus(self, other: Room) -> Room:
        return self.plus(other, -1)


@dataclass(frozen=True)
class Job:
    """A job as the scheduler sees it. Times are seconds on the caller's clock."""

    name: str
    needs: Mapping[int, Need]
    """By the numbers of cores that it can run on. Which of them is settled when it first starts, because a run goes on as it began."""
    gpus: int = 0
    deadline: float = math.inf
    priority: int = 0
    """Higher goes first."""
    preemptible: bool = False
    after: tuple[str, ...] = ()
    """Jobs that must be done before."""

    def takes(self, cores: int) -> Room:
        return Room(cores, self.needs[cores].memory, self.gpus)


@dataclass(frozen=True)
class State:
    """How far a job is."""

    phase: Phase = "waiting"
    cores: int = 0
    """Settled at its first start; 0: open."""
    since: float = 0.0
    """When the piece began that runs."""
    ran: float = 0.0
    """Seconds of earlier pieces, whose work is kept."""

    def left(self, job: Job, now: float) -> float:
        """Seconds that it still takes, as far as is predicted."""
        whole = job.needs[self.cores].seconds
        ran = self.ran + (now - self.since if self.phase in ("running", "stopping") else 0.0)
        return max(whole - ran, LATE * whole)


class Start(NamedTuple):
    name: str
    cores: int


class Stop(NamedTuple):
    name: str
    instead: str
    """The job that needs its place."""


class Piece(NamedTuple):
    """A job at work from `start` to `end`. One that was stopped has several."""

    name: str
    cores: int
    start: float
    end: float


class Claim(NamedTuple):
    """What a job demands for itself and for those that wait for its result."""

    priority: int
    """The highest of them."""
    deadline: float
    """When it must be done for all of them to be in time."""
    tail: float
    """Seconds from its start until the last of them is done."""


def claims(jobs: Sequence[Job]) -> dict[str, Claim]:
    """Of each job, by name."""
    waiting: dict[str, list[Job]] = {job.name: [] for job in jobs}
    for job in jobs:
        for name in job.after:
            waiting[name].append(job)
    found: dict[str, Claim] = {}

    def shortest(job: Job) -> float:
        return min(need.seconds for need in job.needs.values())

    def claim(job: Job) -> Claim:
        if job.name not in found:
            others = [(claim(other), shortest(other)) for other in waiting[job.name]]
            priority = max([job.priority, *(other.priority for other, _ in others)])
            deadline = min([job.deadline, *(other.deadline - seconds for other, seconds in others)])
            found[job.name] = Claim(priority, deadline, shortest(job) + max((other.tail for other, _ in others), default=0.0))
        return found[job.name]

    for job in jobs:
        claim(job)
    return found


def decide(
    jobs: Sequence[Job], room: Room, states: Mapping[str, State], now: float, least_run_s: float = LEAST_RUN_S
) -> list[Start | Stop]:
    """What to do now. room: what the machine has. states: of every job, by name.

    What is started fits into what is free. A job that is stopped keeps its place until its state says that it has ended. A job that needs
    more than the whole machine never starts."""
    return list(_Decision(jobs, room, states, now, least_run_s).actions())


class _Decision:
    """One call of `decide`: goes through the waiting jobs in their order, and keeps account of what is still free."""

    def __init__(self, jobs: Sequence[Job], room: Room, states: Mapping[str, State], now: float, least_run_s: float):
        self.jobs, self.claims = {job.name: job for job in jobs}, claims(jobs)
        self.room, self.states, self.now, self.least_run_s = room, dict(states), now, least_run_s
        done = {name for name, state in states.items() if state.phase == "done"}
        ready = [job for job in jobs if states[job.name].phase == "waiting" and done.issuperset(job.after)]
        self.waiting = sorted(ready, key=self._rank)  # jobs that are alike stay in their order
        self.free = room
        for job in self._at_work():
            self.free = self.free.minus(job.takes(states[job.name].cores))
        self.reserved_s = math.inf
        """Seconds until the first job that does not fit has its place; infinite: there is none."""
        self.reserver: Job | None = None
        self.spare = room
        """What will be left beside it then."""

    def actions(self) -> Iterator[Start | Stop]:
        while self.waiting and (self.free.cores or self.reserver is None):
            job = self.waiting[0]
            cores = self._cores(job)
            takes, seconds = job.takes(cores), self._left(job, cores)
            if self.free.holds(takes) and self._delays_nobody(job, takes, seconds):
                self.free = self.free.minus(takes)
                if self.reserver is not None and seconds > self.reserved_s and self.spare.holds(takes):
                    self.spare = self.spare.minus(takes)
                self.states[job.name] = State("running", cores, self.now, self.states[job.name].ran)
                yield Start(job.name, cores)
            else:
                if self.reserver is None:
                    for victim in self._victims(job, takes, seconds):
                        self.states[victim.name] = replace(self.states[victim.name], phase="stopping")
                        yield Stop(victim.name, job.name)
                    self._reserve(job, takes)
            self.waiting.pop(0)

    # order

    def _rank(self, job: Job) -> tuple:
        """Higher priority first; then earlier deadlines; then what cannot be stopped; then what takes more than half of the machine,
        because small jobs fit beside others later; then what the end of all waits longest for."""
        least = job.takes(self.states[job.name].cores or min(job.needs))
        share = max(part / whole for part, whole in zip(least, self.room, strict=True) if whole)
        return -self.claims[job.name].priority, self._due(job), job.preemptible, -max(share, 0.5), -self.claims[job.name].tail

    def _due(self, job: Job) -> float:
        """The deadline; infinite where there is none, or none that can still be met."""
        counts = [self.states[job.name].cores] if self.states[job.name].cores else job.needs
        soonest = self.now + min(self._left(job, cores) for cores in counts)
        return self.claims[job.name].deadline if soonest <= self.claims[job.name].deadline else math.inf

    def _left(self, job: Job, cores: int | None = None) -> float:
        """Seconds that a job still takes; of one that waits, on so many cores."""
        state = self.states[job.name]
        if state.phase == "stopping":
            return STOP_S
        return (state if cores is None else replace(state, cores=cores)).left(job, self.now)

    def _cores(self, job: Job) -> int:
        """How many cores a job gets: where that is open, its part of what is free, shared with all that wait; more where its deadline
        needs them."""
        if cores := self.states[job.name].cores:
            return cores
        if len(job.needs) == 1:
            return min(job.needs)
        open_ones = [other for other in self.waiting if len(other.needs) > 1 and not self.states[other.name].cores]
        others = [self.states[other.name].cores or min(other.needs) for other in self.waiting if other not in open_ones]
        part = (self.free.cores - sum(cores for cores in others if cores <= self.free.cores)) // len(open_ones)
        counts = sorted(cores for cores in job.needs if self.free.holds(job.takes(cores))) or [min(job.needs)]
        chosen = max((cores for cores in counts if cores <= part), default=counts[0])
        in_time = [cores for cores in counts if self.now + (1 + SLACK) * job.needs[cores].seconds <= self._due(job)]
        return chosen if chosen in in_time or not in_time else min(in_time, key=lambda cores: (cores < chosen, cores))

    # places

    def _at_work(self) -> list[Job]:
        return [self.jobs[name] for name, state in self.states.items() if state.phase in ("running", "stopping")]

    def _delays_nobody(self, job: Job, takes: Room, seconds: float) -> bool:
        """Whether a job may start before the one that has a reservation."""
        if self.reserver is None or seconds <= self.reserved_s or self.spare.holds(takes):
            return True
        return job.preemptible and self.reserved_s >= self.least_run_s and self._yields(job, self.reserver, urgent=False)

    def _yields(self, job: Job, other: Job, urgent: bool) -> bool:
        """Whether a preemptible job makes place for another: for a higher priority; within its own for what is not preemptible, and where
        that one would otherwise miss its deadline (urgent), which comes first."""
        mine, theirs = self.claims[job.name].priority, self.claims[other.name].priority
        if theirs != mine:
            return theirs > mine
        return (urgent and self._due(other) < self._due(job)) or (not other.preemptible and self._due(job) == math.inf)

    def _fits_in(self, takes: Room, leaving: Sequence[tuple[float, Room]]) -> float:
        """Seconds until there is room, where `leaving` give theirs back after some seconds; infinite: never."""
        free = self.free
        if free.holds(takes):
            return 0.0
        for seconds, room in sorted(leaving):
            free = free.plus(room)
            if free.holds(takes):
                return seconds
        return math.inf

    def _ends(self) -> list[tuple[float, Room]]:
        """Of what is at work: (seconds until it ends, what it gives back)."""
        return [(self._left(job), job.takes(self.states[job.name].cores)) for job in self._at_work()]

    def _reserve(self, job: Job, takes: Room) -> None:
        """Keep a place for the first job that does not fit: when others have ended, or could have been stopped for it."""
        leaving, ends = [], self._ends()
        for other, (seconds, room) in zip(self._at_work(), ends, strict=True):
            state = self.states[other.name]
            if state.phase == "running" and other.preemptible and self._yields(other, job, urgent=False):
                seconds = min(seconds, max(0.0, state.since + self.least_run_s - self.now) + STOP_S)
            leaving.append((seconds, room))
        self.reserver, self.reserved_s = job, self._fits_in(takes, leaving)
        free = self.free
        for seconds, room in ends:
            free = free.plus(room) if seconds <= self.reserved_s else free
        self.spare = Room(*(max(0, part) for part in free.minus(takes)))

    def _victims(self, job: Job, takes: Room, seconds: float) -> list[Job]:
        """The preemptible jobs to stop, so that this one has room soon: as few as do, of low priority first. None where that would not
        help, or where it has room soon anyway."""
        wait = self._fits_in(takes, self._ends())
        if wait <= SHORT_S:
            return []
        urgent = self.now + wait + (1 + SLACK) * seconds > self._due(job)
        may = [
            other
            for other in self._at_work()
            if other.preemptible and self.states[other.name].phase == "running" and self._left(other) > SHORT_S
            and self.now - self.states[other.name].since >= self.least_run_s and self._yields(other, job, urgent)
        ]  # fmt: skip
        may.sort(key=lambda other: (self.claims[other.name].priority, -self._due(other), -self.states[other.name].since))
        soon = self.free
        for left, room in self._ends():
            soon = soon.plus(room) if left <= SHORT_S else soon
        chosen: list[Job] = []
        for other in may:
            if soon.holds(takes):
                break
            chosen.append(other)
            soon = soon.plus(other.takes(self.states[other.name].cores))
        if not soon.holds(takes):
            return []
        for other in chosen[:]:  # the last one may have made an earlier one needless
            room = other.takes(self.states[other.name].cores)
            if soon.minus(room).holds(takes):
                chosen.remove(other)
                soon = soon.minus(room)
        return chosen


def simulate(
    jobs: Sequence[Job],
    room: Room,
    states: Mapping[str, State],
    now: float,
    least_run_s: float = LEAST_RUN_S,
    seconds: Callable[[Job, int], float] = lambda job, cores: job.needs[cores].seconds,
) -> list[Piece]:
    """The pieces of all jobs in the order of their starts, if each takes `seconds(job, cores)` (default: what is predicted). Jobs that
    cannot start are left out."""
    states, pieces, named = dict(states), [], {job.name: job for job in jobs}
    stops: dict[str, float] = {}

    def ends(name: str) -> float:
        state = states[name]
        naturally = state.since + max(0.0, seconds(named[name], state.cores) - state.ran)
        return min(naturally, stops.get(name, math.inf))

    while True:
        for action in decide(jobs, room, states, now, least_run_s):
            if isinstance(action, Start):
                states[action.name] = State("running", action.cores, now, states[action.name].ran)
            else:
                states[action.name] = replace(states[action.name], phase="stopping")
                stops[action.name] = now + STOP_S
        at_work = [name for name, state in states.items() if state.phase in ("running", "stopping")]
        if not at_work:
            return sorted(pieces, key=lambda piece: piece.start)
        moments = [ends(name) for name in at_work]
        if any(state.phase == "waiting" for state in states.values()):  # then some may be stopped when they have run long enough
            moments += [states[name].since + least_run_s for name in at_work if named[name].preemptible]
        now = min(moment for moment in moments if moment > now or moment in moments[: len(at_work)])
        for name in at_work:
            state = states[name]
            if ends(name) <= now:
                stopped = name in stops and stops.pop(name) <= now and now < state.since + seconds(named[name], state.cores) - state.ran
                pieces.append(Piece(name, state.cores, state.since, now))
                states[name] = State("waiting" if stopped else "done", state.cores, 0.0, state.ran + now - state.since)


def busy(pieces: Sequence[Piece], cores: int) -> float:
    """The jobs' core-seconds as a share of cores x time, until the last of them starts (or is started again)."""
    first, last = min(piece.start for piece in pieces), max(piece.start for piece in pieces)
    used = sum(piece.cores * max(0.0, min(piece.end, last) - piece.start) for piece in pieces)
    return used / (cores * (last - first)) if last > first else 1.0
