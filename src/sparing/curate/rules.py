"""The rules that a corpus is judged by, in order, and the stage that applies them to a batch of documents.

A batch is an Arrow record batch with the columns `text`, `source`, `line` and `meta`. `judge` is a pure function of one document at a
time: neither the cut into batches nor the number of processes changes what it says.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_type_hints

from sparing.base.config import UserError
from sparing.base.config_file import check_section, unwrap
from sparing.base.files import read_text
from sparing.curate.contamination import Contamination
from sparing.curate.document import Document
from sparing.curate.encoding import Encoding
from sparing.curate.filters import C4, FineWeb, GopherQuality, GopherRepetition, Rule
from sparing.curate.language import Language
from sparing.curate.lists import UrlList, WordList
from sparing.curate.pii import PII
from sparing.curate.quality import Quality

if TYPE_CHECKING:
    import pyarrow

LINE_END = re.compile(r"\r\n?")


@dataclass(frozen=True)
class Rules:
    """The chosen rules; those that are None are left out. They are applied in the order of the fields, which is FineWeb's. It repairs
    text at the end, though; here that comes first, so that all rules see it."""

    encoding: Encoding | None = None
    url_list: UrlList | None = None
    word_list: WordList | None = None
    language: Language | None = None
    gopher_repetition: GopherRepetition | None = None
    gopher_quality: GopherQuality | None = None
    c4: C4 | None = None
    fineweb: FineWeb | None = None
    quality: Quality | None = None
    contamination: Contamination | None = None
    pii: PII | None = None
    all_scores: bool = True
    """False: nothing is computed of a document after the first rule that rejects it. That is faster, but then `verdicts` knows only what
    was computed, and texts are edited only up to that rule."""

    @classmethod
    def default(cls) -> Rules:
        """FineWeb's rules: those that need no list, model or text of the user's, with the published thresholds."""
        return cls(
            encoding=Encoding(),
            language=Language(),
            gopher_repetition=GopherRepetition(),
            gopher_quality=GopherQuality(),
            c4=C4(line_end=False),  # as FineWeb's: datatrove, examples/fineweb.py
            fineweb=FineWeb(),
            pii=PII(),
        )

    @classmethod
    def from_toml(cls, path: str | Path) -> Rules:
        """The default rules as a file changes them.

        A section is a rule and sets its fields: `[gopher_quality]`, `min_words = 20`. `gopher_quality = "none"` leaves a rule out, a field
        that is "none" a threshold. Rules that the default lacks are added by their sections.

        Raises:
            UserError: unreadable, not TOML, an unknown key, a value of the wrong type.
        """
        try:
            values = tomllib.loads(read_text(path))
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{path}: not valid TOML: {error}") from None
        return cls.from_values(values, path)

    @classmethod
    def from_values(cls, values: dict, path: str | Path) -> Rules:
        """What a file at `path` holds, read already; as `from_toml`."""
        checked, rules, hints = check_section(values, cls, f"{path}: "), cls.default(), get_type_hints(cls)
        for name, value in checked.items():
            if isinstance(value, dict):
                _refuse_negative(value, f"{path}: {name}")
                standing, kind = getattr(rules, name), unwrap(hints[name])[0]
                checked[name] = replace(standing, **value) if standing is not None else kind(**value)
        return replace(rules, **checked)

    def load(self) -> Rules:
        """These rules, after everything that they need has been read: lists, models, evaluation texts, packages.

        Without it, each process reads them when its first document asks for them. Raises UserError for what cannot be read.
        """
        for rule in self:
            if load := getattr(rule, "load", None):
                load()
        return self

    def files(self) -> list[str]:
        """What the rules read besides documents: lists, models, evaluation texts."""
        return [path for rule in self if (named := getattr(rule, "files", None)) for path in named()]

    def __iter__(self) -> Iterator[Rule]:
        """The chosen rules, in order."""
        return (rule for field in fields(self) if is_dataclass(rule := getattr(self, field.name)))


def _refuse_negative(values: dict, where: str) -> None:
    for key, value in values.items():
        if isinstance(value, int | float) and value < 0:
            raise UserError(f'{where}.{key} must be at least 0, not {value}; "none" leaves it out')


def judge_document(document: Document, rules: Rules) -> tuple[Document, dict[str, dict[str, float]], str | None]:
    """(the document as the rules edit it, scores by the rule's name, why it is rejected or None).

    Each rule sees the text as the rules before it left it, whether or not one of them rejects it. Line ends become "\\n" before that: to
    the published filters, which were made for extracted pages, "\\r" is a line of its own that repeats.
    """
    document = document.edited(LINE_END.sub("\n", document.text))
    attributes: dict[str, dict[str, float]] = {}
    rejected = None
    for rule in rules:
        attributes[rule.name] = scores = rule.scores(document)
        rejected = rejected or rule.verdict(scores)
        if rejected and not rules.all_scores:
            break
        if edit := getattr(rule, "edit", None):
            document = edit(document)
    return document, attributes, rejected


def judge(batch: pyarrow.RecordBatch, rules: Rules) -> pyarrow.RecordBatch:
    """The same rows, with `text` edited and two columns more.

    `attributes` (JSON text): scores by rule, {"gopher_quality": {"words": 512, ...}, ...}, as Dolma keeps them beside documents. `rejected`
    (text): why the document is rejected; null where it is kept. Both are replaced where the batch has them already.
    """
    import pyarrow

    texts, attributes, verdicts_ = [], [], []
    metas = batch.column("meta").to_pylist() if "meta" in batch.schema.names else [None] * batch.num_rows
    for text, meta in zip(batch.column("text").to_pylist(), metas, strict=True):
        document, scores, rejected = judge_document(Document(text, meta), rules)
        texts.append(document.text)
        attributes.append(json.dumps(scores, separators=(",", ":")))
        verdicts_.append(rejected)
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    columns |= {name: pyarrow.array(values, pyarrow.string()) for name, values in (("text", texts), ("attributes", attributes))}
    columns["rejected"] = pyarrow.array(verdicts_, pyarrow.string())
    return pyarrow.RecordBatch.from_pydict(columns)


def verdicts(attributes: str, rules: Rules) -> str | None:
    """What `judge` says of a document whose `attributes` it wrote: why it is rejected, or None. The text is not read again.

    So thresholds can move. Rules that the attributes lack are not applied, and fields that scores depend on (they say so) change nothing.
    """
    scores = json.loads(attributes)
    return next((reason for rule in rules if rule.name in scores and (reason := rule.verdict(scores[rule.name]))), None)
