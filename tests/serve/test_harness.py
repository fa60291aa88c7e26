"""lm-eval in process and through the server: the same weights, the same figures, with the compiled step to the last bit."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from sparing import api
from sparing.base.config import UserError
from sparing.evals.harness import HarnessModel, run_tasks
from sparing.infer.engine import Engine
from sparing.infer.generate import generate_texts, score_tokens
from sparing.kernels.decode import library

SOURCE = Path(json.__file__).read_text()
LIMIT = 8


def same(ours, theirs) -> bool:
    """Without the compiled step sums depend on what is computed beside them, in their last digits."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == (theirs if library() is not None or isinstance(theirs, str) else pytest.approx(theirs, rel=1e-6))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    """Questions about this Python's json module; the words are short texts and one that is longer than the context."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [line for line in SOURCE.split("\n") if len(line.split()) > 5][:12]
    words = [line.split() for line in lines]
    quiz = [{"question": w[0], "choices": [w[1], w[2], " ".join(w[3:])], "answer": i % 3} for i, w in enumerate(words)]
    rows = {
        "quiz": quiz,
        "words": [{"text": SOURCE[:6000].rstrip()}, *({"text": line} for line in lines)],
        "written": [{"question": line[:30], "answer": line[30:]} for line in lines],
    }
    for name, these in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, these)))
    return [str(folder / f"{name}.jsonl") for name in rows]


@pytest.fixture(scope="module")
def in_process(server, run):
    """With the weights of the server, whatever measured fastest there."""
    weights = server.ask("GET", "/v1/models")[2]["data"][0]["weights"]
    with Engine(run, weights=weights, threads=1, speculate=False) as engine:
        yield HarnessModel(engine.tokenizer, engine.context, partial(score_tokens, engine), partial(generate_texts, engine))


@pytest.fixture(scope="module")
def through_server(server, run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "hf"
    api.export(str(run), out=str(folder))
    url = server.url + "/v1/completions"
    return LocalCompletionsAPI(url, "huggingface", model=server.name, tokenizer=str(folder), max_length=512)


def test_tasks_score_the_same(in_process, through_server, files):
    ours = run_tasks(in_process, files, LIMIT)
    assert same(ours, run_tasks(through_server, files, LIMIT))
    assert [row["name"] for row in ours] == ["quiz", "words", "written"] and all(row["items"] == LIMIT for row in ours)
    assert {"acc", "acc_stderr", "acc_norm"} <= ours[0].keys()
    assert 1 < ours[1]["perplexity"] < 1e9 and 0 <= ours[2]["exact_match"] <= 1


def test_every_number_is_the_same(in_process, through_server):
    def ask(kind, *arguments):
        return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]

    pairs = [("import json\n", "import"), ("", "class JSONDecoder"), (SOURCE[:4000], SOURCE[4000:4040]), ("def f( ", "x")]
    requests = ask("loglikelihood", *pairs)
    found = in_process.loglikelihood(requests)
    assert same(found, through_server.loglikelihood(requests))
    assert len({nats for nats, _ in found}) == 4
    requests = ask("loglikelihood_rolling", (SOURCE[:5000],), ("import json",))
    assert same(in_process.loglikelihood_rolling(requests), through_server.loglikelihood_rolling(requests))
    settings = [{"until": ["\n"]}, {"until": "e", "max_gen_toks": 9}, {"until": ["zz"], "temperature": 0.8, "max_gen_toks": 20}]
    requests = ask("generate_until", *[(SOURCE[:80], dict(one)) for one in settings], (SOURCE[:4000], {"until": ["q"], "max_gen_toks": 5}))
    written = in_process.generate_until(requests)
    assert written == through_server.generate_until(requests)
    assert all(written) and "\n" not in written[0] and "e" not in written[1]


def test_the_verb(run, files, tmp_path):
    result = api.evaluate(str(run), [str(json.__file__)], tasks=files[:1], limit=5, weights="float32")
    assert result["bpb"] > 0 and result["weights"] == "float32"
    assert result["rows"][0]["items"] == 5
    again = api.evaluate(str(run), tasks=files[:1], limit=5)
    assert again["rows"] == result["rows"] and "bpb" not in again
    yaml = tmp_path / "own.yaml"  # lm-eval's own format
    yaml.write_text(f"""task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {files[0]}}}, cache_dir: {tmp_path}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: choices
""")
    [row] = api.evaluate(str(run), tasks=[str(yaml)], limit=5)["rows"]
    assert row["name"] == "own" and row["acc"] == result["rows"][0]["acc"]
    with pytest.raises(UserError, match="no-such-task"):
        api.evaluate(str(run), tasks=["no-such-task"])


def test_files_of_one_name_are_two_tasks(in_process, files, tmp_path):
    other = tmp_path / "quiz.jsonl"
    other.write_text(json.dumps({"question": "Which?", "choices": ["this", "that"], "answer": 0}))
    rows = run_tasks(in_process, [files[0], str(other)], LIMIT)
    assert [row["name"] for row in rows] == [files[0], str(other)] and [row["items"] for row in rows] == [LIMIT, 1]
    with pytest.raises(UserError, match="are the same file"):
        run_tasks(in_process, [str(other), str(other)])


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach the Hub\nand more"), RuntimeError("offline"), FileNotFoundError("gone")])
def test_a_named_task_without_a_network_is_one_line(in_process, files, monkeypatch, error):
    import sparing.evals.harness as harness

    def fail(*_):
        raise error

    monkeypatch.setattr(harness.TaskManager, "load", fail)
    with pytest.raises(UserError, match=r"--tasks arc_easy: .*comes from the internet; a file of questions needs none") as said:
        run_tasks(in_process, [files[0], "arc_easy"])
    assert "\n" not in str(said.value) and str(error).split("\n")[0] in str(said.value)
