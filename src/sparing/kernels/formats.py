"""Which number formats this processor multiplies fast: measured once, in about a tenth of a second, and kept with the machine.

A feature flag does not say it. PyTorch multiplies bfloat16 on a processor with AVX2 alone in a scalar loop, a hundred times slower than
float32 (pytorch/pytorch#146508). Whatever chooses a format reads this one fact, here or as `Machine.fast`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import torch

from sparing.base import hardware
from sparing.base.hardware import Machine

NAMES = ("float32", "bfloat16", "float16", "int8")
SIZES = (64, 256)
"""Of the square product; the larger one only where the smaller one shows that it is short."""
EACH_S = 0.02
"""For each format at each size."""


def measure() -> dict[str, float]:
    """Operations per second of a square product on one core, by format; formats that torch does not multiply here are left out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {name: rate for name in NAMES if (rate := _rate(name)) is not None}
    finally:
        torch.set_num_threads(threads)


def _rate(name: str) -> float | None:
    best = 0.0
    for size in SIZES:
        if best and 2.0 * size**3 / best > EACH_S:
            break
        a = torch.randn(size, size).mul_(30).to(getattr(torch, name))
        product = torch._int_mm if name == "int8" else torch.mm
        begun = time.perf_counter()
        try:
            for done in range(1, 51):  # the first one also makes the kernel
                start = time.perf_counter()
                product(a, a)
                end = time.perf_counter()
                best = max(best, 2.0 * size**3 / (end - start))
                if end - begun > (EACH_S if done > 2 else 5 * EACH_S):  # something else may have had the core during the first ones
                    break
        except (RuntimeError, NotImplementedError):
            return None
    return best


def measured(machine: Machine) -> Machine:
    """`machine` with its formats, measured now and kept where they were not known."""
    return machine if machine.formats else replace(machine, formats=_known(str(hardware.home()), machine))


@cache
def _known(home: str, machine: Machine) -> Mapping[str, float]:
    """Cached by home: a process that is given another one looks there, but measures once."""
    stored = hardware.load_calibration(machine).get("formats")
    if stored:
        return stored
    found = _measure_once()
    hardware.save_calibration(machine, {"formats": found})
    return found


_measure_once = cache(measure)


def this_machine() -> Machine:
    """This machine with its formats."""
    return measured(hardware.machine())


@cache
def _fast(home: str, format: str) -> bool:
    return this_machine().fast(format)


def fast(format: str) -> bool:
    """Whether this machine's processor multiplies `format` at least as fast as float32."""
    return _fast(str(hardware.home()), format)


def training_dtype() -> str:
    """The number format that training multiplies in on this machine's processor."""
    return "bfloat16" if fast("bfloat16") else "float32"


def warning(format: str, machine: Machine) -> str | None:
    """A line for whoever asked for a format that is slow here; None where it is not."""
    times = machine.slowness(format)
    return None if times <= 1.0 else f"{format}: this processor multiplies it {times:.3g} times slower than float32 (measured)"
