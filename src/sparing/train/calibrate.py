"""What this machine does, measured: the peak that MFU is quoted against, and which micro-batch, threads and compiler win.

Short by design: a probe is one forward and backward pass after a warm-up, and all of them together get a small share of the budget.
Gradients are thrown away and nothing of the run's state changes.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from sparing.account.hardware import Machine, load_calibration, save_calibration
from sparing.config import Config, PrecisionConfig, TrainConfig
from sparing.kernels import native, pool
from sparing.model.transformer import Transformer
from sparing.precision.linear import fastest_kind, install
from sparing.precision.policy import Policy
from sparing.train.replicas import Replicas

PEAK_SIZES = (1024, 2048, 4096)
LEAST_TOKENS = 2048
"""Smaller micro-batches are not tried: products become too thin."""
MORE = 1.05
"""How much faster another setting must look: two passes on a shared machine differ by less without any reason."""
COMPILE_S = 90.0
"""A compilation of the training step takes about this long on two cores (LAB.md)."""


def measure_peak(device: str = "cpu", dtype: torch.dtype = torch.bfloat16, sizes: tuple[int, ...] = PEAK_SIZES, repeats: int = 3) -> float:
    """FLOP/s of the best square matrix product on this process's threads."""
    best = 0.0
    for size in sizes:
        a, b = torch.randn(size, size, device=device).to(dtype), torch.randn(size, size, device=device).to(dtype)
        a @ b
        for _ in range(repeats):
            wait(device)
            start = time.perf_counter()
            a @ b
            wait(device)
            best = max(best, 2.0 * size**3 / (time.perf_counter() - start))
    return best


def peak_flops(machine: Machine, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> float:
    """`measure_peak`, remembered per machine. The larger of what was measured before and what a quick look shows now: a machine that
    was busy the first time must not set the yardstick low for good."""
    key = f"peak_flops_{device}_{str(dtype).removeprefix('torch.')}"
    known = load_calibration(machine).get(key, 0.0)
    now = measure_peak(device, dtype, (2048,) if known else PEAK_SIZES, repeats=2)
    if now > known:
        save_calibration(machine, {key: now})
    return max(now, known)


def has_compiler() -> bool:
    """torch.compile on a CPU needs a C++ compiler."""
    return any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl"))


def choose(
    model: Transformer,
    config: Config,
    machine: Machine,
    batch,
    seconds: float,
    check: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[TrainConfig, dict[str, str]]:
    """Fill in what `config.train` leaves open (micro_batch_size, threads, compile) by measuring on `batch`, within about `seconds`.

    -> (the complete TrainConfig, the reason for each choice by dotted name). check: called between probes, may raise.
    """
    t = config.train
    device = str(next(model.parameters()).device.type)
    reasons: dict[str, str] = {}
    start = time.monotonic()
    timed: dict[tuple[int, int], float] = {}
    replicas = t.replicas or 1
    cores = t.threads or machine.cores_physical
    if t.replicas is None and device == "cpu" and not t.compile and 1 < cores <= t.batch_size and native.passes() is not None:
        # The compiled passes are for single threads: undivided, every model tried was slower and took more memory.
        replicas = cores
        reasons["train.replicas"] = "one a core: the compiled passes have one thread each (LAB.md)"

    def probe(threads: int, micro: int, anew: bool = False) -> float:
        """Tokens per second."""
        check()
        if anew or (threads, micro) not in timed:
            if device == "cpu":
                torch.set_num_threads(threads)
            timed[threads, micro] = _speed(model, t, batch, micro, device, replicas=replicas)
        return timed[threads, micro]

    if device == "cpu" and native.passes() is None:
        say("no C compiler found: training with PyTorch's own operations, without compiled passes and torch.compile, which is slower")
    all_threads = [t.threads] if t.threads else sorted({machine.cores_physical, machine.cores_logical})
    all_threads = [cores] if replicas > 1 else all_threads
    micro_batches = [t.micro_batch_size] if t.micro_batch_size else [size for size in _micro_batches(t) if size >= replicas]
    threads, micro = all_threads[-1], micro_batches[0]
    # Micro-batch first, on all threads, then threads with the best micro-batch: the product of both would cost more than it finds.
    for size in micro_batches[: 1 if device == "cuda" and not t.micro_batch_size else None]:
        # What is measured first is slower than it will be (fresh memory), whatever its size: it gets a second chance.
        if probe(threads, size) > MORE * probe(threads, micro) and probe(threads, size) > MORE * probe(threads, micro, anew=True):
            micro = size
        if time.monotonic() - start > seconds / 2:
            break
    for count in all_threads:
        if time.monotonic() - start > seconds:
            break
        if probe(count, micro) > MORE * probe(threads, micro):
            threads = count
    if device == "cpu":
        torch.set_num_threads(threads)
    speed = probe(threads, micro)
    if t.micro_batch_size is None:
        tried = ", ".join(f"{m} rows {v:,.0f}" for (n, m), v in sorted(timed.items()) if n == all_threads[-1])
        reasons["train.micro_batch_size"] = f"measured, tokens/s: {tried}"
    if t.threads is None and device == "cpu":
        reasons["train.threads"] = "measured, tokens/s: " + ", ".join(
            f"{n} threads {v:,.0f}" for (n, m), v in sorted(timed.items()) if m == micro
        )
    if t.replicas is None and replicas == 1 and device == "cpu" and threads > 1 and micro >= threads and not t.compile:
        check()
        divided = _speed(model, t, batch, micro, device, replicas=threads)
        reasons["train.replicas"] = f"measured, tokens/s: {divided:,.0f} with {threads}, {speed:,.0f} without"
        if divided > 1.03 * speed:
            replicas, speed = threads, divided
    compiled = t.compile
    p = config.precision
    if compiled is None and (p.linear not in ("none", "auto") or p.activations != "full"):
        compiled, reasons["train.compile"] = False, "8-bit products and activations are not compiled"
    elif compiled is None:
        compiled, reasons["train.compile"] = _worth_compiling(model, t, batch, micro, device, speed, seconds, check, say)
    replicas = 1 if compiled else replicas
    threads = threads if device == "cpu" else t.threads
    _give_back()
    return replace(t, micro_batch_size=micro, threads=threads, replicas=replicas, compile=compiled), reasons


def choose_products(model: Transformer, config: Config, batch) -> tuple[PrecisionConfig, str]:
    """`precision.linear = auto`, measured on `batch` with everything else chosen: 8 bits where they are faster by 5 % and nine tenths of
    every direction's multiplications stay under the error budget; -> (the complete PrecisionConfig, the reason)."""
    t, p = config.train, config.precision
    device = str(next(model.parameters()).device.type)
    kind = fastest_kind(device)
    if kind is None or t.dtype != "bfloat16":
        return replace(p, linear="none"), "no 8-bit arithmetic here that is faster than 16 bits"
    if t.compile:
        return replace(p, linear="none"), "training is compiled here, which 8-bit products are not"
    micro = t.micro_batch_size or t.batch_size
    sixteen = _speed(model, t, batch, micro, device, replicas=t.replicas or 1)
    sites = install(model, kind)
    try:
        eight = _speed(model, t, batch, micro, device, replicas=t.replicas or 1)
        policy = Policy(sites, replace(p, measure_every=1))
        for _ in range(2):  # to finer blocks, and from there to 16 bits
            policy.begin(0)
            _speed(model, t, batch, micro, device, passes=1)
            policy.end()
    finally:
        install(model, None)
    sixteen = max(sixteen, _speed(model, t, batch, micro, device, replicas=t.replicas or 1))  # what comes first is measured slower
    share = min(policy.shares().values())
    why = f"measured, tokens/s: {eight:,.0f} in {kind}, {sixteen:,.0f} in 16 bits; {share:.0%} within the error budget"
    chosen = kind if eight > 1.05 * sixteen and share >= 0.9 else "none"
    return replace(p, linear=chosen), why


def _worth_compiling(model, t, batch, micro, device, speed, seconds, check, say) -> tuple[bool, str]:
    if device == "cpu" and not has_compiler():
        return False, "no C++ compiler on this machine"
    if seconds < COMPILE_S:
        return False, f"the budget is too short to try: compiling takes about {COMPILE_S:.0f} s"
    check()
    try:
        fast = _speed(model, t, batch, micro, device, compiled=True)
    except Exception as error:  # a compiler's failure is not ours, and never a reason not to train
        say(f"torch.compile failed ({type(error).__name__}): training without it")
        return False, f"torch.compile failed: {type(error).__name__}"
    return fast > 1.05 * speed, f"measured, tokens/s: {fast:,.0f} with, {speed:,.0f} without"


def _micro_batches(t: TrainConfig) -> list[int]:
    """The whole batch, then halves of it while a micro-batch keeps enough tokens."""
    sizes = [t.batch_size]
    while sizes[-1] % 2 == 0 and sizes[-1] // 2 * t.seq_len >= LEAST_TOKENS:
        sizes.append(sizes[-1] // 2)
    return sizes


def _speed(
    model: Transformer, t: TrainConfig, batch, micro: int, device: str, compiled: bool = False, replicas: int = 1, passes: int = 3
) -> float:
    """Tokens per second of the best forward and backward pass over `micro` rows but the first of several."""
    loss_fn = torch.compile(model.loss, dynamic=False) if compiled else model.loss
    divided = Replicas(model, replicas)
    rows = slice(0, micro)
    part = batch[rows].cut(t.short_seq_len) if t.short_seq_len else batch[rows]
    tokens, targets, documents = (x.to(device) for x in (part.tokens, part.targets, part.documents))
    took = []
    model.compute_dtype = getattr(torch, t.dtype)
    model.train()
    for _ in range(passes):
        wait(device)
        before = time.perf_counter()
        options = {"denominator": tokens.numel(), "mtp_weight": t.mtp_weight, "sequence_balance": t.sequence_balance}
        divided.backward(tokens, targets, documents if t.document_mask else None, loss_fn=loss_fn, **options)
        wait(device)
        took.append(time.perf_counter() - before)
    for parameter in model.parameters():
        parameter.grad = None
    return tokens.numel() / min(took[1:] or took)


def _give_back() -> None:
    """Memory that the probes used and training will not, to the system: glibc keeps it otherwise, an arena for each thread."""
    pool.trim()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
