"""Weights of a model that is learning, packed in memory for the compiled network: what a rollout is sampled by between two steps."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from sparing.base.hardware import cores
from sparing.infer.packed_weights import PAGE, PackedWeights, Part, Writer
from sparing.model.linear import Adaptable
from sparing.model.transformer import Transformer


class LiveWeights(PackedWeights):
    """A model's weights, its low-rank updates added, in memory that stays where it is: `refresh` packs what has learned anew.

    The sum of a weight and its update is rounded to `format`, which the model that learns need not do: a trainer has to compare its own
    probabilities with those that sampled.
    """

    def __init__(self, model: Transformer, format: str):
        self.model, self.format, self.source = model, format, "live"
        self._owners = {
            f"{path}.{name}": (module, name)
            for path, module in model.named_modules()
            if isinstance(module, Adaptable)
            for name in module.weights
        }
        self._buffers = dict(model.named_buffers())
        self._others = dict(model.named_parameters()) | self._buffers
        self._read: set[str] = set()
        self.parts: dict[str, Part] = Writer(model.config, format, self._get, []).parts
        end = start = 0
        for part in self.parts.values():
            if part.make:
                start, end = end, end + -(-part.bytes // PAGE) * PAGE
            part.offset += start
        self.data, self.bytes = torch.zeros(end, dtype=torch.uint8), end
        self._changing: list[Part] = []
        self._pool = ThreadPoolExecutor(cores(), "sparing-pack", partial(torch.set_num_threads, 1))
        for part in self.parts.values():
            if part.make:
                self._read.clear()
                self._fill(part)
                if any(map(self._learns, self._read)):
                    self._changing.append(part)

    @torch.no_grad()
    def refresh(self) -> None:
        """Pack what learns as it is now. No request may be under way."""
        list(self._pool.map(self._fill, self._changing))

    @torch.no_grad()
    def _fill(self, part: Part) -> None:
        assert part.make is not None
        at = part.offset
        for data in part.make():
            self.data[at : at + len(data)] = data
            at += len(data)

    @torch.no_grad()
    def _get(self, name: str) -> Tensor:
        self._read.add(name)
        if name in self._owners:
            module, own = self._owners[name]
            return module._operand(own, None).whole()
        return self._others[name].float()

    def _learns(self, name: str) -> bool:
        if name in self._owners:
            return any(parameter.requires_grad for parameter in self._owners[name][0].parameters())
        return self._others[name].requires_grad or name in self._buffers  # a router's biases move without a gradient
