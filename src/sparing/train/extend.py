"""A finished run, given more budget: back to the checkpoint that was kept before the decay, and on from there.

The learning rate is still at its peak there, so the longer run is the one that the larger budget would have made from the start;
what the first decay cost counts as spent.
"""

from __future__ import annotations

import json
import shutil

from sparing.base.config import UserError
from sparing.base.files import link_or_copy, replace_folder
from sparing.base.run import RunFolder


def rewind(run: RunFolder) -> int:
    """Make the checkpoint before the decay the newest; -> its step. The caller holds the run's lock. Raises UserError without one."""
    kept = run.state / "pre-decay"
    try:
        step = int(json.loads((kept / "state.json").read_text())["step"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{run}: cannot be extended, its checkpoint before the decay is missing or damaged ({error})") from None
    target, beside = run.state / f"step-{step:08d}", run.state / ".extend.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    for file in kept.iterdir():
        link_or_copy(file, beside / file.name)
    replace_folder(beside, target)
    for folder in run.state.glob("step-*"):
        if folder.name > target.name:
            shutil.rmtree(folder)
    (run.state / "plan.jsonl").unlink(missing_ok=True)  # the old plan's total was the old budget's
    return step
