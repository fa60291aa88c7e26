"""Which texts a run is trained on. A run is bound to them by content: state/corpus.json has their fingerprint, wherever their files are.

A run also keeps the tokenizer that it began with, even when it goes on with other texts.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from sparing.account.receipt import read_state
from sparing.base.config import ChatsConfig, Config, DataConfig, UserError
from sparing.base.config_file import Wishes
from sparing.base.files import write_atomic
from sparing.base.messages import say
from sparing.base.run import RunFolder
from sparing.data.chats import ChatFacts, scan_chats
from sparing.data.files import absolute
from sparing.data.progress import Bars
from sparing.data.scan import CorpusFacts, scan
from sparing.planning.start import corpora, texts_of
from sparing.resolve import MARGIN


class Facts(Protocol):
    """What is bound to a run of what it learns from."""

    @property
    def documents(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def content(self) -> str:
        """Changes when what is learnt from does."""
        ...


def with_absolute_paths(wishes: Wishes) -> Wishes:
    """Wishes that name the same texts, the same tokenizer and the same start from any working folder."""
    tokenizer, start = (wishes.value(name) for name in ("data.tokenizer", "start.run"))
    for name in ("paths", "sample"):
        if named := wishes.value(f"data.{name}"):
            wishes = Wishes.of(wishes, {"data": {name: tuple(map(absolute, named))}})
    if tokenizer:
        wishes = Wishes.of(wishes, {"data": {"tokenizer": absolute(tokenizer)}})
    if start:
        wishes = Wishes.of(wishes, {"start": {"run": str(Path(start).resolve())}})
    for name in ("val", "keep"):
        if named := wishes.value(f"chats.{name}"):
            wishes = Wishes.of(wishes, {"chats": {name: tuple(map(absolute, named))}})
    return wishes


def facts_of(data: DataConfig, chats: ChatsConfig | None, should_stop: Callable[[], bool] | None = None) -> CorpusFacts | ChatFacts:
    """How much text there is, or how many conversations. Raises UserError where there is nothing usable, Stopped when asked to."""
    with Bars() as bars:
        if chats is None:
            return scan(data, progress=bars, should_stop=should_stop)
        return scan_chats(data.paths, data.holdout_fraction, chats.val, progress=bars, should_stop=should_stop)


def facts_of_own(
    run: RunFolder, data: DataConfig, chats: ChatsConfig | None, should_stop: Callable[[], bool] | None = None
) -> CorpusFacts | ChatFacts:
    """`facts_of` what a run learns from. Where it chose, counts are of the whole pool: what it left is rejected."""
    own = texts_of(run, data)
    facts = facts_of(own, chats, should_stop)
    if own.paths == data.paths:
        return facts
    counts = read_state(run, "selected", dict)["documents"]
    return replace(facts, counts=counts, quarantined=counts["quarantined"])


def with_own_tokenizer(run: RunFolder, data: DataConfig) -> DataConfig:
    """`data` with the run's own tokenizer, once it has one: the user's file may be gone, and other texts would give another one."""
    return replace(data, tokenizer=str(run.tokenizer_file)) if run.tokenizer_file.exists() else data


def bind(run: RunFolder, data: DataConfig, facts: Facts, earlier: list[dict]) -> None:
    """Note what the run is trained on from here on. earlier: what it was trained on before, `corpora(run)`; of a new run nothing."""
    entry = {"paths": list(data.paths), "fingerprint": facts.content, "documents": facts.documents, "bytes": facts.bytes}
    if data.sample:
        entry["for"] = list(data.sample)
    if counts := getattr(facts, "counts", None):  # problems to practise on have none
        entry["counts"] = counts
    if earlier and earlier[-1]["fingerprint"] == facts.content:
        earlier = earlier[:-1]  # the same texts, perhaps moved
    write_atomic(run.state / "corpus.json", json.dumps([*earlier, entry], indent=1))


def same_texts(run: RunFolder, facts: Facts, way_on: str) -> None:
    """Raises UserError, which ends with `way_on`, where these are not the texts that the run was trained on last."""
    known = corpora(run)
    if known and known[-1]["fingerprint"] != facts.content:
        before, now = (f"{of['documents']:,} documents of {of['bytes']:,} bytes" for of in (known[-1], vars(facts)))
        change = f"they were {before}, they are {now}" if before != now else f"still {now}, but others or in another order"
        raise UserError(f"the texts of {run} have changed ({change}): put them back, or {way_on}")


def texts_to_go_on_with(
    run: RunFolder, config: Config, paths: Sequence[str], text_key: str | None, longer: float, budget: str | None
) -> tuple[DataConfig, CorpusFacts | ChatFacts]:
    """What a run is trained on when it goes on, and how much that is: `paths`, or the texts that it has been trained on.

    longer: its budget from now on, in budgets until now. budget: the extension as it was asked for. Raises UserError, naming the way on,
    where no other texts are named and the run's own are gone or have changed.
    """
    data, limit = config.data, config.data.max_tokens
    if paths:
        tokens = (read_state(run, "summary", dict) or {}).get("tokens") or _predicted_tokens(run)  # other texts may be many more
        data = replace(data, paths=tuple(map(absolute, paths)), text_key=text_key or data.text_key, sample=())
        limit = int(MARGIN * tokens) if tokens else limit
    else:
        data = replace(data, paths=tuple(map(absolute, data.paths)))  # older runs have relative ones
    data = replace(data, max_tokens=limit and int(limit * longer))
    named = texts_of(run, data).paths
    named = shlex.join(named) if 1 <= len(named) <= 3 else "PATH..."
    way_on = shlex.join(["sparing", "resume", str(run), *(["--budget", budget] if budget else [])]) + f" --data {named}"
    try:
        facts = facts_of_own(run, data, config.chats)
    except UserError as error:
        raise error if paths else UserError(f"{error}; to go on with other texts: {way_on}") from None
    if not paths:
        same_texts(run, facts, f"go on with them as they are: {way_on}")
    elif (known := corpora(run)) and known[-1]["fingerprint"] != facts.content:
        say(f"from here on other texts: {facts.documents:,} documents of {facts.bytes / 1e6:.1f} MB; bits per byte are of these")
    return data, facts


def _predicted_tokens(run: RunFolder) -> float | None:
    predicted = read_state(run, "prediction", dict) or {}
    tokens = predicted.get("tokens")
    return tokens.get("value") if isinstance(tokens, dict) else None
