"""A SkyPilot task for `sparing launch`: a managed job on spot machines, which goes on where it was when one of them is taken away.

Written as YAML by hand: it is a few keys, and JSON's strings are YAML's. Checked against `sky.utils.schemas` of SkyPilot 0.14.1.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path

from sparing import __version__
from sparing.base.config import UserError

HERE, KEPT, SHARED = "/tmp/sparing", "/sparing-kept", "/sparing-shared"
"""On those machines: what the job reads and writes, the bucket, the volume of several machines."""
STOPPED = [130, 143]
"""Statuses of a job that was told to stop, as machines are that are switched off: no reason to give up."""
PORT = 29500
VENV = "~/sparing-venv"


class Moved:
    """Paths of this machine that a command names, as they will be named there. `mounts`: there -> here."""

    def __init__(self) -> None:
        self.mounts: dict[str, str] = {}

    def __call__(self, named: str) -> str:
        """The name there of a file, folder or glob; a name of nothing here stays as it is."""
        if os.path.exists(named):
            return self._place(named)
        if not glob.has_magic(named) or not glob.glob(named, recursive=True):
            return named
        parts = Path(named).parts
        first = next(at for at, part in enumerate(parts) if glob.has_magic(part))
        return os.path.join(self._place(os.path.join(*parts[:first]) if first else "."), *parts[first:])

    def _place(self, path: str) -> str:
        real = os.path.realpath(path)  # what links lead to is not taken along
        there = next((there for there, here in self.mounts.items() if here == real), None)
        if there is None:
            there = f"{HERE}/given/{len(self.mounts)}/{os.path.basename(real)}"
            self.mounts[there] = real
        return there


def bucket_name(run: str, owner: str) -> str:
    """A name for a new bucket, of letters, digits and - as all clouds allow. owner: what tells this run from others of its name."""
    short = re.sub(r"[^a-z0-9]+", "-", os.path.basename(run).lower()).strip("-")[:30]
    return f"sparing-{short or 'run'}-{hashlib.sha256(owner.encode()).hexdigest()[:8]}"


def task(
    command: Sequence[str],
    n: int,
    nodes: int = 1,
    *,
    name: str,
    accelerators: str | None,
    cpus: int | None = None,
    infra: str | None = None,
    bucket: str | None = None,
    volume: str | None = None,
    mounts: dict[str, str] | None = None,
    restarts: int = 100,
    rent: str | None = None,
) -> dict:
    """The task as SkyPilot's schema has it.

    command: a verb and its options, with paths as they are there. bucket: where the run is kept, an address as s3://NAME, or a name: then
    it is made; or volume: SkyPilot's name of one that all machines mount. rent: how money is counted there, where its price is known.
    Raises UserError for several machines without a volume, since a mounted bucket is not a file system that several machines share."""
    for option, value in (("--cloud", infra), ("--gpu", accelerators), ("--volume", volume)):
        if value is not None and not re.fullmatch(r"[\w.:/*+-]+", value):
            raise UserError(f"{option} {value!r}: not a name that SkyPilot knows")
    for word in command:
        if not word.replace("\n", "").replace("\t", "").isprintable():
            raise UserError(f"launch: {word!r} has characters that a YAML file cannot have")
    if nodes > 1 and not volume:
        raise UserError(
            f"launch: --spot with {nodes} machines needs --volume NAME, one of SkyPilot's that all mount: they share the run folder, "
            "and a mounted bucket is no folder that several machines write; nearest: --nodes 1 with more GPUs"
        )
    resources: dict = {"use_spot": True, "job_recovery": {"strategy": "EAGER_NEXT_REGION", "recover_on_exit_codes": STOPPED}}
    if accelerators is not None:
        resources["accelerators"] = accelerators
    if cpus is not None:
        resources["cpus"] = f"{cpus}+"
    if infra is not None:
        resources["infra"] = infra
    files: dict = dict(mounts or {})
    words = ["launch", "-n", str(n), "--restarts", str(restarts)]
    together = ""
    if volume is None:
        files[KEPT] = {"source" if "://" in bucket else "name": bucket, "mode": "MOUNT"}
        words += ["--mirror", f"{KEPT}/{name}"]
    if nodes > 1:
        together = f' --nodes "$SKYPILOT_NUM_NODES" --meet "$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{PORT}"'
    result = {
        "name": re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-") or "sparing",
        "num_nodes": nodes,
        "resources": resources,
        "envs": {"SPARING_RENT": rent} if rent else {},
        "file_mounts": files,
        "volumes": {SHARED: volume} if volume else {},
        "setup": f"""\
set -e
export PATH="$HOME/.local/bin:$PATH"
command -v uv || curl -LsSf https://astral.sh/uv/install.sh | sh
uv venv --allow-existing --python 3.12 {VENV}
uv pip install --python {VENV}/bin/python sparing=={__version__}
""",
        "run": f"""\
export SPARING_LAUNCH_ID="$SKYPILOT_TASK_ID"
{VENV}/bin/sparing {shlex.join(words)}{together} \\
  {shlex.join(command)}
""",
    }
    return {key: value for key, value in result.items() if value != {}}


def text(task: dict) -> str:
    """The task as a YAML file."""
    lines = ["# Written by `sparing launch --spot`. Start it with: sky jobs launch FILE"]
    for key, value in task.items():
        if isinstance(value, dict):
            lines.append(f"{key}:")
            lines += [f"  {_word(name)}: {json.dumps(inner, ensure_ascii=False)}" for name, inner in value.items()]
        elif isinstance(value, str) and "\n" in value:
            lines += [f"{key}: |", textwrap.indent(value, "  ").rstrip("\n")]
        else:
            lines.append(f"{key}: {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def _word(key: str) -> str:
    return key if re.fullmatch(r"[a-z_]+", key) else json.dumps(key, ensure_ascii=False)
