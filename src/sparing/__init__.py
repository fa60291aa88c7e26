"""Sparing: say what you can spend, get the best language model that it buys."""

import importlib

__version__ = "0.1.0"


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
