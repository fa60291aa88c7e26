"""Times whole optimizer steps of a few small models on this machine, for the planner; kept in the machine's calibration.

About six seconds: a model is timed only if its steps are expected to fit into what is left. Data and weights are random; nothing is
written but the timings.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import sparing
from sparing.base.config import Config, OptimConfig, TrainConfig
from sparing.base.hardware import Machine, load_calibration, save_calibration
from sparing.budget.estimate import DESCRIPTION, features
from sparing.budget.flops import train_flops
from sparing.kernels.formats import this_machine
from sparing.kernels.products import fitting
from sparing.resolve import LADDER, Shape, shaped
from sparing.train.calibrate import FIRST_GUESS
from sparing.train.peak import peak_flops, wait
from sparing.train.practice import practise, trainer_of

KEY = "step_timings"
TOKENS = 4096
WIDE = Shape(640, 1, 10, 64)
"""As wide as open models are, and of one layer."""
PROBES = (
    (LADDER[2], False, 256, 4096), (LADDER[2], True, 256, 4096), (LADDER[0], False, 256, 2048), (WIDE, False, 512, 1024),
    (LADDER[4], True, 256, 4096), (LADDER[2], False, 512, 2048), (LADDER[3], False, 512, 8192), (LADDER[3], True, 512, 1024),
)  # fmt: skip
"""(shape, mixture, sequence, vocabulary): what the ladder is made of, most telling first."""
WARM_UP = 2
"""Steps of each model that are not counted."""
MEAN_STEP = 1.03
"""A run's mean step in units of its median (fourteen runs, LAB.md): the few steps timed here say nothing of slow ones."""


def step_timings(
    machine: Machine, device: str = "cpu", seconds: float = 5.5, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """For `budget.estimate.fit`: {"description", "limit", "peak_flops", "rows": [{"features", "seconds"}]}; measured once, then remembered,
    and measured again where more `seconds` are given than there were. In a process of its own: its memory is not the run's."""
    if known := _known(machine, device, seconds):
        return known
    say(f"measuring training steps on this machine, once, for about {seconds:.0f} s")
    source = str(Path(sparing.__file__).parent.parent)
    code = f"import sys; sys.path.insert(0, {source!r}); from sparing.train.profile import main; main({device!r}, {seconds!r})"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, told = child.communicate(timeout=10 * seconds + 60)
    except subprocess.TimeoutExpired:
        told = b"it did not end"
    finally:
        child.kill()
        child.wait()
    lines = told.decode(errors="replace").splitlines()
    if found := _known(machine, device, seconds):
        for line in lines:
            say(line)
        return found
    say(f"training steps were not measured ({lines[-1] if lines else 'no message'}): default rates are used")
    return {"description": DESCRIPTION, "limit": seconds, "peak_flops": peak_flops(machine, device, seconds=seconds / 3), "rows": []}


def _known(machine: Machine, device: str, seconds: float) -> dict[str, Any] | None:
    known = load_calibration(machine).get(f"{KEY}_{device}")
    current = isinstance(known, dict) and known.get("description") == DESCRIPTION and known.get("limit", 0.0) >= seconds
    return known if current else None


def main(device: str, seconds: float) -> None:
    """Measure and remember; what is to be said goes to standard error."""
    measure(this_machine(), device, seconds, lambda message: print(message, file=sys.stderr))


def measure(machine: Machine, device: str, seconds: float, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """As `step_timings`, in this process."""
    dtype = machine.training_dtype(device)
    peak = peak_flops(machine, device, dtype, seconds / 3, say)
    fitting(1, 1, device, dtype)  # compiles what was never compiled, and measures products: no part of a step
    trainer_of(next(_configs(machine, device, dtype)))  # imports what optimizers need, for seconds
    start, probes, speed, left_out = time.monotonic(), [], FIRST_GUESS * peak, 0
    for config in _configs(machine, device, dtype):
        flops = TOKENS * train_flops(config.model, config.train.seq_len)
        if probes and time.monotonic() - start > seconds:
            break
        smallest = config.model.hidden_size == LADDER[0].hidden_size  # is timed in any case: without a model there is no plan
        if time.monotonic() - start + (WARM_UP + 1) * flops / speed > seconds and (probes or not smallest):
            left_out += 1
            continue
        step = _stepper(config)
        for _ in range(WARM_UP):  # slow ones: memory is fresh
            step()
        probes.append((config, step, [step()]))
        speed = flops / probes[-1][2][0]
    if left_out:
        say(f"{left_out} of {len(PROBES)} models were too slow here to be timed in {seconds:.0f} s: the plan is fitted to {len(probes)}")
    while time.monotonic() - start < seconds:  # in turn: what else the machine does then is in all of them
        for _, step, took in probes:
            took.append(step())
    rows = [{"features": features(c, c.train.seq_len, peak).tolist(), "seconds": MEAN_STEP * median(took)} for c, _, took in probes]
    found = {"description": DESCRIPTION, "limit": seconds, "peak_flops": peak, "rows": rows}
    save_calibration(machine, {f"{KEY}_{device}": found})
    return found


def _configs(machine: Machine, device: str, dtype: str) -> Iterator[Config]:
    cores = machine.cores_physical if device == "cpu" else 1
    for shape, moe, seq_len, vocab in PROBES:
        rows = TOKENS // seq_len
        train = TrainConfig(seq_len=seq_len, batch_size=rows, dtype=dtype, device=device, replicas=min(cores, rows))
        optim = OptimConfig(matrix="adamw" if shape is WIDE else "muon")  # what goes on from an open model learns by AdamW
        yield Config(model=shaped(shape, vocab, seq_len, moe), train=train, optim=optim)


def _stepper(config: Config) -> Callable[[], float]:
    """Makes an optimizer step on random words; -> its seconds."""
    trainer = trainer_of(config)

    def step() -> float:
        wait(config.train.device)
        before = time.perf_counter()
        practise(trainer)
        wait(config.train.device)
        return time.perf_counter() - before

    return step
