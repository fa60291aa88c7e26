import json

import pytest
import torch
from tests.infer.conftest import TEXT
from tests.infer.test_engine import PLAIN, tokens

from sparing.base.config import UserError
from sparing.cli.main import main
from sparing.infer.engine import Engine
from sparing.infer.generate import complete, finished_requests, load, score_tokens
from sparing.infer.request import Sampling

SHORT = {"max_position_embeddings": 64}


def greedy_without_cache(run, prompt, count, context):
    network, window, made = load(run).network, list(prompt), []
    for _ in range(count):
        window = window[-(context // 2) :] if len(window) >= context else window
        with torch.no_grad():
            made.append(int(network(torch.tensor([window]))[0, -1].argmax()))
        window.append(made[-1])
    return made


@pytest.mark.parametrize("changes", [SHORT, SHORT | PLAIN])
@pytest.mark.parametrize("length", [3, 62, 64, 100])
def test_the_context_slides(make_run, tokenizer, changes, length):
    run = make_run(**changes)
    prompt = tokenizer.decode(tokenizer.encode(TEXT)[:length])
    ids = [tokenizer.eot_id, *tokenizer.encode(prompt)]
    made, pieces = greedy_without_cache(run, ids, 150, 64), []
    with Engine(run, weights="float32", max_batch=1, device="cpu") as engine:
        engine._ends.clear()
        text, count = complete(engine, prompt, Sampling(150, 0), pieces.append)
    assert text == "".join(pieces) == tokenizer.decode(made, skip_special_tokens=True) and count == 150
    assert len(pieces) > 50


def test_a_model_in_memory_writes_what_its_folder_does(make_run):
    run = make_run()
    model = load(run)
    with Engine(run, weights="float32") as engine:
        for temperature, seed in ((0, None), (0.7, 3)):
            expected = complete(engine, "import json", Sampling(60, temperature, seed=seed))[0]
            assert model.generate("import json", 60, temperature, seed=seed) == expected
    draw = lambda seed: model.generate("x", 30, 3.0, seed=seed)  # noqa: E731
    assert draw(3) == draw(3) != draw(4)
    assert draw(None) != draw(None)
    counts = [b for name, b in model.network.named_buffers() if name.endswith("tokens_per_expert")]
    assert counts and all(float(b.sum()) == 0 for b in counts), "generating counted as training"


def test_it_ends_before_the_end_of_text(make_run, tokenizer):
    with Engine(make_run(), weights="float32") as engine:
        ids = tokens(engine.submit([tokenizer.eot_id, *tokenizer.encode("import")], Sampling(30, 0)))
        engine._ends.add(ids[5])
        text, made = complete(engine, "import", Sampling(30, 0))
    assert text == tokenizer.decode(ids[: ids.index(ids[5])]) and made == ids.index(ids[5])


def test_many_answers_come_in_order(make_run, tokenizer):
    with Engine(make_run(), weights="float32", max_queue=64) as engine:
        asks = [([tokenizer.eot_id, 5 + i % 200], Sampling(1 + i % 4, 0, ignore_eos=True)) for i in range(150)]
        found = list(finished_requests(engine, iter(asks)))
        assert [request.prompt for request, _ in found] == [prompt for prompt, _ in asks]
        assert [request.usage["completion_tokens"] for request, _ in found] == [s.max_tokens for _, s in asks]
        [rows] = score_tokens(engine, [[tokenizer.eot_id, 7, 8, 9]])
    with torch.no_grad():
        line = load(make_run()).network(torch.tensor([[tokenizer.eot_id, 7, 8, 9]]))[0].log_softmax(-1)
    assert [nats for nats, _ in rows] == pytest.approx([float(line[i, token]) for i, token in enumerate((7, 8, 9))], abs=1e-3)
    assert [likeliest for _, likeliest in rows] == [int(line[i].argmax()) == token for i, token in enumerate((7, 8, 9))]


def test_an_engine_that_fails_is_told(make_run, monkeypatch, capfd):
    with Engine(make_run(), weights="float32") as engine:
        monkeypatch.setattr(engine._network, "forward", lambda rows: 1 / 0)
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            complete(engine, "x", Sampling(5))
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            list(finished_requests(engine, [([5], Sampling(5))]))
    assert "ZeroDivisionError" in capfd.readouterr().err
    with pytest.raises(UserError, match="max_tokens 0: must be 1 or more"):
        load(make_run()).generate("x", 0)


def test_an_empty_prompt_begins_a_new_text(make_run, capsys):
    command = ["generate", str(make_run()), "--prompt", "", "--max-tokens", "5", "--seed", "1"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompt"] == "" and 0 < found["tokens"] <= 5
    assert main(command) == 0 and capsys.readouterr().out == found["text"] + "\n"
    assert main(["generate", str(make_run())]) == 2 and "needs --prompt" in capsys.readouterr().err
