"""Answers SIGTERM and SIGINT within two seconds, whatever is running, and loses nothing that is worth saving.

Three layers. (1) The handler sets a flag, which the loop looks at between steps. (2) Inside `interruptible` code (forward and backward,
evaluation, tokenising, any verb that has nothing to save) the handler raises at once. (3) Python runs handlers only between its own
instructions. For a product, a tokeniser or a compiler that doesn't come back, a thread is woken by the C-level handler and ends the process
after `GRACE_S`: the newest checkpoint on disk is consistent by construction. Inside `finishing` (an update of the weights, a checkpoint)
the thread says what is waited for and allows it `SAVING_S`, or what torchrun allows its ranks. Where the machine is about to be taken away
(`base.notices`), whatever runs has the time that is left: nobody waits at a terminal.
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

from sparing.base.rank import this_rank

GRACE_S = 1.5
"""For code that can be left at any time."""
TELL_S = 1.0
"""After this time the user is told what is waited for."""
SAVING_S = 9.0
"""For what has to be finished first."""
MARGIN_S = 5.0
"""By which a process ends before another one, or the machine's end, would end it."""
TORCHRUN_S = 30.0
"""After which torchrun kills ranks that it has sent SIGTERM (`LocalElasticAgent`, shutdown_timeout)."""
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
        self._deadline: float | None = None
        """When the machine goes away, less a margin, by `time.monotonic`."""
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

    def leave_by(self, seconds: float) -> None:
        """This machine goes away in so many seconds: stop as on SIGTERM, but with this time to finish. For any thread."""
        self._deadline = time.monotonic() + max(seconds - MARGIN_S, SAVING_S)
        if hasattr(self, "_old"):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
        else:
            self.requested = True  # not in the main thread: no handler of ours is there

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

    def _handle(self, number, _frame) -> None:
        if self.requested:
            if self._at_once(number):
                self._exit()
            return
        self.requested = True
        if self._raise:
            self._raise = False
            raise Interrupted(self.message)

    def _at_once(self, number: int) -> bool:
        """Whether a second signal means that nothing is to be finished. Of a machine that goes down all processes get a SIGTERM, those that
        are told already too; and a rank gets what it was sent, and what its launcher was sent and passes on."""
        return this_rank().size == 1 and (number == signal.SIGINT or self._deadline is None)

    def _limit(self) -> float:
        """When the process ends though the main thread doesn't come back, by `time.monotonic`."""
        if self._deadline is not None:
            return self._deadline
        saving = SAVING_S if this_rank().size == 1 else TORCHRUN_S - MARGIN_S
        return self._since + (saving if self._finishing else GRACE_S)

    def _watch(self) -> None:
        """The thread: waits for a signal's byte, then for the main thread to leave."""
        receive, signalled, announced = self._receive, False, False
        wanted = {int(number) for number in SIGNALS}
        while not self._left.is_set():
            receive.settimeout(max(0.01, min(0.25, self._limit() - time.monotonic())) if signalled else None)
            try:
                data = receive.recv(64)
            except TimeoutError:
                data = b"-"
            except OSError:
                break
            if not data:
                break  # closed: the context was left
            for number in filter(wanted.__contains__, data):
                if signalled and self._at_once(number):
                    self._exit()
                if not signalled:
                    signalled, self._since = True, time.monotonic()
            now = time.monotonic()
            if signalled and self._finishing and not announced and now - self._since >= TELL_S:
                announced = True
                left = "; again: at once" if self._at_once(signal.SIGTERM) else f", in at most {self._limit() - now:.0f} s"
                print(f"\nsparing: interrupted: {self._finishing} first{left}", file=sys.stderr, flush=True)
            if signalled and now >= self._limit() and not self._left.is_set():
                self._exit()
        receive.close()

    def _exit(self) -> None:
        print(f"\nsparing: {self.message}", file=sys.stderr, flush=True)
        os._exit(130)
