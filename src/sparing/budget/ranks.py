"""What ranks that train together send each other in a step, and hold, in each layout of `[parallel]` (`sparing.parallel`).

Bytes sent are of what a collective is about, on one rank: the tensor that is added up, broadcast, put together from pieces or cut into
them; of an all-to-all, the rows that a rank sends, those to itself included. `benchmarks/collectives.py` counts the same where the
collectives are called, and tests hold one to the other.
"""

from __future__ import annotations

from math import prod

from sparing.base.config import Config
from sparing.base.layers import SELECTION_BIAS, Layer, is_matrix, layers, mixtures, shapes


def learning(config: Config) -> dict[str, tuple[tuple[int, ...], int]]:
    """(shape, bytes of a number) of each tensor that learns, by name. All of a model's do; see `train.optim.keep_as`."""
    narrow = 4 if config.precision.weights == "float32" else 2
    every = {name: shape for name, shape in shapes(config.model).items() if not name.endswith(SELECTION_BIAS)}
    return {name: (shape, narrow if is_matrix(name, len(shape)) else 4) for name, shape in every.items()}


def passes(config: Config, ranks: int) -> int:
    """How many micro-batches a step of a rank has (`Trainer._passes`)."""
    t = config.train
    smallest, largest = t.batch_size // ranks, -(-t.batch_size // ranks)
    return min(smallest, -(-largest // (t.micro_batch_size or t.batch_size)))


def sent(config: Config, ranks: int) -> dict[str, float]:
    """Bytes of each kind of collective in a step of one rank: gradients, update, and the numbers that go with them. `config` is resolved.

    Where experts are divided, rows are as many as come on average: all ranks' sums are exact. What ranks agree on around a step (stop, skip
    a batch) takes 8 bytes each and is not counted."""
    c, t, p = config.model, config.train, config.parallel
    parts = p.experts if p.shard != "nothing" else 1
    every = learning(config)
    own = {name: of for name, of in every.items() if parts > 1 and ".mlp.experts." in name}
    common = {name: of for name, of in every.items() if name not in own}
    whole = _bytes(common.values())
    pieces = _bytes(own.values()) / parts if ranks > parts else 0.0
    heads = 1 + (c.mtp_depth > 0 and t.mtp_weight > 0) + bool(mixtures(c))
    # Tokens, rows and weight of the batch; parts of the loss, experts' loads; which tensors have a gradient.
    numbers = 3 * 8.0 + 4 * (heads + sum(layer.feed_forward.experts for layer in mixtures(c))) + 4 * len(every)
    if p.shard == "nothing":
        return {"all_reduce": numbers + whole}
    found = {"all_reduce": numbers + 8}  # and the gradients' norm
    if p.shard == "optimizer":
        found |= {"reduce": whole + pieces, "broadcast": whole + pieces}
    else:
        cut = {name: (_padded(shape, ranks), size) for name, (shape, size) in common.items()}
        times = passes(config, ranks)
        once = _bytes(cut.values())
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


def _of(tensors: dict, layer: Layer) -> list:
    start = f"model.layers.{layer.index}."
    return [of for name, of in tensors.items() if name.startswith(start)]


def _bytes(tensors) -> float:
    return float(sum(prod(shape) * size for shape, size in tensors))


def _padded(shape: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    """A tensor whose rows are cut into equally large pieces, one for each rank."""
    return -(-shape[0] // ranks) * ranks, *shape[1:]
