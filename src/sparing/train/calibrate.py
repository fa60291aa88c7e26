"""What this machine does, measured: which micro-batch, threads, compiler and products win.

All probes together have a limit in seconds, and the next is begun only if it is expected to fit into what is left of them. A probe is a
few forward and backward passes. Gradients are thrown away and nothing of the run's state changes.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from sparing.base.config import Config, PrecisionConfig, TrainConfig
from sparing.base.hardware import Machine
from sparing.budget.flops import train_flops
from sparing.data.loader import Batch
from sparing.kernels import native
from sparing.kernels.products import fitting
from sparing.model.transformer import Transformer
from sparing.precision.eight_bit import fastest_kind, install
from sparing.precision.policy import Policy
from sparing.train.objective import NextToken
from sparing.train.peak import wait
from sparing.train.replicas import Replicas

PASSES = 3
"""Forward and backward passes of a probe, the first of which warms up."""
FIRST_GUESS = 0.25
"""Share of the peak by which the first pass's time is guessed."""
LEAST_TOKENS = 2048
"""Smaller micro-batches are not tried: products become too thin."""
MORE = 1.05
"""How much faster another setting must look: two passes on a shared machine differ by less without any reason."""
EIGHT_BIT_PASSES = 10
"""What trying 8-bit products takes, in passes in 16 bits: two more probes, and two passes that measure errors, which are slower."""
COMPILE_S = 90.0
"""A compilation of the training step takes about this long on two cores (LAB.md)."""


def has_compiler() -> bool:
    """torch.compile on a CPU needs a C++ compiler."""
    return any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl"))


def choose(
    model: Transformer,
    config: Config,
    machine: Machine,
    batch,
    seconds: float,
    peak: float | None = None,
    check: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda _: None,
    cut_short: Callable[[str], None] = lambda _: None,
) -> tuple[TrainConfig, dict[str, str]]:
    """Fill in what `config.train` leaves open (micro_batch_size, threads, compile) by measuring on `batch`, within about `seconds`.

    -> (the complete TrainConfig, the reason for each choice by dotted name). peak: FLOP/s of this machine, for a first guess of a pass's
    time. check: called between probes, may raise. cut_short: told what was not measured because it would have taken too long.
    """
    t = config.train
    device = str(next(model.parameters()).device.type)
    reasons: dict[str, str] = {}
    start = time.monotonic()
    timed: dict[tuple[int, int], float] = {}
    divided: dict[int, Replicas] = {}
    replicas = t.replicas or 1
    cores = t.threads or machine.cores_physical
    passes = t.kernels != "plain" and native.passes() is not None
    if t.replicas is None and device == "cpu" and not t.compile and 1 < cores <= t.batch_size and passes:
        # The compiled passes are for single threads: undivided, every model tried was slower and took more memory.
        replicas = cores
        reasons["train.replicas"] = "one a core: the compiled passes have one thread each (LAB.md)"

    def probe(threads: int, micro: int, anew: bool = False) -> float:
        """Tokens per second; 0 where measuring it would not fit into the time that is left."""
        check()
        if anew or (threads, micro) not in timed:
            if not fits(micro):
                return timed.get((threads, micro), 0.0)
            if device == "cpu":
                torch.set_num_threads(threads)
            if threads not in divided:  # its threads serve all probes: each keeps its work space for good
                divided[threads] = _replicas(model, config, device, replicas=replicas)
            timed[threads, micro] = _speed(model, config, batch, micro, device, divided[threads])
        return timed[threads, micro]

    def pass_s(micro: int) -> float:
        """Seconds of a forward and backward pass over `micro` rows, by what was timed, or by a share of the peak."""
        guess = FIRST_GUESS * peak / train_flops(config.model, t.seq_len, adapter=config.adapter) if peak else math.inf
        return micro * t.seq_len / max(timed.values(), default=guess)

    def fits(micro: int) -> bool:
        return time.monotonic() - start + PASSES * pass_s(micro) <= seconds

    if device == "cpu" and native.passes() is None:
        say("no C compiler found: training with PyTorch's own operations, without compiled passes and torch.compile, which is slower")
    all_threads = [t.threads] if t.threads else sorted({machine.cores_physical, machine.cores_logical})
    all_threads = [cores] if replicas > 1 else all_threads
    micro_batches = [t.micro_batch_size] if t.micro_batch_size else [size for size in _micro_batches(t) if size >= replicas]
    threads, micro = all_threads[-1], micro_batches[0]
    # Micro-batch first, on all threads, then threads with the best micro-batch: the product of both would cost more than it finds.
    if len(micro_batches) > 1 and device == "cuda":
        micro_batches = micro_batches[:1]
    elif not fits(micro_batches[0]):  # a smaller one may
        micro_batches = [size for size in micro_batches if fits(size)] or micro_batches[-1:]
    micro = micro_batches[0]
    for size in micro_batches:
        # What is measured first is slower than it will be (fresh memory), whatever its size: it gets a second chance.
        if probe(threads, size) > MORE * probe(threads, micro) and probe(threads, size) > MORE * probe(threads, micro, anew=True):
            micro = size
        if time.monotonic() - start > seconds / 2:
            break
    for count in all_threads:
        if probe(count, micro) > MORE * probe(threads, micro):
            threads = count
    if device == "cpu":
        torch.set_num_threads(threads)
    speed = probe(threads, micro)
    if not speed:
        told = f"not measured: {PASSES} passes over {micro} rows would take about {PASSES * pass_s(micro):.1f} s of {seconds:.1f}"
        cut_short(f"micro-batch and threads were {told}")
    if t.micro_batch_size is None:
        tried = ", ".join(f"{m} rows {v:,.0f}" for (n, m), v in sorted(timed.items()) if n == all_threads[-1])
        reasons["train.micro_batch_size"] = f"measured, tokens/s: {tried}" if tried else told
    if t.threads is None and device == "cpu":
        tried = ", ".join(f"{n} threads {v:,.0f}" for (n, m), v in sorted(timed.items()) if m == micro)
        reasons["train.threads"] = f"measured, tokens/s: {tried}" if tried else told
    undivided = t.replicas is None and replicas == 1 and device == "cpu" and not t.compile
    if undivided and threads > 1 and micro >= threads and fits(micro):
        check()
        faster = _speed(model, config, batch, micro, device, _replicas(model, config, device, replicas=threads))
        reasons["train.replicas"] = f"measured, tokens/s: {faster:,.0f} with {threads}, {speed:,.0f} without"
        if faster > 1.03 * speed:
            replicas, speed = threads, faster
    compiled = t.compile
    p = config.precision
    if compiled is None and (p.linear not in ("none", "auto") or p.activations != "full"):
        compiled, reasons["train.compile"] = False, "8-bit products and activations are not compiled"
    elif compiled is None:
        compiled, reasons["train.compile"] = _worth_compiling(model, config, batch, micro, device, speed, seconds, check, say)
    replicas = 1 if compiled else replicas
    threads = threads if device == "cpu" else t.threads
    _trim()
    kernels = t.kernels
    if kernels is None:
        why = "plain", "what torch.compile compiles"
        kernels, reasons["train.kernels"] = why if compiled else fitting(replicas, threads, device, t.dtype)
    return replace(t, micro_batch_size=micro, threads=threads, replicas=replicas, compile=compiled, kernels=kernels), reasons


def choose_products(
    model: Transformer, config: Config, batch, seconds: float = math.inf, cut_short: Callable[[str], None] = lambda _: None
) -> tuple[PrecisionConfig, str]:
    """`precision.linear = auto`, measured on `batch` with everything else chosen: 8 bits where they are faster by 5 % and nine tenths of
    every direction's multiplications stay under the error budget; -> (the complete PrecisionConfig, the reason). Within about `seconds`:
    16 bits where measuring would take longer, of which `cut_short` is told."""
    t, p = config.train, config.precision
    device = str(next(model.parameters()).device.type)
    kind = fastest_kind(device)
    if kind is None or t.dtype != "bfloat16":
        return replace(p, linear="none"), "no 8-bit arithmetic here that is faster than 16 bits"
    if t.compile:
        return replace(p, linear="none"), "training is compiled here, which 8-bit products are not"
    micro = t.micro_batch_size or t.batch_size
    sixteen = _speed(model, config, batch, micro, device, _replicas(model, config, device, replicas=t.replicas or 1))
    if (needs := EIGHT_BIT_PASSES * micro * t.seq_len / sixteen) > seconds:
        cut_short(f"8-bit products were not tried: that would take about {needs:.1f} s of {seconds:.1f}")
        return replace(p, linear="none"), "8 bits not tried: measuring would take too long"
    sites = install(model, kind)
    try:
        eight = _speed(model, config, batch, micro, device, _replicas(model, config, device, replicas=t.replicas or 1))
        policy = Policy(sites, replace(p, measure_every=1))
        for _ in range(2):  # to finer blocks, and from there to 16 bits
            policy.begin(0)
            _speed(model, config, batch, micro, device, _replicas(model, config, device), passes=1)
            policy.end()
    finally:
        install(model, None)
    sixteen = max(
        sixteen, _speed(model, config, batch, micro, device, _replicas(model, config, device, replicas=t.replicas or 1))
    )  # what comes first is measured slower
    share = min(policy.shares().values())
    why = f"measured, tokens/s: {eight:,.0f} in {kind}, {sixteen:,.0f} in 16 bits; {share:.0%} within the error budget"
    chosen = kind if eight > 1.05 * sixteen and share >= 0.9 else "none"
    return replace(p, linear=chosen), why


def _worth_compiling(model, config, batch, micro, device, speed, seconds, check, say) -> tuple[bool, str]:
    if device == "cpu" and not has_compiler():
        return False, "no C++ compiler on this machine"
    if seconds < COMPILE_S or not speed:
        return False, f"the budget is too short to try: compiling takes about {COMPILE_S:.0f} s"
    check()
    try:
        fast = _speed(model, config, batch, micro, device, _replicas(model, config, device, compiled=True))
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


def _replicas(model: Transformer, config: Config, device: str, *, compiled: bool = False, replicas: int = 1) -> Replicas:
    t = config.train
    kernels = t.kernels or fitting(replicas, torch.get_num_threads(), device, t.dtype)[0]
    return Replicas(model, NextToken.of(config), replicas, compiled, kernels)


def _speed(model: Transformer, config: Config, batch: Batch, micro: int, device: str, divided: Replicas, passes=PASSES) -> float:
    """Tokens per second of the best forward and backward pass over `micro` rows but the first of several."""
    t = config.train
    part = batch[:micro].to(device)
    part = part.cut(t.short_seq_len) if t.short_seq_len else part
    part = part if t.document_mask else replace(part, documents=None)
    took = []
    model.compute_dtype = getattr(torch, t.dtype)
    model.train()
    for _ in range(passes):
        wait(device)
        before = time.perf_counter()
        divided.gradients(part)
        wait(device)
        took.append(time.perf_counter() - before)
    for parameter in model.parameters():
        parameter.grad = None
    return part.tokens.numel() / min(took[1:] or took)


def _trim() -> None:
    """Memory that the probes used and training will not, to the system: glibc keeps it otherwise, an arena for each thread."""
    native.trim()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
