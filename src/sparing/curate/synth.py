"""`data synth`: exercises of some kinds and difficulties, none twice, written as JSON lines."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from sparing.account.meter import metered
from sparing.base.config import UserError
from sparing.base.config_file import nearest
from sparing.base.files import atomic_file, output_file, output_folder
from sparing.base.messages import say
from sparing.curate.contamination import Contamination, n_grams
from sparing.curate.document import Document
from sparing.curate.exercises import DIFFICULTIES, Exercise, countdown
from sparing.curate.programs import programs
from sparing.curate.puzzles import puzzles
from sparing.curate.word_problems import words
from sparing.data.accounts import balanced, in_words
from sparing.data.split import content_hash

Maker = Callable[[random.Random, int], Exercise]
KINDS: dict[str, Maker] = {"words": words, "countdown": countdown, "puzzles": puzzles, "programs": programs}
FORMS = ("task", "chats")
SUFFIXES = (".jsonl", ".ndjson", ".json")
"""Of files that are read as JSON lines."""
TRIES = 1000
"""So many in a row that were made before, or leak, and there are no more."""
LEAKS, TWICE = "contamination", "made before"


def make(kind: str, difficulty: int, seed: int, number: int) -> Exercise:
    """The exercise of these four, always the same."""
    return KINDS[kind](random.Random(f"{kind} {difficulty} {seed} {number}"), difficulty)


def row(exercise: Exercise, form: str, about: dict) -> dict:
    """One line of a file that `grpo` ("task") or `sft` ("chats") takes. about: further keys."""
    if form == "chats":
        turns = (("user", exercise.prompt), ("assistant", exercise.worked))
        return {"messages": [{"role": role, "content": content} for role, content in turns], **about}
    judged = {"answer": exercise.answer, "verifier": exercise.verifier, "tests": list(exercise.tests), "worked": exercise.worked}
    return {"prompt": exercise.prompt, **judged, **about}


def synth(
    kinds: Sequence[str],
    count: int,
    out: str,
    seed: int = 0,
    form: str = "task",
    against: Sequence[str] = (),
    started: float | None = None,
) -> dict:
    """Make `count` exercises in all, of each of `kinds` as many, in the file `out`, or a file for each kind in the new folder `out`.

    kinds: "words" for all difficulties in turn, "words:3" for one. against: files of evaluation texts; an exercise goes whose question
    has half of its runs of 13 words, numbers included, from them.

    -> {"documents": {"in", "out", "rejected", "quarantined"}, "rejected": by reason, "exercises": by kind and difficulty, "out"}. The same
    arguments give the same bytes. Raises UserError: a slip, or there are not as many different exercises.
    """
    wanted = [_kind(name) for name in kinds]
    if form not in FORMS:
        raise UserError(f"--form {form}: choose {' or '.join(FORMS)}")
    if count < 1:
        raise UserError(f"--count {count}: must be 1 or more")
    evaluations = Contamination(evaluations=tuple(against), numbers=True) if against else None
    if evaluations is not None:
        evaluations.load()
    made, rejected = Counter(), Counter()
    with metered("data", started=started) as meter, meter.stage("synth"), ExitStack() as around:
        files = {kind: around.enter_context(atomic_file(path)) for kind, path in _files(out, wanted).items()}
        for kind, difficulty, exercise, source in _different(wanted, count, seed, evaluations, rejected):
            line = json.dumps(row(exercise, form, {"difficulty": difficulty, "source": source}), ensure_ascii=False)
            (files.get(kind) or files[""]).write(line.encode() + b"\n")
            made[f"{kind}/{difficulty}"] += 1
    documents = {"in": count + rejected.total(), "out": made.total(), "rejected": rejected.total(), "quarantined": 0}
    say(in_words(balanced(documents)))
    return {"documents": documents, "rejected": dict(rejected), "exercises": dict(sorted(made.items())), "out": out}


def _different(
    wanted: Sequence[tuple[str, Sequence[int]]], count: int, seed: int, evaluations: Contamination | None, rejected: Counter[str]
) -> Iterator[tuple[str, int, Exercise, str]]:
    """`count` exercises, each with its kind, difficulty and provenance; `rejected` counts the others by reason.

    They are told apart by what they are about, exactly. Shares of common n-grams (`minhash`) would say that a long story with one other
    number is the same, and that the same story with other names is not.
    """
    seen: set[int] = set()
    numbers: Counter[tuple[str, int]] = Counter()
    for at in range(count):
        kind, difficulties = wanted[at % len(wanted)]
        difficulty = difficulties[at // len(wanted) % len(difficulties)]
        failed: Counter[str] = Counter()
        while True:
            number = numbers[kind, difficulty]
            numbers[kind, difficulty] += 1
            exercise = make(kind, difficulty, seed, number)
            subject = content_hash(exercise.subject.encode())
            leaks = evaluations is not None and _leaks(exercise, evaluations)
            if subject not in seen and not leaks:
                break
            failed[LEAKS if leaks else TWICE] += 1
            if failed.total() == TRIES:
                why = f"{failed[LEAKS]} of {TRIES:,} in a row are in --against" if failed[LEAKS] else f"{TRIES:,} in a row were made before"
                raise UserError(
                    f"{kind}:{difficulty}: no more of them ({why}), {at} of {count} are made; ask for fewer, or for other kinds"
                )
        rejected.update(failed)
        seen.add(subject)
        yield kind, difficulty, exercise, f"{kind}/{difficulty} seed {seed} number {number}"


def _leaks(exercise: Exercise, evaluations: Contamination) -> bool:
    """Whether evaluation texts have half of all runs of n words of the question. One alone may be a phrase of the maker's."""
    document = Document(exercise.question)
    runs = n_grams(document.pieces, evaluations.n, evaluations.numbers).size
    return runs > 0 and 2 * evaluations.scores(document)["shared"] >= runs


def _kind(name: str) -> tuple[str, Sequence[int]]:
    """(kind, difficulties)."""
    kind, colon, difficulty = name.partition(":")
    if kind not in KINDS:
        raise UserError(f"data synth {name}: no such kind; nearest: {nearest(kind, KINDS)}; all: {', '.join(KINDS)}")
    if not colon:
        return kind, DIFFICULTIES
    if difficulty not in map(str, DIFFICULTIES):
        raise UserError(f"data synth {name}: difficulty is {DIFFICULTIES[0]} to {DIFFICULTIES[-1]}, as {kind}:3")
    return kind, [int(difficulty)]


def _files(out: str, wanted: Sequence[tuple[str, Sequence[int]]]) -> dict[str, Path]:
    """The file of each kind; "": of all."""
    path = Path(out)
    if path.suffix in SUFFIXES or (path.exists() and not path.is_dir()):
        return {"": output_file(out, "--out")}
    if path.suffix and not path.exists():
        raise UserError(f"--out {out}: name a file that ends in {SUFFIXES[0]}, or a folder")
    folder = output_folder(out, "--out")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--out {out}: is not empty; choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    return {kind: folder / f"{kind}.jsonl" for kind, _ in wanted}
