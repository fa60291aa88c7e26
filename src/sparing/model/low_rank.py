"""Models in which only low-rank updates learn (LoRA, arXiv 2106.09685), beside frozen weights that may be held in few bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from sparing.base.config import AdapterConfig, ModelConfig
from sparing.base.held import held_as
from sparing.base.run import fill
from sparing.kernels import native
from sparing.model.init import unfilled
from sparing.model.linear import Adaptable, few_bits
from sparing.model.transformer import MTPBlock, Transformer


def adaptable(model: Transformer) -> dict[str, Adaptable]:
    """What gets an update, by name: all linears of the decoder's layers, a mixture's experts as one module. Embedding, head and routers
    stay as they are, and so do MTP modules, which PEFT does not know and which only draft."""
    drafting = {id(module) for block in model.model.layers if isinstance(block, MTPBlock) for module in block.modules()}
    inside = ((f"model.layers.{name}", module) for name, module in model.model.layers.named_modules())
    return {name: module for name, module in inside if isinstance(module, Adaptable) and id(module) not in drafting}


@torch.no_grad()
def fill_frozen(model: Transformer, tensors: Iterable[tuple[str, Tensor]], hold: str | None, where: object) -> None:
    """Fill an unfilled model with weights that do not learn. Matrices are held as `base.held.held_as` has it for `hold`
    ("bfloat16", "int8", "int4"; None: float32) as soon as each is there, so that the model is never whole in float32.
    Routers and norms stay float32. Raises DamagedError, as `base.run.fill`."""
    model.requires_grad_(False)
    state = model.state_dict()
    modules = {name: module for name, module in model.named_modules() if isinstance(module, Adaptable)}

    def freezing():
        for name, tensor in tensors:
            yield name, tensor
            state.pop(name, None)
            at, _, own = name.rpartition(".")
            if hold and own in getattr(modules.get(at), "weights", ()):
                modules[at].keep(own, held_as(name, tuple(tensor.shape), hold))

    fill(state, freezing(), where)
    native.trim_heap()  # the floats of what is codes now: freed, but among what lives on


def add_low_rank(model: Transformer, adapter: AdapterConfig, seed: int) -> None:
    """Add updates that change nothing yet; they alone learn."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for module in adaptable(model).values():
        module.add_low_rank(adapter.rank, adapter.alpha, generator)


def unfilled_adapted(c: ModelConfig, adapter: AdapterConfig) -> Transformer:
    """A model as `fill_frozen` and `add_low_rank` make it, on the meta device."""
    model = unfilled(c)
    fill_frozen(model, model.state_dict().items(), hold_of(adapter), "meta")
    add_low_rank(model, adapter, 0)
    return model


@torch.no_grad()
def adapted(c: ModelConfig, adapter: AdapterConfig, seed: int, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the state dict that `fill_frozen` and `add_low_rank` give a whole model, to the bit, one at a time. tensors: of the
    frozen model, as floats."""
    model, hold, generator = unfilled(c), hold_of(adapter), torch.Generator().manual_seed(seed)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, Adaptable)}
    for name, tensor in tensors:
        at, _, own = name.rpartition(".")
        kept = hold and own in getattr(modules.get(at), "weights", ())
        yield from few_bits(name, tensor.float(), held_as(name, tuple(tensor.shape), hold)).items() if kept else [(name, tensor)]
    for name, module in adaptable(model).items():
        for factor, tensor in module.factors(adapter.rank, generator):
            yield f"{name}.{factor}.weight", tensor


def hold_of(adapter: AdapterConfig) -> str | None:
    """What `fill_frozen` holds the matrices of an adapter's base in."""
    return None if adapter.base == "float32" else adapter.base


def learned(model: Transformer) -> dict[str, Tensor]:
    """The tensors that learn, by name and without their gradients: of an adapted model, its factors."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
