"""Sampling from a model, one sequence at a time: what `sparing generate` and the completions after training use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparing.config import UserError


def generate(
    model,
    prompt_ids: Sequence[int],
    max_tokens: int,
    temperature: float = 0.8,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    eot_id: int | None = None,
    context: int | None = None,
) -> Iterator[int]:
    """Yield up to `max_tokens` token ids that continue `prompt_ids`; ends before the end-of-text token `eot_id`.

    Args:
        model: a `Transformer`: `forward` (B, T) -> (B, T, V), `hidden`, `new_cache`.
        prompt_ids: a document begins with the end-of-text token; the caller puts it there.
        temperature: 0 takes the likeliest token always.
        top_p: sample from the smallest set of likeliest tokens whose probability is at least this (Holtzman et al., arXiv 1904.09751).
        top_k: sample from this many likeliest tokens; 0: no limit.
        seed: the same seed gives the same tokens from the same logits; None: a different text each time.
        context: most tokens that the model reads. When they are used up, the last half is read anew and generation goes on.

    Raises:
        UserError: a setting out of its range, an empty prompt.
    """
    for name, value, good, range_text in (
        ("max-tokens", max_tokens, max_tokens >= 1, "1 or more"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "0 or more"),
        ("top-p", top_p, 0 < top_p <= 1, "above 0, at most 1"),
        ("top-k", top_k, top_k >= 0, "0 (off) or more"),
        ("context", context, context is None or context >= 2, "2 or more"),
    ):
        if not good:
            raise UserError(f"--{name} {value}: must be {range_text}")
    if not len(prompt_ids):
        raise UserError("the prompt has no tokens")
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    return _generate(model, list(prompt_ids), max_tokens, temperature, top_p, top_k, generator, eot_id, context)


def _generate(model, window: list[int], max_tokens, temperature, top_p, top_k, generator, eot_id, context) -> Iterator[int]:
    window = window if context is None else window[-context:]
    cache, unread = model.new_cache(), window  # `unread`: the end of the window that the cache doesn't hold yet
    for _ in range(max_tokens):
        token = sample(_next_logits(model, unread, cache), temperature, top_p, top_k, generator)
        if token == eot_id:
            return
        yield token
        window, unread = [*window, token], [token]
        if context is not None and len(window) > context:
            window = window[-(context // 2) :]
            cache, unread = model.new_cache(), window


@torch.inference_mode()
def _next_logits(model, unread: list[int], cache) -> Tensor:
    """(V,) float32 logits of the token after `unread`; the cache then holds it."""
    was_training = model.training
    model.eval()  # routers count tokens in training mode only
    try:
        tokens_BT = torch.tensor([unread], device=model.head_weight.device)
        if len(unread) > 1:  # a vocabulary's worth of logits for each word of the prompt would be wasted
            model.hidden(tokens_BT[:, :-1], cache=cache)
        return model.forward(tokens_BT[:, -1:], cache=cache)[0, -1]
    finally:
        model.train(was_training)


def sample(logits_V: Tensor, temperature: float, top_p: float, top_k: int, generator: torch.Generator) -> int:
    """One token id from (V,) logits. On the CPU in float64, so that a seed means the same on every device."""
    logits_V = logits_V.double().cpu()
    if temperature == 0:
        return int(logits_V.argmax())
    ranked, ids = logits_V.sort(descending=True, stable=True)
    if top_k:
        ranked = ranked[:top_k]
    # Subtracting the largest first keeps a tiny temperature from overflowing.
    probabilities = ((ranked - ranked[0]) / temperature).softmax(0)
    if top_p < 1:
        before = probabilities.cumsum(0) - probabilities  # the token that crosses top_p is still in
        probabilities = probabilities[: int((before < top_p).sum())]
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
