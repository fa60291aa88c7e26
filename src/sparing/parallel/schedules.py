"""Schedules of `torch.distributed.pipelining`: in which order the ranks of a pipeline compute micro-batches, and how long they idle.

A pipeline has as many ranks as `stages` says, and each of them holds one chunk of consecutive layers, or two (`CHUNKS`). Torch is imported
inside functions, because it loads its compiler for pipelines.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

CLASSES = {
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "zbv": "ScheduleZBVZeroBubble",
    "dualpipev": "ScheduleDualPipeV",
}
"""1F1B (PipeDream-flush, arXiv 2006.09503), interleaved (2104.04473 §2.2), ZB-V (2401.10241 §6), DualPipe cut in half (DeepSeek-V3
§3.2.1; the repository deepseek-ai/DualPipe)."""
CHUNKS = {"1f1b": 1, "interleaved": 2, "zbv": 2, "dualpipev": 2}
"""Of the model, on each rank."""
ENOUGH = 4
"""Micro-batches for each stage: 1F1B then idles less than a fifth of the time."""
COSTS = {"F": 1, "B": 2, "I": 1, "W": 1}
"""Time units of a chunk's forward pass, its whole backward pass, and that pass's halves: gradients of the input, and of the weights."""
AGAIN = {"F": 1, "B": 3, "I": 3, "W": 0}
"""The same where layers are computed again for their backward pass, which then makes all gradients at once."""
WAITS = {"1f1b": (3, 4), "interleaved": (3, 4), "zbv": (1, 6), "dualpipev": (2, 7)}
"""Units that each rank idles in a step, for each further rank of its pipeline: by COSTS, by AGAIN."""


def chunks_of(schedule: str, stages: int, position: int) -> list[int]:
    """Which chunks of the model the rank at `position` in its pipeline holds, in their order. Those of "zbv" and "dualpipev" form a V: the
    first rank has the first chunk and the last."""
    if CHUNKS[schedule] == 1:
        return [position]
    return [position, position + stages if schedule == "interleaved" else 2 * stages - 1 - position]


def places_of(schedule: str, stages: int, spans: Sequence[range], layers: int) -> tuple[list[int], int]:
    """(the position in its pipeline of the rank that holds each of `layers`, that of the last chunk, which has all behind its span too)."""
    by_chunk = {chunk: place for place in range(stages) for chunk in chunks_of(schedule, stages, place)}
    end = by_chunk[len(spans) - 1]
    return [next((by_chunk[chunk] for chunk, span in enumerate(spans) if layer in span), end) for layer in range(layers)], end


def in_flight(schedule: str, stages: int, microbatches: int, position: int) -> list[int]:
    """Of how many micro-batches the rank at `position` keeps what each of its chunks (`chunks_of`) computed, where it keeps most: those
    that have gone forward and not yet back."""
    if CHUNKS[schedule] == 1:
        return [min(microbatches, stages - position)]
    if schedule != "interleaved":
        return [min(microbatches, 2 * stages - position), position + (schedule == "dualpipev")]
    together = microbatches // max(1, microbatches // stages)  # of one chunk, before the other one's turn
    forward = min(2 * microbatches, together + 2 * (stages - 1 - position) + 1)
    first = min(forward, 2 * together, microbatches)
    return [first, forward - first]


def runs(schedule: str, stages: int, microbatches: int) -> bool:
    """Whether a schedule can run so many micro-batches."""
    if schedule == "interleaved":  # in rounds of at least `stages`, all as long as each other
        return microbatches >= stages and microbatches % (microbatches // stages) == 0
    return microbatches >= stages * CHUNKS[schedule]


def microbatches_of(schedule: str, stages: int, rows: int, wished: int | None = None) -> int | None:
    """Into how many equal micro-batches the `rows` of a pipeline's batch are cut: the number nearest to `wished` that the schedule can run.
    By default the smallest that is at least ENOUGH for each stage, else the largest. None: there is none."""
    possible = [number for number in range(1, rows + 1) if rows % number == 0 and runs(schedule, stages, number)]
    if not possible:
        return None
    if wished is not None:
        return min(possible, key=lambda number: (abs(number - wished), number))
    return next((number for number in possible if number >= ENOUGH * stages), possible[-1])


def spans(costs: Sequence[float], head: float, chunks: int) -> list[range]:
    """Cut layers into chunks of consecutive ones whose dearest costs least. costs: of each layer. head: what the last chunk does besides;
    it may have no layer of its own, each of the others has one. Raises ValueError where there are too few layers."""
    layers = len(costs)
    if chunks > layers + 1:
        raise ValueError(f"{layers} layers make at most {layers + 1} chunks, not {chunks}")
    # best[n]: ((the dearest chunk, the sum of squares), where the last one begins), of the first n layers in so many chunks.
    best: list[dict[int, tuple[tuple[float, float], int]]] = [{0: ((0.0, 0.0), 0)}]
    for chunk in range(chunks):
        last = chunk == chunks - 1
        found: dict[int, tuple[tuple[float, float], int]] = {}
        for end in [layers] if last else range(1, layers + 1):
            for start, ((dearest, squares), _) in best[-1].items():
                if start < end or (last and start == end):
                    cost = sum(costs[start:end]) + (head if last else 0.0)
                    option = (max(dearest, cost), squares + cost * cost), start
                    found[end] = min(found.get(end, option), option)
        best.append(found)
    ends = [layers]
    for found in reversed(best[1:]):
        ends.append(found[ends[-1]][1])
    return [range(start, end) for start, end in zip(ends[:0:-1], ends[-2::-1], strict=True)]


def made(schedule: str, chunks: Sequence[Any], microbatches: int, loss: Callable[..., Any] | None = None) -> Any:
    """Torch's schedule over what a rank holds, `PipelineStage`s. Gradients are sums over micro-batches."""
    from torch.distributed.pipelining import schedules

    one = CHUNKS[schedule] == 1
    return getattr(schedules, CLASSES[schedule])(chunks[0] if one else list(chunks), microbatches, loss, scale_grads=False)


def bubble(schedule: str, stages: int, microbatches: int, recompute: bool = False) -> float:
    """The share of the ranks' time that is idle in one step, by walking the lists of actions that torch makes, at unit costs (`COSTS`).

    schedule: one of `CLASSES`. stages: ranks of the pipeline. recompute: whether layers are computed again (`AGAIN`). Sending
    takes no time. An overlapped pair of DualPipeV takes as long as both passes one after the other, as torch runs it, and what it makes is
    sent when both are done. Raises ValueError where torch cannot run so many micro-batches."""
    orders, costs = _orders(schedule, stages, microbatches), AGAIN if recompute else COSTS
    last = stages * CHUNKS[schedule] - 1
    done: dict[tuple[int, str, int], int] = {}
    clocks, at = [0] * stages, [0] * stages
    busy = 0
    while any(at[rank] < len(orders[rank]) for rank in range(stages)):
        before = list(at)
        for rank, order in enumerate(orders):
            while at[rank] < len(order):
                parts = order[at[rank]]
                needs = [need for part in parts if (need := _needs(*part, last)) is not None and need not in parts]
                if any(need not in done for need in needs):
                    break
                start = max([clocks[rank], *(done[need] for need in needs)])
                took = sum(costs[kind] for _, kind, _ in parts)
                clocks[rank], busy, at[rank] = start + took, busy + took, at[rank] + 1
                for chunk, kind, number in parts:
                    done[chunk, "I" if kind == "B" else kind, number] = start + took
        assert at != before, f"{schedule} of {stages} stages and {microbatches} micro-batches waits for itself"
    return 1 - busy / (stages * max(clocks))


def idle(schedule: str, stages: int, microbatches: int, recompute: bool = False) -> float:
    """`bubble` in closed form, where `stages` divides the micro-batches of an interleaved schedule; without torch."""
    waits = WAITS[schedule][recompute] * (stages - 1) - (stages > 1 and recompute and schedule == "dualpipev")
    return waits / ((4 if recompute else 3) * CHUNKS[schedule] * microbatches + waits)


def _needs(chunk: int, kind: str, number: int, last: int) -> tuple[int, str, int] | None:
    """The action that must have ended before one begins, other than its own rank's earlier ones."""
    if kind == "F":
        return (chunk - 1, "F", number) if chunk else None
    if kind == "W":
        return None
    return (chunk + 1, "I", number) if chunk < last else (chunk, "F", number)


def _orders(schedule: str, stages: int, microbatches: int) -> list[list[tuple[tuple[int, str, int], ...]]]:
    """Each rank's actions, in order; of each, the (chunk, kind, micro-batch) that it consists of."""
    held = [
        SimpleNamespace(num_stages=stages * CHUNKS[schedule], group_size=stages, group_rank=0, stage_index=chunk, submod=None)
        for chunk in chunks_of(schedule, stages, 0)
    ]
    order = made(schedule, held, microbatches).pipeline_order
    found = []
    for rank in range(stages):
        # Of each chunk and kind, micro-batches go in their order. Torch's list of the last rank in 1F1B, which nothing executes, begins to
        # count its forward passes at 1 (2.13), so they are counted here.
        counts: dict[tuple[int, str], int] = defaultdict(int)
        actions = []
        for action in order[rank]:
            parts = []
            for part in (action.sub_actions or (action,)) if action else ():
                if (kind := part.computation_type.value) in COSTS:
                    kinds = ("I", "W") if kind == "B" else (kind,)
                    parts.append((part.stage_index, kind, counts[part.stage_index, kinds[0]]))
                    for one in kinds:
                        counts[part.stage_index, one] += 1
            if parts:
                actions.append(tuple(parts))
        found.append(actions)
    return found
