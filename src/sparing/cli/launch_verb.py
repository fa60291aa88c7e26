"""The verb `launch`: another verb as several processes, here, or by a batch file or a spot job that it writes (`job_files`); or a queue
of verbs."""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sparing.base.config import UserError

if TYPE_CHECKING:
    import tyro  # `arguments.parse` imports it for the chosen verb

    from sparing.cli.arguments import Call

SHARED = ("train", "sft", "distill", "dpo", "grpo", "grow", "resume")
"""Verbs whose steps are divided among ranks."""


@dataclass
class Launch:
    """Run a verb as several processes (ranks) that train one model together, on this machine or on many; start them anew when one dies.

    Where the run exists already, it goes on, so the same command may be given again. With --queue FILE, run the jobs of a file instead."""

    takes: ClassVar[str] = "command"
    owns_signals: ClassVar[bool] = True
    command: tyro.conf.Positional[list[str]] = field(default_factory=list)
    """The verb, and its options behind it."""
    n: int | None = None
    """Ranks on this machine. Default: one a GPU, else one."""
    nodes: str = "1"
    """Machines, as 2, or 1:4 where some may go and others come. Each runs the same command; RUN is a folder that all of them see."""
    meet: str | None = None
    """HOST:PORT of one of them, where they meet."""
    restarts: int = 100
    """How often ranks that died are started anew. Each time costs little, since the run goes on from its last checkpoint."""
    mirror: str | None = None
    """What outlives this machine, a folder or a URL of fsspec's (s3://BUCKET/RUN, gs://...): RUN is copied there at each checkpoint, and
    brought back from there where it is not here."""
    slurm: str | None = None
    """A file to write for sbatch, instead of starting anything here."""
    spot: str | None = None
    """A file to write for `sky jobs launch` (SkyPilot), instead: on spot machines, which the run survives."""
    gpu: str | None = None
    """With --slurm or --spot: what each machine has, as H100:8, 8 (of any kind), or none."""
    cpus: int | None = None
    """With --slurm or --spot: cores of each machine. Default: 4 a GPU; whole nodes of Slurm without GPUs."""
    time: str | None = None
    """With --slurm: 2h, after which the job is saved and queued again. Default: a budget in time and a tenth more."""
    partition: str | None = None
    """With --slurm."""
    cloud: str | None = None
    """With --spot: where, as aws, gcp/us-central1 or k8s. Default: wherever it is cheapest."""
    bucket: str | None = None
    """With --spot: where the run is kept, as s3://NAME or gs://NAME, or the name of a bucket to make. Default: one is made."""
    volume: str | None = None
    """With --spot, instead of a bucket: a volume of SkyPilot's that all machines mount; several need one."""
    failures_per_hour: float | None = None
    """With --spot: how often a machine is taken away, for the price. Default: as often as this workspace has seen."""
    queue: str | None = None
    """A TOML file of jobs, [[job]] command = "train ...", deadline, priority, preemptible: packed on this machine by predicted memory and
    time (docs/scaling.md). The same command goes on."""
    plan: bool = False
    """With --queue: say when each job would run, and start none."""
    json: bool = False
    """With --queue: print one JSON object on standard output. Otherwise the verb's own --json does it."""

    def __call__(self, call: Call) -> None:
        from sparing.cli.arguments import choose, parse

        if self.queue:
            return self._queue(call)
        if self.plan or self.json:
            raise UserError(f"launch: --{'plan' if self.plan else 'json'} goes with --queue FILE; the verb's own options stand behind it")
        call.need(VERB=self.command)
        verb, words = choose(self.command, call.verbs)
        if verb not in SHARED:
            raise UserError(f"launch: {verb} is not divided among ranks; verbs that are: {', '.join(SHARED)}")
        arguments, overrides = parse(verb, call.verbs[verb], words)  # a slip is told once, and before anything starts
        if self.slurm or self.spot:
            from sparing.cli.job_files import write

            return write(self, verb, arguments, overrides)
        for option in ("gpu", "cpus", "time", "partition", "cloud", "bucket", "volume", "failures_per_hour"):
            if getattr(self, option) is not None:
                raise UserError(f"launch: --{option.replace('_', '-')} goes with --slurm FILE or --spot FILE, which it is for")
        return self._start(arguments.run if verb == "resume" else arguments.out)

    def machines(self) -> tuple[int, int]:
        """The fewest and the most. Raises UserError."""
        found = re.fullmatch(r"(\d+)(?::(\d+))?", self.nodes)
        fewest, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= fewest <= most:
            raise UserError(f"launch: --nodes {self.nodes}: at least 1, as 2, or the fewest and the most, as 1:4")
        return fewest, most

    def _start(self, run: str | None) -> None:
        from sparing.base.hardware import gpus
        from sparing.interop.launch import launch
        from sparing.interop.mirror import Mirror

        nodes = self.machines()
        if self.mirror and (nodes[1] > 1 or not run):
            raise UserError(
                "launch: --mirror is for one machine, and for a verb with --out" if run else "launch: --mirror needs the verb's --out"
            )
        n = max(1, len(gpus())) if self.n is None else self.n
        with Mirror(Path(run), self.mirror) if self.mirror else nullcontext():
            status = launch(self.command, n, nodes, self.meet, self.restarts)
        if status:
            sys.exit(status)

    def _queue(self, call: Call) -> None:
        from sparing.cli.output import print_json
        from sparing.cli.queued import command_of
        from sparing.cli.streams import leaving_on_sigterm
        from sparing.job.queue import run_queue
        from sparing.job.queue_screen import lines

        for field_ in fields(self):
            if field_.name not in ("queue", "plan", "json") and getattr(self, field_.name) != getattr(Launch(), field_.name):
                raise UserError(f"launch: --queue runs the jobs of its file alone: {field_.name} does not go with it")
        with leaving_on_sigterm():
            result = run_queue(self.queue, partial(command_of, verbs=call.verbs, shared=SHARED), start=not self.plan)
        if self.json:
            print_json(result, out=call.out)
        elif not self.plan:
            print("\n".join(lines(result)))
        if result["failed"] and not self.plan:
            sys.exit(1)
