"""On-policy distillation: the student writes, and learns what its teacher says at each token that it wrote (Agarwal and others 2023,
arXiv 2306.13649), by the reverse divergence, which punishes what the teacher would not say (Gu and others 2023, arXiv 2306.08543).

Before every step the engine continues beginnings of the text with the student's weights of that moment, at temperature 1. Its compiled
step gives each text the same bits whatever else is in the batch. So a batch is a pure function of (weights, text, seed, step), and a
resumed run repeats it. The loss is the divergence over all words, and not an estimate by the word that was drawn.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sparing.adapt.teacher import Teacher
from sparing.base.config import Config, UserError
from sparing.base.files import link_or_copy
from sparing.base.run import RunFolder, write_tensors
from sparing.data.loader import IGNORED, Batch, Loader
from sparing.data.split import mix
from sparing.infer.engine import Engine
from sparing.infer.network import cannot_compile
from sparing.infer.request import Sampling
from sparing.kernels.sizes import HEAD_TOKENS
from sparing.kernels.vocabulary import logits_of
from sparing.model.transformer import Transformer
from sparing.train.objective import Loss, weight_of


class OwnFeed:
    """Rows of which the student wrote all but the first tokens."""

    def __init__(self, loader: Loader, run: RunFolder, prompt: int, seed: int):
        self.loader, self.run, self.prompt, self.seed = loader, run, prompt, seed
        self.model: Transformer | None = None
        """That learns; set as soon as it is there."""

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        numbers, T = self.loader.numbers(step, rank, world), self.loader.seq_len
        prompts = self.loader.rows(numbers).tokens[:, : self.prompt].tolist()
        seeds = [mix(mix(self.seed % (1 << 64)) ^ int(row)) for row in numbers]
        with Engine(self._snapshot(), weights="float32", speculate=False, device="cpu", max_batch=len(prompts)) as engine:
            settings = [Sampling(T - self.prompt, 1.0, seed=seed, ignore_eos=True) for seed in seeds]
            requests = [engine.submit(*each) for each in zip(prompts, settings, strict=True)]
            ids = [[*request.prompt, *(token for piece in request for token in piece.tokens)] for request in requests]
        if any(len(row) != T for row in ids):
            raise RuntimeError(f"the engine stopped: {next(filter(None, (request.error for request in requests)), 'a text is too short')}")
        tokens = torch.tensor(ids)
        targets = torch.full((*tokens.shape, 1 + self.loader.mtp_depth), IGNORED)
        targets[:, self.prompt - 1 : -1, 0] = tokens[:, self.prompt :]
        return Batch(tokens, targets, torch.zeros_like(tokens, dtype=torch.int32))

    def _snapshot(self) -> Path:
        """A run folder with the weights of this moment."""
        assert self.model is not None
        own = RunFolder(self.run.state / "own")
        own.weights.mkdir(parents=True, exist_ok=True)
        for name in ("config.toml", "tokenizer.json"):
            (own.path / name).unlink(missing_ok=True)
            link_or_copy(self.run.path / name, own.path / name)
        write_tensors(own.weights_file, {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()})
        return own.path


class _ReverseDivergence(torch.autograd.Function):
    """Sum over rows of KL(student, teacher), in chunks of rows: no logits are kept, and gradients are computed with the loss."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_WD: Tensor, other_NE: Tensor, other_WE: Tensor) -> Tensor:
        """x, weight: the student's hidden states and output head; other: the teacher's."""
        words = min(len(weight_WD), other_WE.shape[0])
        weight, total = weight_WD[:words].to(x_ND.dtype), torch.zeros((), device=x_ND.device)
        grad_x, grad_weight = torch.empty_like(x_ND), torch.zeros(weight_WD.shape, device=x_ND.device)
        for start in range(0, len(x_ND), HEAD_TOKENS):
            part = slice(start, start + HEAD_TOKENS)
            mine = (x_ND[part] @ weight.t()).float().log_softmax(-1)
            apart = mine - logits_of(other_NE[part], other_WE)[:, :words].float().log_softmax(-1)
            p = mine.exp()
            each = (p * apart).sum(-1, keepdim=True)
            total += each.sum()
            grad = (p * (apart - each)).to(x_ND.dtype)
            torch.mm(grad, weight, out=grad_x[part])
            grad_weight[:words] += grad.t() @ x_ND[part]
        ctx.save_for_backward(grad_x, grad_weight.to(weight_WD.dtype))
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad.to(grad_x.dtype), grad_weight * grad.to(grad_weight.dtype), None, None


class OwnTexts:
    """KL(student, teacher) a token, at the tokens that the student wrote."""

    parts = ("loss",)

    def __init__(self, teacher: Transformer):
        self.teacher = teacher.requires_grad_(False)

    def __call__(self, model: Transformer, batch: Batch, denominator: float | None = None, share: float = 1.0) -> Loss:
        denominator = weight_of(batch) if denominator is None else denominator
        written = (batch.targets[..., 0] != IGNORED).flatten()
        with torch.no_grad():
            other = self.teacher.hidden(batch.tokens, batch.documents).flatten(0, 1)[written]
        x = model.hidden(batch.tokens, batch.documents).flatten(0, 1)[written]
        loss = _ReverseDivergence.apply(x, model.head_weight, other, self.teacher.head_weight) / denominator
        return Loss(loss, loss.detach()[None])


def objective(config: Config) -> OwnTexts:
    """Loads the teacher. Raises UserError where it is gone or has changed."""
    return OwnTexts(Teacher(config).model)


def checked(config: Config) -> Config:
    """`config` itself. Raises UserError where the student cannot write what it is to learn from."""
    if why := cannot_compile(config.model):
        raise UserError(f"--on-policy: the student writes by the compiled step ({why})")
    if config.budget.unit == "flop":
        raise UserError("--on-policy: what writing costs is not known in operations beforehand; give a budget in time or tokens")
    if not 0 < config.distill.prompt < config.train.seq_len:
        raise UserError(f"distill.prompt {config.distill.prompt}: must be less than the {config.train.seq_len} tokens of a row")
    return config
