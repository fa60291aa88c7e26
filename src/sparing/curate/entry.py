"""The verb `data`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from sparing.account.meter import Meter, metered
from sparing.base.config import UserError
from sparing.base.hardware import cores
from sparing.base.messages import say
from sparing.base.preempt import Interrupted, Preempt
from sparing.base.run import RunFolder, folder_lock
from sparing.curate.card import write_card
from sparing.curate.parts import Engine
from sparing.curate.pipeline import QUARANTINE, Fate, curate, finish, vacant
from sparing.curate.recipe import Recipe
from sparing.curate.select import Selection, select
from sparing.data.accounts import in_words
from sparing.data.files import find_files
from sparing.data.progress import Stopped
from sparing.data.web import EXTRACTORS

WAYS = ("stats", "curate", "dedup", "select")
ENGINES = ("local", "ray")


def data(
    way: str,
    paths: Sequence[str],
    out: str,
    rules: str | None = None,
    text_key: str = "text",
    workers: int | None = None,
    started: float | None = None,
    selection: Selection | None = None,
    engine: str = "local",
    extract: str = EXTRACTORS[0],
) -> dict:
    """Look at a corpus, or make a better one of it, in the folder `out`.

    way: "curate" judges documents by rules and takes duplicates out; "dedup" takes duplicates out; "stats" says what "curate" would do, and
    writes no texts; "select" keeps what `selection` says. rules: a TOML file that changes the default `Recipe`. workers: processes; None:
    one a core. engine: "ray" judges and compares on the cluster that $RAY_ADDRESS names, or on one that is started here; the bytes are the
    same. extract: what takes the text out of web pages, of EXTRACTORS.

    -> {"documents": {"in", "out", "rejected", "quarantined"}, "bytes", "edited", "rejected", "quarantined", "languages", "licences",
    "stages", "seconds", "out"}, and what `select.select` adds. Raises UserError; Interrupted, and then the same call goes on where it was.
    """
    if way not in WAYS:
        raise UserError(f"data {way}: not known; choose {', '.join(WAYS)}, synth")
    if (way == "select") != (selection is not None):
        raise UserError("a selection goes with `data select`, and with nothing else")
    if selection is not None and rules is not None:
        raise UserError("--rules goes with stats, curate and dedup: curate the pool first, and select from what stays")
    for option, value, choices in (("engine", engine, ENGINES), ("extract", extract, EXTRACTORS)):
        if value not in choices:
            raise UserError(f"--{option} {value}: not known; choose {' or '.join(choices)}")
    if selection is not None and engine != "local":
        raise UserError(f"--engine {engine} goes with stats, curate and dedup")
    recipe = Recipe() if rules is None else Recipe.from_toml(rules)
    if way == "dedup" and recipe.duplicates is None:
        raise UserError(f"{rules}: duplicates are left in, and `data dedup` does nothing else")
    if way in ("dedup", "select"):
        recipe = replace(recipe, rules=None)
    if recipe.rules is not None:
        recipe.rules.load()  # what a rule lacks is said before any text is read
    if selection is not None:
        selection.load()
    find_files(paths)
    folder = vacant(out)
    run = RunFolder(folder)
    with (
        leaving_nothing(folder),
        folder_lock(folder),
        metered("data", run, started=started) as meter,
        _engine(engine, workers) as those,
        Preempt("the same command goes on") as signals,
    ):
        try:
            how = {"text_key": text_key, "meter": meter, "should_stop": lambda: signals.requested, "extract": extract}
            if selection is not None:
                summary, fate = select(paths, out, selection, workers=workers or cores(), **how)
            else:
                summary, fate = curate(paths, out, recipe, workers=those, **how, keep_texts=way != "stats")
        except Stopped:
            raise Interrupted(signals.message) from None
        complete(folder, Path(out).name, summary, fate, meter)
    say(in_words(summary["documents"]))
    return summary | {"out": out}


def complete(folder: Path, name: str, summary: dict, fate: Fate, meter: Meter) -> None:
    """Add to the summary what its stages took, write the data card, and mark the folder as a whole corpus. name: for the card."""
    stages = meter.rows()
    summary["stages"] = [{"name": row.stage, "seconds": row.wall_s, "tokens": row.tokens, "usd": row.usd, "kwh": row.kwh} for row in stages]
    summary["seconds"] = sum(row.wall_s for row in stages)
    try:
        write_card(folder / "card.html", name, summary, fate, stages)
    except UserError as error:  # plotly is an extra
        say(f"without a data card: {error}")
    finish(folder, summary)
    if reasons := summary["quarantined"]:
        counted = ", ".join(f"{reason} ({count:,})" for reason, count in reasons.items())
        say(f"quarantined: {counted}; each with its place in {folder / QUARANTINE}")


@contextmanager
def _engine(name: str, workers: int | None) -> Iterator[Engine | int]:
    if name == "local":
        yield workers or cores()
        return
    from sparing.curate.ray_engine import RayData

    with RayData(workers) as engine:
        yield engine


@contextmanager
def leaving_nothing(folder: Path) -> Iterator[None]:
    """A folder for what is made, which goes again where that is refused. What an interruption leaves stays: the same command goes on."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except UserError:
        if made:
            shutil.rmtree(folder, ignore_errors=True)
        raise
