"""What this process may use of this machine, and what was measured on it before ($SPARING_HOME/calibration).

A container's or a batch system's limits count, not the host's size: CPU affinity, cgroup CPU quota, cgroup memory limit. psutil knows
the machine and the affinity; cgroups, the processor's name and which hyperthreads share a core it doesn't.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil

from sparing.base.config import UserError
from sparing.base.files import write_atomic
from sparing.base.rank import this_rank


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_bytes: int
    capability: str
    """CUDA compute capability, as "9.0"."""


@dataclass(frozen=True)
class Machine:
    """One machine as this process sees it."""

    os: str
    cpu: str
    """Model name; where the system gives none, the architecture."""
    cores_physical: int
    """Cores that this process may run on, hyperthreads counted once, cut to the CPU quota."""
    cores_logical: int
    memory_bytes: int
    """Memory that this process may fill: the machine's or the container's, whichever is less."""
    gpus: tuple[Gpu, ...] = ()
    formats: Mapping[str, float] = field(default_factory=dict, compare=False)
    """Operations per second of a small matrix product on one core, by number format; empty: `kernels.formats` has not measured them yet."""

    def fast(self, format: str) -> bool:
        """Whether the CPU multiplies `format` at least as fast as float32. Only float32 is, as long as nothing was measured."""
        return format == "float32" or self.formats.get(format, 0.0) >= self.formats.get("float32", 0.0) > 0.0

    def training_dtype(self, device: str) -> str:
        """The number format that training multiplies in on `device` ("cpu", "cuda")."""
        return "bfloat16" if device == "cuda" or self.fast("bfloat16") else "float32"

    def slowness(self, format: str) -> float:
        """How many times slower than float32 the CPU multiplies `format`: 1 where it is as fast, or not measured."""
        return 1.0 if self.fast(format) or not self.formats.get(format) else self.formats["float32"] / self.formats[format]

    def describe(self) -> str:
        """One line: `2 cores of AMD EPYC`, `1 x NVIDIA H200, 16 cores of ...`."""
        gpus = f"{len(self.gpus)} x {self.gpus[0].name}, " if self.gpus else ""
        return f"{gpus}{self.cores_logical} cores of {self.cpu}"


def machine(with_gpus: bool = True) -> Machine:
    """Look at this machine; of several ranks on it, at this one's share. Looking for GPUs imports torch."""
    ranks = this_rank().local_size
    here = Machine(
        os=f"{platform.system()} {platform.release()}",
        cpu=cpu_name(),
        cores_physical=max(1, min(cores(), _physical(_affinity())) // ranks),
        cores_logical=max(1, cores() // ranks),
        memory_bytes=_memory() // ranks,
        gpus=gpus() if with_gpus else (),
    )
    return replace(here, formats=load_calibration(here).get("formats", {}))


def cores() -> int:
    """Logical cores that this process may run on, cut to the CPU quota."""
    most, quota = len(_affinity()), _cpu_quota()
    # A quota of 1.5 cores runs one thread at full speed; two would be stopped a quarter of the time.
    return most if quota is None else min(most, max(1, math.floor(quota)))


def _affinity() -> list[int]:
    process = psutil.Process()
    return process.cpu_affinity() if hasattr(process, "cpu_affinity") else list(range(psutil.cpu_count() or 1))  # macOS has none


def gpu_numbers() -> list[int]:
    """Which of the CUDA devices that torch sees (CUDA_VISIBLE_DEVICES counts) are this process's: of several ranks on a host, one each."""
    import torch

    numbers = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    rank = this_rank()
    return numbers if rank.local_size == 1 or not numbers else [numbers[rank.local % len(numbers)]]


def gpus() -> tuple[Gpu, ...]:
    """The CUDA devices of this process."""
    numbers = gpu_numbers()
    if not numbers:
        return ()
    import torch

    devices = [torch.cuda.get_device_properties(number) for number in numbers]
    return tuple(Gpu(p.name, p.total_memory, f"{p.major}.{p.minor}") for p in devices)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _cgroup_folders(controller: str, proc: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> list[Path]:
    """This process's cgroup and all above it, version 2 or the controller's version 1 tree: a limit may sit on any of them."""
    folders = []
    for line in _read(proc).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            base = Path(root)
        elif controller in controllers.split(","):
            base = Path(root) / controller
        else:
            continue
        inside = Path(path.strip("/"))
        folders += [base / part for part in (inside, *inside.parents)]
    return folders


def _cpu_quota() -> float | None:
    """Cores' worth of CPU time that the cgroups grant; None: no limit."""
    quotas = []
    for folder in _cgroup_folders("cpu"):
        words = _read(folder / "cpu.max").split()
        if len(words) == 2 and words[0].isdigit():
            quotas.append(int(words[0]) / int(words[1]))
        quota, period = _read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()
        if quota.isdigit() and period.isdigit():  # "-1" is no limit
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _memory() -> int:
    amounts = [psutil.virtual_memory().total]
    for folder in _cgroup_folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _read(folder / name).strip()
            if limit.isdigit():
                amounts.append(int(limit))  # version 1 writes about 2^63 for no limit; the minimum takes care of it
    return min(amounts)


def free_memory() -> int:
    """Bytes that this process may still take: of the machine's, and of what the cgroups grant (files that were read can make room)."""
    amounts = [psutil.virtual_memory().available]
    for folder in _cgroup_folders("memory"):
        for most, used, cached in (
            ("memory.max", "memory.current", "inactive_file "),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
        ):
            limit, taken = _read(folder / most).strip(), _read(folder / used).strip()
            if limit.isdigit() and taken.isdigit():
                files = [line.removeprefix(cached) for line in _read(folder / "memory.stat").splitlines() if line.startswith(cached)]
                amounts.append(int(limit) - int(taken) + int(files[0] if files else 0))
    return max(0, min(amounts))


def _physical(cpus: list[int]) -> int:
    """Cores among `cpus`, hyperthreads counted once. psutil counts those of the whole machine only."""
    if sys.platform != "linux":
        return min(psutil.cpu_count(logical=False) or len(cpus), len(cpus))
    return len(_by_core(cpus))


def _by_core(cpus: list[int]) -> list[tuple[int, ...]]:
    """`cpus` of Linux, those of a core (hyperthreads) together, in their order."""
    cores: dict[object, list[int]] = {}
    for cpu in cpus:
        cores.setdefault(_read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or cpu, []).append(cpu)
    return [tuple(core) for core in cores.values()]


def cpus_of_cores() -> list[tuple[int, ...]]:
    """The CPUs of each core that this process may use, as many cores as its quota allows. A process that is bound to some of them
    (`os.sched_setaffinity`) sees a machine of that many cores. Empty where the system binds none (macOS, Windows)."""
    if not hasattr(os, "sched_setaffinity"):
        return []
    return _by_core(sorted(_affinity()))[: machine(with_gpus=False).cores_physical]


def share(on: Machine, count: int, gpus: int = 0) -> Machine:
    """What a process sees that is bound to `count` of the cores of `on`, and to so many of its GPUs. It may fill all the memory."""
    threads = max(1, on.cores_logical // on.cores_physical)
    part = replace(on, cores_physical=count, cores_logical=count * threads, gpus=on.gpus[:gpus])
    return replace(part, formats=load_calibration(part).get("formats", {}))


def cpu_name() -> str:
    """The processor's model name; where the system gives none, the architecture."""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip() or platform.machine()
        except (OSError, subprocess.TimeoutExpired):
            return platform.machine()
    for line in _read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """The instruction sets that Linux says the processor has, as "avx512_bf16"; empty on other systems."""
    for line in _read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def home() -> Path:
    """$SPARING_HOME, by default ~/.local/share/sparing: calibrations, fitted laws, the workspace ledger.

    Raises UserError for a user without a home folder.
    """
    path = os.path.expanduser(os.environ.get("SPARING_HOME") or "~/.local/share/sparing")
    if path.startswith("~"):
        raise UserError(f"there is no home folder {path.split('/')[0]} (no HOME, no entry in passwd): set SPARING_HOME to a folder")
    return Path(path)


INSTRUCTION_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "SPARING_PROCESSOR")
"""Environment variables that keep torch's libraries, and our own C (`kernels.native`), from using all that the processor has."""


def _facts(on: Machine) -> dict:
    """What a machine is, without what was measured on it."""
    facts = asdict(on)
    del facts["formats"]
    return facts


def machine_key(on: Machine) -> str:
    """Names what a measurement depends on: the machine as this process sees it, torch's version, and what limits instruction sets."""
    try:
        torch_version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch_version = ""
    facts = {**_facts(on), "os": platform.system(), "torch": torch_version}
    facts |= {name: os.environ[name] for name in INSTRUCTION_LIMITS if name in os.environ}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def load_calibration(on: Machine) -> dict:
    """What was measured on this machine before, by name; empty when nothing was, or when the file is damaged."""
    try:
        values = json.loads((home() / "calibration" / f"{machine_key(on)}.json").read_text())["values"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return values if isinstance(values, dict) else {}


def save_calibration(on: Machine, values: dict) -> bool:
    """Add measurements (JSON values by name) to this machine's. False when the folder can't be written: nothing is lost but time."""
    path = home() / "calibration" / f"{machine_key(on)}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"machine": _facts(on), "values": {**load_calibration(on), **values}}, indent=1))
    except (OSError, ValueError):  # a full disk is a ValueError here (run.DiskFullError)
        return False
    return True
