"""Run by test_memory: prepares a corpus under a limit on address space and prints the largest sum of resident memory, in MB.

python memory_probe.py CORPUS ROOT MAX_TOKENS|all LIMIT_MB
"""

import os
import resource
import sys
import threading
import time
from pathlib import Path

from sparing.base.config import DataConfig
from sparing.data import workers
from sparing.data.prepare import prepare


def resident(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0


def main(corpus: str, root: str, max_tokens: str, limit_mb: str) -> None:
    limit = int(limit_mb) << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))  # the workers inherit it
    pids, peak, done = [os.getpid()], 0, threading.Event()
    popen = workers.subprocess.Popen

    def start(*args, **kwargs):
        process = popen(*args, **kwargs)
        pids.append(process.pid)
        return process

    workers.subprocess.Popen = start

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, sum(map(resident, pids)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.monotonic()
    try:
        config = DataConfig(paths=(corpus,), max_tokens=None if max_tokens == "all" else int(max_tokens), workers=2)
        made = prepare(config, 4096, Path(root))
    finally:
        done.set()
        watcher.join()
    print(peak >> 20, made.tokens, round(time.monotonic() - begin, 1), len(pids) - 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
