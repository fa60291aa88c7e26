"""Long work that can be asked to end: callers pass `should_stop`, workers call `check` often."""

from __future__ import annotations

from collections.abc import Callable


class Stopped(Exception):
    """`should_stop()` said so. Whatever was finished is kept; the same call later goes on from there."""


def check(should_stop: Callable[[], bool] | None) -> None:
    if should_stop is not None and should_stop():
        raise Stopped("stopped on request")
