"""Messages to the user: on standard error, because standard output belongs to results."""

from __future__ import annotations

import sys

from sparing.base.rank import this_rank


def say(text: str) -> None:
    """Print one line. Of several ranks the first one alone does."""
    if this_rank().number == 0:
        print(text, file=sys.stderr, flush=True)
