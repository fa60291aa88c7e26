import numpy as np
import pytest
from tests.infer.test_engine import PLAIN, prompts, tokens
from tests.infer.test_network import TABLE
from tests.infer.test_network import compiled as compiled_network

from sparing.base.config import UserError
from sparing.infer.engine import Engine
from sparing.infer.generate import load
from sparing.infer.network import Rows, TorchNetwork
from sparing.infer.request import Sampling
from sparing.infer.sample import choose, truncated
from sparing.infer.scheduler import BURST, MIN_INTERVAL, ROUNDS, SpeedTuner
from sparing.kernels.decode import library

compiled = pytest.mark.skipif(library() is None, reason="there is no C compiler")


@compiled
@pytest.mark.parametrize("weights", ["float32", "int8", "bfloat16", "int4"])
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_drafts_do_not_change_a_token(make_run, tokenizer, weights, temperature):
    settings = [Sampling(max_tokens=50 + i, temperature=temperature, seed=i, ignore_eos=True, top_p=0.9) for i in range(4)]
    texts = {}
    for speculate in (False, True):
        with Engine(make_run(), weights=weights, speculate=speculate, max_batch=3) as engine:
            requests = [engine.submit(p, s) for p, s in zip(prompts(tokenizer), settings)]
            texts[speculate] = [tokens(r) for r in requests]
            counts = engine.metrics()
            assert (counts.get("drafted_total", 0) > 0) == speculate
            assert [r.usage["completion_tokens"] for r in requests] == [50, 51, 52, 53]
    assert texts[True] == texts[False]


@compiled
def test_good_drafts_are_accepted(make_run, tokenizer, monkeypatch):
    """A random module guesses badly: here the guesses are put right, or wrong in a known place."""
    import sparing.infer.engine as module

    prompt, s = prompts(tokenizer)[1], Sampling(max_tokens=40, temperature=0.8, seed=3, ignore_eos=True)
    with Engine(make_run(), weights="int8", speculate=False) as engine:
        expected = tokens(engine.submit(prompt, s))

    def propose(network, spans, length):
        for span in spans:
            made = len(span.seq.tokens) - len(prompt)
            guess = expected[made : min(made + 3, 39)]
            span.seq.draft = [*guess[:2], (guess[2] + 1) % 300] if len(guess) == 3 else []

    monkeypatch.setattr(module, "propose", propose)
    with Engine(make_run(), weights="int8", speculate=True) as engine:
        request = engine.submit(prompt, s)
        assert tokens(request) == expected
        assert request.usage["accepted"] == pytest.approx(request.usage["drafted"] * 2 / 3)
        assert engine.metrics()["steps_total"] < 25


def test_sampling_keeps_the_distribution():
    """Chi-square of draws whose noise is the position's, as drafts are verified with; and drafts agree more often than chance."""
    rng = np.random.default_rng(0)
    target, draft = rng.normal(0, 1.5, 24).astype(np.float32), rng.normal(0, 1.5, 24).astype(np.float32)
    draft = (0.8 * target + 0.4 * draft).astype(np.float32)
    s, n = Sampling(max_tokens=1, temperature=0.8), 20_000
    drawn = np.array([choose(target, s, seed=5, position=i) for i in range(n)])
    guessed = np.array([choose(draft, s, seed=5, position=i, edit=False) for i in range(n)])
    p, q = (np.exp(truncated(z.astype(np.float64), s)) for z in (target, draft))
    p, q = p / p.sum(), q / q.sum()
    chi_square = ((np.bincount(drawn, minlength=24) - n * p) ** 2 / (n * p)).sum()
    assert chi_square < 52  # 23 degrees of freedom: one draw in 2,000 is above
    # Given the guess, what follows is still distributed as the model says: the pair's first member does not bias the second's marginal.
    agree, chance = (drawn == guessed).mean(), (p * q).sum()
    overlap = np.minimum(p, q).sum()
    assert chance + 0.2 < agree <= overlap + 0.02


def test_where_drafts_could_change_the_text_they_are_for_those_who_ask(make_run, tokenizer):
    s = Sampling(max_tokens=40, temperature=0, ignore_eos=True)
    with Engine(make_run(**PLAIN), device="cpu") as engine:
        assert not engine.speculates and engine.metrics()["speculates"] == 0
        alone = [tokens(engine.submit(p, s)) for p in prompts(tokenizer)]
        assert "drafted_total" not in engine.metrics()
    with Engine(make_run(**PLAIN), speculate=True, device="cpu") as engine:
        together = [engine.submit(p, s) for p in prompts(tokenizer)]
        assert [tokens(r) for r in together] == alone  # float32, and logits far apart
        assert engine.metrics()["drafted_total"] > 0


@compiled
@pytest.mark.parametrize("changes", [{}, {"attention": "gqa"}])
def test_plain_and_compiled_modules_guess_alike(make_run, changes):
    """Hidden states and drafts of a text whose module begins in its middle, and the module's second guess."""
    run, found = make_run(**changes), []
    for network in (TorchNetwork(load(run).network, 16), compiled_network(run)):
        ids, rows = list(range(7, 57)), Rows()
        rows.add(TABLE, ids, 0, 1)
        network.forward(rows)
        hidden, rows = network.hidden.copy(), Rows(first=[20] * 29)
        rows.add(TABLE, ids[21:], 20, 2)
        first = network.draft(rows, hidden[20:49]).copy()
        after, rows = network.hidden[28:], Rows(first=[20])
        rows.add(TABLE, [9], 49, 1)
        found.append((hidden, first, network.draft(rows, after).copy()))
        network.close()
    for ours, peers in zip(*found):
        assert np.abs(ours - peers).max() < 1e-3


@compiled
def test_without_a_module_there_are_no_drafts(make_run):
    with pytest.raises(UserError, match="no MTP module"):
        Engine(make_run(mtp_depth=0), speculate=True)


@pytest.mark.parametrize("best", [0, 1])
def test_a_chooser_gives_a_hopeless_option_up_at_once(best):
    """Half as fast: two steps are enough where two are asked for, a burst otherwise; not so bad: all trials."""
    for least, slow, most in ((2, 50.0, 2), (BURST, 50.0, BURST), (2, 90.0, BURST * ROUNDS)):
        chooser, spent = SpeedTuner([best, 1 - best], least=least), {0: 0, 1: 0}
        for _ in range(2 * BURST * ROUNDS):
            option = chooser.pick()
            spent[option] += 1
            chooser.report(option, 1.0, 1 / (100.0 if option == best else slow))
        assert chooser.best == best and spent[1 - best] == most


def test_a_chooser_finds_the_best_and_notices_a_change():
    rates, chooser, spent = {0: 100.0, 1: 130.0, 2: 90.0}, SpeedTuner([0, 1, 2]), {0: 0, 1: 0, 2: 0}

    def run(steps):
        for option in spent:
            spent[option] = 0
        for _ in range(steps):
            option = chooser.pick()
            spent[option] += 1
            chooser.report(option, 1.0, 1 / rates[option])

    run(3 * BURST * ROUNDS)
    assert chooser.best == 1
    run(4 * MIN_INTERVAL)
    assert spent[1] > 0.9 * 4 * MIN_INTERVAL and spent[0] > 0
    rates[1] = 50.0
    run(16 * MIN_INTERVAL)
    assert chooser.best == 0
