"""Writes the files that `launch` hands to others: a batch file of Slurm's, or a task of SkyPilot's. Nothing is submitted."""

from __future__ import annotations

import getpass
import os
import re
import shlex
import socket
from pathlib import Path
from typing import Any

from sparing.base.config import Budget, UserError
from sparing.base.config_file import read_recipe
from sparing.base.files import output_file, write_atomic
from sparing.budget.units import parse_budget, parse_extension
from sparing.data.hub import HUB

FOR = {
    "slurm": ("gpu", "cpus", "time", "partition"),
    "spot": ("gpu", "cpus", "cloud", "bucket", "volume", "failures_per_hour"),
}
"""Which options each of them takes."""
TEXTS = ("data", "val", "keep", "for_")
"""Options that name texts, which have to be there."""
MODELS = ("recipe", "run", "teacher", "from_", "base", "data.tokenizer")
"""What may name files or folders, or something else."""


def write(launch: Any, verb: str, arguments: Any, overrides: dict[str, Any]) -> None:
    """Write the file that `launch` (a `cli.launch_verb.Launch`) asks for, and say how to submit it.

    Raises UserError for options that cannot be, before anything is written."""
    if launch.slurm and launch.spot:
        raise UserError("launch: --slurm and --spot each write a file: choose one")
    kind = "slurm" if launch.slurm else "spot"
    for option in sorted({*FOR["slurm"], *FOR["spot"], "meet", "mirror"} - {*FOR[kind]}):
        if getattr(launch, option) is not None:
            raise UserError(f"launch: --{option.replace('_', '-')} does not go with --{kind}; see `sparing launch --help`")
    if launch.restarts < 0 or any(count is not None and count < 1 for count in (launch.n, launch.cpus)):
        raise UserError("launch: -n and --cpus are at least 1, --restarts 0")
    fewest, nodes = launch.machines()
    if fewest != nodes:
        raise UserError(f"launch: --nodes {launch.nodes}: --{kind} asks for one number of machines; nearest: --nodes {nodes}")
    out = arguments.run if verb == "resume" else arguments.out
    if not out:
        raise UserError(f"{verb} needs {'RUN' if verb == 'resume' else '--out'}; see `sparing {verb} --help`")
    if launch.slurm:
        _slurm(launch, nodes, verb, arguments, out)
    else:
        _spot(launch, nodes, verb, arguments, overrides, out)


def _slurm(launch: Any, nodes: int, verb: str, arguments: Any, out: str) -> None:
    from sparing.base.hardware import gpus
    from sparing.interop.slurm import sbatch, time_for

    file = output_file(launch.slurm, "--slurm")
    kind, count = (None, len(gpus())) if launch.gpu is None else gpu_of(launch.gpu, launch.n)
    n = launch.n or max(1, count)
    if count:
        _one_each(n, count)
    budget = _budget(verb, arguments)
    time_s = _seconds("--time", launch.time) if launch.time else time_for(budget.amount) if budget and budget.unit == "s" else None
    text = sbatch(
        launch.command, n, nodes, folder=os.getcwd(), name=Path(out).name, cpus=launch.cpus, time_s=time_s,
        gpus=f"{kind}:{count}" if kind else str(count) if count else None, partition=launch.partition, restarts=launch.restarts,
    )  # fmt: skip
    write_atomic(file, text)
    machines = f"{nodes} x {n} ranks, " + (f"{count} GPUs each" if count else "without GPUs (--gpu 8 asks for them)")
    until = "the partition's time (--time sets it)" if time_s is None else f"{time_s / 3600:.3g} h, then saved and queued again"
    print(f"{launch.slurm}: {machines}, for {until}; submit it with: {shlex.join(['sbatch', launch.slurm])}")


def _spot(launch: Any, nodes: int, verb: str, arguments: Any, overrides: dict[str, Any], out: str) -> None:
    from sparing.interop.skypilot import HERE, SHARED, Moved, bucket_name, task, text
    from sparing.planning.rent import lines, rented

    if verb == "resume":
        raise UserError("launch: --spot begins a run, and goes on with it by itself; `resume` is for a run that is here")
    if launch.gpu is None:
        raise UserError("launch: --spot needs --gpu KIND:COUNT, as H100:8, or --gpu none")
    if launch.bucket and launch.volume:
        raise UserError("launch: the run is kept in a --bucket or in a --volume: choose one")
    file = output_file(launch.spot, "--spot")
    kind, count = gpu_of(launch.gpu, launch.n)
    if count and not kind:
        raise UserError(f"launch: --gpu {launch.gpu}: which kind? As H100:{count}")
    n = launch.n or max(1, count)
    if count:
        _one_each(n, count)
    moved = Moved()
    name = re.sub(r"[^\w-]+", "-", Path(out).name).strip("-") or "run"
    renamed = {out: f"{SHARED if launch.volume else HERE}/{name}"}
    values = vars(arguments) | overrides
    for field in (*TEXTS, *MODELS, "data.paths"):
        value = values.get(field)
        for word in [value] if isinstance(value, str) else value or ():
            renamed[word] = moved(word)
            if field in TEXTS and renamed[word] == word and not word.startswith(HUB) and "://" not in word:
                raise UserError(f"launch: {word}: no such file or folder here, so none can be taken along")
    owner = f"{getpass.getuser()}@{socket.gethostname()}:{os.path.abspath(out)}"
    bucket = None if launch.volume else launch.bucket or bucket_name(out, owner)
    budget = _budget(verb, arguments)
    try:
        price = lines(budget, *rented(kind, count or launch.cpus or 8, nodes), nodes, launch.failures_per_hour)
        rent = "spot" if kind else None  # a processor is known there, and may have no price in the table
    except UserError as error:
        if "--failures-per-hour" in str(error):
            raise
        price, rent = [f"price: {error}"], None
    made = task(
        [launch.command[0], *(_there(word, renamed) for word in launch.command[1:])], n, nodes, name=name,
        accelerators=f"{kind}:{count}" if kind else None, cpus=launch.cpus, infra=launch.cloud, bucket=bucket, volume=launch.volume,
        mounts=moved.mounts, restarts=launch.restarts, rent=rent,
    )  # fmt: skip
    write_atomic(file, text(made))
    for there, here in moved.mounts.items():
        print(f"taken along: {here} (there {there})")
    print(f"kept in: {f'the volume {launch.volume}' if launch.volume else f'the bucket {bucket}'}, also after the job")
    for line in price:
        print(line)
    print(f"{launch.spot}: {nodes} x {n} ranks; start it with: {shlex.join(['sky', 'jobs', 'launch', launch.spot])}")


def _there(word: str, renamed: dict[str, str]) -> str:
    """A word of the command, with the path in it as it is on the other machines."""
    option, equals, value = word.partition("=")
    if word.startswith("--") and equals:
        return f"{option}={renamed.get(value, value)}"
    return renamed.get(word, word)


def gpu_of(text: str, n: int | None) -> tuple[str | None, int]:
    """(kind, how many) of `H100:8`, `H100` (as many as ranks), `8` (of any kind) or `none`. Raises UserError for anything else."""
    if text == "none":
        return None, 0
    match = re.fullmatch(r"(?:([A-Za-z][\w.+-]*)(?::([1-9]\d*))?|([1-9]\d*))", text)
    if match is None:
        raise UserError(f"launch: --gpu {text!r}: write KIND:COUNT, as H100:8, a number, or none")
    kind, count, alone = match.groups()
    return kind, int(count or alone or n or 1)


def _one_each(n: int, count: int) -> None:
    if n != count:
        raise UserError(f"launch: -n {n} with {count} GPUs: each rank has a GPU; nearest: -n {count}")


def _budget(verb: str, arguments: Any) -> Budget | None:
    """The verb's own, or its recipe's; None: `resume` goes on with what is left. Raises UserError where another verb has none."""
    if verb == "resume":
        return parse_extension(arguments.budget) if arguments.budget else None
    said = arguments.budget or (read_recipe(arguments.recipe).budget if verb == "train" else None)
    if not said:
        raise UserError(f"{verb} needs --budget; see `sparing {verb} --help`")
    return parse_budget(said)


def _seconds(option: str, text: str) -> float:
    budget = parse_budget(text)
    if budget.unit != "s":
        raise UserError(f"{option} {text}: is no time; write 30m, 2h or 1d")
    return budget.amount
