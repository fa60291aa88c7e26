"""Arms of a figure: verbs in processes of their own, whose results are kept, and whose runs go on where they were stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import sparing
from sparing.base.messages import say
from sparing.bench.results import stored_result


def asked(folder: Path, *command: str) -> dict:
    """What `sparing COMMAND --json` says, in a process of its own whose home is in `folder`."""
    say(f"sparing {' '.join(command)}")
    environment = os.environ | {"SPARING_HOME": str(folder / "home"), "PYTHONPATH": str(Path(sparing.__file__).parent.parent)}
    words = [sys.executable, "-m", "sparing", *command, "--json"]
    return json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True, env=environment).stdout)


def kept(folder: Path, name: str, *command: str) -> dict:
    """What a verb says, kept as FOLDER/NAME.json."""
    return stored_result(folder / f"{name}.json", lambda: asked(folder, *command))


def made(folder: Path, name: str, *command: str) -> tuple[Path, dict]:
    """(the run FOLDER/NAME, which a verb makes; what the verb says). A run that was interrupted goes on."""
    run = folder / name
    command = ("resume", str(run)) if (run / "config.toml").exists() else (*command, "--out", str(run), "--samples", "0")
    return run, kept(folder, f"{name}-made", *command)
