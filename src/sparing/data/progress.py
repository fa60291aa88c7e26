"""Progress bars of the data stage, and the exception that stops it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total): stages `scan`, `tokenizer`, `tokenise`; done and total in bytes."""
NAMES = {"scan": "reading", "tokenizer": "training the tokenizer", "tokenise": "tokenising"}
POLL_S = 0.1


class Stopped(Exception):
    """`should_stop()` returned true. Whatever was finished is kept; the same call later goes on from there."""


def check(should_stop: Callable[[], bool] | None) -> None:
    """Raise Stopped when `should_stop()` says so. Long loops call this often."""
    if should_stop is not None and should_stop():
        raise Stopped("stopped on request")


def result_of(future: Future, should_stop: Callable[[], bool] | None) -> Any:
    """A future's result, waited for. Raises Stopped meanwhile, and whatever the future raises."""
    while not future.done():
        check(should_stop)
        wait([future], timeout=POLL_S)
    return future.result()


class Bars:
    """Shows progress on standard error: a bar on a terminal, one line a stage elsewhere. A `Progress`, and a context manager."""

    def __init__(self):
        self._tasks: dict[str, int] = {}
        self._bars = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

            columns = (TextColumn("{task.description:>22}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bars = Progress(*columns, console=Console(stderr=True), transient=True)

    def __enter__(self) -> Bars:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_exc) -> None:
        if self._bars:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(NAMES[stage], total=total) if self._bars else 0
            if not self._bars:
                print(f"{NAMES[stage]}: {total / 1e6:,.1f} MB", file=sys.stderr, flush=True)
        if self._bars:
            self._bars.update(self._tasks[stage], completed=done, total=total)
