"""Fewer experts: calibration on text, the guard, and what requests of both tiers share."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.infer.conftest import SMALL
from tests.losses import loss_of

from sparing.base.config import Config, ModelConfig, UserError
from sparing.base.config_file import read_config, write_config
from sparing.base.run import RunFolder, write_tensors
from sparing.infer import calibration
from sparing.infer.approximate import Approximate
from sparing.infer.calibration import Calibration, calibrate, milder, save, saved, token_losses, windows
from sparing.infer.engine import Engine
from sparing.infer.network import CompiledNetwork, Rows
from sparing.infer.packed_weights import open_packed
from sparing.infer.request import Sampling
from sparing.kernels.decode import library
from sparing.model.experts import update_biases
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer

pytestmark = pytest.mark.skipif(library() is None, reason="there is no C compiler")
STDLIB = sorted(__import__("pathlib").Path(json.__file__).parent.parent.glob("*.py"))


def texts(which: int, size=60_000) -> list[str]:
    """Every third file of this Python's own source, from `which`."""
    found, total = [], 0
    for path in STDLIB[which::3]:
        found.append(path.read_text(encoding="utf-8", errors="ignore")[:6000])
        total += len(found[-1])
        if total > size:
            return found
    return found


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory):
    """A mixture trained for seconds: it can spare experts, though not all of them."""
    torch.manual_seed(0)
    c = replace(SMALL, vocab_size=tokenizer.vocab_size, num_experts_per_tok=3, mtp_depth=0)
    model = Transformer(c)
    init_weights(model, 0)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    ids = torch.tensor([i for text in texts(0, 200_000) for i in tokenizer.encode(text)])
    for _ in range(150):
        rows = ids[torch.randint(len(ids) - 66, (16, 1)) + torch.arange(66)]
        optimizer.zero_grad()
        loss_of(model, rows[:, :64], rows[:, 1:65, None]).total.backward()
        optimizer.step()
        update_biases(model, 0.01)
    run = RunFolder.create(tmp_path_factory.mktemp("trained") / "run")
    write_tensors(run.weights_file, model.state_dict())
    run.config_file.write_text(write_config(replace(Config(), model=c)))
    tokenizer.save(run.tokenizer_file)
    return run


@pytest.fixture
def network(trained, tokenizer):
    c = replace(SMALL, vocab_size=tokenizer.vocab_size, num_experts_per_tok=3, mtp_depth=0)
    found = CompiledNetwork(c, open_packed(trained, c, "int8"), "int8", 8, 1)
    yield found
    found.close()


@pytest.mark.parametrize("limit", [0.002, 0.006])
def test_calibration_keeps_its_limit_on_text_that_it_has_not_seen(trained, network, tokenizer, limit):
    found = calibrate(network, tokenizer, texts(1), limit, 1)
    shares = np.array(found.shares, np.float32)
    assert 1 <= found.experts < 2.95 and (shares < 1).any()
    held_out = windows(network, tokenizer, texts(2))
    exact, all_of_them = token_losses(network, held_out, None)
    thin, experts = token_losses(network, held_out, shares)
    assert all_of_them == 3 and experts == pytest.approx(found.experts, abs=0.1)
    assert thin.mean() - exact.mean() <= limit * exact.mean()
    least, one = token_losses(network, held_out, np.array([1, 0, 0], np.float32))
    assert one == 1 and least.mean() - exact.mean() > limit * exact.mean(), "the limit must bind"


def allow(run, weights, shares, **more):
    """As if a calibration had found these shares of the mixture's layers; random weights could spare nothing."""
    run = RunFolder.open(run)
    c = read_config(run.config_file).model
    shares = (1.0,) * c.num_dense_layers + tuple(shares) + (1.0,) * c.mtp_depth
    source = open_packed(run, c, weights).source
    found = Calibration(source, "", **{"limit": 0.001, "floor": 1, **more}, shares=shares, loss=3.0, increase=0.0, error=0.0, experts=1.5,
                        tokens=1, date="2026-11-22")  # fmt: skip
    assert save(run, weights, found) and saved(run, source, weights) == found


def tokens(request):
    return [token for piece in request for token in piece.tokens]


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_texts_of_both_tiers_are_those_alone_and_share_no_cache(make_run, tokenizer, weights):
    run = make_run()
    allow(run, weights, (0.6, 0.5))
    prompts = [[tokenizer.eot_id, *tokenizer.encode(text[:300])] for text in texts(0)[:3]]
    settings = [Sampling(max_tokens=30, temperature=t, seed=7, ignore_eos=True, approximate=a) for t in (0, 1) for a in (False, True)]
    asks = [(prompt, s) for prompt in prompts for s in settings]
    with Engine(run, weights=weights, approximate=Approximate(checked=0)) as engine:
        alone, missed = [], 0
        for prompt, s in asks:
            request = engine.submit(prompt, s)
            alone.append(tokens(request))
            assert s.temperature == 1 or request.usage["cached_tokens"] == 0, "the first of a tier has nothing to reuse"
            missed += s.temperature == 1 and request.usage["cached_tokens"] == 0
            used = request.usage["approximate_experts"] / max(1, request.usage["approximate_layers"])
            assert 1 < used < 3 if s.approximate else used == 0
            assert (request.approximate is not None) == s.approximate
        assert missed <= 1, "the cache grows when what was given up is asked for"
        together = [engine.submit(*ask) for ask in asks]
        assert [tokens(request) for request in together] == alone
    assert len({tuple(text) for text in alone}) == len(asks)
    with Engine(run, weights=weights, speculate=False, approximate=Approximate(checked=0)) as engine:
        assert [tokens(engine.submit(*ask)) for ask in reversed(asks)] == alone[::-1]
    with Engine(run, weights=weights) as engine:
        assert [tokens(engine.submit(*ask)) for ask in asks if not ask[1].approximate] == alone[0::2]
        with pytest.raises(UserError, match="operator"):
            engine.submit(*asks[1])


def test_the_guard_backs_off_where_too_much_is_lost(trained, network, tokenizer, capfd):
    ask = Sampling(max_tokens=150, ignore_eos=True, approximate=True)
    prompts = [[tokenizer.eot_id, *tokenizer.encode(text[:100])] for text in texts(2, 80_000)]
    for limit, temperature in ((0.5, 1.0), (0.5, 0.0), (0.0005, 0.0)):
        allow(trained.path, "int8", (0.0, 0.0), limit=limit)
        with Engine(trained.path, weights="int8", approximate=Approximate(checked=1.0)) as engine:
            requests = [engine.submit(prompt, replace(ask, seed=seed, temperature=temperature)) for seed, prompt in enumerate(prompts[:12])]
            made = [tokens(request) for request in requests]
            while engine.metrics()["requests_total"] < 24:  # the guard's come after
                time.sleep(0.01)
            found, shares = engine.metrics(), engine.approximate.shares
            later = engine.submit(prompts[0], replace(ask, seed=0))
            later.text()
            assert all(request.approximate["back_offs"] == 0 for request in requests)
        assert found["approximate_experts_per_token"] == pytest.approx(1)
        if limit == 0.5:
            assert found["approximate_back_offs_total"] == later.approximate["back_offs"] == 0
            assert found["approximate_checked_total"] == 12 * 150
            divergences = []
            for prompt, text in zip(prompts, made, strict=False):
                rows = [Rows(), Rows()]
                for one, shares in zip(rows, (None, np.array([1, 0, 0], np.float32)), strict=True):
                    one.add(list(range(8)), [*prompt, *text[:-1]], 0, 150, shares)
                p, q = (torch.from_numpy(network.forward(one)).double().log_softmax(-1) for one in rows)
                divergences.append((q.exp() * (q - p)).sum(-1))
            expected = float(torch.cat(divergences).mean())
            assert abs(found["approximate_rise"] - expected) < 4 * found["approximate_rise_error"] < expected
        else:
            assert found["approximate_back_offs_total"] == later.approximate["back_offs"] == 1
            assert (shares == np.array([1, 0.5, 0.5], np.float32)).all()
            assert later.usage["approximate_experts"] > 1.2 * later.usage["approximate_layers"]
            assert found["approximate_checked_total"] < 12 * 150 and found["approximate_rise"] == 0, "what began before it no longer counts"
            assert "halfway back" in capfd.readouterr().err
            with Engine(trained.path, weights="int8", approximate=Approximate(checked=1.0)) as engine:  # a restart
                assert (engine.approximate.shares == shares).all() and engine.metrics()["approximate_back_offs_total"] == 1


def test_backing_off_ends_at_every_expert():
    shares, steps = np.array([1, 0.3, 0.9], np.float32), 0
    while shares is not None:
        steps, before, shares = steps + 1, shares, milder(shares, 1 / 2)
        assert shares is None or (shares >= before).all()
    assert steps < 8
    kept = Calibration("", "", 0.001, 1, (1.0, 0.3, 0.9), 3.0, 0.0, 0.0, 1.5, 1, "")
    assert replace(kept, back_offs=1).current_shares == pytest.approx([1, 0.65, 0.95])
    assert replace(kept, back_offs=steps).current_shares is replace(kept, back_offs=steps + 3).current_shares is None


@pytest.mark.slow
def test_calibrations_are_kept_and_made_anew_for_another_text(trained, tokenizer, monkeypatch, tmp_path):
    path = trained.path / "packed" / "int8-experts.json"
    path.unlink(missing_ok=True)
    options = {"weights": "int8", "cache_bytes": 1 << 20}
    with pytest.raises(UserError, match="not calibrated"):
        Engine(trained.path, approximate=Approximate(), **options)
    with pytest.raises(UserError, match="4096 are needed"):
        Engine(trained.path, approximate=Approximate(["too short"]), **options)
    made = []
    for which, limit in ((1, 0.006), (1, 0.006), (1, 0.004), (2, 0.004)):
        with Engine(trained.path, approximate=Approximate(texts(which, 20_000), limit), **options) as engine:
            made.append((path.stat().st_mtime_ns, engine.approximate.calibration))
    assert made[0] == made[1] and len({when for when, _ in made}) == 3 and len({found.text for _, found in made}) == 2
    with Engine(trained.path, approximate=Approximate(), **options) as engine:
        assert engine.approximate.calibration == made[3][1]
    monkeypatch.setenv("SPARING_HOME", str(tmp_path))
    monkeypatch.setattr("sparing.infer.calibration.derived_paths", lambda run, source, name: (path / "no folder" / name, tmp_path / name))
    with Engine(trained.path, approximate=Approximate(texts(1, 20_000), 0.006), **options) as engine:
        assert replace(engine.approximate.calibration, date="") == replace(made[0][1], date="")
    assert (tmp_path / path.name).exists()


@pytest.mark.parametrize("changes", [{"num_dense_layers": 3}, {"qk_rope_head_dim": 8}])
def test_what_cannot_be_approximated_says_so(make_run, changes):
    with pytest.raises(UserError, match=r"no experts to leave out|plain PyTorch"):
        Engine(make_run(**changes), approximate=Approximate(["x" * 10_000]))


def test_calibrating_reads_less_text_where_reading_is_slow(monkeypatch, capsys):
    slow, now = iter(range(1000)), [0.0]
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(calibration, "token_losses", lambda *_: now.__setitem__(0, now[0] + 5.0) or next(slow))
    network = SimpleNamespace(c=ModelConfig(num_layers=3, num_dense_layers=1))
    pieces = [[0] * 513 for _ in range(64)]
    assert len(calibration._affordable(network, pieces)) == 9  # FEWEST tokens, and one piece more
    assert "9 of 64 pieces of text: all of them would take 2,560 s" in capsys.readouterr().err
    monkeypatch.setattr(calibration, "token_losses", lambda *_: now.__setitem__(0, now[0] + 0.01))
    assert calibration._affordable(network, pieces) == pieces
