"""Makes the three standard streams safe to use, whatever the caller has made of them."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TextIO

from sparing.base.preempt import Interrupted


class _Messages(io.TextIOWrapper):
    """Standard error. Messages that nobody reads any more are dropped: a reader who leaves must not end a run."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            discard(self)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            discard(self)


def make_safe() -> None:
    """Put the null device where a stream is closed: its number would otherwise go to the next file that is opened, a ledger say, and
    messages into that file. Escape what an encoding lacks."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            if os.open(os.devnull, os.O_RDWR) == number:  # the lowest number that is free
                os.set_inheritable(number, True)
            stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    sys.stdout.reconfigure(errors="backslashreplace")
    # sys.__stderr__ keeps the first one, whose end would close the file that both write to.
    sys.stderr = _Messages(sys.stderr.buffer, encoding=sys.stderr.encoding, errors="backslashreplace", line_buffering=True)


def discard(stream: TextIO) -> None:
    """Send what is still written to `stream` to the null device."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextlib.contextmanager
def leaving_on_sigterm() -> Iterator[None]:
    """SIGTERM raises Interrupted, for a verb that answers Ctrl-C itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(_number, _frame) -> None:
        raise Interrupted("terminated")

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
