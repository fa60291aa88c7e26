"""Weights in memory that change between requests: the engine samples by them as the model computes them, and says through which experts."""

import numpy as np
import pytest
import torch

from sparing.base.config import AdapterConfig
from sparing.infer.engine import Engine
from sparing.infer.generate import load
from sparing.infer.live import LiveWeights
from sparing.infer.request import Sampling
from sparing.kernels.decode import library
from sparing.model.experts import MoE
from sparing.model.low_rank import add_low_rank
from sparing.model.transformer import MTPBlock

GQA = {"attention": "gqa", "num_kv_heads": 2, "head_dim": 16, "num_heads": 4}


def moved(model) -> None:
    """What learns becomes something else."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def sampled(engine, prompt, **options):
    """(tokens with the one that ended the answer, their log-probabilities, the request)."""
    request = engine.submit(prompt, Sampling(24, seed=3, logprobs=0, **options))
    pieces = list(request)
    tokens, logprobs = ([x for piece in pieces for x in part(piece)] for part in (lambda p: p.tokens, lambda p: p.logprobs or []))
    if request.end is not None:
        tokens.append(request.end.token)
        logprobs.append(request.end)
    return tokens, torch.tensor([entry.logprob for entry in logprobs]), request


def trainers(model, prompt, tokens):
    """The model's own log-probabilities of these tokens, and the experts of each mixture (layers, rows, K)."""
    chosen = []
    gates = [b.mlp.gate for b in model.model.layers if isinstance(b.mlp, MoE) and not isinstance(b, MTPBlock)]
    hooks = [gate.register_forward_hook(lambda _m, _i, routing: chosen.append(routing.experts_NK.sort().values)) for gate in gates]
    ids = torch.tensor([[*prompt, *tokens]])
    found = -model.nll(ids[:, :-1], ids[:, 1:])[0, len(prompt) - 1 :]
    for hook in hooks:
        hook.remove()
    return found, torch.stack(chosen) if chosen else None


@pytest.mark.parametrize("changes", [GQA | {"num_dense_layers": 3}, GQA, {}, {"qk_rope_head_dim": 8}], ids=["dense", "gqa", "mla", "plain"])
@pytest.mark.parametrize("adapted", [False, True])
def test_it_samples_by_the_weights_as_they_are(make_run, tokenizer, changes, adapted):
    run = make_run(**changes)
    model = load(run).network
    if adapted:
        add_low_rank(model, AdapterConfig(4, 8.0), 0)
    plain = changes == {"qk_rope_head_dim": 8} or library() is None
    live = None if plain else LiveWeights(model, "float32")
    prompt = [tokenizer.eot_id, *tokenizer.encode("It was a ship of the sea and")] * 3
    mixtures = [layer for layer, block in enumerate(model.model.layers) if isinstance(block.mlp, MoE) and not isinstance(block, MTPBlock)]
    with Engine(run, live=live, network=model if plain else None, speculate=False) as engine:
        texts = []
        for _ in range(2):
            tokens, logprobs, request = sampled(engine, prompt, routes=True)
            expected, experts = trainers(model, prompt, tokens)
            torch.testing.assert_close(logprobs, expected, rtol=0, atol=2e-4)
            routes = torch.from_numpy(np.concatenate(request.routes))
            assert routes.shape[:2] == (len(prompt) + len(tokens) - 1, model.config.num_layers)
            if experts is not None:
                same = (routes[:, mixtures].transpose(0, 1).sort().values == experts).float().mean()
                assert same > 0.99, "but for ties"
            texts.append(tokens)
            moved(model)
            if live:
                live.refresh()
            engine.renew()
        assert texts[0] != texts[1]


def test_what_ended_an_answer(make_run, tokenizer):
    """The end token is in no piece; with log-probabilities it is told beside them."""
    run = make_run(**GQA)
    with Engine(run, weights="float32") as engine:
        ends = {tokenizer.eot_id: 100.0}
        tokens, logprobs, request = sampled(engine, tokenizer.encode("It was"), logit_bias=ends)
        assert request.finish_reason == "stop" and tokens == [tokenizer.eot_id] and len(logprobs) == 1
        assert engine.submit(tokenizer.encode("It was"), Sampling(4, logit_bias=ends)).text() == ""
