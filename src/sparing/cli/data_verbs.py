"""The ways of the verb `data`: each a dataclass of its own options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from sparing.base.config import UserError

if TYPE_CHECKING:
    import tyro  # `arguments.parse` imports it for the chosen way

    from sparing.cli.arguments import Call


@dataclass
class _Corpus:
    """What all ways have that read a corpus."""

    paths: tyro.conf.Positional[list[str]] = field(default_factory=list)
    """Files, folders and globs, as for `train --data`."""
    out: str | None = None
    """The folder to make: documents/, attributes/, rejected/, quarantine.jsonl, card.html. `train --data` takes it as it is."""
    text_key: str = "text"
    """JSONL and Parquet: the field that holds the text."""
    extract: str = "resiliparse"
    """What takes the text out of web pages: resiliparse or trafilatura."""
    workers: int | None = None
    """Processes; default: one a core."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""

    way: ClassVar[str]

    def _data(self, call: Call, **more: Any) -> dict:
        from sparing.curate.entry import data

        how = {"text_key": self.text_key, "extract": self.extract, "workers": self.workers}
        return data(self.way, self.paths, self.out, **how, **more, started=call.started)


@dataclass
class _Ruled(_Corpus):
    rules: str | None = None
    """TOML file that changes the rules (docs/data.md)."""
    engine: str = "local"
    """local, or ray: Ray Data judges and signs the documents, on the cluster that $RAY_ADDRESS names or on one of --workers processes that
    is started here. The result has the same bytes."""

    def __call__(self, call: Call) -> dict:
        call.need(PATH=self.paths, out=self.out)
        return self._data(call, rules=self.rules, engine=self.engine)


@dataclass
class Stats(_Ruled):
    """Say what `data curate` would do; no texts are written. Interrupted, the same command goes on."""

    way: ClassVar[str] = "stats"


@dataclass
class Curate(_Ruled):
    """Judge documents by rules and take duplicates out. Interrupted, the same command goes on."""

    way: ClassVar[str] = "curate"


@dataclass
class Dedup(_Ruled):
    """Take duplicates out. Interrupted, the same command goes on."""

    way: ClassVar[str] = "dedup"


@dataclass
class Select(_Corpus):
    """Keep the documents of a pool that are most like a sample. Interrupted, the same command goes on."""

    way: ClassVar[str] = "select"
    for_: Annotated[list[str], tyro.conf.arg(name="for")] = field(default_factory=list)
    """A sample of what you care about, some hundred kilobytes of text; read as PATH is."""
    budget: str | None = None
    """How much to keep: 2Mtok, 20MB, or 10% of the pool."""
    by: str = "quality"
    """quality (a model that tells the sample from the pool), overlap (of words and pairs of words), loss, random; mixture: shares of each
    PATH, by small models that are trained on some."""
    model: str | None = None
    """--by loss: a run; what it finds hardest beside --reference stays, and --for is not needed."""
    reference: str | None = None
    """--by loss: a run, or imported model, that is good at what you care about."""
    tokenizer: str | None = None
    """A run, or its tokenizer.json, to count tokens with; default: 4 bytes are a token."""
    proxies: int | None = None
    """--by mixture: how many small models find the shares of each PATH, in seconds each; default: four a PATH, eight or more."""

    def __call__(self, call: Call) -> dict:
        call.need(PATH=self.paths, budget=self.budget, out=self.out)
        from sparing.curate.select import Selection

        selection = Selection(self.budget, tuple(self.for_), self.by, self.tokenizer, self.model, self.reference, self.proxies)
        return self._data(call, selection=selection)


TAUGHT = ("rewrite", "questions", "exercises")
"""What `data synth` asks a teacher for."""


@dataclass
class Synth:
    """Make exercises that a program can judge, for `grpo` and `sft`; or with a teacher documents in other words, questions about them, and
    exercises on topics. With a teacher the same command goes on where it was interrupted."""

    kinds: tyro.conf.Positional[list[str]] = field(default_factory=list)
    """KIND or KIND:DIFFICULTY: words, countdown, puzzles, programs; 1 to 5, default: all in turn. With --teacher: rewrite PATH...,
    questions PATH..., exercises TOPICS or exercises:code TOPICS (a file, a topic a line)."""
    count: int | None = None
    """Exercises, in all."""
    out: str | None = None
    """A file of JSON lines, or a folder with one for each kind; with a teacher a folder as of `data curate`."""
    seed: int = 0
    """Another one makes other exercises."""
    form: str = "task"
    """task, for `grpo --task`; chats, with worked answers, for `sft --data`."""
    against: list[str] = field(default_factory=list)
    """Files of evaluation texts; an exercise goes that has half of its runs of 13 words from them, with a teacher one run."""
    teacher: str | None = None
    """Who is asked: the URL of OpenAI's interface, such as http://127.0.0.1:8000/v1#MODEL ($OPENAI_API_KEY is sent where it is set), or a
    run."""
    budget: str | None = None
    """With a teacher: 500ktok, asked and answered, or 20m."""
    style: list[str] = field(default_factory=lambda: ["encyclopedic"])
    """rewrite: plain, encyclopedic, dialogue; each piece of text is rewritten in each."""
    votes: int = 3
    """With a teacher: how often each answer is asked for again; more than half must agree. 0: none, for rewrite alone."""
    pairs: int = 3
    """questions: about each 4 kB of text."""
    answer_tokens: int = 1024
    """With a teacher: of one answer, at most."""
    text_key: str = "text"
    """rewrite, questions: the field of JSONL and Parquet that holds the text."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""

    def __call__(self, call: Call) -> dict:
        call.need(KIND=self.kinds, out=self.out)
        if self.teacher is not None or self.kinds[0].partition(":")[0] in TAUGHT:
            from sparing.curate.taught import Wanted, taught

            wanted = Wanted(
                self.kinds[0], self.kinds[1:], self.style, self.count, self.votes, self.pairs, self.form, self.answer_tokens, self.seed,
                self.against, self.budget, self.text_key,
            )  # fmt: skip
            return taught(wanted, self.out, self.teacher, call.started)
        of_teacher = ("budget", "style", "votes", "pairs", "answer_tokens", "text_key")
        if given := [name for name in of_teacher if getattr(self, name) != getattr(Synth(), name)]:
            raise UserError(f"--{given[0].replace('_', '-')} goes with `data synth rewrite|questions|exercises`, which ask a --teacher")
        call.need(count=self.count)
        from sparing.curate.synth import synth

        return synth(self.kinds, self.count, self.out, self.seed, self.form, self.against, call.started)


WAYS = {"stats": Stats, "curate": Curate, "dedup": Dedup, "select": Select, "synth": Synth}
