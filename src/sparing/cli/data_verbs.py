"""The ways of the verb `data`: each a dataclass of its own options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    import tyro  # `arguments.parse` imports it for the chosen way

    from sparing.cli.arguments import Call
    from sparing.curate.select import Selection


@dataclass
class _Corpus:
    """What all ways have that read a corpus."""

    paths: tyro.conf.Positional[list[str]] = field(default_factory=list)
    """Files, folders and globs, as for `train --data`."""
    out: str | None = None
    """The folder to make: documents/, attributes/, rejected/, quarantine.jsonl, card.html. `train --data` takes it as it is."""
    text_key: str = "text"
    """JSONL and Parquet: the field that holds the text."""
    workers: int | None = None
    """Processes; default: one a core."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""

    def _data(self, call: Call, way: str, rules: str | None = None, selection: Selection | None = None) -> dict:
        from sparing.curate.entry import data

        return data(way, self.paths, self.out, rules, self.text_key, self.workers, call.started, selection)


@dataclass
class _Ruled(_Corpus):
    rules: str | None = None
    """TOML file that changes the rules (docs/data.md)."""


@dataclass
class Stats(_Ruled):
    """Say what `data curate` would do; no texts are written. Interrupted, the same command goes on."""

    def __call__(self, call: Call) -> dict:
        call.need(PATH=self.paths, out=self.out)
        return self._data(call, "stats", self.rules)


@dataclass
class Curate(_Ruled):
    """Judge documents by rules and take duplicates out. Interrupted, the same command goes on."""

    def __call__(self, call: Call) -> dict:
        call.need(PATH=self.paths, out=self.out)
        return self._data(call, "curate", self.rules)


@dataclass
class Dedup(_Ruled):
    """Take duplicates out. Interrupted, the same command goes on."""

    def __call__(self, call: Call) -> dict:
        call.need(PATH=self.paths, out=self.out)
        return self._data(call, "dedup", self.rules)


@dataclass
class Select(_Corpus):
    """Keep the documents of a pool that are most like a sample. Interrupted, the same command goes on."""

    for_: Annotated[list[str], tyro.conf.arg(name="for")] = field(default_factory=list)
    """A sample of what you care about, some hundred kilobytes of text; read as PATH is."""
    budget: str | None = None
    """How much to keep: 2Mtok, 20MB, or 10% of the pool."""
    by: str = "quality"
    """quality (a model that tells the sample from the pool), overlap (of words and pairs of words), loss, random."""
    model: str | None = None
    """--by loss: a run; what it finds hardest beside --reference stays, and --for is not needed."""
    reference: str | None = None
    """--by loss: a run, or imported model, that is good at what you care about."""
    tokenizer: str | None = None
    """A run, or its tokenizer.json, to count tokens with; default: 4 bytes are a token."""

    def __call__(self, call: Call) -> dict:
        call.need(PATH=self.paths, budget=self.budget, out=self.out)
        from sparing.curate.select import Selection

        selection = Selection(self.budget, tuple(self.for_), self.by, self.tokenizer, self.model, self.reference)
        return self._data(call, "select", selection=selection)


@dataclass
class Synth:
    """Make exercises that a program can judge, for `grpo` and `sft`."""

    kinds: tyro.conf.Positional[list[str]] = field(default_factory=list)
    """KIND or KIND:DIFFICULTY: words, countdown, puzzles, programs; 1 to 5, default: all in turn."""
    count: int | None = None
    """Exercises, in all."""
    out: str | None = None
    """A file of JSON lines, or a folder with one for each kind."""
    seed: int = 0
    """Another one makes other exercises."""
    form: str = "task"
    """task, for `grpo --task`; chats, with worked answers, for `sft --data`."""
    against: list[str] = field(default_factory=list)
    """Files of evaluation texts; an exercise goes that has half of its runs of 13 words from them."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""

    def __call__(self, call: Call) -> dict:
        call.need(KIND=self.kinds, count=self.count, out=self.out)
        from sparing.curate.synth import synth

        return synth(self.kinds, self.count, self.out, self.seed, self.form, self.against, call.started)


WAYS = {"stats": Stats, "curate": Curate, "dedup": Dedup, "select": Select, "synth": Synth}
