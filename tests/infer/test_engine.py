import stat
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from tests.infer.conftest import TEXT

from sparing.base.config import UserError
from sparing.infer.engine import Engine
from sparing.infer.generate import load
from sparing.infer.request import Busy, GrammarFailed, Sampling
from sparing.kernels.decode import library


def greedy_by_training_forward(run, prompt, count):
    network, ids = load(run).network, list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(network(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def tokens(request):
    return [token for piece in request for token in piece.tokens]


def prompts(tokenizer, count=5):
    return [[tokenizer.eot_id, *tokenizer.encode(TEXT[300 * i : 300 * i + 40 + 60 * i])] for i in range(count)]


PLAIN = {"qk_rope_head_dim": 8}  # not a multiple of 16: plain PyTorch


@pytest.mark.parametrize(
    "changes",
    [{}, PLAIN, {"attention": "gqa"}, {"attention": "gqa", "head_dim": 8}, {"q_lora_rank": None, "num_dense_layers": 3},
     {"tie_word_embeddings": True}, {"n_group": 4, "topk_group": 2, "scoring_func": "softmax", "norm_topk_prob": False},
     {"scoring_func": "sqrtsoftplus", "n_shared_experts": 0}],
)  # fmt: skip
def test_greedy_is_the_training_forward(make_run, tokenizer, changes):
    run = make_run(**changes)
    prompt = prompts(tokenizer)[2]
    with Engine(run, weights="float32") as engine:
        got = tokens(engine.submit(prompt, Sampling(max_tokens=40, temperature=0, ignore_eos=True)))
    assert got == greedy_by_training_forward(run, prompt, 40)
    assert len(set(got)) > 5


@pytest.mark.parametrize("weights", ["float32", "bfloat16", *(("int8", "int4") if library() else ())])
def test_batched_cached_and_chunked_texts_are_those_alone(make_run, tokenizer, weights):
    settings = [Sampling(max_tokens=30, temperature=t, seed=7, ignore_eos=True) for t in (0, 1, 0.7, 0, 1.3)]
    with Engine(make_run(), weights=weights, max_batch=3) as engine:
        alone = [tokens(engine.submit(p, s)) for p, s in zip(prompts(tokenizer), settings)]
        assert engine.metrics()["cached_tokens_total"] == 0
        together = [engine.submit(p, s) for p, s in zip(prompts(tokenizer), settings)]
        assert [tokens(r) for r in together] == alone
        assert engine.metrics()["cached_tokens_total"] > 0
    assert len({tuple(t) for t in alone}) == 5


def test_a_second_turn_reuses_the_first(make_run, tokenizer):
    with Engine(make_run(), weights="float32") as engine:
        prompt = prompts(tokenizer)[3]
        first = engine.submit(prompt, Sampling(max_tokens=20, temperature=0, ignore_eos=True))
        longer = [*prompt, *tokens(first), 7, 8, 9]
        second = engine.submit(longer, Sampling(max_tokens=20, temperature=0, ignore_eos=True))
        again = tokens(second)
        assert second.usage["cached_tokens"] == (len(longer) - 4) // 32 * 32 > len(prompt)
    with Engine(make_run(), weights="float32") as engine:
        assert tokens(engine.submit(longer, Sampling(max_tokens=20, temperature=0, ignore_eos=True))) == again


def test_a_small_cache_makes_texts_wait_and_forgets_the_oldest(make_run, tokenizer):
    per_block = 32 * 3 * (32 + 16) * 4
    with Engine(make_run(mtp_depth=0), weights="float32", cache_bytes=9 * per_block) as engine:
        assert engine.metrics()["cache_blocks"] == 9
        s = Sampling(max_tokens=40, temperature=0, ignore_eos=True)
        requests = [engine.submit(p, s) for p in prompts(tokenizer) for _ in range(2)]
        got = [tokens(r) for r in requests]
        assert all(len(t) == 40 for t in got)
        assert got[::2] == got[1::2]
        after = engine.metrics()
        assert after["cache_blocks_free"] == 9 and after["cache_evictions_total"] > 0


def test_stop_strings_are_never_shown(make_run, tokenizer):
    s = Sampling(max_tokens=60, temperature=0, ignore_eos=True)
    prompt = prompts(tokenizer)[1]
    with Engine(make_run(), weights="float32") as engine:
        whole = engine.submit(prompt, s).text()
        stop = whole[20:23]
        request = engine.submit(prompt, Sampling(max_tokens=60, temperature=0, ignore_eos=True, stop=(stop, "never there")))
        shown = [piece.text for piece in request]
    assert "".join(shown) == whole[: whole.index(stop)]
    assert request.finish_reason == "stop"


def test_callbacks_cancelling_and_reasons(make_run, tokenizer):
    with Engine(make_run(), weights="float32") as engine:
        heard, done = [], threading.Event()

        def hear(piece):
            heard.append(piece)
            if piece is None:
                done.set()
            elif len(heard) == 3:
                request.cancel()

        request = engine.submit(prompts(tokenizer)[0], Sampling(max_tokens=200, ignore_eos=True, seed=1), hear)
        assert done.wait(20)
        assert request.finish_reason == "cancelled" and heard[-1] is None
        assert 3 <= request.usage["completion_tokens"] < 200
        short = engine.submit([5], Sampling(max_tokens=3, ignore_eos=True))
        assert (len(tokens(short)), short.finish_reason) == (3, "length")
        full = engine.submit([5], Sampling(max_tokens=10**9, ignore_eos=True, temperature=0))
        assert len(tokens(full)) == engine.context - 1


def test_logprobs_are_the_models_own(make_run, tokenizer):
    run, prompt = make_run(), prompts(tokenizer)[0]
    with Engine(run, weights="float32") as engine:
        request = engine.submit(prompt, Sampling(max_tokens=12, temperature=0.5, seed=3, logprobs=4, ignore_eos=True))
        pieces = list(request)
    made, given = [t for p in pieces for t in p.tokens], [one for p in pieces for one in p.logprobs]
    with torch.no_grad():
        rows = load(run).network(torch.tensor([prompt + made]))[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert [one.token for one in given] == made and len(made) == 12
    for row, one in zip(rows, given):
        assert one.logprob == pytest.approx(float(row[one.token]), abs=2e-4)
        best = row.topk(4)
        assert [t for t, _ in one.top] == best.indices.tolist()


def test_faults_are_told_at_once(make_run, tmp_path):
    with Engine(make_run(), weights="float32", max_queue=0) as engine:
        for prompt, says in (([], "no tokens"), ([10**6], "token ids"), ([-1], "token ids"), ([5] * 256, "room for 256")):
            with pytest.raises(UserError, match=says):
                engine.submit(prompt, Sampling(max_tokens=1))
        with pytest.raises(Busy, match="waiting"):
            engine.submit([5], Sampling(max_tokens=1))
    with pytest.raises(UserError, match="weights fp3"):
        Engine(make_run(), weights="fp3")
    with pytest.raises(UserError, match="no such run folder"):
        Engine(tmp_path / "nothing")
    for setting in (
        {"temperature": -1},
        {"top_p": -0.1},
        {"top_p": 1.1},
        {"stop": ("",)},
        {"logprobs": 99},
        {"max_tokens": 0},
        {"temperature": float("nan")},
    ):
        with pytest.raises(UserError, match=next(iter(setting))):
            Sampling(**{"max_tokens": 5, **setting})


def test_a_closed_engine_takes_nothing(make_run):
    with Engine(make_run(), weights="float32") as engine:
        engine.submit([5, 6], Sampling(max_tokens=3))
    with pytest.raises(Busy, match="shutting down"):
        engine.submit([5], Sampling(max_tokens=1))


def test_a_read_only_folder_is_served(make_run):
    run = make_run(seed=5)
    modes = {path: path.stat().st_mode for path in (run, *run.rglob("*"))}
    try:
        for path in modes:
            path.chmod(modes[path] & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
        with Engine(run, weights="float32") as engine:
            assert len(tokens(engine.submit([5], Sampling(max_tokens=3, ignore_eos=True)))) == 3
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


def test_only_the_engines_thread_reads_its_counters(make_run, tokenizer):
    class Own(Counter):
        def __iter__(self):
            assert threading.current_thread() is engine._thread
            return super().__iter__()

        def keys(self):
            assert threading.current_thread() is engine._thread
            return super().keys()

    with Engine(make_run()) as engine:
        engine._counts = Own()
        request = engine.submit(prompts(tokenizer)[0], Sampling(max_tokens=20, temperature=0, ignore_eos=True))
        seen = [engine.metrics().get("completion_tokens_total", 0)]
        for _ in request:
            seen.append(engine.metrics().get("completion_tokens_total", 0))
        seen.append(engine.metrics()["completion_tokens_total"])
    assert seen == sorted(seen) and seen[-1] == 20 and request.finish_reason == "length"


def test_a_grammar_that_fails_ends_its_own_text_and_says_so(make_run, tokenizer):
    class Fails:
        left = 5

        def mask(self):
            if not self.left:
                raise GrammarFailed("too complex")
            allowed = np.zeros(tokenizer.vocab_size, bool)
            allowed[100:110] = True
            return allowed

        def advance(self, token):
            self.left -= 1

    with Engine(make_run()) as engine:
        prompt = prompts(tokenizer)[0]
        asked = [Sampling(max_tokens=20, temperature=0, ignore_eos=True, grammar=grammar) for grammar in (Fails(), None)]
        requests = [engine.submit(prompt, sampling) for sampling in asked]
        made = [tokens(request) for request in requests]
        counted = engine.metrics()["requests_grammar_total"]
    assert [(request.finish_reason, request.error) for request in requests] == [("grammar", "too complex"), ("length", None)]
    assert [len(text) for text in made] == [5, 20] and counted == 1
