"""The scheduler of a queue, in simulations: nothing runs."""

import math
import random
from collections import Counter
from dataclasses import replace

import pytest

from sparing.job.schedule import LEAST_RUN_S, STOP_S, Job, Piece, Room, Start, State, Stop, busy, decide, simulate
from sparing.planning.needs import Need

GB = 1e9


def job(name, seconds, cores=1, memory=1 * GB, **rest):
    return Job(name, {cores: Need(seconds, memory)}, **rest)


def run(jobs, room, factors=None, **options):
    """The pieces, where each job takes so much more than was predicted."""
    factors = factors or {}
    actual = lambda job, cores: job.needs[cores].seconds * factors.get(job.name, 1.0)  # noqa: E731
    return simulate(jobs, room, {one.name: State() for one in jobs}, 0.0, seconds=actual, **options)


def ends(pieces):
    return {piece.name: piece.end for piece in sorted(pieces, key=lambda piece: piece.end)}


def starts(pieces):
    return {piece.name: piece.start for piece in reversed(pieces)}


def check_room(jobs, pieces, room):
    """At no moment is more taken than there is."""
    named = {one.name: one for one in jobs}
    for piece in pieces:
        at_once = [other for other in pieces if other.start <= piece.start < other.end]
        assert len({other.name for other in at_once}) == len(at_once)
        taken = [named[other.name].takes(other.cores) for other in at_once]
        assert room.holds(Room(*map(sum, zip(*taken, strict=True))))


def mixed(seed, cores):
    """Twelve jobs: budgets in time on any number of cores, and in tokens; small ones on one core; one on the whole machine; a chain,
    priorities, deadlines, and preemptible ones."""
    dice = random.Random(seed)
    counts = [count for count in (1, 2, 4, 8) if count <= cores]
    seconds = [60 * dice.choice((2, 5, 10, 20, 60)) * dice.uniform(0.5, 1.5) for _ in range(12)]
    total = sum(seconds)
    jobs = []
    for number, took in enumerate(seconds):
        memory = {count: (0.5 + 0.2 * count) * GB for count in counts}
        if number % 4 == 0:
            needs = {count: Need(took, memory[count]) for count in counts}
        elif number % 4 == 1:
            needs = {count: Need(took / count, memory[count]) for count in counts}
        elif number == 3:
            needs = {cores: Need(took, 3 * GB)}
        else:
            needs = {1: Need(took, dice.uniform(0.2, 1.5) * GB)}
        rest = {"preemptible": number in (2, 5, 8, 11), "priority": 1 if number in (3, 4) else 0}
        if number in (6, 9):
            rest["deadline"] = dice.uniform(0.5, 1.5) * total / cores
        if number == 10:
            rest["after"] = ("3",)
        jobs.append(Job(str(number), needs, **rest))
    return jobs


@pytest.mark.parametrize("cores", [2, 4])
def test_a_mixed_queue_keeps_the_machine_busy_whatever_predictions_miss_by(cores):
    room, shares = Room(cores, 6 * GB), []
    for seed in range(20):
        jobs, dice = mixed(seed, cores), random.Random(seed + 1000)
        pieces = run(jobs, room, {one.name: dice.uniform(0.7, 1.3) for one in jobs})
        assert {piece.name for piece in pieces} == {one.name for one in jobs}
        check_room(jobs, pieces, room)
        shares.append(busy(pieces, cores))
        named = {one.name: one for one in jobs}
        for name, count in Counter(piece.name for piece in pieces).items():
            assert count == 1 or (named[name].preemptible and count <= 4)
            for piece in [piece for piece in pieces if piece.name == name][:-1]:
                assert piece.end - piece.start >= LEAST_RUN_S  # nobody is stopped who has just begun
        planned = ends(run(jobs, room))
        for one in jobs:  # what the plan meets with time to spare is met
            if planned[one.name] * 1.4 < one.deadline < math.inf:
                assert ends(pieces)[one.name] <= one.deadline
    assert min(shares) >= 0.95, shares


def test_any_queue_ends_and_nobody_takes_what_is_not_there_or_is_stopped_again_and_again():
    for seed in range(15):
        dice, jobs = random.Random(seed), []
        cores = dice.choice((1, 2, 3, 8))
        for number in range(15):
            seconds, counts = dice.uniform(1, 2000), dice.sample(range(1, cores + 1), dice.randint(1, cores))
            needs = {count: Need(seconds / dice.choice((1, count)), dice.uniform(0.1, 7.9) * GB) for count in counts}
            after = tuple(str(other) for other in range(number) if dice.random() < 0.1)
            deadline = math.inf if dice.random() < 0.5 else dice.uniform(0, 10_000)
            jobs.append(Job(str(number), needs, dice.choice((0, 0, 1)), deadline, dice.randint(-1, 1), dice.random() < 0.5, after))
        room = Room(cores, 8 * GB, 1)
        pieces = run(jobs, room, {one.name: dice.uniform(0.5, 2) for one in jobs})
        check_room(jobs, pieces, room)
        assert starts(pieces).keys() == {one.name for one in jobs}
        assert len(pieces) <= 2 * len(jobs)  # who is stopped makes place for one that then starts
        for one in jobs:
            assert all(ends(pieces)[other] <= starts(pieces)[one.name] for other in one.after)


def test_deadlines_come_first_within_a_priority_and_those_that_cannot_be_met_last():
    jobs = [
        job("none", 100), job("late", 100, deadline=900), job("early", 100, deadline=250), job("hopeless", 100, deadline=50),
        job("urgent", 100, deadline=10_000, priority=1),
    ]  # fmt: skip
    order = [piece.name for piece in run(jobs, Room(1, 8 * GB))]
    assert order == ["urgent", "early", "late", "none", "hopeless"]


def test_a_preemptible_job_makes_place_for_a_higher_priority_and_goes_on_afterwards():
    jobs = [job("first", 100), job("second", 50, cores=2, priority=1, after=("first",)), job("filler", 500, preemptible=True)]
    pieces = run(jobs, Room(2, 8 * GB))
    assert [(piece.name, piece.start) for piece in pieces] == [
        ("first", 0),
        ("filler", 0),
        ("second", 100 + STOP_S),
        ("filler", 150 + STOP_S),
    ]
    assert sum(piece.end - piece.start for piece in pieces if piece.name == "filler") == 500
    assert ends(run(jobs, Room(2, 8 * GB), least_run_s=200))["second"] == 250 + STOP_S  # the filler has its time first
    stubborn = [replace(one, preemptible=False) for one in jobs]
    assert starts(run(stubborn, Room(2, 8 * GB)))["second"] == 500


def test_a_preemptible_job_is_stopped_for_a_deadline_and_not_without_need():
    def pair(deadline):
        return [
            job("first", 100), job("background", 1000, cores=2, preemptible=True), job("next", 200, cores=1, preemptible=True,
            deadline=deadline, after=("first",)),
        ]  # fmt: skip

    room = Room(3, 8 * GB)
    assert ends(run(pair(500), room))["next"] == 300  # there is room beside it
    room = Room(2, 8 * GB)
    running = {"first": State("done", 1), "background": State("running", 2, since=0.0), "next": State()}
    assert decide(pair(500), room, running, 100.0) == [Stop("background", "next")]
    assert decide(pair(500), room, running, 30.0) == []  # it has not run long enough
    assert decide(pair(5000), room, running, 100.0) == []  # the deadline can wait until the other has ended
    assert decide(pair(250), room, running, 100.0) == []  # and this one cannot be met at all
    assert decide(pair(500), room, running | {"background": State("stopping", 2)}, 102.0) == []
    assert decide(pair(500), room, running | {"background": State("waiting", 2, 0.0, 100.0)}, 104.0)[0] == Start("next", 1)


def test_small_jobs_start_before_a_large_one_only_where_they_do_not_delay_it():
    jobs = [job("long", 300), job("large", 100, cores=2, after=("gate",)), job("gate", 10), job("short", 200), job("longer", 400)]
    waits = {"long": State("running", 1, 0.0), "large": State(), "gate": State("done"), "short": State(), "longer": State()}
    assert decide(jobs, Room(2, 8 * GB), waits, 50.0) == [Start("short", 1)]  # and not the longer one, which would be in the way


def test_what_others_wait_for_goes_first():
    jobs = [job("plain", 100), job("base", 50), job("tuned", 300, after=("base",)), job("wished", 10, after=("dear",), priority=5)]
    jobs += [job("dear", 10), job("due", 30, deadline=120, after=("input",)), job("input", 60)]
    assert [piece.name for piece in run(jobs, Room(1, 8 * GB))] == ["dear", "wished", "input", "due", "base", "tuned", "plain"]


def test_memory_and_gpus_are_packed_too():
    jobs = [job(str(number), 100, memory=3 * GB) for number in range(4)]
    pieces = run(jobs, Room(8, 8 * GB))
    assert [piece.start for piece in pieces] == [0, 0, 100, 100]
    on_gpu = [job(str(number), 100, gpus=1) for number in range(3)]
    assert [piece.start for piece in run(on_gpu, Room(8, 8 * GB, 2))] == [0, 0, 100]


def test_free_cores_are_shared_among_those_that_wait_and_settled_then():
    wide = {count: Need(100 / count, count * GB) for count in (1, 2, 4, 8)}
    jobs = [Job(name, wide) for name in "abc"]
    begun = decide(jobs, Room(8, 64 * GB), {name: State() for name in "abc"}, 0.0)
    assert sorted(action.cores for action in begun) == [2, 2, 4]
    assert decide(jobs[:1], Room(8, 64 * GB), {"a": State()}, 0.0) == [Start("a", 8)]
    assert decide(jobs[:1], Room(8, 3 * GB), {"a": State()}, 0.0) == [Start("a", 2)]  # as many as there is memory for
    assert decide(jobs[:1], Room(8, 64 * GB), {"a": State(cores=1, ran=5.0)}, 0.0) == [Start("a", 1)]  # goes on as it began
    hurried = [Job("a", wide, deadline=30.0), Job("b", wide)]
    first = decide(hurried, Room(8, 64 * GB), {name: State() for name in "ab"}, 0.0)[0]
    assert first == Start("a", 4)


def test_the_busy_share_counts_until_the_last_start():
    assert busy([Piece("a", 2, 0, 10), Piece("b", 1, 10, 90)], 2) == 1.0
    assert busy([Piece("a", 1, 0, 10), Piece("b", 1, 10, 90)], 2) == 0.5
    assert busy([Piece("a", 1, 5, 10)], 2) == 1.0
