"""Tokenises in worker processes: texts in, arrays of ids out, in order. A worker runs this file: `python -m sparing.data.workers`.

Plain child processes with pipes, not `multiprocessing`: they never import the user's main script, share nothing, and end by themselves
when the parent does, because their input ends. `pipes` has the form of the messages.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from sparing.data import pipes
from sparing.data.pipes import python_path, receive, send
from sparing.data.progress import check, result_of
from sparing.data.tokenizer import Tokenizer


def encode_chunks(
    tokenizer: Tokenizer, chunks: Iterable[tuple[Any, list[str]]], workers: int, should_stop: Callable[[], bool] | None = None
) -> Iterator[tuple[Any, list[np.ndarray]]]:
    """(key, texts) -> (key, one array of ids per text), in the same order, whatever `workers` is; 1: in this process.

    At most two chunks per worker are in memory. Raises Stopped; workers are gone when the iterator ends, is closed, or raises.
    """
    if workers <= 1:
        for key, texts in chunks:
            check(should_stop)
            yield key, [tokenizer.encode_array(text) for text in texts]
        return
    source = iter(chunks)
    head = []
    for chunk in source:  # a small corpus is done before a process has started
        head.append(chunk)
        if len(head) > workers:
            break
    if len(head) <= workers:
        yield from encode_chunks(tokenizer, head, 1, should_stop)
        return
    processes: list[_Worker] = []
    threads = ThreadPoolExecutor(workers, thread_name_prefix="tokenise")
    idle: deque[_Worker] = deque()
    pending: deque[tuple[Any, Future]] = deque()

    def encode(texts: list[str]) -> list[np.ndarray]:
        worker = idle.popleft()  # never empty: as many threads as workers
        try:
            return worker.encode(texts)
        finally:
            idle.append(worker)

    try:
        for _ in range(workers):
            processes.append(_Worker(tokenizer))
            idle.append(processes[-1])
        for stream in (head, source):
            for key, texts in stream:
                pending.append((key, threads.submit(encode, texts)))
                if len(pending) >= 2 * workers:
                    key, future = pending.popleft()
                    yield key, result_of(future, should_stop)
        while pending:
            key, future = pending.popleft()
            yield key, result_of(future, should_stop)
    finally:
        for _, future in pending:
            future.cancel()
        for process in processes:
            process.end()
        threads.shutdown(wait=True, cancel_futures=True)


class _Worker:
    def __init__(self, tokenizer: Tokenizer):
        # Its own session: an interrupt at the keyboard is for the parent, which ends the worker itself.
        environment = dict(os.environ, TOKENIZERS_PARALLELISM="false", PYTHONPATH=python_path())
        command = [sys.executable, "-P", "-m", "sparing.data.workers"]  # -P: a numpy.py in the working folder is not meant
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True)
        self.tokenizer: Tokenizer | None = tokenizer

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        raws = [text.encode() for text in texts]
        sizes = np.array([len(raw) for raw in raws], np.uint64)
        try:
            if self.tokenizer is not None:  # sent first, by the thread that waits anyway
                send(self.process.stdin, self.tokenizer.to_json().encode())
            send(self.process.stdin, sizes.tobytes())
            send(self.process.stdin, b"".join(raws))
            counts = np.frombuffer(receive(self.process.stdout), np.uint64).astype(np.int64)
            dtype = np.uint16 if receive(self.process.stdout) == b"2" else np.uint32
            ids = np.frombuffer(receive(self.process.stdout), dtype)
        except (BrokenPipeError, EOFError, ValueError):
            status = self.process.poll()
            raise RuntimeError(f"a tokenising process ended early (status {status}): was it killed for want of memory?") from None
        self.tokenizer = None
        return np.split(ids, np.cumsum(counts)[:-1])

    def end(self) -> None:
        pipes.end(self.process)


def _main() -> None:
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    try:
        tokenizer = Tokenizer(receive(source).decode())
        while True:
            sizes = np.frombuffer(receive(source), np.uint64).tolist()
            raw, start, ids = receive(source), 0, []
            for size in sizes:
                ids.append(tokenizer.encode_array(raw[start : start + size].decode()))
                start += size
            send(sink, np.array([len(part) for part in ids], np.uint64).tobytes())
            send(sink, str(tokenizer.dtype.itemsize).encode())
            send(sink, np.concatenate(ids).tobytes() if ids else b"")
    except (EOFError, BrokenPipeError):  # the parent has what it wanted, or is gone
        os._exit(0)


if __name__ == "__main__":
    _main()
