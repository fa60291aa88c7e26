"""Sources of energy figures: NVML (GPUs), RAPL (processors), or an estimate, labelled as one, where the system shows no counter.

A source counts joules from the moment it was made; `how` says whether it measures or estimates. Counters see the whole chip, other
programs included; a model sees this process's CPU time and nothing else's.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Protocol

import psutil

from sparing.account.prices import Rates
from sparing.base.hardware import Machine, gpu_numbers
from sparing.base.rank import this_rank

POWERCAP = Path("/sys/class/powercap")


class Source(Protocol):
    """joules() never falls; reading it twice costs little and changes nothing."""

    part: str
    """cpu or gpu."""
    name: str
    how: str
    """measured or estimated."""

    def joules(self) -> float: ...


class Rapl:
    """The processors' own counters (Linux powercap: docs.kernel.org/power/powercap/powercap.html): packages and their memory.

    A package's zone has its cores and graphics in it, but not the memory (dram); psys, where it exists, has the package in it once
    more, and intel-rapl-mmio shows package-0 a second time: neither is added. Read at least once a round of the counter (minutes).
    """

    part, name, how = "cpu", "RAPL", "measured"

    def __init__(self, folder: Path = POWERCAP, share: float = 1.0):
        """share: of what is counted, that is this process's. Raises OSError where there is no zone, or where only root may read it (kernels
        since 5.10 on many systems)."""
        self.share, zones = share, {}
        for zone in sorted(folder.glob("intel-rapl:*")):
            name = (zone / "name").read_text().strip()
            if name.startswith("package") or name == "dram":
                zones[zone] = int((zone / "max_energy_range_uj").read_text())
        if not zones:
            raise FileNotFoundError(f"{folder}: no RAPL zone")
        self._rounds = zones
        self._last = {zone: self._read(zone) for zone in zones}
        self._total = 0

    @staticmethod
    def _read(zone: Path) -> int:
        return int((zone / "energy_uj").read_text())

    def joules(self) -> float:
        for zone, before in self._last.items():
            now = self._read(zone)
            self._total += now - before + (self._rounds[zone] if now < before else 0)  # the counter began anew
            self._last[zone] = now
        return self.share * self._total / 1e6


class Nvml:
    """The energy counters of the NVIDIA GPUs that torch sees (nvmlDeviceGetTotalEnergyConsumption: Volta and later, in mJ).

    A GPU without the counter is asked for its power at each reading instead, so that it never counts as nothing.
    """

    part, name, how = "gpu", "NVML", "measured"

    def __init__(self):
        """Raises ImportError without nvidia-ml-py, RuntimeError where NVML shows no such GPU."""
        import pynvml
        import torch

        self._nvml = pynvml
        self._watched = time.monotonic()
        self._added = 0.0
        try:
            pynvml.nvmlInit()
            uuids = [str(torch.cuda.get_device_properties(number).uuid) for number in gpu_numbers()]
            self._devices = [pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}") for uuid in uuids]
            if not self._devices:
                raise RuntimeError("torch sees no CUDA device")
            self._counted, self._sampled = [], []
            for device in self._devices:
                try:
                    pynvml.nvmlDeviceGetTotalEnergyConsumption(device)
                    self._counted.append(device)
                except pynvml.NVMLError:
                    pynvml.nvmlDeviceGetPowerUsage(device)
                    self._sampled.append(device)
        except pynvml.NVMLError as error:
            raise RuntimeError(f"NVML: {error}") from None
        self._start = self._counters()

    def _counters(self) -> float:
        return sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(device) for device in self._counted) / 1e3

    def joules(self) -> float:
        if self._sampled:
            now = time.monotonic()
            self._added += (now - self._watched) * sum(self._nvml.nvmlDeviceGetPowerUsage(device) for device in self._sampled) / 1e3
            self._watched = now
        return self._added + self._counters() - self._start


class PowerModel:
    """idle + utilisation · (busy − idle) watts; utilisation: the CPU time of this process and of its finished children over that of all
    cores. Linear, so it holds for any span: joules = idle · seconds + (busy − idle) · CPU seconds / cores."""

    part, name, how = "cpu", "model of the processor", "estimated"

    def __init__(self, idle_w: float, busy_w: float, cores: int):
        self._before = 0.0
        self.change(idle_w, busy_w, cores)

    def change(self, idle_w: float, busy_w: float, cores: int) -> None:
        """Other watts from now on."""
        if hasattr(self, "_clock"):
            self._before = self.joules()
        self.idle_w, self.busy_w, self.cores = idle_w, busy_w, max(1, cores)
        self._clock, self._cpu = time.monotonic(), cpu_seconds()

    def joules(self) -> float:
        seconds = time.monotonic() - self._clock
        busy = min(seconds, (cpu_seconds() - self._cpu) / self.cores)  # two hyperthreads of a core are not twice as busy
        return self._before + self.idle_w * seconds + (self.busy_w - self.idle_w) * busy


class Constant:
    """A GPU without NVML: the watts that it is said to draw under load, all the time."""

    part, name, how = "gpu", "rated power", "estimated"

    def __init__(self, watts: float):
        self.watts, self._clock = watts, time.monotonic()

    def joules(self) -> float:
        return self.watts * (time.monotonic() - self._clock)


def cpu_seconds() -> float:
    """CPU time of this process (all threads) and of its children that have ended, seconds.

    psutil has both in hundredths of a second only, which is too coarse for the joules of one answer.
    """
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def sources(machine: Machine, rates: Rates, processor: Rates) -> list[Source]:
    """The best source for each part of `machine`. rates: of what it trains on; processor: of its processor alone."""
    chosen: list[Source] = []
    if machine.gpus:
        try:
            chosen.append(Nvml())
        except (ImportError, RuntimeError):
            chosen.append(Constant(rates.watts_busy))
    try:
        chosen.append(Rapl(share=1 / this_rank().local_size))
    except (OSError, ValueError):
        chosen.append(PowerModel(processor.watts_idle, processor.watts_busy, machine.cores_physical))
    return chosen


def reset_peak_memory() -> None:
    """Start the peaks that `peak_memory` reports anew (man 5 proc, clear_refs; CUDA's allocator)."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    if cuda := _cuda():
        cuda.reset_peak_memory_stats()


def peak_memory() -> tuple[int, int]:
    """(bytes of main memory of this process, bytes of CUDA memory), the most since `reset_peak_memory`."""
    peak = 0
    with contextlib.suppress(OSError, ValueError, StopIteration), open("/proc/self/status") as file:
        peak = 1024 * int(next(line for line in file if line.startswith("VmHWM:")).split()[1])
    cuda = _cuda()
    return peak, cuda.max_memory_allocated() if cuda else 0


def resident_memory() -> int:
    """Bytes of main memory that this process holds now."""
    return psutil.Process().memory_info().rss


def cuda_memory() -> int:
    """Bytes that CUDA's allocator holds for tensors now; 0 where CUDA is not used."""
    cuda = _cuda()
    return cuda.memory_allocated() if cuda else 0


def _cuda():
    """torch.cuda where somebody uses it already: metering alone never starts CUDA."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized() else None
