"""Sparing: say what you can spend, get the best language model that it buys."""

import importlib
import os

__version__ = "0.1.0"

# GNU OpenMP reads this when torch is first imported. A thread that has finished its part of an operation spins for milliseconds by
# default: on a machine that does anything else, training then ran six times slower (LAB.md). Short spinning costs nothing measurable.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def __getattr__(name: str):
    """Re-export `sparing.api` lazily, so that `sparing --help` and `import sparing` stay fast."""
    if name.startswith("_"):
        raise AttributeError(name)
    api = importlib.import_module("sparing.api")
    if name == "api":
        return api
    try:
        return getattr(api, name)
    except AttributeError:
        raise AttributeError(f"module 'sparing' has no attribute {name!r}") from None
