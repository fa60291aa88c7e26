"""`data synth` with a teacher: documents in other words, questions about them, exercises on topics; each checked before it stays.

    OUT/documents/   what stays, JSON lines that `train --data` (rewrite), `sft --data` (questions) or `grpo --task` (exercises) takes
    OUT/rejected/    what failed a check, with the check
    OUT/attributes/  id, and how many votes agreed
    OUT/quarantine.jsonl, card.html, ledger.sqlite; curated.json, written last: the summary

What the teacher said lies in OUT/.work until the end, a line for each answer; all else is computed from it. So the same command goes on
after a kill, asks nothing again that was answered, and comes to the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from sparing.account.meter import Meter, metered
from sparing.base.config import Budget, UserError
from sparing.base.files import read_text
from sparing.base.messages import say
from sparing.base.preempt import Interrupted, Preempt
from sparing.base.run import RunFolder, folder_lock
from sparing.budget.units import parse_budget
from sparing.curate import posed, questions, rewrites
from sparing.curate.duplicates import find_duplicates
from sparing.curate.entry import complete, leaving_nothing
from sparing.curate.making import How, Leaks, Made, Piece, Steps, cut, made_of
from sparing.curate.minhash import DuplicateSettings
from sparing.curate.parts import Stop, open_table, part_file, write_table
from sparing.curate.pipeline import QUARANTINE, WORK, Fate, Row, rows, shown, summary_of, vacant, write_rows
from sparing.curate.synth import FORMS
from sparing.curate.teachers import Asking, Kept, Teacher, teacher_of
from sparing.data.accounts import in_words
from sparing.data.files import find_files
from sparing.data.progress import Stopped
from sparing.data.sources import Tally, documents

KINDS = ("rewrite", "questions", "exercises")
BLOCK = 32
"""Pieces, or exercises, whose questions are put together. A budget is looked at between two blocks."""
LEAST_WORDS = 20
"""Of a piece: less is nothing to write about."""
PART_ROWS = 1024
SAME = DuplicateSettings(numbers=True)
"""Exercises that differ in their numbers are different ones."""
MAKES = {"rewrite": "train --data", "questions": "sft --data", "exercises": "grpo --task, or sft --data with --form chats"}


@dataclass(frozen=True)
class Wanted:
    """What to make of what."""

    kind: str
    """rewrite, questions or exercises; exercises:code for programs."""
    paths: Sequence[str]
    """Documents; of exercises: files of topics, one a line."""
    styles: Sequence[str] = ("encyclopedic",)
    """rewrite: of `rewrites.STYLES`; each piece is rewritten in each."""
    count: int | None = None
    """Of exercises."""
    votes: int = 3
    """How often each answer is asked for again; more than half must agree."""
    pairs: int = 3
    """Questions about a piece."""
    form: str = "task"
    """Of exercises: task or chats."""
    tokens: int = 1024
    """Of an answer, at most."""
    seed: int = 0
    against: Sequence[str] = ()
    """Evaluation texts, which nothing that is made may have 13 words in a row of."""
    budget: str | None = None
    """Tokens, asked and answered, or time."""
    text_key: str = "text"
    sort: str = field(init=False, default="")

    def __post_init__(self):
        name, colon, sort = self.kind.partition(":")
        if name not in KINDS or (colon and (name != "exercises" or sort not in posed.SORTS)):
            raise UserError(f"data synth {self.kind}: with --teacher choose {', '.join(KINDS)}, exercises:code")
        object.__setattr__(self, "kind", name)
        object.__setattr__(self, "sort", sort or "answer")
        if not self.paths:
            raise UserError(f"data synth {name} needs {'a file of topics, one a line' if name == 'exercises' else 'PATH: documents'}")
        if unknown := set(self.styles) - rewrites.STYLES.keys():
            raise UserError(f"--style {min(unknown)}: choose {', '.join(rewrites.STYLES)}")
        if (self.count is None) == (name == "exercises"):
            raise UserError(f"data synth {name}: --count is how many exercises to make" + (" and is needed" if self.count is None else ""))
        if self.form not in FORMS:
            raise UserError(f"--form {self.form}: choose {' or '.join(FORMS)}")
        least = 0 if name == "rewrite" else 1
        for option, value, low, high in (
            ("count", self.count if self.count is not None else 1, 1, 1 << 40), ("votes", self.votes, least, 99),
            ("pairs", self.pairs, 1, 99), ("answer-tokens", self.tokens, 16, 1 << 20),
        ):  # fmt: skip
            if not low <= value <= high:
                raise UserError(f"--{option} {value}: must be from {low} to {high}")
        self.limit()

    def limit(self) -> Budget | None:
        """Raises UserError for a budget that is neither tokens nor time."""
        budget = None if self.budget is None else parse_budget(self.budget)
        if budget is not None and budget.unit not in ("tok", "s"):
            raise UserError(f"--budget {self.budget}: what a teacher takes is limited in tokens or in time, as 500ktok or 20m")
        return budget

    def how(self) -> How:
        return How(Leaks(self.against), self.votes, self.pairs, self.tokens, self.form)


class Unit(NamedTuple):
    """One attempt: what makes it, and where it is from."""

    steps: Steps
    id: str
    prompt: str
    """Which kind of prompt the teacher gets."""
    source: str
    line: int
    meta: dict


def taught(wanted: Wanted, out: str, teacher: str | None, started: float | None = None) -> dict:
    """Make the folder `out` (see above).

    teacher: the URL of a server with OpenAI's interface (#MODEL behind it; $OPENAI_API_KEY is sent where it is set), or a run.
    -> {"documents": {"in", "out", "rejected", "quarantined"}, "bytes", "rejected", "quarantined", "languages", "licences", "teacher",
    "asked": {"questions", "earlier", "tokens_asked", "tokens_answered", "failed"}, "ended_by_budget", "stages", "seconds", "out"}.
    In are what the teacher made, and the pieces of which it made nothing. Raises UserError; CannotGoOn where the teacher does not answer
    any more, and Interrupted: then the same call goes on where it was.
    """
    if teacher is None:
        raise UserError(f"data synth {wanted.kind} needs --teacher: a URL such as http://127.0.0.1:8000/v1#MODEL, or a run")
    how = wanted.how()
    find_files(wanted.paths)
    if wanted.sort == "code":
        posed.can_run()
    folder = vacant(out)
    with (
        leaving_nothing(folder),
        folder_lock(folder),
        metered("data", RunFolder(folder), started=started) as meter,
        Preempt("the same command goes on") as signals,
    ):
        with meter.stage("load"):
            asked_of = teacher_of(teacher)
        try:
            summary, fate = _made(wanted, how, folder, asked_of, meter, lambda: signals.requested)
        except Stopped:
            raise Interrupted(signals.message) from None
        finally:
            asked_of.close()
        complete(folder, Path(out).name, summary, fate, meter)
    asked = summary["asked"]
    say(
        f"{asked['questions']:,} questions to {asked_of.facts['teacher']}: {asked['tokens_asked']:,} tokens asked, "
        f"{asked['tokens_answered']:,} answered" + (f"; {asked['earlier']:,} were answered before" if asked["earlier"] else "")
    )
    say(in_words(summary["documents"]) + f"; for `{MAKES[wanted.kind]}`")
    return summary | {"out": out}


def _made(wanted: Wanted, how: How, folder: Path, teacher: Teacher, meter: Meter, should_stop: Stop) -> tuple[dict, Fate]:
    work = folder / WORK
    asking = Asking(teacher, Kept(work / "answers.jsonl"), wanted.seed, meter, wanted.limit(), should_stop)
    with meter.stage("ask"), open(work / QUARANTINE, "w", encoding="utf-8") as quarantine:
        tally = Tally(quarantine)
        parts = _Parts(work, wanted, teacher)
        units = _units(wanted, how, tally)
        while not (ended := asking.spent()) and (block := list(islice(units, BLOCK))):
            for unit, made in zip(block, made_of([unit.steps for unit in block], asking), strict=True):
                parts.add(unit, made)
        parts.flush()
        if ended and next(units, None) is None:
            ended = False
        if ended:
            say(f"--budget {wanted.budget} is used up: what comes after is left out")
    with meter.stage("duplicates"):
        shutil.rmtree(work / "duplicates", ignore_errors=True)  # of an attempt that got less far
        decisions = find_duplicates(partial(_unrejected, parts.files), work / "duplicates", SAME, 1, should_stop)
    with meter.stage("write"):
        fate = write_rows(folder, rows(parts.files, None, None, decisions), should_stop, line_of=_line_of)
    more = {
        "teacher": teacher.facts, "ended_by_budget": ended,
        "asked": {
            "questions": asking.questions, "earlier": asking.earlier, "tokens_asked": asking.asked, "tokens_answered": asking.answered,
            "failed": asking.failed,
        },
    }  # fmt: skip
    return summary_of(fate, tally, parts.count) | more, fate


def _units(wanted: Wanted, how: How, reject) -> Iterator[Unit]:
    """All attempts, in the order of the input."""
    if wanted.kind == "exercises":
        topics = _topics(wanted.paths)
        maker = posed.program if wanted.sort == "code" else posed.exercise
        prompt = "exercises:code" if wanted.sort == "code" else "exercises"
        for number in range(wanted.count or 0):
            topic, source, line = topics[number % len(topics)]
            number_of_topic = number // len(topics) + 1
            about = {"topic": topic, "number": str(number_of_topic)}
            steps = maker(topic, number_of_topic, how)
            yield Unit(steps, f"{prompt} seed {wanted.seed} {source}:{line} number {number_of_topic}", prompt, source, line, about)
        return
    module = rewrites if wanted.kind == "rewrite" else questions
    for piece in cut(documents(find_files(wanted.paths), wanted.text_key, reject), module.PIECE_BYTES):
        at = f"{shown(piece.source)}:{piece.line} part {piece.part}"
        meta = {("source_id" if name == "id" else name): value for name, value in piece.meta.items()} | {"source_part": str(piece.part)}
        for style in dict.fromkeys(wanted.styles) if wanted.kind == "rewrite" else [""]:
            prompt = f"{wanted.kind} {style}".strip()
            if len(piece.text.split()) < LEAST_WORDS:
                steps = _too_short(piece)
            else:
                steps = rewrites.rewrite(piece, style, how) if style else questions.questions(piece, how)
            yield Unit(steps, f"{prompt} seed {wanted.seed} {at}", prompt, shown(piece.source), piece.line, meta)


def _too_short(piece: Piece) -> Steps:
    return [Made(piece.text, rejected=f"length: fewer than {LEAST_WORDS} words to write about")]
    yield


def _topics(paths: Sequence[str]) -> list[tuple[str, str, int]]:
    """(topic, file, line), each topic once. Raises UserError where there are none."""
    found: dict[str, tuple[str, str, int]] = {}
    for path in paths:
        for number, line in enumerate(read_text(path).splitlines(), 1):
            if topic := " ".join(line.split())[:500]:
                found.setdefault(topic, (topic, path, number))
    if not found:
        raise UserError(f"no topics in {', '.join(paths)}: write one a line")
    return list(found.values())


class _Parts:
    """What is made, in files of some rows each."""

    def __init__(self, work: Path, wanted: Wanted, teacher: Teacher):
        self.work, self.wanted, self.facts = work, wanted, teacher.facts
        self.files: list[Path] = []
        self.count = 0
        self._rows: list[dict] = []

    def add(self, unit: Unit, made: Iterable[Made]) -> None:
        for number, one in enumerate(made, 1):
            about = {"made_by": "sparing data synth", "prompt": unit.prompt, **self.facts, "seed": str(self.wanted.seed), **unit.meta}
            if one.checks:
                about["checks"] = ", ".join((*one.checks, "duplicates"))
            known = {name: unit.meta[name] for name in ("language", "licence") if name in unit.meta}
            meta = {"value": one.value, "place": [unit.source, unit.line], "metadata": about, **known}
            self._rows.append(
                {
                    "text": one.text, "source": unit.id, "line": number, "meta": json.dumps(meta, ensure_ascii=False),
                    "attributes": json.dumps(one.scores), "rejected": one.rejected or None, "bytes": len(one.text.encode()),
                    "edited": False,
                }
            )  # fmt: skip
            self.count += 1
            if len(self._rows) >= PART_ROWS:
                self.flush()

    def flush(self) -> None:
        if self._rows or not self.files:
            path = part_file(self.work, "made", len(self.files))
            write_table(path, pa.RecordBatch.from_pylist(self._rows, SCHEMA), "")
            self.files.append(path)
            self._rows = []


SCHEMA = pa.schema(
    [
        ("text", pa.large_string()), ("source", pa.large_string()), ("line", pa.int64()), ("meta", pa.large_string()),
        ("attributes", pa.large_string()), ("rejected", pa.large_string()), ("bytes", pa.int64()), ("edited", pa.bool_()),
    ]
)  # fmt: skip


def _unrejected(files: list[Path]) -> Iterator[pa.RecordBatch]:
    for path in files:
        with open_table(path) as batch:
            yield batch.filter(pc.is_null(batch.column("rejected"))).select(["text", "source", "line"])


def _line_of(row: Row) -> dict:
    """A line with what was made, and where it is from. A document that has been rejected has its text too, whatever its form."""
    (source, line), value = row.meta["place"], row.meta["value"]
    text = {"text": row.text} if row.reason else {}
    return {"id": row.id, **text, **value, "source": source, "line": line, "metadata": row.meta["metadata"]}
