"""`distill`: a student learns from a teacher's draws, inside a budget that pays for both; bit for bit the same after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.model.shapes import TINY
from tests.model.test_frozen import filled

from sparing import api
from sparing.adapt.distill import Taught, divided
from sparing.adapt.own import _ReverseDivergence
from sparing.adapt.teacher import Draws, drawn, same_tokenizer, strata
from sparing.base.config import StartConfig, UserError
from sparing.base.config_file import read_config, write_config
from sparing.base.files import file_sha256, read_lines, write_atomic
from sparing.base.layers import SELECTION_BIAS
from sparing.base.run import RunFolder, read_tensors, weights_sha256
from sparing.budget.flops import train_flops
from sparing.data.loader import IGNORED, Batch
from sparing.infer.engine import Engine
from sparing.infer.generate import generate_texts
from sparing.job.start import keep_origin
from sparing.kernels.decode import library

compiled = pytest.mark.skipif(library() is None, reason="drafting and int8 are the compiled step's, which needs a C compiler")
TRAIN = {"threads": 1, "replicas": 1, "compile": False, "micro_batch_size": 8, "kernels": "plain", "dtype": "float32"}
TEACHER = {
    "model": {
        "hidden_size": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 512, "num_dense_layers": 2, "max_position_embeddings": 256,
    },
    "train": TRAIN | {"seq_len": 64, "batch_size": 8, "evals": 0},
}  # fmt: skip
STUDENT = """
[model]
hidden_size = 32
num_layers = 1
num_heads = 2
num_dense_layers = 1
[train]
seq_len = 64
batch_size = 8
evals = 0
threads = 1
replicas = 1
compile = false
micro_batch_size = 8
kernels = "plain"
dtype = "float32"
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    root = tmp_path_factory.mktemp("distill")
    (root / "text").mkdir()
    for i in range(40):
        lines = [f"The {word} number {j} of book {i} went to the sea. What is it?" for j, word in enumerate(["cat", "dog", "ship"] * 20)]
        (root / "text" / f"{i:02d}.txt").write_text("\n".join(lines))
    (root / "student.toml").write_text(STUDENT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARING_HOME", str(root / "home"))
        api.train([str(root / "text")], "60ktok", str(root / "teacher"), TEACHER, seed=3, samples=0)
        yield root


def distilled(workplace, student, out, budget="20ktok", **options) -> dict:
    teacher, text = str(workplace / "teacher"), [str(workplace / "text")]
    return api.distill(str(workplace / student), teacher, text, budget, str(out), **({"samples": 0} | options))


def test_a_student_learns_from_noise(workplace, tmp_path, capsys):
    out = tmp_path / "run"
    summary = distilled(workplace, "student.toml", out, samples=1)
    assert summary["before"] is None and summary["base"] is None and summary["after"]["new"]["bpb"] < 2
    assert [(row["name"], row["relation"]) for row in summary["ancestors"]] == [("teacher", "teacher")]
    assert summary["trained_tokens"] == summary["tokens"] <= 20_000 and summary["trainable_parameters"] == summary["parameters"]
    told = summary["teacher"]
    assert told["asked_tokens"] >= 20_000 and told["flops"] > 0 and told["seconds"] > 0 and summary["no_teacher"]["bpb"]["value"] > 0
    assert told["cache_bytes"] <= told["top_128_bytes"] / 8
    size = (out / "state/teacher/draws.bin").stat().st_size
    assert abs(size / told["cache_bytes"] - 1) < 0.3, "what was said, but for the margin of text"
    assert f"{told['cache_bytes'] / 1e6:,.1f} MB in the run folder" in capsys.readouterr().err
    assert (out / "tokenizer.json").read_text() == (workplace / "teacher/tokenizer.json").read_text()
    receipt = api.receipt(str(out))
    assert "teach" in json.dumps(receipt)
    assert api.evaluate(str(out), [str(workplace / "text/00.txt")])["bpb"] < 2
    assert api.generate(str(out), "The cat", 4, temperature=0.0)


def test_a_mixture_goes_on_from_a_run(workplace, tmp_path):
    model = TEACHER["model"] | {"num_dense_layers": 1, "n_routed_experts": 4, "moe_intermediate_size": 32, "mtp_depth": 1}
    wishes = {"model": model, "train": TEACHER["train"], "data": {"tokenizer": str(workplace / "teacher/tokenizer.json")}}
    api.train([str(workplace / "text")], "8ktok", str(tmp_path / "base"), wishes, seed=4, samples=0)
    summary = distilled(workplace, tmp_path / "base", tmp_path / "run", wishes={"train": TEACHER["train"], "distill": {"truth": 0.0}})
    assert summary["after"]["new"]["bpb"] < summary["before"]["new"]["bpb"] and summary["base"]
    assert {row["relation"] for row in summary["ancestors"]} == {"teacher", "first weights"}
    assert "mtp_loss" in read_lines(tmp_path / "run/metrics.jsonl")[-2]


def test_draws_are_unbiased():
    """Over many positions of one distribution, each word's share comes to its probability; the words of a position are in order."""
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(0)) * 2
    p = logits.double().softmax(-1)[0]
    words = drawn(logits.expand(40_000, -1), torch.from_numpy(strata(np.arange(40_000), 12, seed=5)))
    found = torch.bincount(words.flatten(), minlength=200).double() / words.numel()
    assert ((found - p).abs() < 5 * (p * (1 - p) / words.numel()).sqrt() + 1e-9).all()
    assert bool((words[:, 1:] >= words[:, :-1]).all())
    independent = drawn(logits.expand(40_000, -1), torch.rand(40_000, 12, generator=torch.Generator().manual_seed(1)))
    most = int(p.argmax())
    spread = [float((of == most).double().mean(1).var()) for of in (words, independent)]
    assert spread[0] < 0.5 * spread[1], "strata: less noise than independent draws"


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=50), st.integers(1, 255), st.integers(-(2**63), 2**64 - 1))
def test_strata_lie_in_their_parts(positions, samples, seed):
    at = strata(np.array(positions), samples, seed)
    assert at.shape == (len(positions), samples) and (at >= 0).all() and (at < 1).all()
    assert (np.abs(at * samples - np.arange(samples) - 0.5) <= 0.5 + 1e-4).all()
    again = strata(np.array(positions[-1:]), samples, seed)
    assert np.array_equal(again[0], at[-1]), "of a position alone, whatever is asked beside it"


def test_the_expected_gradient_is_that_of_the_whole_distribution():
    """Many draws: loss and gradient come to the cross-entropy against the teacher's distribution, mixed with the text's own word."""
    student, teacher = filled(TINY), filled(replace(TINY, num_layers=2))
    c, count = student.config, 4000
    tokens = torch.randint(0, c.vocab_size, (1, 6))
    targets = torch.randint(0, c.vocab_size, (1, 6, 1 + c.mtp_depth))
    targets[0, 4] = IGNORED
    with torch.no_grad():
        logits = teacher(tokens)[0]
    words = drawn(logits, torch.from_numpy(strata(np.arange(6), count, 0)))[None]
    words[0, 2] = IGNORED  # the teacher was not asked
    student.zero_grad()
    loss = Taught(c, truth=0.25, mtp_weight=0.0)(student, Batch(tokens, targets, drawn=words))
    loss.total.backward()
    grad = student.model.norm.weight.grad.clone()
    student.zero_grad()
    log_p, own = student(tokens)[0].log_softmax(-1), targets[0, :, 0]
    soft = -(logits.softmax(-1) * log_p).sum(-1)
    hard = -log_p.gather(1, own.clamp(min=0)[:, None])[:, 0]
    mixed = torch.where(torch.arange(6) == 2, hard, 0.25 * hard + 0.75 * soft).where(own != IGNORED, 0.0)
    expected = mixed.sum() / (own != IGNORED).sum()
    expected.backward()
    assert float(loss.total) == pytest.approx(float(expected), rel=2e-3)
    assert torch.allclose(grad, student.model.norm.weight.grad, rtol=0.02, atol=2e-4)


@pytest.mark.parametrize("posix", [True, False])
def test_draws_on_disk(tmp_path, monkeypatch, posix):
    if not posix:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    draws = Draws(tmp_path / "d", "key", 10, 3, 512)
    assert draws.rows == 0 and draws.bytes == 10 * 3 * 2 == (tmp_path / "d/draws.bin").stat().st_size
    draws.put(np.array([4, 2]), np.array([[0, 0, 511], [1, 2, 3]]))
    draws.note(1)
    found = Draws(tmp_path / "d", "key", 10, 3, 512)
    assert found.rows == 1
    assert found.take(np.array([[4, -1], [2, 5]])).tolist() == [[[0, 0, 511], [-100] * 3], [[1, 2, 3], [-100] * 3]]
    other = Draws(tmp_path / "d", "another", 10, 3, 512)
    assert other.rows == 0 and bool((other.take(np.arange(10)) == -100).all()), "of another teacher: begun anew"
    assert Draws(tmp_path / "w", "key", 10, 3, 1 << 17).bytes == 120
    for wrong in ("", "[]", '{"key": "key"}', "no json"):
        (tmp_path / "d/note.json").write_text(wrong)
        assert Draws(tmp_path / "d", "key", 10, 3, 512).rows == 0


@given(st.floats(1, 1e9), st.floats(1e-6, 10), st.floats(0, 10), st.floats(1, 1e9), st.none() | st.integers(1, 10**9))
def test_a_budget_is_divided_and_never_exceeded(whole, learning, asking, corpus, wished):
    tokens, asked = divided(whole, learning, asking, corpus, wished)
    if wished is None:
        assert tokens * learning + (asked - 1) * asking <= whole * (1 + 1e-6) and asked <= max(1, tokens + 1, corpus)
        assert asked - 1 <= corpus and (tokens * learning + min(tokens, corpus) * asking) == pytest.approx(whole, rel=1e-6)
    else:
        assert asked == wished and tokens >= 0 and (tokens == 0 or tokens * learning + asked * asking == pytest.approx(whole, rel=1e-6))


def test_a_budget_in_operations_pays_for_the_teacher(workplace, tmp_path):
    summary = distilled(workplace, "student.toml", tmp_path / "run", "1.2e10flop")
    c = read_config(tmp_path / "run/config.toml")
    learnt = summary["tokens"] * train_flops(c.model, 64)
    assert 0.9 * 1.2e10 < learnt + summary["teacher"]["flops"] <= 1.02 * 1.2e10
    assert c.distill.teacher_share == pytest.approx(summary["teacher"]["flops"] / 1.2e10, rel=0.05)


def started(arguments, written) -> None:
    """The verb in a process of its own, killed as soon as it has written something."""
    command = [sys.executable, "-m", "sparing", *map(str, arguments)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=-1, stderr=-1, text=True)
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None and not written():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()


PLAIN = [
    "--train.seq-len", "64", "--train.batch-size", "8", "--train.kernels", "plain", "--train.replicas", "1", "--train.threads", "1",
    "--train.dtype", "float32", "--train.micro-batch-size", "8", "--train.compile", "false", "--train.evals", "0",
]  # fmt: skip
"""The fixtures' settings."""
OPTIONS = ["--budget", "24ktok", "--train.checkpoint-interval-s", "0.2", "--samples", "0"]


def losses(run) -> list:
    return [(line["step"], line.get("loss"), line.get("eval_loss")) for line in read_lines(run / "metrics.jsonl")]


def test_killed_and_resumed_bit_for_bit(workplace, tmp_path):
    """Once while the teacher is asked, and once while the student learns."""
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    bits = killed / "state/teacher/draws.bin"
    begin = ["distill", workplace / "student.toml", "--teacher", workplace / "teacher", "--data", workplace / "text", "--out", killed]
    started([*begin, *OPTIONS], lambda: bits.exists() and any(bits.read_bytes()))
    assert not (killed / "metrics.jsonl").exists()
    started(["resume", killed], lambda: (killed / "metrics.jsonl").exists() and any(line[0] >= 12 for line in losses(killed)))
    api.resume(str(killed), samples=0)
    distilled(workplace, "student.toml", straight, "24ktok", wishes={"train": {"checkpoint_interval_s": 0.2}})
    assert losses(killed) == losses(straight) and len(losses(killed)) > 25
    assert bits.read_bytes() == (straight / "state/teacher/draws.bin").read_bytes()
    assert file_sha256(RunFolder(killed).weights_file) == file_sha256(RunFolder(straight).weights_file)
    longer = api.resume(str(killed), "+8ktok", samples=0)
    assert longer["tokens"] > 24_000


def test_refused_in_one_line(workplace, tmp_path):
    def refused(student, teacher, **options) -> str:
        with pytest.raises(UserError) as error:
            api.distill(str(student), str(teacher), [str(workplace / "text")], "20ktok", str(tmp_path / "run"), samples=0, **options)
        assert "\n" not in str(error.value) and not (tmp_path / "run/config.toml").exists()
        return str(error.value)

    other = TEACHER | {"model": TEACHER["model"] | {"vocab_size": 300}}
    api.train([str(workplace / "text")], "4ktok", str(tmp_path / "other"), other, samples=0)
    student, teacher = workplace / "student.toml", workplace / "teacher"
    said = refused(tmp_path / "other", teacher)
    assert "its tokenizer is another one" in said and "words, not" in said
    assert "no such run folder" in refused(student, tmp_path / "nobody")
    assert "no such recipe" in refused("nothing", teacher)
    assert "must be at least 1" in refused(student, teacher, wishes={"distill": {"samples": 0}})
    assert "128 tokens at most" in refused(student, shorter(teacher, tmp_path / "short"), wishes={"train": {"seq_len": 256}})
    assert "esft: distill has no use" in refused(student, teacher, wishes={"esft": {}})
    assert "adapter: distill has no use" in refused(teacher, teacher, wishes={"adapter": {}}, on_policy=True)
    with pytest.raises(UserError, match="sparing distill --teacher"):
        api.train([str(workplace / "text")], "20ktok", str(tmp_path / "run"), {"distill": {}})


def shorter(run, folder):
    """A copy of a run that reads 128 tokens at most."""
    shutil.copytree(run, folder)
    file = folder / "config.toml"
    file.write_text(file.read_text().replace("max_position_embeddings = 256", "max_position_embeddings = 128"))
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["model"]["vocab"].update({"zz": t["model"]["vocab"].pop("Ġthe", 300)}), "no word"),
        (lambda t: t["model"]["merges"].reverse(), "other merges"),
        (lambda t: t.update(normalizer={"type": "NFC"}), "another normalizer"),
        (lambda t: t.update(decoder=None), None),
    ],
)
def test_tokenizers_are_compared_by_what_they_do(workplace, tmp_path, change, said):
    content = json.loads((workplace / "teacher/tokenizer.json").read_text())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    if said is None:
        return same_tokenizer(tmp_path / "tokenizer.json", workplace / "teacher/tokenizer.json", (None, None))
    with pytest.raises(UserError, match=said):
        same_tokenizer(tmp_path / "tokenizer.json", workplace / "teacher/tokenizer.json", (None, None))
    return None


@pytest.fixture(scope="module", params=["dense", "mixture"])
def drafting(workplace, request):
    """(base, the run with a module that drafts, its summary)."""
    base, out = workplace / f"base-{request.param}", workplace / f"drafts-{request.param}"
    model = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 512, "max_position_embeddings": 256}
    if request.param == "dense":  # as SmolLM2 is
        model |= {"num_dense_layers": 2, "attention": "gqa", "num_kv_heads": 1, "head_dim": 32, "tie_word_embeddings": True}
    else:
        model |= {"num_dense_layers": 1, "n_routed_experts": 4, "moe_intermediate_size": 32}
    api.train([str(workplace / "text")], "60ktok", str(base), TEACHER | {"model": model}, seed=3, samples=0)
    wishes = {"train": TEACHER["train"], "drafts": {"words": 256}}
    return base, out, api.distill(str(base), None, [str(workplace / "text")], "40ktok", str(out), mtp=True, wishes=wishes, samples=0)


def test_a_module_learns_to_draft_and_nothing_else_changes(drafting):
    base, out, summary = drafting
    before, after = (dict(read_tensors(RunFolder(run).weights_file)) for run in (base, out))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    module = {name for name in after if name not in before}
    assert module and all(name.startswith("model.layers.2.") for name in module)
    assert summary["trainable_parameters"] == sum(after[name].numel() for name in module if SELECTION_BIAS not in name)
    assert summary["before"]["new"] == summary["after"]["new"], "it is the same model"
    assert summary["after"]["drafts"]["agreement"] > max(0.5, summary["before"]["drafts"]["agreement"] + 0.1)
    words = json.loads((out / "draft_words.json").read_text())
    assert len(words) == summary["draft_words"] == 256 and summary["draft_words_share"] > 0.95


@compiled
@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_same_texts_in_fewer_steps(drafting, weights, temperature):
    base, out, _ = drafting
    settings = [{"max_tokens": 40, "temperature": temperature, "seed": seed, "ignore_eos": True} for seed in range(4)]
    texts, steps = [], []
    for run in (base, out):
        with Engine(run, weights=weights, max_batch=1) as engine:
            prompt = engine.tokenizer.encode_prompt("The cat number")
            texts.append(list(generate_texts(engine, ((prompt, setting) for setting in settings))))
            steps.append(engine.metrics()["steps_total"])
            if run == out:
                accepted = engine.metrics()["accepted_total"] / engine.metrics()["drafted_total"]
    assert texts[0] == texts[1] and steps[1] < 0.9 * steps[0] and accepted > 0.3


@pytest.mark.parametrize("drafting", ["dense"], indirect=True)
def test_words_of_drafts_go_on_with_the_model(drafting, tmp_path):
    """Into runs that start from it, and back again: else its module would choose among all words, which takes longer."""
    _, out, _ = drafting
    words, child = (out / "draft_words.json").read_bytes(), RunFolder.create(tmp_path / "child")
    config = replace(read_config(out / "config.toml"), drafts=None, start=StartConfig(str(out), weights_sha256(RunFolder(out))))
    keep_origin(child, config)
    write_atomic(child.config_file, write_config(config))
    api.rollback(str(child), str(tmp_path / "back"))
    assert words == child.draft_words_file.read_bytes() == (tmp_path / "back/draft_words.json").read_bytes()


@compiled
@pytest.mark.parametrize("drafting", ["dense"], indirect=True)
def test_words_of_drafts_are_checked(drafting, tmp_path):
    _, out, _ = drafting
    run = tmp_path / "run"
    shutil.copytree(out, run)
    shutil.rmtree(run / "packed", ignore_errors=True)
    for wrong in ("[]", "[1, 1]", "[-1]", "[512]", "{}", "[0.5]", "no json", '["a"]'):
        (run / "draft_words.json").write_text(wrong)
        with pytest.raises(UserError, match="a list of different token ids from 0 to 511"):
            Engine(run, weights="int8")
    (run / "draft_words.json").unlink()
    with Engine(run, weights="int8") as engine:
        assert engine.speculates, "without a list it chooses among all words"


@pytest.mark.parametrize("drafting", ["dense", pytest.param("mixture", marks=pytest.mark.slow)], indirect=True)
def test_a_module_is_resumed_bit_for_bit(drafting, workplace, tmp_path):
    base, _, _ = drafting
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    wishes = {"train": TEACHER["train"] | {"checkpoint_interval_s": 0.1}}
    words = [*PLAIN, "--train.checkpoint-interval-s", "0.1", "--samples", "0"]
    started(
        ["distill", base, "--mtp", "--data", workplace / "text", "--budget", "40ktok", "--out", killed, *words],
        lambda: (killed / "metrics.jsonl").exists() and any(line[0] >= 30 for line in losses(killed)),
    )
    api.resume(str(killed), samples=0)
    api.distill(str(base), None, [str(workplace / "text")], "40ktok", str(straight), mtp=True, wishes=wishes, samples=0)
    assert losses(killed) == losses(straight) and len(losses(killed)) > 60
    assert file_sha256(RunFolder(killed).weights_file) == file_sha256(RunFolder(straight).weights_file)


@pytest.mark.parametrize("drafting", ["dense"], indirect=True)
def test_mtp_refused_in_one_line(drafting, workplace, tmp_path):
    _, out, _ = drafting
    text = [str(workplace / "text")]
    with pytest.raises(UserError, match="has a module that drafts already"):
        api.distill(str(out), None, text, "20ktok", str(tmp_path / "run"), mtp=True)
    with pytest.raises(UserError, match="distill: distill --mtp has no use for this section"):
        api.distill(str(out), None, text, "20ktok", str(tmp_path / "run"), mtp=True, wishes={"distill": {}})
    with pytest.raises(UserError, match="leave --teacher out"):
        api.distill(str(out), str(out), text, "20ktok", str(tmp_path / "run"), mtp=True)
    with pytest.raises(UserError, match="needs --teacher"):
        api.distill(str(out), None, text, "20ktok", str(tmp_path / "run"))
    with pytest.raises(UserError, match="no such run folder"):
        api.distill(str(workplace / "student.toml") + "x", None, text, "20ktok", str(tmp_path / "run"), mtp=True)


@compiled
def test_own_texts_of_the_student(workplace, tmp_path):
    """What the teacher says there serves other texts too; killed in the middle it repeats the undisturbed run bit for bit."""
    base, killed, straight = tmp_path / "base", tmp_path / "killed", tmp_path / "straight"
    distilled(workplace, "student.toml", base, "8ktok")
    wishes = {"train": TEACHER["train"] | {"checkpoint_interval_s": 0.0}}
    summary = distilled(workplace, base, straight, "8ktok", on_policy=True, wishes=wishes)
    assert summary["after"]["new"]["bpb"] < summary["before"]["new"]["bpb"] - 0.1 and summary["steps"] == 15
    words = [*PLAIN, "--train.checkpoint-interval-s", "0", "--samples", "0", "--budget", "8ktok", "--out", killed, "--on-policy"]
    begin = ["distill", base, "--teacher", workplace / "teacher", "--data", workplace / "text"]
    started([*begin, *words], lambda: (killed / "metrics.jsonl").exists() and any(line[0] >= 9 for line in losses(killed)))
    api.resume(str(killed), samples=0)
    assert losses(killed) == losses(straight)
    assert file_sha256(RunFolder(killed).weights_file) == file_sha256(RunFolder(straight).weights_file)
    for change, said in (({"prompt": 64}, "must be less than the 64 tokens of a row"), ({"prompt": 0}, "at least 1")):
        with pytest.raises(UserError, match=said):
            distilled(workplace, base, tmp_path / "run", on_policy=True, wishes={"train": TEACHER["train"], "distill": change})
    with pytest.raises(UserError, match="give a budget in time or tokens"):
        distilled(workplace, base, tmp_path / "run", "1e10flop", on_policy=True, wishes={"train": TEACHER["train"]})


def test_the_reverse_divergence_and_its_gradients():
    generator = torch.Generator().manual_seed(0)
    x, w, y, v = (torch.randn(shape, generator=generator) for shape in ((9, 8), (20, 8), (9, 4), (24, 4)))
    results = []
    for own in (True, False):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        if own:
            loss = _ReverseDivergence.apply(a, b, y, v)
        else:
            mine, theirs = (a @ b.T).log_softmax(-1), (y @ v[:20].T).log_softmax(-1)
            loss = (mine.exp() * (mine - theirs)).sum()
        (3 * loss).backward()
        results.append((loss.detach(), a.grad, b.grad))
    assert all(torch.allclose(ours, theirs, atol=1e-4) for ours, theirs in zip(*results, strict=True))
