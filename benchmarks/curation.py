"""Curation beside datatrove's, on the same documents. What is in --out is not done again, so a killed command goes on.

python -m benchmarks.curation decisions --data PATH... --out FOLDER
python -m benchmarks.curation speed     --data PATH... --out FOLDER [--megabytes 1000]
python -m benchmarks.curation web       --data PATH... --out FOLDER [--pages 2000]

`decisions` asks datatrove's Gopher, C4 and FineWeb filters and ours about the same real and mangled documents, each filter apart. `speed`
(`curation_speed.py`) takes the time of all rules and near-duplicates per core, `web` (`web_text.py`) that of text from WARC files, and what
of it is the page's own. They need `pip install 'sparing[bench,web,curate]'`, which brings datatrove, spaCy and warcio.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tyro

from sparing.base.files import write_atomic
from sparing.base.messages import say
from sparing.bench.results import stored_result
from sparing.curate.contamination import all_text
from sparing.curate.document import Document
from sparing.curate.filters import C4, FineWeb, GopherQuality, GopherRepetition
from sparing.data.files import find_files, kind_of
from sparing.data.sources import JSON, PARQUET, documents, rows

SLICE = 250
"""Documents whose decisions are one file of --out."""
REASONS = {
    "gopher_short_doc": "min_words", "gopher_long_doc": "max_words", "gopher_below_avg_threshold": "min_mean_word_length",
    "gopher_above_avg_threshold": "max_mean_word_length", "gopher_too_many_hashes": "max_hashes",
    "gopher_too_many_ellipsis": "max_ellipses",
    "gopher_too_many_bullets": "max_bullet_lines", "gopher_too_many_end_ellipsis": "max_ellipsis_lines",
    "gopher_below_alpha_threshold": "min_words_with_letter", "gopher_enough_stop_words": "min_stop_words",
    "dup_para_frac": "dup_paragraph_fraction", "dup_para_char_frac": "dup_paragraph_chars", "dup_line_frac": "dup_line_fraction",
    "dup_line_char_frac": "dup_line_chars", **{f"top_{n}_gram": f"top_{n}_gram" for n in (2, 3, 4)},
    **{f"duplicated_{n}_n_grams": f"dup_{n}_gram" for n in range(5, 11)}, "lorem_ipsum": "lorem_ipsum", "curly_bracket": "curly_bracket",
    "too_few_sentences": "min_sentences", "empty": "min_ended_lines", "line_punct_ratio": "min_ended_lines",
    "short_line_ratio": "max_short_lines", "char_dup_ratio": "max_dup_line_chars", "list_ratio": "max_line_ends",
}  # fmt: skip
"""datatrove's reasons in our words."""


def _share(change: Callable[[str, random.Random], str]) -> Callable[[str, random.Random], str]:
    """A mangling that changes a random share of the lines."""

    def mangle(text: str, dice: random.Random) -> str:
        share = dice.random()
        return "\n".join(change(line, dice) if dice.random() < share else line for line in text.split("\n"))

    return mangle


def _words(change: Callable[[str], str], most: float = 1.0) -> Callable[[str, random.Random], str]:
    """A mangling that changes a random share of the words, at most `most`."""

    def mangle(text: str, dice: random.Random) -> str:
        share = dice.random() * most
        return " ".join(change(word) if dice.random() < share else word for word in text.split(" "))

    return mangle


def _repeat(separator: str, most: int) -> Callable[[str, random.Random], str]:
    """A mangling that repeats some parts of a text at random places."""

    def mangle(text: str, dice: random.Random) -> str:
        parts = text.split(separator)
        for _ in range(dice.randint(1, max(1, len(parts) * most // 100))):
            parts.insert(dice.randrange(len(parts)), dice.choice(parts))
        return separator.join(parts)

    return mangle


def _phrase(text: str, dice: random.Random) -> str:
    words = text.split(" ")
    phrase = words[: dice.randint(2, 12)]
    for _ in range(dice.randint(1, 1 + len(words) // 12)):
        at = dice.randrange(len(words))
        words[at:at] = phrase
    return " ".join(words)


def _shuffled(text: str, dice: random.Random) -> str:
    words = text.split(" ")
    dice.shuffle(words)
    return " ".join(words)


def _short_lines(text: str, dice: random.Random) -> str:
    words, size = text.split(), dice.randint(1, 9)
    return "\n".join(" ".join(words[at : at + size]) for at in range(0, len(words), size))


def _begins(text: str, dice: random.Random) -> str:
    return " ".join(text.split(" ")[: dice.randint(20, 80)])


MANGLINGS: dict[str, Callable[[str, random.Random], str]] = {
    "as it is": lambda text, dice: text,
    "lines repeated": _repeat("\n", 60),
    "paragraphs repeated": _repeat("\n\n", 60),
    "a phrase repeated": _phrase,
    "punctuation stripped": _share(lambda line, dice: line.rstrip(".?!\"' ")),
    "words shuffled": _shuffled,
    "javascript lines": _share(lambda line, dice: "Please enable JavaScript in your browser."),
    "cookie lines": _share(lambda line, dice: line + " This site uses cookies."),
    "lorem ipsum": lambda text, dice: text + dice.choice(["\n", " "]) + "Lorem ipsum dolor sit amet" + dice.choice([".", ""]),
    "curly brackets": lambda text, dice: text.replace(" ", " { ", 1),
    "bullets": _share(lambda line, dice: dice.choice(["- ", "• ", "  -"]) + line),
    "ellipses": _share(lambda line, dice: line + dice.choice(["...", "…", " ... "])),
    "all capitals": lambda text, dice: text.upper(),
    "hash marks": _words(lambda word: f"#{word}", 0.3),
    "symbols": _words(lambda word: f"{word} ~ | %", 0.5),
    "digits": _words(lambda word: "1234", 0.5),
    "no stop words": _words(lambda word: "" if word.lower() in {"the", "be", "to", "of", "and", "that", "have", "with"} else word, 1.2),
    "short words": _words(lambda word: word[:2], 1.2),
    "long words": lambda text, dice: text.replace(" ", "", int(text.count(" ") * dice.random())),
    "one endless word": lambda text, dice: text + "\n" + "x" * dice.randint(900, 1100) + " and so on.",
    "short lines": _short_lines,
    "one line": lambda text, dice: " ".join(text.split("\n")),
    "the beginning": _begins,
    "citations": _words(lambda word: f"{word}[12]", 0.2),
    "curly quotes": lambda text, dice: text.replace("'", "’").replace(' "', " “").replace('"', "”"),
    "control characters and icons": _words(lambda word: f"{word}\x0b☃\u2028é́", 0.1),
}


@dataclass
class Decisions:
    """Ask datatrove's filters and ours about the same documents."""

    data: tuple[str, ...]
    """Files and folders of text; of JSON, all text of a row is a document."""
    out: str
    """Folder for decisions and the result."""
    count: int = 6000
    """Documents, real and mangled ones together."""
    seconds: float = 3600.0
    """No new slice begins after this time; the same command goes on."""

    def __call__(self) -> dict:
        """{"documents", "filters": {name: {"equal": share, "reasons_equal": share, "differences": [...]}}}, also in OUT/decisions.json."""
        folder, begun, parts = Path(self.out) / "decisions", time.monotonic(), []
        folder.mkdir(parents=True, exist_ok=True)
        texts = islice(mangled(self.data), self.count)
        for index, first in enumerate(range(0, self.count, SLICE)):
            file, some = folder / f"{index:04d}.json", list(islice(texts, SLICE))
            if not some:
                break
            if not file.exists() and time.monotonic() - begun > self.seconds:
                say(f"stopped at document {first}; the same command goes on")
                break
            parts += stored_result(file, lambda some=some: [compare(*one) for one in some])
        result = summary(parts)
        write_atomic(Path(self.out) / "decisions.json", json.dumps(result, indent=1, ensure_ascii=False))
        return result

    @staticmethod
    def told(result: dict) -> None:
        for name, row in result["filters"].items():
            equal, reasons, rejected = (row[key] for key in ("equal", "reasons_equal", "rejected_by_theirs"))
            say(f"{name}: {equal:.2%} decisions equal, {reasons:.2%} of reasons, {rejected:.0%} rejected")
            for kind in row["differences"]:
                example = kind["example"]
                say(f"  {kind['count']} × theirs {kind['theirs']}, ours {kind['ours']}: {example['place']} ({example['mangling']}), "
                    f"words {example['words']}, {example['scores']}")  # fmt: skip


def mangled(paths: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    """(where it is from, mangling, text), always in the same order."""
    for index, (place, text) in enumerate(pieces_in_turn(paths)):
        # every other document is as it is
        name = "as it is" if index % 2 else list(MANGLINGS)[index // 2 % len(MANGLINGS)]
        if (text := MANGLINGS[name](text, random.Random(index))).strip():
            yield place, name, text


def pieces_in_turn(paths: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(place, text) of documents: one from each path in turn, so that any number of them is a mixture."""
    sources = [_pieces(path) for path in paths]
    while sources:
        for source in list(sources):
            if (piece := next(source, None)) is None:
                sources.remove(source)
            else:
                yield piece


def _pieces(path: str) -> Iterator[tuple[str, str]]:
    """(place, text) of the documents in a file or folder, long ones cut into parts of 200 to 6,000 characters at line ends."""
    dice = random.Random(0)
    for file in find_files([path]):
        if kind_of(file.path) in (*JSON, *PARQUET):
            found = ((all_text(row.value), row.source, row.line) for row in rows([file]))
        else:
            found = documents([file])
        for text, source, line, *_ in found:
            at = 0
            while at < len(text):
                end = at + int(200 * 30 ** dice.random())
                end = text.find("\n", end) + 1 or len(text)
                if text[at:end].strip():
                    yield f"{Path(source).name}:{line}+{at}", text[at:end]
                at = end


def compare(place: str, mangling: str, text: str) -> dict:
    """Both sides' decisions: {"place", "mangling", "chars", "filters": {name: [theirs, ours]}}, None where a document is kept; scores and
    the number of words on both sides where they differ, and whether C4's texts differ."""
    theirs, split_into_words = _datatrove()
    decisions, more = {}, {}
    for rule in (GopherQuality(), GopherRepetition(), C4(), FineWeb()):
        from datatrove.data import Document as TheirDocument

        their_document, our_document = TheirDocument(text=text, id=place), Document(text)
        answer = theirs[rule.name].filter(their_document)
        reason = None if answer is True else REASONS.get(answer[1], answer[1])
        scores = rule.scores(our_document)
        mine = rule.verdict(scores)
        decisions[rule.name] = [reason, mine and mine.partition(": ")[2]]
        if rule.name == "c4" and reason is None and mine is None:
            more["c4_text_equal"] = their_document.text == rule.edit(our_document).text
        if reason != decisions[rule.name][1]:
            more.setdefault("scores", {})[rule.name] = scores
            more |= {"words": [len(split_into_words(text)), len(our_document.words)], "text": text[:300]}
    return {"place": place, "mangling": mangling, "chars": len(text), "filters": decisions} | more


def _datatrove() -> tuple[dict, Callable]:
    """(datatrove's filters by our names, its function that splits words)."""
    if not _FILTERS:
        from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
        from datatrove.utils.text import split_into_words

        _FILTERS.update(
            gopher_quality=GopherQualityFilter(),
            gopher_repetition=GopherRepetitionFilter(),
            c4=C4QualityFilter(),
            fineweb=FineWebQualityFilter(),
            split=split_into_words,
        )
    return _FILTERS, _FILTERS["split"]


_FILTERS: dict = {}


def summary(parts: list[dict]) -> dict:
    """Shares of equal decisions (kept or not) and equal reasons, and each kind of difference with how often it occurs and an example."""
    filters = {}
    for name in parts[0]["filters"] if parts else ():
        pairs = [tuple(part["filters"][name]) for part in parts]
        kinds = Counter(pair for pair in pairs if pair[0] != pair[1])
        examples = {pair: part for pair, part in zip(reversed(pairs), reversed(parts), strict=True) if pair in kinds}
        filters[name] = {
            "equal": sum((theirs is None) == (ours is None) for theirs, ours in pairs) / len(pairs),
            "reasons_equal": sum(theirs == ours for theirs, ours in pairs) / len(pairs),
            "rejected_by_theirs": sum(theirs is not None for theirs, _ in pairs) / len(pairs),
            "differences": [
                {"theirs": pair[0], "ours": pair[1], "count": count, "example": _example(examples[pair], name)}
                for pair, count in kinds.most_common()
            ],
        }
    texts = [part["c4_text_equal"] for part in parts if "c4_text_equal" in part]
    if texts:
        filters["c4"]["texts_equal"] = sum(texts) / len(texts)
    return {
        "documents": len(parts),
        "chars": sum(part["chars"] for part in parts),
        "mangled": sum(part["mangling"] != "as it is" for part in parts),
        "filters": filters,
    }


def _example(part: dict, name: str) -> dict:
    return {key: part.get(key) for key in ("place", "mangling", "words", "text")} | {"scores": part["scores"][name]}


def main() -> None:
    from benchmarks.curation_speed import Speed
    from benchmarks.web_text import Web

    way = tyro.extras.subcommand_cli_from_dict({"decisions": Decisions, "speed": Speed, "web": Web}, prog="python -m benchmarks.curation")
    result = way()
    way.told(result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
