"""Starts several ranks of one verb by torchrun's own agent (`torch.distributed.launcher`), and again when one of them dies."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import psutil

from sparing.base.config import CannotGoOn, UserError
from sparing.base.messages import say
from sparing.base.notices import notices
from sparing.base.preempt import Interrupted
from sparing.base.rank import ELASTIC, NEW_STORE, STATUS, this_rank

ALONE = "localhost:0"
"""Meeting point of ranks on this machine alone: any free port."""
STOPPED_S = 10
"""A rank that is stopped (SIGSTOP) for so long, while this process is not, is ended: all others wait for it."""
LOOK_S = 1.0
MEETING_S = 600
"""For the fewest machines to meet; torchrun's own."""


def launch(words: Sequence[str], n: int, nodes: tuple[int, int], meet: str | None, restarts: int) -> int:
    """Run `sparing WORDS` as `n` ranks on this machine, of so many machines that each run the same command; -> exit status.

    nodes: the fewest and the most: where one goes or comes, the ranks of all are started anew, fewer or more of them. A machine that is
    told to stop, by a signal or its cloud, then leaves alone.
    meet: HOST:PORT where the agents of several machines meet. Raises UserError; Interrupted on a signal (the run is saved); CannotGoOn
    where ranks die again and again."""
    if n < 1 or restarts < 0:
        raise UserError(f"launch: -n {n}, --restarts {restarts}: at least 1 and 0")
    if nodes[1] > 1 and meet is None:
        raise UserError(f"launch: {nodes[1]} machines need --meet HOST:PORT, the same on each: where the first one can be reached")
    if this_rank().size > 1:
        raise UserError("launch: this is a rank of another launch already")
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousTimeoutError
    from torch.distributed.launcher import LaunchConfig, elastic_launch

    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):  # each has a level of its own; what they report the ranks say in one line
            logging.getLogger(name).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="sparing-launch-") as folder:
        status = Path(folder, "status")
        os.environ[STATUS] = str(status)
        os.environ[NEW_STORE] = "1"
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # what torchrun would set, and say; each rank measures how many it uses
        name = os.environ.get("SPARING_LAUNCH_ID") or meet or str(uuid.uuid4())  # the same on all machines, or they do not meet
        settings = {
            "min_nodes": nodes[0], "max_nodes": nodes[1], "nproc_per_node": n, "run_id": name,
            "rdzv_backend": "c10d", "rdzv_endpoint": meet or ALONE, "max_restarts": restarts, "monitor_interval": 0.2,
            "rdzv_configs": {"join_timeout": MEETING_S},
        }  # fmt: skip
        if "signals_to_handle" in {field.name for field in dataclasses.fields(LaunchConfig)}:
            settings["signals_to_handle"] = "SIGTERM,SIGINT"  # the ranks have sessions of their own: a terminal's does not reach them
        if nodes[0] < nodes[1]:
            os.environ[ELASTIC] = "1"
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with ending_stopped(), notices(_leave) if nodes[0] < nodes[1] else nullcontext():
                elastic_launch(LaunchConfig(**settings), sys.executable)("-m", "sparing", *words)
        except SignalException:
            if not status.exists():  # else rank 0 has said how to go on
                raise Interrupted("interrupted") from None
        except RendezvousTimeoutError:
            raise CannotGoOn(f"fewer than {nodes[0]} machines have met at {meet} within {MEETING_S / 60:.0f} minutes") from None
        except RendezvousConnectionError:
            if not status.exists():
                raise CannotGoOn(f"the machine at {meet}, where all meet, has ended: see what it says") from None
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            raise CannotGoOn(
                f"rank {rank} ended with status {failure.exitcode} after {restarts} restarts: see what it says above"
            ) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            del os.environ[STATUS]
            os.environ.pop(ELASTIC, None)
        return int(status.read_text()) if status.exists() else 0


def _leave(_seconds: float) -> None:
    """This machine goes away: the agent, as by SIGTERM, ends its ranks, and leaves the others."""
    signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)


@contextmanager
def ending_stopped() -> Iterator[None]:
    """Meanwhile, kill children that are stopped. Where all is stopped together, as batch systems suspend a job, nothing is killed."""
    over, looks = threading.Event(), defaultdict(int)

    def watch() -> None:
        while not over.wait(LOOK_S):
            for child in psutil.Process().children():
                with suppress(psutil.Error):
                    looks[child.pid] = looks[child.pid] + 1 if child.status() == psutil.STATUS_STOPPED else 0
                    if LOOK_S * looks[child.pid] >= STOPPED_S:
                        say(f"process {child.pid} is stopped, and the others wait for it: it is started anew")
                        child.kill()

    thread = threading.Thread(target=watch, daemon=True, name="sparing-stopped")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
