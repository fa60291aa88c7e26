"""Where the programs are that Sparing is compared with: in `benchmarks/` beside `src/`, so in a source tree or an editable install only."""

from __future__ import annotations

import sys
from pathlib import Path

import sparing
from sparing.base.config import UserError
from sparing.base.messages import say

SOURCE_TREE = Path(sparing.__file__).resolve().parents[2]


def exist() -> bool:
    """Whether `benchmarks/` is there. Its modules can be imported from then on, here and in workers."""
    if not (SOURCE_TREE / "benchmarks" / "__init__.py").exists():
        return False
    if str(SOURCE_TREE) not in sys.path:
        sys.path.insert(0, str(SOURCE_TREE))
    return True


def available(program: str) -> bool:
    """`exist`, for a figure that can do without; where it isn't, one line says that `program` is left out."""
    if not exist():
        say(f"{program} is left out: comparisons need benchmarks/ of Sparing's source tree, which is not installed")
    return exist()


def require(figure: str) -> None:
    """Raises UserError where there is no `benchmarks/`."""
    if not exist():
        raise UserError(f"{figure} measures another program only: it needs benchmarks/ of Sparing's source tree, which is not installed")
