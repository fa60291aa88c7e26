"""What ranks that train together send each other in a step, and hold, in each layout of `[parallel]` (`sparing.parallel`).

Bytes sent are of what a collective is about, on one rank: the tensor that is added up, broadcast, put together from pieces or cut into
them; of an all-to-all, the rows that a rank sends, those to itself included. `benchmarks/collectives.py` counts the same where the
collectives are called, and tests hold one to the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from math import prod

from sparing.base.config import Config
from sparing.base.layers import EMBED, HEAD, SELECTION_BIAS, Layer, is_matrix, layers, mixtures, shapes
from sparing.budget.memory import (
    MUON_BYTES,
    PROCESS_BYTES,
    REUSED,
    KernelPath,
    Memory,
    gives_back,
    path_of,
    saved_per_token,
    training_memory,
)
from sparing.kernels.sizes import MOMENT_BLOCK

Tensors = Mapping[str, tuple[tuple[int, ...], int]]
"""Shape, and bytes of a number, by name."""


def learning(config: Config) -> tuple[Tensors, Tensors]:
    """What learns: (what all ranks have, this rank's part of the experts where those are divided). See `train.optim.keep_as`."""
    narrow, parts = 4 if config.precision.weights == "float32" else 2, _parts(config)
    common, own = {}, {}
    for name, shape in shapes(config.model).items():
        size = narrow if is_matrix(name, len(shape)) else 4
        if parts > 1 and ".mlp.experts." in name:
            own[name] = (shape[0] // parts, *shape[1:]), size
        elif not name.endswith(SELECTION_BIAS):
            common[name] = shape, size
    return common, own


def _parts(config: Config) -> int:
    return config.parallel.experts if config.parallel.shard != "nothing" else 1


def passes(config: Config, ranks: int) -> int:
    """How many micro-batches a step of a rank has (`Trainer._passes`)."""
    t = config.train
    smallest, largest = t.batch_size // ranks, -(-t.batch_size // ranks)
    return min(smallest, -(-largest // (t.micro_batch_size or t.batch_size)))


def sent(config: Config, ranks: int) -> dict[str, float]:
    """Bytes of each kind of collective in a step of one rank: gradients, update, and the numbers that go with them. `config` is resolved.

    Where experts are divided, rows are as many as come on average: all ranks' sums are exact. What ranks agree on around a step (stop, skip
    a batch) takes 8 bytes each and is not counted."""
    c, t, p, parts = config.model, config.train, config.parallel, _parts(config)
    common, own = learning(config)
    whole, pieces = _bytes(common), _bytes(own) if ranks > parts else 0.0
    heads = 1 + (c.mtp_depth > 0 and t.mtp_weight > 0) + bool(mixtures(c))
    # Tokens, rows and weight of the batch; parts of the loss, experts' loads; which tensors have a gradient.
    numbers = 3 * 8.0 + 4 * (heads + sum(layer.feed_forward.experts for layer in mixtures(c))) + 4 * len(common | own)
    if p.shard == "nothing":
        return {"all_reduce": numbers + whole}
    found = {"all_reduce": numbers + 8}  # and the gradients' norm
    if p.shard == "optimizer":
        found |= {"reduce": whole + pieces, "broadcast": whole + pieces}
    else:
        cut, times = _padded(common, ranks), passes(config, ranks)
        once = _bytes(cut)
        # Layers are put together once more for the backward pass; modules that draft too, when what joins their inputs comes last there.
        again = sum(_bytes(_of(cut, layer)) for layer in layers(c))
        found |= {"all_gather": times * (once + again), "reduce_scatter": times * once, "gather": once, "scatter": once}
        found |= {"reduce": pieces, "broadcast": pieces} if pieces else {}
    if parts > 1:
        found["all_to_all"] = len(mixtures(c)) * exchanged(config, ranks)
    return found


def exchanged(config: Config, ranks: int) -> float:
    """Bytes of a step's all-to-alls of one rank in one mixture. A row goes to each chosen expert, also where two are on one rank."""
    c, t = config.model, config.train
    rows = t.batch_size / ranks * t.seq_len * c.num_experts_per_tok
    there_and_back = 2 * rows * c.hidden_size * (2 if t.dtype == "bfloat16" else 4)
    gates, numbers, counts = 4 * rows, 8 * rows, 8 * config.parallel.experts * passes(config, ranks)
    forward = there_and_back + gates + numbers + counts
    return forward * (2 if t.recompute else 1) + there_and_back + gates


def held(config: Config, ranks: int, path: KernelPath | None = None) -> Memory:
    """Peak of the rank that holds most, during the passes or the update. `config` is resolved. Loads torch, where owners are found."""
    c, t = config.model, config.train
    common, own = learning(config)
    rows = -(-t.batch_size // ranks)
    micro = -(-rows // passes(config, ranks)) if own or config.parallel.shard == "weights" else min(rows, t.micro_batch_size or rows)
    path = path or path_of(config)
    kept = training_memory(replace(config, train=replace(t, batch_size=rows, micro_batch_size=micro)), path=path).activations
    size = 2 if t.dtype == "bfloat16" else 4
    if own and path == "cuda" and size == 2 and config.precision.weights == "float32" and not t.recompute:
        kept -= size * sum(layer.feed_forward.routed for layer in layers(c))  # experts that tokens travel to keep no copies of weights
    owned = _fullest(config, common, own, ranks)
    moments = sum(_moments(config, name, of) for name, of in owned.items())
    weights, update = _bytes(common) + _bytes(own), MUON_BYTES * _largest_group(config, owned)
    gradients = weights
    if config.parallel.shard == "weights":
        masters = _bytes({name: of for name, of in owned.items() if name in common})
        gradients = _bytes(_padded(common, ranks)) / ranks + _bytes(own)
        weights, update = gradients + masters, update + masters  # the update has gradients of whole tensors
        every = [_bytes(_of(common, layer)) for layer in layers(c)]
        ends, drafting = _bytes(common) - sum(every), sum(every[c.num_layers :])
        # Whole for all of a pass: embedding and head; and modules that draft and a layer beside the next one, or at its end the gradients
        # of embedding and head, which are copied before they are cut.
        kept = ends + max(kept + drafting + 2 * max(every), 2 * ends)
    work = micro * t.seq_len * max(saved_per_token(layer, t.seq_len, size, path) for layer in layers(c))
    reused = REUSED[False] * min(gradients, kept) if micro >= rows else 0.0
    return Memory(weights, gradients, moments, kept, PROCESS_BYTES[t.device or "cpu"] + max(work, update - kept), reused)


def _fullest(config: Config, common: Tensors, own: Tensors, ranks: int) -> Tensors:
    """What the rank updates that has most to keep for it."""
    if config.parallel.shard == "nothing":
        return common
    from sparing.parallel.owners import owners_of

    def by_rank(tensors: Tensors, count: int) -> list[Tensors]:
        found: list[Tensors] = [{} for _ in range(count)]
        for name, rank in owners_of({name: prod(shape) for name, (shape, _) in tensors.items()}, count).items():
            found[rank][name] = tensors[name]
        return found

    parts = _parts(config)
    every, lines = by_rank(common, ranks), by_rank(own, ranks // parts)
    masters = config.parallel.shard == "weights"
    loads = [{name: _moments(config, name, of) for name, of in tensors.items()} for tensors in every]
    totals = [sum(load.values()) + masters * _bytes(tensors) for load, tensors in zip(loads, every, strict=True)]
    totals = [total + sum(_moments(config, *one) for one in lines[rank // parts].items()) for rank, total in enumerate(totals)]
    first = totals.index(max(totals))
    return {**every[first], **lines[first // parts]}


def _moments(config: Config, name: str, of: tuple[tuple[int, ...], int]) -> float:
    """Bytes that the optimizer keeps of a tensor: one number of each under Muon, two under AdamW, and what `[precision]` says."""
    (shape, size), p = of, config.precision
    one = 4.0 if p.moments == "float32" else 1.0 + 4.0 / min(MOMENT_BLOCK, config.model.hidden_size)
    numbers = 1 if _by_muon(config, name, shape) else 2
    return prod(shape) * (numbers * one + (size == 2 and p.compensation == "kahan"))


def _by_muon(config: Config, name: str, shape: tuple[int, ...]) -> bool:
    return config.optim.matrix == "muon" and is_matrix(name, len(shape)) and name not in (EMBED, HEAD)


def _largest_group(config: Config, owned: Tensors) -> float:
    """Numbers in the largest batch of equally shaped matrices, which Muon orthogonalises together; where its state is of few bits, none."""
    found: dict[tuple[int, ...], float] = defaultdict(float)
    for name, (shape, _) in owned.items():
        if _by_muon(config, name, shape):
            rows = shape[-2] // 2 if name.endswith("gate_up_proj") else shape[-2]
            found[rows, shape[-1]] += prod(shape)
    return 0.0 if gives_back(config.precision) else max(found.values(), default=0.0)


def _of(tensors: Tensors, layer: Layer) -> Tensors:
    start = f"model.layers.{layer.index}."
    return {name: of for name, of in tensors.items() if name.startswith(start)}


def _bytes(tensors: Tensors) -> float:
    return float(sum(prod(shape) * size for shape, size in tensors.values()))


def _padded(tensors: Tensors, ranks: int) -> Tensors:
    """Tensors whose rows are cut into equally large pieces, one for each rank."""
    return {name: ((-(-shape[0] // ranks) * ranks, *shape[1:]), size) for name, (shape, size) in tensors.items()}
