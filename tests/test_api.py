"""The main job through the library, on a few files: train, evaluate, generate, export, import, extend."""

import json
import math
from pathlib import Path

import pytest
import torch

from sparing import api
from sparing.base.config import UserError
from sparing.base.config_file import read_config
from sparing.kernels import native

SMALL = {
    "model": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 512, "n_routed_experts": 4, "mtp_depth": 1},
    "train": {"seq_len": 64, "batch_size": 8, "threads": 1, "replicas": 1, "compile": False, "micro_batch_size": 4},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        lines = [f"The {word} number {j} of book {i} went to the sea and came back." for j, word in enumerate(["cat", "dog", "ship"] * 20)]
        (folder / f"{i:02d}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory, monkeypatch_module):
    out = tmp_path_factory.mktemp("runs") / "run"
    summary = api.train([str(corpus)], "80ktok", str(out), SMALL, seed=3)
    return out, summary


@pytest.fixture(scope="module")
def monkeypatch_module(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("SPARING_HOME", str(tmp_path_factory.mktemp("home")))
    yield patch
    patch.undo()


def test_training_leaves_a_whole_run_folder(run):
    out, summary = run
    counts = summary["documents"]
    assert counts["in"] == counts["out"] > 0 and counts["rejected"] == counts["quarantined"] == 0
    assert summary["steps"] == 80_000 // (64 * 8) and summary["tokens"] <= 80_000
    assert 0 < summary["bpb"] < 4 and math.isfinite(summary["loss"])
    assert len(summary["samples"]) == min(3, summary_held_out(out))
    for name in ("config.toml", "tokenizer.json", "weights/model.safetensors", "state/pre-decay", "metrics.jsonl", "MODEL_CARD.md"):
        assert (out / name).exists(), name
    config = read_config(out / "config.toml")
    assert config.model.hidden_size == 64 and config.train.seed == 3 and config.train.seq_len == 64
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line and "eval_bpb" not in line]
    assert [line["step"] for line in steps] == list(range(1, summary["steps"] + 1))
    assert {"step", "tokens", "loss", "lr", "tokens_per_s"} <= steps[0].keys()
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    assert any("eval_bpb" in line for line in lines)


def summary_held_out(out):
    return len(json.loads((out / "state/summary.json").read_text())["samples"])


def test_the_trained_model_scores_and_writes_text(run, corpus):
    out, _ = run
    score = api.evaluate(str(out), [str(corpus / "00.txt")])
    assert score["documents"] == {"in": 1, "out": 1, "rejected": 0, "quarantined": 0}
    assert score["context"] == 64 and score["bytes"] == (corpus / "00.txt").stat().st_size
    assert score["bpb"] == pytest.approx(score["loss"] * score["tokens"] / score["bytes"] / math.log(2))
    greedy = [api.generate(str(out), "The cat number", 20, temperature=0)["text"] for _ in range(2)]
    assert greedy[0] == greedy[1] and greedy[0]
    pieces = []
    result = api.generate(str(out), "The ship", 30, seed=1, stream=pieces.append)
    assert "".join(pieces) == result["text"]


def test_a_score_says_what_it_left_out(run, tmp_path, capsys):
    rows = [{"text": "the cat went to the sea"}, {"body": "x", "id": 1}, {"text": 3}, {"body": "y"}, {"text": "the dog"}]
    (tmp_path / "half.jsonl").write_text("\n".join(map(json.dumps, rows)))
    score = api.evaluate(str(run[0]), [str(tmp_path / "half.jsonl")])
    assert (score["documents"], score["rejected"]) == ({"in": 5, "out": 2, "rejected": 0, "quarantined": 3}, 3)
    assert score["reasons"] == {"no key 'text'": 2, "'text' is not text but int": 1}
    said = capsys.readouterr().err
    assert "2 documents were scored, 3 could not be used: 2 × no key 'text' (keys: body, id), in " in said
    assert api.evaluate(str(run[0]), [str(tmp_path / "half.jsonl")], text_key="body")["documents"]["out"] == 2
    (tmp_path / "none.jsonl").write_text(json.dumps(rows[1]))
    (tmp_path / "pointer.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n")
    with pytest.raises(UserError, match=r"no usable text: 1 × no key 'text' \(keys: body, id\), in .*none\.jsonl:1; 1 × a Git LFS pointer"):
        api.evaluate(str(run[0]), [str(tmp_path / "none.jsonl"), str(tmp_path / "pointer.txt")])


def test_sixteen_bits_score_as_thirty_two_do(run, monkeypatch):
    """On a text that the run does not know by heart, and that is larger than the piece on which both are compared."""
    found = {}
    for quick in (False, True):
        monkeypatch.setattr(api, "fast", lambda _, quick=quick: quick)
        monkeypatch.setattr(api, "cores", lambda: 2)
        found[quick] = api.evaluate(str(run[0]), [str(Path(json.__file__).parent)])
    assert found[False]["tokens"] > 2 * 2048 and found[False]["dtype"] == "float32"
    assert found[True]["bpb"] == pytest.approx(found[False]["bpb"], rel=1e-3)
    if native.passes() is not None:  # plain kernels round logits too, and may differ by more than the piece allows
        assert found[True]["dtype"] == "bfloat16"
    assert api.evaluate(str(run[0]), [json.__file__])["dtype"] == "float32", "too little text to compare"


def test_logits_of_the_library(run):
    model = api.load(run[0])
    tokens = torch.tensor([model.tokenizer.encode("The cat went to the sea")])
    logits = model.logits(tokens)
    assert logits.shape == (1, tokens.shape[1], 512) and logits.dtype == torch.float32
    with pytest.raises(UserError, match=r"\(B, T\) integers"):
        model.logits(torch.zeros(3))


def test_export_with_a_chat_template_and_for_llama_cpp(run, tmp_path):
    gguf = pytest.importorskip("gguf")
    (run[0] / "chat_template.jinja").write_text("{{ messages[0].content }}")
    found = api.export(str(run[0]), "gguf", str(tmp_path / "m.gguf"), type="f16")
    api.export(str(run[0]), "hf", str(tmp_path / "hf"))
    (run[0] / "chat_template.jinja").unlink()
    api.import_(str(tmp_path / "hf"), str(tmp_path / "again"))
    assert (tmp_path / "again/chat_template.jinja").read_text() == "{{ messages[0].content }}", "it comes back with an import"
    assert found["format"] == "gguf" and found["dtype"] == "f16"
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.get_field("general.name").contents() == run[0].name
    assert reader.get_field("tokenizer.chat_template").contents() == "{{ messages[0].content }}"
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F16", "F32"}


def test_export_and_import_keep_the_logits(run, tmp_path):
    out, _ = run
    api.export(str(out), "hf", str(tmp_path / "hf"))
    api.import_(str(tmp_path / "hf"), str(tmp_path / "again"))
    tokens = torch.randint(0, 512, (2, 20))
    ours, again = api.load(out), api.load(tmp_path / "again")
    assert torch.equal(ours.logits(tokens), again.logits(tokens))
    assert again.config.model.mtp_depth == 1
    assert api.generate(str(tmp_path / "again"), "The dog", 5, temperature=0) is not None


def test_an_import_without_a_tokenizer_computes_and_refuses_text(run, tmp_path):
    api.export(str(run[0]), "hf", str(tmp_path / "hf"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "hf" / name).unlink()
    api.import_(str(tmp_path / "hf"), str(tmp_path / "mute"))
    assert api.load(tmp_path / "mute").logits(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 4, 512)
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        api.generate(str(tmp_path / "mute"), "hello")


def test_a_finished_run_is_extended_from_before_the_decay(corpus, tmp_path, monkeypatch_module):
    out = tmp_path / "run"
    first = api.train([str(corpus)], "30ktok", str(out), SMALL, seed=1, samples=0)
    with pytest.raises(UserError, match=r"is finished.*--budget \+30"):
        api.resume(str(out))
    with pytest.raises(UserError, match="same unit"):
        api.resume(str(out), "+5m")
    second = api.resume(str(out), "+30ktok", samples=0)
    assert first["tokens"] <= 30_000 < second["tokens"] <= 60_000
    assert second["bpb"] < first["bpb"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "grad_norm" in line]
    assert steps == list(range(1, second["steps"] + 1))
    assert read_config(out / "config.toml").budget.amount == 60_000


@pytest.mark.parametrize(
    "wishes,budget,message",
    [
        ({}, "1e-6kWh", "lasts .* s here; a minute costs"),
        ({}, "1e6flop", "budget 1Mflop is less than one batch"),
        ({"data": {"holdout_fraction": 0}}, "30ktok", "holdout_fraction must be more than 0"),
        ({"train": {"seed": 2**64}}, "30ktok", "train.seed must be at most"),
        ({"train": {"device": "cuda"}}, "30ktok", "no CUDA device"),
        ({"data": {"tokenizer": "/nowhere/tokenizer.json"}}, "30ktok", "does not exist"),
        ({"data": {"holdout_fraction": 0.9}}, "30ktok", "holdout_fraction"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_run(corpus, tmp_path, monkeypatch_module, wishes, budget, message):
    if "cuda" in str(wishes) and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=message) as error:
        api.train([str(corpus)], budget, str(tmp_path / "run"), wishes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.toml").exists()


def test_a_corpus_of_one_unusable_file_is_refused(tmp_path, monkeypatch_module):
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="no usable text"):
        api.train([str(tmp_path / "bad.txt")], "30ktok", str(tmp_path / "run"))
