"""A batch file of Slurm for `sparing launch`: one launcher on each node, saved and requeued before its time is up.

What is said of Slurm here is from the manual pages sbatch, srun and scontrol, and from src/slurmd/slurmstepd of release 26.05.
"""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Sequence

from sparing.base.config import UserError

INTERRUPTED = 130
"""What `sparing launch` ends with after a signal: the run is saved."""
WARNING_S = 120
"""How long before its time is up a job is told; Slurm may be up to a minute early."""
CORES_PER_GPU = 4
"""Asked for where the user says nothing: reading batches and launching kernels take one or two."""
MARGIN, MARGIN_S = 0.1, 600.0
"""Time asked for beyond a budget in time: for starting Python and torch on every node, and for the warning."""

_TEMPLATE = """\
#!/bin/bash
# Written by `sparing launch --slurm`; its last part is the command. Options of sbatch win over those here: sbatch --time=4:00:00 FILE
{options}

# INT reaches every process of the step, {warning_s} s before the time is up: all ranks stop after the same step, and the run is saved.
# (TERM would too, but Slurm then forgets the exit status; and what srun itself is sent as TERM it passes on as KILL.)
cd {folder} || exit 2
export SPARING_LAUNCH_ID="slurm-$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"
meet="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((10000 + SLURM_JOB_ID % 20000))"

# A launcher a node, which may use all cores of the job there. One that has ended must not end the others: they may be saving.
srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait=0 \\
  {program} launch -n {n} --nodes "$SLURM_JOB_NUM_NODES" --meet "$meet" --restarts {restarts} \\
  {command}
status=$?
if [ "$status" -eq {interrupted} ]; then  # told to stop, and saved: the same job goes on when there is room again
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def time_for(budget_s: float) -> float:
    """Seconds to ask for, where a budget lasts so many."""
    return budget_s * (1 + MARGIN) + MARGIN_S


def sbatch(
    command: Sequence[str],
    n: int,
    nodes: int = 1,
    *,
    folder: str,
    name: str = "sparing",
    gpus: str | None = None,
    cpus: int | None = None,
    time_s: float | None = None,
    partition: str | None = None,
    restarts: int = 100,
    program: Sequence[str] = (sys.executable, "-m", "sparing"),
) -> str:
    """The text of a file for `sbatch`: `command` (a verb and its options) on `n` ranks of each of `nodes` nodes, run in `folder`.

    gpus: of a node, as `8` or `h100:8`; None: none, and then whole nodes where `cpus` (of a node) is None too. time_s: None: what the
    partition allows by default. Raises UserError for a name that would not be one word to Slurm."""
    for option, value in (("--partition", partition), ("--gpu", gpus)):
        if value is not None and not re.fullmatch(r"[\w.:,+-]+", value):
            raise UserError(f"{option} {value!r}: not a name that Slurm knows; such are letters, digits and . : , + - _")
    name = re.sub(r"[^\w.-]+", "-", name)
    options = [f"job-name={name}", f"nodes={nodes}", "ntasks-per-node=1"]
    if gpus is not None:
        options.append(f"gpus-per-node={gpus}")
    if gpus is None and cpus is None:
        options += ["exclusive", "mem=0"]
    else:
        options.append(f"cpus-per-task={cpus or CORES_PER_GPU * n}")
    if time_s is not None:
        minutes = max(1, math.ceil(time_s / 60))
        options.append(f"time={minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}:00")
    if partition is not None:
        options.append(f"partition={partition}")
    options += ["requeue", "open-mode=append", f"signal=INT@{WARNING_S}"]
    return _TEMPLATE.format(
        options="\n".join(f"#SBATCH --{option}" for option in options), warning_s=WARNING_S, folder=shlex.quote(folder),
        program=shlex.join(program), n=n, restarts=restarts, command=shlex.join(command), interrupted=INTERRUPTED,
    )  # fmt: skip
