"""Which of the processes (ranks) that do one job together this one is, as torchrun says it in the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

STATUS = "SPARING_STATUS"
"""Environment variable: a file to which a host's first rank writes an exit status that is no reason to start the ranks anew."""

NEW_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Environment variable of torch's: 1, ranks that meet anew have a new store, in which none is known that died."""


ELASTIC = "SPARING_ELASTIC"
"""Environment variable: 1 where the ranks of some machines go on when others leave."""


class Rank(NamedTuple):
    number: int = 0
    """0 to size - 1. Number 0 alone writes files and messages."""
    size: int = 1
    local: int = 0
    """Number among the ranks of this host."""
    local_size: int = 1
    """Ranks of this host: each may use as large a share of it."""


def launched() -> bool:
    """Whether torchrun has started this process, perhaps as the only one."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def elastic() -> bool:
    """Whether this process is a rank, and the ranks of some machines go on when others leave."""
    return launched() and os.environ.get(ELASTIC) == "1"


def machine() -> tuple[int, int]:
    """(number of this rank's machine, how many have ranks), as torchrun counts them."""
    return int(os.environ.get("GROUP_RANK", 0)), int(os.environ.get("GROUP_WORLD_SIZE", 1))


def this_rank() -> Rank:
    """Of a process that torchrun did not start: the only one."""
    if not launched():
        return Rank()
    return Rank(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))


def started_anew() -> int:
    """How often torchrun has started these ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


class RankLost(Exception):
    """Another rank is gone, or does not answer. What is on disk is whole; torchrun starts all ranks anew."""


def leave(status: int) -> int:
    """The exit status of a rank whose verb ended with `status`: 0 where ranks that were started anew would end in the same way."""
    file = os.environ.get(STATUS)
    if not file or status == 1:
        return status
    if this_rank().local == 0:
        if status:
            Path(file).write_text(str(status))
        else:  # ranks that were told to stop so that more or fewer begin have written one
            Path(file).unlink(missing_ok=True)
    return 0
