"""Sparing: say what you can spend, get the best language model that it buys.

Every verb of the command line is a function here: `sparing.train(...)`, `sparing.plan(...)`. What does the work is imported at the first
call or look-up, so `import sparing` loads no torch.
"""

import importlib
import os
from types import ModuleType

__version__ = "0.1.0"

# GNU OpenMP reads this when torch is first imported. A thread that has finished its part of an operation spins for milliseconds by
# default: on a machine that does anything else, training then ran six times slower (LAB.md). Short spinning costs nothing measurable.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

VERBS = {
    "plan": "sparing.planning.plan",
    "receipt": "sparing.account.paper",
    "report": "sparing.account.paper",
    "compare": "sparing.account.paper",
    "serve": "sparing.serve.entry",
    "bench": "sparing.bench.figures",
    "data": "sparing.curate.entry",
} | dict.fromkeys(
    ("train", "sft", "distill", "dpo", "grpo", "resume", "evaluate", "generate", "chat", "export", "merge", "import_", "fetch", "load"),
    "sparing.api",
)
VERBS |= dict.fromkeys(("grow", "retire", "slice", "pack", "adapt", "rollback", "reason"), "sparing.api")
"""The module of each verb's function, and of `load`."""


class _CallableFolder(ModuleType):
    """A folder that has the name of a verb. Importing anything from it sets `sparing.train` to the folder, whatever that was before, so the
    folder itself can be called as the verb."""

    def __call__(self, *arguments, **options):
        return _verb(self.__name__.removeprefix("sparing."))(*arguments, **options)


def _verb(name: str):
    return getattr(importlib.import_module(VERBS[name]), name)


def __getattr__(name: str):
    if name in VERBS:
        return _verb(name)
    if name == "api":
        return importlib.import_module("sparing.api")
    raise AttributeError(f"module 'sparing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *VERBS})


for _name in ("train", "adapt", "serve", "bench"):  # their __init__ has a docstring alone
    importlib.import_module(f"sparing.{_name}").__class__ = _CallableFolder
