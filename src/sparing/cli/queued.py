"""Checks a command line that a queue is to run later, as far as its verb does before it begins."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sparing.base.config import UserError
from sparing.cli.arguments import HELP_FLAGS, Call, choose, parse
from sparing.planning.needs import Command

NEVER_END = ("serve", "chat")
NOT_THROUGH_API = ("plan", "receipt", "report", "compare", "bench")
"""Verbs that begin without `call.api`; so do the ways of `data`."""


class _Begins(Exception):
    """A verb has checked its arguments, and would begin."""


class _Rehearsal(Call):
    """A call that ends where the verb would begin its work."""

    @property
    def api(self):
        raise _Begins


def command_of(words: Sequence[str], verbs: Mapping[str, type], shared: Sequence[str]) -> Command:
    """The command line, parsed. shared: verbs that `launch` divides among ranks.

    Raises UserError for whatever its verb would refuse before it begins, and for verbs that cannot wait in a queue."""
    verb, rest = choose(list(words), dict(verbs))
    if verb in NEVER_END:
        raise UserError(f"{verb} waits for people, and never ends: it is no job of a queue")
    if HELP_FLAGS & set(rest):
        raise UserError(f"{verb}: --help is no job")
    arguments, overrides = parse(verb, verbs[verb], rest)
    if verb == "launch":
        return _launched(words, arguments, verbs, shared)
    _rehearse(verb, arguments, overrides, verbs)
    return Command(tuple(words), verb, vars(arguments), overrides)


def _launched(words: Sequence[str], launch: Any, verbs: Mapping[str, type], shared: Sequence[str]) -> Command:
    """launch: a `cli.launch_verb.Launch`."""
    from sparing.planning.places import this_machine

    for option in ("queue", "slurm", "spot", "meet"):
        if getattr(launch, option):
            raise UserError(f"launch --{option} is no job of a queue, which is for this machine alone; -n is")
    if launch.machines()[1] > 1:
        raise UserError("launch --nodes is no job of a queue, which is for this machine alone; -n is")
    inner = command_of(launch.command, verbs, shared)
    if inner.verb not in shared or inner.ranks:
        raise UserError(f"launch: {inner.words[0]} is not divided among ranks; verbs that are: {', '.join(shared)}")
    ranks = max(1, len(this_machine().gpus)) if launch.n is None else launch.n
    if ranks < 1:
        raise UserError(f"launch: -n {ranks}: at least 1")
    return Command(tuple(words), inner.verb, inner.values, inner.overrides, ranks)


def _rehearse(verb: str, arguments: Any, overrides: dict[str, Any], verbs: Mapping[str, type]) -> None:
    call = _Rehearsal(verb, time.monotonic(), overrides, io.StringIO(), dict(verbs))
    if verb.startswith("data "):
        paths = getattr(arguments, "paths", None) or getattr(arguments, "kinds", None)
        return call.need(PATH=paths, out=arguments.out)
    if verb in NOT_THROUGH_API:
        return None
    if getattr(arguments, "prompt", None) == "-":
        raise UserError(f"{verb}: a job of a queue has no standard input: --prompt TEXT")
    try:
        arguments(call)
    except _Begins:
        return None
    raise AssertionError(f"{verb} has begun without call.api")
