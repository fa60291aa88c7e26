"""Answers SIGTERM and SIGINT within two seconds, whatever is running, and loses nothing that is worth saving.

Three layers. (1) The handler sets a flag, which the loop looks at between steps. (2) Inside `interruptible` code (forward and backward,
evaluation, tokenising, any verb that has nothing to save) the handler raises at once. (3) Python runs handlers only between its own
instructions. For a product, a tokeniser or a compiler that doesn't come back, a thread is woken by the C-level handler and ends the process
after `GRACE_S`: the newest checkpoint on disk is consistent by construction. Inside `finishing` (an update of the weights, a checkpoint)
the thread says what is waited for and allows it `SAVING_S`.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

GRACE_S = 1.5
"""For code that can be left at any time."""
TELL_S = 1.0
"""After this time the user is told what is waited for."""
SAVING_S = 9.0
"""For what has to be finished first."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
    """Raised where work may stop. A KeyboardInterrupt, so that no `except Exception` on the way (compilers have them) swallows it."""


class Preempt:
    """Context manager that owns the signals of the main thread while it lasts; elsewhere (a notebook's worker thread) it does nothing."""

    def __init__(self, hint: str | Callable[[], str]):
        """hint: the command that goes on, e.g. `sparing resume RUN`; a function: asked when it is needed."""
        self.hint = hint
        self.requested = False
        self._finishing: str | None = None
        self._raise = False
        self._since = 0.0
        self._depth = 0
        self._left = threading.Event()

    def __enter__(self) -> Preempt:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            self._left.clear()
            self._receive, self._send = socket.socketpair()
            self._send.setblocking(False)
            self._old_fd = signal.set_wakeup_fd(self._send.fileno(), warn_on_full_buffer=False)
            self._old = {number: signal.signal(number, self._handle) for number in SIGNALS}
            threading.Thread(target=self._watch, daemon=True, name="sparing-preempt").start()
        return self

    def __exit__(self, *_exc) -> None:
        self._depth -= 1
        if self._depth == 0 and hasattr(self, "_old"):
            self._left.set()
            for number, handler in self._old.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._old_fd)
            self._send.close()
            del self._old

    def check(self) -> None:
        """For loops outside `interruptible`: raise Interrupted if a signal has come."""
        if self.requested:
            raise Interrupted(self.message)

    def should_stop(self) -> bool:
        """For work that polls (`sparing.data`, `sparing.evals`)."""
        return self.requested

    @property
    def message(self) -> str:
        return f"interrupted; go on with: {self.hint if isinstance(self.hint, str) else self.hint()}"

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Code that may be left at any instruction: a signal raises Interrupted inside it."""
        try:
            self._raise = True
            self.check()
            yield
        finally:
            self._raise = False

    @contextmanager
    def finishing(self, what: str) -> Iterator[None]:
        """Code that is worth waiting for, as the user is told: "saving the checkpoint"."""
        before, self._finishing = self._finishing, what
        try:
            yield
        finally:
            self._finishing = before

    def _handle(self, _number, _frame) -> None:
        if self.requested:
            self._exit()
        self.requested = True
        if self._raise:
            self._raise = False
            raise Interrupted(self.message)

    def _watch(self) -> None:
        """The thread: waits for a signal's byte, then for the main thread to leave."""
        receive, signals, announced = self._receive, 0, False
        wanted = {int(number) for number in SIGNALS}
        while not self._left.is_set():
            limit = SAVING_S if self._finishing else GRACE_S
            receive.settimeout(None if not signals else max(0.01, min(0.25, self._since + limit - time.monotonic())))
            try:
                data = receive.recv(64)
            except TimeoutError:
                data = b"-"
            except OSError:
                break
            if not data:
                break  # closed: the context was left
            came = sum(byte in wanted for byte in data)
            if came and not signals:
                self._since = time.monotonic()
            signals += came
            if signals == 1 and self._finishing and not announced and time.monotonic() - self._since >= TELL_S:
                announced = True
                print(f"\nsparing: interrupted: {self._finishing} first; again: at once", file=sys.stderr, flush=True)
            if signals >= 2 or (signals and time.monotonic() - self._since >= limit and not self._left.is_set()):
                self._exit()
        receive.close()

    def _exit(self) -> None:
        print(f"\nsparing: {self.message}", file=sys.stderr, flush=True)
        os._exit(130)
