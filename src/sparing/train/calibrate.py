"""Chooses micro-batch, threads, torch.compile and 8-bit products for a run by measuring them on this machine.

A probe times a few forward and backward passes. All probes share one limit in seconds; a probe starts only if it should fit into the rest
of it. Gradients are discarded, and the run's state does not change.
"""

from __future__ import annotations

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
"""Forward and backward passes of a probe. The first one warms up and is not counted."""
FIRST_GUESS = 0.25
"""Share of the machine's peak that the first pass is assumed to reach, before any pass was timed."""
LEAST_TOKENS = 2048
"""Micro-batches with fewer tokens are not tried: their matrix products are too thin to be fast."""
MARGIN = 1.05
"""A setting replaces another one if it is this many times as fast. Two passes of one setting differ by less on a shared machine."""
EIGHT_BIT_PASSES = 10
"""Cost of trying 8-bit products, in 16-bit passes: two more probes, and two slower passes that measure errors."""
TOO_LARGE = "not measured: the whole model does not fit one rank"
COMPILE_S = 90.0
"""Time to compile the training step on two cores (LAB.md)."""


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which torch.compile needs on a CPU."""
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
    """Measure the best values of the fields that `config.train` leaves open (micro_batch_size, threads, replicas, compile, kernels).

    -> (the complete TrainConfig, the reason for each choice by dotted name). model: one on the meta device is not measured; the smallest
    micro-batch is chosen. batch: what the probes compute. seconds: limit of all probes.
    peak: FLOP/s of this machine, from which the first pass's time is estimated. check: called between probes; may raise. cut_short: called
    with a message for each choice that could not be measured within the limit.
    """
    t = config.train
    unreal = model.device.type == "meta"
    device = t.device or ("cuda" if machine.gpus else "cpu") if unreal else model.device.type
    reasons: dict[str, str] = {}
    start = time.monotonic()
    speeds: dict[tuple[int, int], float] = {}  # (threads, micro-batch) -> tokens/s
    replicas_by_threads: dict[int, Replicas] = {}
    replicas = t.replicas or 1
    cores = t.threads or machine.cores_physical
    passes = t.kernels != "plain" and native.passes() is not None
    if t.replicas is None and device == "cpu" and not t.compile and 1 < cores <= t.batch_size and passes:
        # The compiled passes are for single threads: undivided, every model tried was slower and took more memory.
        replicas = cores
        reasons["train.replicas"] = "one a core: the compiled passes have one thread each (LAB.md)"

    def probe(threads: int, micro: int, anew: bool = False) -> float:
        """Tokens per second; 0 if measuring it would not fit into the limit. anew: measure again."""
        check()
        if anew or (threads, micro) not in speeds:
            if not fits(micro):
                return speeds.get((threads, micro), 0.0)
            if device == "cpu":
                torch.set_num_threads(threads)
            if threads not in replicas_by_threads:  # one set of threads for all probes, whose work space is made once
                replicas_by_threads[threads] = _replicas(model, config, device, replicas=replicas)
            speeds[threads, micro] = _speed(model, config, batch, micro, device, replicas_by_threads[threads])
        return speeds[threads, micro]

    def pass_s(micro: int) -> float:
        """Estimated seconds of a forward and backward pass over `micro` rows: from the fastest probe, else from the peak."""
        guess = FIRST_GUESS * peak / train_flops(config.model, t.seq_len, adapter=config.adapter, esft=config.esft) if peak else math.inf
        return micro * t.seq_len / max(speeds.values(), default=guess)

    def fits(micro: int) -> bool:
        return not unreal and time.monotonic() - start + PASSES * pass_s(micro) <= seconds

    if device == "cpu" and native.passes() is None:
        say("no C compiler found: training with PyTorch's own operations, without compiled passes and torch.compile, which is slower")
    all_threads = [t.threads] if t.threads else sorted({machine.cores_physical, machine.cores_logical})
    all_threads = [cores] if replicas > 1 else all_threads
    micro_batches = [t.micro_batch_size] if t.micro_batch_size else [size for size in _micro_batches(t) if size >= replicas]
    threads, micro = all_threads[-1], micro_batches[0]
    # First the micro-batch with all threads, then the threads with the best micro-batch: trying all pairs costs more than it gains.
    if unreal:
        micro_batches = micro_batches[-1:]
    elif len(micro_batches) > 1 and device == "cuda":
        micro_batches = micro_batches[:1]
    elif not fits(micro_batches[0]):  # a smaller one may
        micro_batches = [size for size in micro_batches if fits(size)] or micro_batches[-1:]
    micro = micro_batches[0]
    for size in micro_batches:
        # The first probe is slow whatever its size, because its memory is fresh: it is measured again before it loses.
        if probe(threads, size) > MARGIN * probe(threads, micro) and probe(threads, size) > MARGIN * probe(threads, micro, anew=True):
            micro = size
        if time.monotonic() - start > seconds / 2:
            break
    for count in all_threads:
        if probe(count, micro) > MARGIN * probe(threads, micro):
            threads = count
    if device == "cpu":
        torch.set_num_threads(threads)
    speed = probe(threads, micro)
    if not speed:
        not_measured = f"not measured: {PASSES} passes over {micro} rows would take about {PASSES * pass_s(micro):.1f} s of {seconds:.1f}"
        not_measured = TOO_LARGE if unreal else not_measured
        cut_short(f"micro-batch and threads were {not_measured}")
    if t.micro_batch_size is None:
        tried = ", ".join(f"{m} rows {v:,.0f}" for (n, m), v in sorted(speeds.items()) if n == all_threads[-1])
        reasons["train.micro_batch_size"] = f"measured, tokens/s: {tried}" if tried else not_measured
    if t.threads is None and device == "cpu":
        tried = ", ".join(f"{n} threads {v:,.0f}" for (n, m), v in sorted(speeds.items()) if m == micro)
        reasons["train.threads"] = f"measured, tokens/s: {tried}" if tried else not_measured
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
    elif compiled is None and unreal:
        compiled, reasons["train.compile"] = False, TOO_LARGE
    elif compiled is None:
        compiled, reasons["train.compile"] = _worth_compiling(model, config, batch, micro, device, speed, seconds, check, say)
    replicas = 1 if compiled else replicas
    threads = threads if device == "cpu" else t.threads
    _trim()
    kernels = t.kernels
    if kernels is None:
        why = "plain", "what torch.compile compiles"
        kernels, reasons["train.kernels"] = why if compiled else fitting(replicas, threads, device, t.dtype, config.model)
    return replace(t, micro_batch_size=micro, threads=threads, replicas=replicas, compile=compiled, kernels=kernels), reasons


def choose_products(
    model: Transformer, config: Config, batch, seconds: float = math.inf, cut_short: Callable[[str], None] = lambda _: None
) -> tuple[PrecisionConfig, str]:
    """Decide `precision.linear = auto` by measuring on `batch`, with everything else chosen; -> (the complete PrecisionConfig, the reason).

    8 bits are chosen if they are 5 % faster and nine tenths of the multiplications of every direction stay within the error budget.
    seconds: limit. If measuring would take longer, 16 bits are chosen and `cut_short` is called with a message."""
    t, p = config.train, config.precision
    if model.device.type == "meta":
        return replace(p, linear="none"), TOO_LARGE
    device = model.device.type
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
    """Sizes to try: the whole batch, then half of it again and again, down to LEAST_TOKENS."""
    sizes = [t.batch_size]
    while sizes[-1] % 2 == 0 and sizes[-1] // 2 * t.seq_len >= LEAST_TOKENS:
        sizes.append(sizes[-1] // 2)
    return sizes


def _replicas(model: Transformer, config: Config, device: str, *, compiled: bool = False, replicas: int = 1) -> Replicas:
    """As the trainer makes them: twins have what is set before they are made."""
    t = config.train
    model.compute_dtype = getattr(torch, t.dtype)
    model.set_recompute(t.recompute)
    kernels = t.kernels or fitting(replicas, torch.get_num_threads(), device, t.dtype, config.model)[0]
    return Replicas(model, NextToken.of(config), replicas, compiled, kernels)


def _speed(model: Transformer, config: Config, batch: Batch, micro: int, device: str, replicas: Replicas, passes=PASSES) -> float:
    """Tokens per second of the fastest of several forward and backward passes over `micro` rows; the first one does not count."""
    t = config.train
    part = batch[:micro].to(device)
    part = part.cut(t.short_seq_len) if t.short_seq_len else part
    part = part if t.document_mask else replace(part, documents=None)
    took = []
    replicas.train(True)
    for _ in range(passes):
        wait(device)
        before = time.perf_counter()
        replicas.gradients(part)
        wait(device)
        took.append(time.perf_counter() - before)
    for parameter in model.parameters():
        parameter.grad = None
    return part.tokens.numel() / min(took[1:] or took)


def _trim() -> None:
    """Give the memory that only the probes used back to the system."""
    native.trim()
    native.trim_heap()
