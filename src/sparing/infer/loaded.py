"""A trained model in memory: `load` a run folder, then `generate`, `logits`, `tokenizer`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sparing.base.config import Config, UserError
from sparing.base.config_file import read_config
from sparing.base.files import DamagedError
from sparing.base.run import RunFolder, fill, read_tensors
from sparing.data.tokenizer import Tokenizer
from sparing.infer.request import Sampling
from sparing.model.transformer import Transformer


class Model:
    """A run's model: `generate`, `logits`, `tokenizer`."""

    def __init__(self, run: RunFolder, config: Config, network: Transformer, tokenizer: Tokenizer | None):
        self.run, self.config, self.network, self._tokenizer = run, config, network, tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises UserError where the run has none (an import without one)."""
        if self._tokenizer is None:
            raise UserError(f"{self.run} has no tokenizer.json: it computes logits, but cannot read or write text")
        return self._tokenizer

    @torch.no_grad()
    def logits(self, tokens) -> Tensor:
        """(B, T) integers -> (B, T, vocab) float32."""
        ids = torch.as_tensor(tokens)
        if ids.dim() != 2 or ids.dtype.is_floating_point:
            raise UserError(f"logits takes (B, T) integers, not {tuple(ids.shape)} {ids.dtype}")
        return self.network(ids.long())

    def generate(
        self,
        prompt: str,
        max_tokens: int = 200,
        temperature: float = 0.8,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stream: Callable[[str], None] | None = None,
    ) -> str:
        """The text that the model writes after `prompt`, in plain PyTorch; `stream` gets it piece by piece, whole characters only."""
        from sparing.infer.answers import continued  # they open models with this module
        from sparing.infer.engine import Engine

        with Engine(self, max_batch=1) as engine:
            return continued(engine, prompt, Sampling(max_tokens, temperature, top_p, top_k, seed=seed), stream)[0]


def load(run: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """Open a run folder's newest weights. dtype: what they are kept and computed in; routers and norms are float32 always. Raises UserError
    when there are none."""
    folder = RunFolder.open(run)
    config = read_config(folder.config_file)
    network = Transformer(config.model)
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1 and ".gate." not in name:
            parameter.data = parameter.data.to(dtype)
    network.to(device).compute_dtype = dtype
    try:
        fill(network.state_dict(), read_tensors(folder.weights_file), folder.weights_file)
    except DamagedError as error:
        raise UserError(f"{run} has no usable weights: {error}") from None
    network.eval()
    tokenizer = Tokenizer.load(folder.tokenizer_file) if folder.tokenizer_file.exists() else None
    return Model(folder, config, network, tokenizer)
