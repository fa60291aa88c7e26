"""Messages to the user: on standard error, because standard output belongs to results."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """Print one line."""
    print(text, file=sys.stderr, flush=True)
