"""What ranks that train together send each other in a step, and hold, in each layout of `[parallel]` (`sparing.parallel`).

Bytes sent are of what a collective is about, on one rank: the tensor that is added up, broadcast, put together from pieces or cut into
them; of an all-to-all, the rows that a rank sends, those to itself included. `benchmarks/collectives.py` counts the same where the
collectives are called, and tests hold one to the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from math import prod

from sparing.base.config import Config, ModelConfig
from sparing.base.layers import EMBED, HEAD, SELECTION_BIAS, Layer, is_matrix, layers, mixtures, shapes
from sparing.budget.flops import forward_products, layer_flops
from sparing.budget.memory import (
    CORPUS_BYTES,
    HEAP_OF_GROUPS,
    MUON_BYTES,
    PROCESS_BYTES,
    REUSED,
    KernelPath,
    Memory,
    copies_of,
    gives_back,
    head_bytes,
    kept_behind,
    kept_by,
    path_of,
    saved_per_token,
    training_memory,
)
from sparing.kernels.sizes import MOMENT_BLOCK
from sparing.parallel.schedules import CHUNKS, chunks_of, idle, in_flight, microbatches_of, places_of, spans

Tensors = Mapping[str, tuple[tuple[int, ...], int]]
"""Shape, and bytes of a number, by name."""


def fitting_parts(wished: int, ranks: int, experts: int) -> int:
    """The largest number up to `wished` that divides the ranks and the experts of a layer."""
    return next(parts for parts in range(max(1, wished), 0, -1) if ranks % parts == 0 and experts % parts == 0)


def fitting_stages(config: Config, ranks: int) -> int:
    """The largest number of stages up to the configured one that so many ranks, the model's layers and a batch's rows allow."""
    p, rows = config.parallel, config.train.batch_size
    most = (config.model.num_layers + 1) // CHUNKS[p.schedule]  # the last chunk may have the head alone
    for stages in range(min(p.stages, ranks, most), 1, -1):
        pipelines = ranks // stages
        if ranks % stages == 0 and rows % pipelines == 0 and microbatches_of(p.schedule, stages, rows // pipelines):
            return stages
    return 1


def fitted(config: Config, ranks: int) -> Config:
    """The configuration with as many stages and parts of the experts as so many ranks can have, which is what they train with."""
    stages = fitting_stages(config, ranks)
    parts = fitting_parts(config.parallel.experts, ranks // stages, config.model.n_routed_experts)
    return replace(config, parallel=replace(config.parallel, stages=stages, experts=parts))


def chunk_spans(config: Config, stages: int) -> list[range]:
    """The layers of each chunk of a pipeline, cut so that the operations of the largest chunk are fewest."""
    return _spans(config.model, config.train.seq_len, stages, config.parallel.schedule)


@lru_cache(maxsize=256)
def _spans(c: ModelConfig, seq_len: int, stages: int, schedule: str) -> list[range]:
    costs, heads = layer_flops(c, seq_len), forward_products(c, seq_len).heads
    return spans(costs[: c.num_layers], heads + sum(costs[c.num_layers :]), stages * CHUNKS[schedule])


def learning(config: Config, place: int = 0) -> tuple[Tensors, Tensors]:
    """What learns on the rank at `place` in its pipeline: (what all ranks that hold these layers have, this rank's part of the experts
    where those are divided). See `train.optim.keep_as`."""
    narrow, parts = 4 if config.precision.weights == "float32" else 2, _parts(config)
    common, own = {}, {}
    for name, shape in shapes(config.model).items():
        size = narrow if is_matrix(name, len(shape)) else 4
        if place not in _holders(config, name):
            continue
        if parts > 1 and ".mlp.experts." in name:
            own[name] = (shape[0] // parts, *shape[1:]), size
        elif not name.endswith(SELECTION_BIAS):
            common[name] = shape, size
    return common, own


def _holders(config: Config, name: str) -> tuple[int, ...]:
    """The places in a pipeline of the ranks that hold a tensor (`parallel.pipeline.divide_layers`)."""
    c, p = config.model, config.parallel
    if p.stages == 1:
        return (0,)
    by_layer, end = _places(c, config.train.seq_len, p.stages, p.schedule)
    if name == EMBED:
        return (0, end) if end and (c.tie_word_embeddings or c.mtp_depth) else (0,)
    return (by_layer[int(name.split(".")[2])],) if name.startswith("model.layers.") else (end,)


@lru_cache(maxsize=256)
def _places(c: ModelConfig, seq_len: int, stages: int, schedule: str) -> tuple[list[int], int]:
    return places_of(schedule, stages, _spans(c, seq_len, stages, schedule), len(layers(c)))


def _layers(config: Config, place: int) -> list[Layer]:
    """Those that the rank at `place` holds."""
    every, p = layers(config.model), config.parallel
    if p.stages == 1:
        return list(every)
    return [layer for layer in every if _places(config.model, config.train.seq_len, p.stages, p.schedule)[0][layer.index] == place]


def _parts(config: Config) -> int:
    return config.parallel.experts if config.parallel.shard != "nothing" else 1


def passes(config: Config, ranks: int) -> int:
    """How many micro-batches a step of a rank has (`Trainer._passes`)."""
    t, p = config.train, config.parallel
    alike = ranks // p.stages
    smallest, largest = t.batch_size // alike, -(-t.batch_size // alike)
    if p.stages > 1:
        count = microbatches_of(p.schedule, p.stages, smallest, -(-smallest // t.micro_batch_size) if t.micro_batch_size else None)
        if count is None:
            raise ValueError(f"{p.schedule} cannot run {smallest} rows through {p.stages} stages")
        return count
    return min(smallest, -(-largest // (t.micro_batch_size or t.batch_size)))


def sent(config: Config, ranks: int, place: int | None = None) -> dict[str, float]:
    """Bytes of each kind of collective in a step of one rank: gradients, update, and the numbers that go with them. `config` is resolved.

    place: of the rank in its pipeline; None: of that which sends most. Where experts are divided, rows are as many as come on average: all
    ranks' sums are exact. What ranks agree on around a step (stop, skip a batch) takes 8 bytes each and is not counted, nor are the 4 bytes
    with which the ranks of a pipeline find each other before their first step."""
    c, t, p, parts = config.model, config.train, config.parallel, _parts(config)
    if place is None and p.stages > 1:
        return max((sent(config, ranks, place) for place in range(p.stages)), key=lambda found: sum(found.values()))
    place, alike = place or 0, ranks // p.stages
    common, own = learning(config, place)
    whole, pieces = _bytes(common), _bytes(own) if alike > parts else 0.0
    heads = 1 + (c.mtp_depth > 0 and t.mtp_weight > 0) + bool(mixtures(c))
    # Tokens, rows and weight of the batch; parts of the loss, experts' loads; which tensors have a gradient.
    numbers = 3 * 8.0 + 4 * (heads + sum(layer.feed_forward.experts for layer in mixtures(c))) + 4 * len(common | own)
    if p.shard == "nothing":
        return {"all_reduce": numbers + whole}
    found = {"all_reduce": numbers + 8}  # and the gradients' norm
    if p.stages > 1 and alike == 1:  # no other rank has these layers
        whole = _bytes({name: of for name, of in common.items() if len(_holders(config, name)) > 1})
    if p.shard != "weights":
        found |= {"reduce": whole + pieces, "broadcast": whole + pieces} if whole + pieces else {}
    else:
        cut, times = _padded(common, ranks), passes(config, ranks)
        once = _bytes(cut)
        # Layers are put together once more for the backward pass; modules that draft too, when what joins their inputs comes last there.
        again = sum(_bytes(_of(cut, layer)) for layer in layers(c))
        found |= {"all_gather": times * (once + again), "reduce_scatter": times * once, "gather": once, "scatter": once}
        found |= {"reduce": pieces, "broadcast": pieces} if pieces else {}
    if p.stages > 1:
        found["send"] = _neighbours(config, place) * t.batch_size / alike * t.seq_len * c.hidden_size * _size(config)
    if parts > 1 and (mixing := sum(layer.mixture for layer in _layers(config, place))):
        found["all_to_all"] = mixing * exchanged(config, ranks)
    return found


def sent_by_all(config: Config, ranks: int) -> dict[str, float]:
    """`sent`, of all ranks together."""
    found: dict[str, float] = defaultdict(float)
    for place in range(config.parallel.stages):
        for kind, count in sent(config, ranks, place).items():
            found[kind] += ranks // config.parallel.stages * count
    return dict(found)


def _neighbours(config: Config, place: int) -> int:
    """To how many chunks of other ranks a rank sends each micro-batch: hidden states to the next, gradients to the one before."""
    p = config.parallel
    mine, last = chunks_of(p.schedule, p.stages, place), p.stages * CHUNKS[p.schedule] - 1
    return sum(0 <= other <= last and other not in mine for chunk in mine for other in (chunk - 1, chunk + 1))


def bubble_of(config: Config, ranks: int) -> tuple[float, float]:
    """(the share of its time that a rank of a pipeline waits for others, how much longer than the mean the rank with most work takes)."""
    config = fitted(config, ranks)
    c, t, p = config.model, config.train, config.parallel
    if p.stages == 1:
        return 0.0, 1.0
    by_layer, end = _places(c, t.seq_len, p.stages, p.schedule)
    work = [0.0] * p.stages
    for place, cost in zip(by_layer, layer_flops(c, t.seq_len), strict=True):
        work[place] += cost
    work[end] += forward_products(c, t.seq_len).heads
    return idle(p.schedule, p.stages, passes(config, ranks), t.recompute), max(work) * p.stages / sum(work)


def exchanged(config: Config, ranks: int) -> float:
    """Bytes of a step's all-to-alls of one rank in one mixture. A row goes to each chosen expert, also where two are on one rank."""
    c, t, p = config.model, config.train, config.parallel
    rows = t.batch_size / (ranks // p.stages) * t.seq_len * c.num_experts_per_tok
    there_and_back = 2 * rows * c.hidden_size * _size(config)
    gates, numbers, counts = 4 * rows, 8 * rows, 8 * p.experts * passes(config, ranks)
    forward = there_and_back + gates + numbers + counts
    return forward * (2 if t.recompute else 1) + there_and_back + gates


def held(config: Config, ranks: int, path: KernelPath | None = None, place: int | None = None, measured: bool = False) -> Memory:
    """Peak of the rank that holds most, during the passes or the update. `config` is resolved. Loads torch, where owners are found.

    place: of the ranks at that place in their pipeline alone. measured: by a run of `train`, with its corpus and evaluations."""
    p = config.parallel
    if place is None and p.stages > 1:
        return max((held(config, ranks, path, place, measured) for place in range(p.stages)), key=lambda memory: memory.total)
    c, t, place, alike = config.model, config.train, place or 0, ranks // p.stages
    common, own = learning(config, place)
    rows, times = -(-t.batch_size // alike), passes(config, ranks)
    together = own or p.shard == "weights" or p.stages > 1
    micro = -(-rows // times) if together else min(rows, t.micro_batch_size or rows)
    path, size, here = path or path_of(config), _size(config), _layers(config, place)
    if p.stages > 1:
        kept = _in_flight(config, place, micro, times, path)
    else:
        kept = training_memory(replace(config, train=replace(t, batch_size=rows, micro_batch_size=micro)), path=path).activations
        if own and path == "cuda" and size == 2 and config.precision.weights == "float32" and not t.recompute:
            kept -= size * sum(layer.feed_forward.routed for layer in here)  # experts that tokens travel to keep no copies of weights
    owned = _fullest(config, common, own, ranks, place)
    moments = sum(_moments(config, name, of) for name, of in owned.items())
    weights, update = _bytes(common) + _bytes(own), MUON_BYTES * _largest_group(config, owned)
    gradients = weights
    if p.shard == "weights":
        masters = _bytes({name: of for name, of in owned.items() if name in common})
        gradients = _bytes(_padded(common, ranks)) / ranks + _bytes(own)
        weights, update = gradients + masters, update + masters  # the update has gradients of whole tensors
        every = [_bytes(_of(common, layer)) for layer in layers(c)]
        ends, drafting = _bytes(common) - sum(every), sum(every[c.num_layers :])
        # Whole for all of a pass: embedding and head; and modules that draft and a layer beside the next one, or at its end the gradients
        # of embedding and head, which are copied before they are cut.
        kept = ends + max(kept + drafting + 2 * max(every), 2 * ends)
    work = micro * t.seq_len * max((saved_per_token(layer, t.seq_len, size, path) for layer in here), default=0.0)
    reused = REUSED[False] * min(gradients, kept) if micro >= rows else 0.0
    device = t.device or "cpu"
    process = PROCESS_BYTES[device] + (CORPUS_BYTES if measured and device == "cpu" else 0.0)
    if measured and path == "plain" and any(layer.mixture for layer in here):
        process += HEAP_OF_GROUPS * (kept + weights)
    return Memory(weights, gradients, moments, kept, process + max(work, update - kept), reused)


def needed(config: Config, ranks: int, path: KernelPath | None = None, measured: bool = True) -> Memory:
    """What a process that trains `config` takes at its peak; of several, the one that takes most. measured: by a run of `train`."""
    frozen = any(part is not None for part in (config.adapter, config.esft, config.growth, config.drafts))
    if ranks > 1 and not frozen:
        return held(fitted(config, ranks), ranks, path, measured=measured)
    t = config.train
    rows = -(-t.batch_size // ranks)
    train = replace(t, batch_size=rows, micro_batch_size=min(t.micro_batch_size or rows, rows))
    return training_memory(replace(config, train=train) if ranks > 1 else config, measured, path)


def _in_flight(config: Config, place: int, rows: int, times: int, path: KernelPath) -> float:
    """Bytes that a rank of a pipeline keeps for backward passes, of all micro-batches of `rows` that have gone forward and not yet back."""
    c, t, p = config.model, config.train, config.parallel
    cut, every, size = chunk_spans(config, p.stages), layers(c), _size(config)
    hidden, kept = rows * t.seq_len * c.hidden_size * size, 0.0
    mine = chunks_of(p.schedule, p.stages, place)
    for chunk, count in zip(mine, in_flight(p.schedule, p.stages, times, place), strict=True):
        some, last = [every[layer] for layer in cut[chunk]], chunk == len(cut) - 1
        some += every[c.num_layers :] if last else []
        each = kept_by(config, some, rows, t.seq_len, path) + copies_of(config, some, path)
        if config.parallel.experts > 1 and path == "cuda" and each and copies_of(config, some, path):
            each -= size * sum(layer.feed_forward.routed for layer in some)
        each += rows * t.seq_len**2 * size if t.document_mask and some else 0.0
        kept += count * (each + (0 if last else hidden))  # what has been sent on is there until its gradient comes
        if last:
            kept += (count - 1) * hidden + kept_behind(config, rows, t.seq_len) + head_bytes(config, path)
    if t.recompute:  # one layer at a time is whole
        kept += rows * t.seq_len * max((saved_per_token(layer, t.seq_len, size, path) for layer in _layers(config, place)), default=0.0)
    return kept + hidden  # a gradient that comes in


def _size(config: Config) -> int:
    """Bytes of a number of the compute type."""
    return 2 if config.train.dtype == "bfloat16" else 4


def _fullest(config: Config, common: Tensors, own: Tensors, ranks: int, place: int = 0) -> Tensors:
    """What the rank updates that has most to keep for it, of those at `place` in their pipelines."""
    if config.parallel.shard == "nothing":
        return common
    from sparing.parallel.owners import owners_of

    def by_rank(tensors: Tensors, count: int) -> list[dict]:
        found: list[dict] = [{} for _ in range(count)]
        for name, rank in owners_of({name: prod(shape) for name, (shape, _) in tensors.items()}, count).items():
            found[rank][name] = tensors[name]
        return found

    parts, alike = _parts(config), ranks // config.parallel.stages
    at_ends = {name for name in common if len(_holders(config, name)) > 1}
    every = by_rank({name: of for name, of in common.items() if name not in at_ends}, alike)
    every[0] |= {name: common[name] for name in at_ends} if place == 0 else {}
    lines = by_rank(own, alike // parts)
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
