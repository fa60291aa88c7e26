"""Ray Data as the engine of a corpus' stages: `--engine ray`.

The cluster runs the stages that are pure functions of a part (judging, signing, counting lines). This process reads the documents, hands
the parts over, writes the files that come back, and merges them.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa

from sparing.base.config import UserError
from sparing.base.messages import say
from sparing.curate.parts import Job, Stage, Stop, write_table
from sparing.data.progress import check, result_of

WINDOW = 128
"""At most so many parts, of about 8 MB each, are with the cluster at a time; while it has them, as many are read."""


class RayData:
    """A context manager. The cluster is the one that $RAY_ADDRESS names, as in all programs of Ray; without it one is started here."""

    def __init__(self, workers: int | None = None):
        """workers: processes of a cluster that is started here; None: one a core. Raises UserError where Ray is missing, or `workers` and
        $RAY_ADDRESS are both given."""
        try:
            import ray.data
        except ImportError:
            raise UserError("--engine ray needs Ray Data: pip install 'sparing[ray]'") from None
        self.ray, self.workers, self.address = ray, workers, os.environ.get("RAY_ADDRESS")
        if self.address and workers:
            raise UserError(f"--workers {workers} is for a cluster that is started here, and RAY_ADDRESS names one: {self.address}")

    def __enter__(self) -> RayData:
        self.ours = not self.ray.is_initialized()
        if self.ours:
            self._connect()
        settings = self.ray.data.DataContext.get_current()
        settings.enable_progress_bars = settings.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # it says on every window how long that took
        processors = int(self.ray.cluster_resources().get("CPU", 1))
        self.window = min(2 * processors, WINDOW)
        where = f"of the cluster at {self.address}" if self.address else "of this machine"
        say(f"ray: {processors} processors {where} judge and sign documents; this process reads, compares and writes them")
        return self

    def _connect(self) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if not self.address:
            options |= {"num_cpus": self.workers, "include_dashboard": False}
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would send statistics of use to its makers
        before = signal.getsignal(signal.SIGTERM)  # Ray puts a handler of its own there
        try:
            self.ray.init(self.address or "local", **options)
        except Exception as error:  # of many kinds, plain Exception too
            raise UserError(f"--engine ray: no cluster at {self.address or 'this machine'}: {error}") from None
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)

    def __exit__(self, *_exc) -> None:
        if self.ours:
            self.ray.shutdown()

    def run(self, stage: Stage, jobs: Iterator[Job], should_stop: Stop) -> None:
        """As `parts.Engine.run`. A mistake of the user that a stage finds is raised as it is."""
        with ThreadPoolExecutor(1) as thread:
            running = None
            while some := list(islice(jobs, self.window)):
                if running:
                    result_of(running, should_stop)
                running = thread.submit(self._map, stage, some, should_stop)
            if running:
                result_of(running, should_stop)

    def _map(self, stage: Stage, jobs: list[Job], should_stop: Stop) -> None:
        # A row is a part: Ray cuts and merges blocks as it sees fit, and what a stage gives depends on where a part begins and ends.
        rows = [pa.table({"number": [number], "part": [_packed(part)]}) for number, (part, _, _) in enumerate(jobs)]
        found = self.ray.data.from_arrow(rows).map_batches(partial(_apply, stage=stage), batch_size=1, batch_format="pyarrow")
        done = 0
        for row in found.iter_rows():
            check(should_stop)
            if row["mistake"]:
                raise UserError(row["mistake"])
            _, path, digest = jobs[row["number"]]
            write_table(path, _unpacked(row["part"]), digest)
            done += 1
        if done != len(jobs):
            raise RuntimeError(f"Ray gave {done} parts of {len(jobs)}")


def _apply(table: pa.Table, stage: Stage) -> pa.Table:
    """Parts in, what the stage makes of them out; a mistake of the user is given back as text, because Ray would wrap it in its own."""
    parts, mistakes = [], []
    for part in table.column("part"):
        try:
            parts.append(_packed(stage(_unpacked(part.as_buffer()))))
            mistakes.append("")
        except UserError as error:
            parts.append(b"")
            mistakes.append(str(error))
    return pa.table({"number": table.column("number"), "part": parts, "mistake": mistakes})


def _packed(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _unpacked(raw: Any) -> pa.RecordBatch:
    with pa.ipc.open_stream(raw) as reader:
        return reader.read_next_batch()
