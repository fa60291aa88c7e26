"""What is made with a teacher: it stays if its checks say so, nothing is asked twice, and the same seed gives the same bytes."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from tests.serve.conftest import Server
from tests.serve.conftest import run as run
from tests.teacher import Teacher, completion

from sparing.account.meter import NoMeter
from sparing.adapt.rewards import load_task, verify
from sparing.base.config import Budget, CannotGoOn, TokensConfig, UserError
from sparing.base.config_file import read_config, write_config
from sparing.base.preempt import Interrupted
from sparing.cli.main import main
from sparing.curate import posed, questions, teachers
from sparing.curate.agreement import agree, new_numbers, supported
from sparing.curate.taught import Wanted, taught
from sparing.curate.teachers import Answer, Ask, Asking, Kept, Served
from sparing.data.chats import chats
from sparing.data.sources import documents
from sparing.data.tokenizer import Tokenizer
from sparing.evals.contained import uncontained


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARING_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sparing.base.endpoint.WAITS", (0.01, 0.01))


@pytest.fixture
def teacher():
    servers = []

    def start(behave) -> Teacher:
        servers.append(Teacher(lambda handler, question: _behaved(behave, handler, question)))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def _behaved(behave, handler, question):
    """`behave` gives text, or answers itself."""
    told = behave(handler, question)
    if told is not None:
        handler.give(completion(told) | {"usage": {"prompt_tokens": len(question.split()), "completion_tokens": len(told.split())}})


def lines(folder) -> list[dict]:
    found = []
    for path in sorted(folder.glob("*.jsonl.zst")):
        with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as raw:
            found += [json.loads(line) for line in io.TextIOWrapper(raw, encoding="utf-8")]
    return found


def files(folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for name in ("documents", "rejected", "attributes")
        for path in sorted((folder / name).iterdir())
    }


PLACES = "Amber Birch Cedar Dune Elm Fern Grove Heath Isle Juniper Kelp Larch Maple North Oak Pine Quay Reed Sand Thorn".split()
FACTS = re.compile(r"lighthouse of (\w+) was built in (\d+) .* engineer (\w+)\. It stands (\d+) metres", re.DOTALL)


def document(number: int) -> str:
    place = PLACES[number % len(PLACES)] + "x" * (number // len(PLACES))
    return (
        f"The lighthouse of {place} was built in {1700 + number} by order of the queen, after the plans of the engineer Mr{place}. "
        f"It stands {30 + number} metres high on a rock outside the harbour, and its lamp is seen by all ships that pass."
    )


def write(path, texts) -> str:
    path.write_text("".join(json.dumps({"text": text, "licence": "CC0-1.0", "id": f"n{at}"}) + "\n" for at, text in enumerate(texts)))
    return str(path)


def in_other_words(text: str) -> str:
    place, year, engineer, height = FACTS.search(text).groups()
    return (
        f"Ships passing {place} see the light of a tower which {engineer} designed. Royal orders led to its construction in {year}. "
        f"From its rock, beyond the port, it rises to {height} metres."
    )


def rewriting(handler, question: str) -> str:
    if question.startswith("First text:"):
        return "No."
    return "Here is the new text:\n\n" + in_other_words(question)


# rewrite


def test_documents_in_other_words_are_what_train_reads(tmp_path, teacher, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "very-secret")
    server, out = teacher(rewriting), tmp_path / "out"
    source = write(tmp_path / "pool.jsonl", map(document, range(5)))
    summary = taught(Wanted("rewrite", [source], seed=4), str(out), server.url)
    assert summary["documents"] == {"in": 5, "out": 5, "rejected": 0, "quarantined": 0}
    found = list(documents([str(out)]))
    assert [one.text for one in found] == [in_other_words(document(number)) for number in range(5)]
    row = lines(out / "documents")[2]
    assert (row["source"], row["line"], row["id"]) == (source, 3, f"rewrite encyclopedic seed 4 {source}:3 part 1:1")
    assert row["metadata"] == {
        "made_by": "sparing data synth", "prompt": "rewrite encyclopedic", "teacher": "big", "teacher_host": server.url[7:-3], "seed": "4",
        "format": "json", "licence": "CC0-1.0", "source_id": "n2", "source_part": "1",
        "checks": "length, copy, numbers, vote 3/3, duplicates",
    }  # fmt: skip
    assert found[2].meta["licence"] == "CC0-1.0" and summary["licences"] == {"CC0-1.0": 5}
    asked = summary["asked"]
    assert asked["questions"] == len(server.seen) == 20 and asked["tokens_answered"] == 15 + sum(len(one.text.split()) + 5 for one in found)
    assert sum(stage["tokens"] for stage in summary["stages"]) == asked["tokens_asked"] + asked["tokens_answered"]
    assert all(key == "Bearer very-secret" and body["max_tokens"] == 1024 for body, key in server.seen)
    assert len({(body["seed"], body["messages"][0]["content"]) for body, _ in server.seen}) == 20
    assert not any(b"very-secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not (out / ".work").exists() and json.loads((out / "curated.json").read_text())["teacher"]["teacher"] == "big"
    with pytest.raises(UserError, match="holds a curated corpus already"):
        taught(Wanted("rewrite", [source]), str(out), server.url)


def test_what_fails_a_check_is_kept_with_the_check(tmp_path, teacher):
    spoilt = {
        0: lambda text: text,
        1: lambda text: text + " It was repaired in 1999.",
        2: lambda text: "A lighthouse.",
        3: lambda text: "",
        5: lambda text: document(5),
    }

    def behave(handler, question):
        if question.startswith("First text:"):
            return "Yes, it does." if "Gro" in question else "no"
        number = int(FACTS.search(question)[2]) - 1700
        if number == 4:
            return handler.give(completion("So far", "length"))
        return spoilt.get(number, lambda text: text)(in_other_words(question))

    evaluation = write(tmp_path / "evaluation.jsonl", [in_other_words(document(7)), document(8).partition(". ")[0]])
    texts = [*map(document, range(10)), document(0).replace("all ships", "every ship"), "Too short."]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "no JSON\n")
    out = tmp_path / "out"
    summary = taught(Wanted("rewrite", [str(tmp_path / "pool.jsonl")], against=[evaluation]), str(out), teacher(behave).url)
    assert summary["documents"] == {"in": 13, "out": 2, "rejected": 10, "quarantined": 1}
    assert {row["line"]: row["rejected"].partition(" of rewrite")[0] for row in lines(out / "rejected")} == {
        2: "numbers: one that its source does not have", 3: "length: much shorter or longer than its source", 4: "teacher: empty",
        5: "teacher: cut off", 6: "copy: nearly its source", 7: "vote: it says something else", 8: "contamination: what was made",
        9: "contamination: its source", 11: "duplicate_exact", 12: "length: fewer than 20 words to write about",
    }  # fmt: skip
    assert [row["line"] for row in lines(out / "documents")] == [1, 10]
    assert "contamination" in lines(out / "documents")[0]["metadata"]["checks"]
    assert summary["asked"]["failed"] == {"empty": 1, "cut off": 1}
    assert len((out / "quarantine.jsonl").read_text().splitlines()) == 1


def test_styles_pieces_and_no_votes(tmp_path, teacher):
    def behave(handler, question):
        text = in_other_words(question)
        return "**Question:** What is it?\n**Answer:** " + text if "Begin each" in question else text

    long = "\n".join(document(number) for number in range(12))
    (tmp_path / "pool.txt").write_text(long)
    server = teacher(behave)
    wanted = Wanted("rewrite", [str(tmp_path / "pool.txt")], ["dialogue", "plain"], votes=0)
    summary = taught(wanted, str(tmp_path / "out"), server.url)
    found = Counter((row["metadata"]["prompt"], row["metadata"]["source_part"]) for row in lines(tmp_path / "out/documents"))
    found += Counter((row["metadata"]["prompt"], row["metadata"]["source_part"]) for row in lines(tmp_path / "out/rejected"))
    assert summary["documents"]["in"] == 2 * max(int(part) for _, part in found) == len(server.seen) and set(found.values()) == {1}
    assert all(len(body["messages"][0]["content"].partition("\n\n")[2]) <= 1200 for body, _ in server.seen)


# questions


def asking(handler, question: str) -> str:
    """Three pairs about a document: two that it answers, and one that it does not."""
    if match := re.search(r"Question: (.+)\n\nAnswer with", question):
        place, year, engineer, height = FACTS.search(question).groups()
        if "How high" in match[1]:
            return f"<think>Let me see.</think>It is {height} metres." if int(year) % 5 else "not in the text"
        return engineer.lower() + "."
    place, _, engineer, height = FACTS.search(question).groups()
    return (
        f"Here are three questions:\n\n1. **Q:** How high is the lighthouse of {place}?\n   **A:** {height} metres\n\n"
        f"Q: Who planned the lighthouse of {place}?\nA: {engineer}\nQ2: What is the lighthouse of {place} made of?\nA: Of pink granite"
    )


def test_questions_are_what_sft_reads(tmp_path, teacher):
    server, out = teacher(asking), tmp_path / "out"
    source = write(tmp_path / "pool.jsonl", [*map(document, range(1, 7)), document(1)])
    summary = taught(Wanted("questions", [source], seed=1), str(out), server.url)
    assert summary["documents"] == {"in": 21, "out": 11, "rejected": 10, "quarantined": 0}
    assert summary["rejected"] == {"support: the answer is not in the text": 7, "duplicate_exact": 2, "vote: no majority for the answer": 1}
    refused: list = []
    found = list(chats([str(out)], refused.append))
    assert not refused and [message["content"] for message in found[0].messages] == ["How high is the lighthouse of Birch?", "31 metres"]
    row = lines(out / "documents")[0]
    assert row["metadata"]["checks"] == "support, vote 3/3, duplicates" and row["metadata"]["prompt"] == "questions" and row["line"] == 1
    assert summary["asked"]["questions"] == len(server.seen) == 6 * 7, "a text that comes twice is asked about once"
    rejected = {row["rejected"].partition(" of ")[0]: row for row in lines(out / "rejected")}
    assert rejected["support: the answer is not in the text"]["messages"][1]["content"] == "Of pink granite"
    scores = {row["id"]: row["attributes"] for row in lines(out / "attributes")}
    assert scores[rejected["vote: no majority for the answer"]["id"]] == {"agree": 0, "votes": 3}


def test_a_question_that_leaks_or_needs_the_text_goes(tmp_path, teacher):
    def behave(handler, question):
        if "Answer with" in question:
            return "MrElm"
        return "Q: Who planned it, according to the text?\nA: MrElm\nQ: What?\nA: MrElm\nQ: Who drew the Elm lighthouse?\nA: MrElm"

    (tmp_path / "evaluation.jsonl").write_text(json.dumps({"question": "who drew the elm lighthouse", "answer": "him"}) + "\n")
    wanted = Wanted("questions", [write(tmp_path / "pool.jsonl", [document(4)])], against=[str(tmp_path / "evaluation.jsonl")])
    summary = taught(wanted, str(tmp_path / "out"), teacher(behave).url)
    assert summary["documents"]["out"] == 0 and summary["rejected"] == {
        "form: it cannot be understood without the text": 1, "form: no whole question": 1, "contamination: what was made": 1,
    }  # fmt: skip


# exercises


def posing(handler, question: str) -> str:
    """Apples: right; pears: another answer than the solutions'; capitals: words; plums: no exercise."""
    if "Think step by step" in question:
        if "capital" in question:
            return "It is by the sea.\nAnswer: The city of Lima"
        numbers = [int(digits) for digits in re.findall(r"\d+", question)]
        return f"{numbers[0]} and {numbers[1]} make {sum(numbers)}.\n**Answer:** {sum(numbers)}"
    topic = re.search("about (.+?)[.:]", question)[1]
    a, b = 3 + len(handler.server.seen) % 50, 40
    if topic == "capitals":
        return "Exercise: What is the capital of Peru, that lies by the sea?\nSolution: It is Lima.\nAnswer: Lima."
    if topic == "plums":
        return "I like plums."
    wrong = 1 if topic == "pears" else 0
    return (
        f"**Exercise:** Ann has {a} {topic} and gets {b} more {topic}. How many has she?\n\n**Solution:** {a} + {b} = {a + b}.\n\n"
        f"**Answer:** {a + b + wrong} {topic}"
    )


def test_exercises_are_a_task(tmp_path, teacher):
    (tmp_path / "topics.txt").write_text("apples\npears\n\ncapitals\n apples \nplums\n")
    out = tmp_path / "out"
    summary = taught(Wanted("exercises", [str(tmp_path / "topics.txt")], count=12), str(out), teacher(posing).url)
    assert summary["documents"] == {"in": 12, "out": 4, "rejected": 8, "quarantined": 0}, summary["rejected"]
    assert summary["rejected"] == {
        "vote: no majority for the answer": 3, "form: no exercise with a short answer": 3, "duplicate_exact": 2,
    }  # fmt: skip
    task, rows = load_task(str(out)), lines(out / "documents")
    worked = {row["prompt"]: row["worked"] for row in rows}
    assert len(task.problems + task.held_out) == 4
    assert all(verify(one, worked[one.prompt]).reward == 1 for one in task.problems + task.held_out)
    capital = next(row for row in rows if row["verifier"] == "format")
    assert capital["prompt"].endswith("sea? Write the answer as <answer>answer</answer>.") and "by the" not in capital["answer"]
    problem = next(one for one in task.problems + task.held_out if one.verifier == "format")
    assert verify(problem, "<answer>The LIMA</answer>").reward == 1 and verify(problem, "<answer>Quito</answer>").reward == 0
    assert (
        capital["metadata"]["topic"] == "capitals"
        and capital["line"] == 4
        and capital["metadata"]["checks"].startswith("verifier, vote 3/3")
    )


def test_exercises_as_chats(tmp_path, teacher):
    (tmp_path / "topics.txt").write_text("apples\n")
    taught(Wanted("exercises", [str(tmp_path / "topics.txt")], count=2, form="chats"), str(tmp_path / "out"), teacher(posing).url)
    (one, _) = chats([str(tmp_path / "out")])
    assert one.messages[1]["content"].startswith("<think>") and one.messages[1]["content"].endswith(
        "</think>" + re.findall(r"\d+ apples", one.messages[1]["content"])[-1]
    )


TWICE = "def twice(n):\n    return "
PROGRAMS = {
    "doubling": ("2 * n", "assert twice(1) == 2\nassert twice(3) == 6\nassert twice(-1) == -2", "n + n"),
    "failing": ("3 * n", "assert twice(1) == 2\nassert twice(3) == 6\nassert twice(0) == 0", ""),
    "nothing": ("2 * n", "assert True\nassert 1 == 1\nassert callable(twice)", ""),
    "disputed": ("2 * n", "assert twice(1) == 2\nassert twice(3) == 6\nassert twice(5) == 10", "n * n"),
    "few": ("2 * n", "assert twice(1) == 2", ""),
    "reading": ("len(open('/etc/passwd').read())", "assert twice(1)\nassert twice(3)\nassert twice(5)", ""),
}
"""Topic -> (the solution, its tests, what is written from the description)."""


def coding(handler, question: str) -> str:
    if topic := re.search("exercise about (.+?):", question):
        solution, tests, _ = PROGRAMS[topic[1]]
        posed = f"Exercise: Write twice(n) for {topic[1]}, which gives n two times."
        return f"{posed}\n\n```python\n{TWICE}{solution}\n```\nTests:\n```python\n{tests}\n```"
    return f"```python\n{TWICE}{PROGRAMS[re.search(r'for (.+?),', question)[1]][2]}\n```"


@pytest.mark.skipif(uncontained() is not None, reason=f"code cannot be contained here: {uncontained()}")
def test_programs_are_run_and_their_tests_are_tested(tmp_path, teacher):
    (tmp_path / "topics.txt").write_text("\n".join(PROGRAMS))
    out = tmp_path / "out"
    wanted = Wanted("exercises:code", [str(tmp_path / "topics.txt")], count=len(PROGRAMS))
    summary = taught(wanted, str(out), teacher(coding).url)
    assert {row["metadata"]["topic"]: row["rejected"] for row in lines(out / "rejected")} == {
        "failing": "code: a test failed", "nothing": "code: its tests pass what does nothing",
        "disputed": "vote: no majority for the answer",
        "few": "form: no exercise with a solution and tests", "reading": "code: a test failed",
    }  # fmt: skip
    (row,) = lines(out / "documents")
    assert row["verifier"] == "code" and row["tests"][2] == "assert twice(-1) == -2" and summary["documents"]["out"] == 1
    assert row["metadata"]["checks"] == "code, tests, vote 3/3, duplicates"


def test_programs_are_refused_where_they_cannot_be_contained(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr(
        "sparing.evals.verifiers.uncontained", lambda: "code cannot be contained on this machine (no Landlock): none is run"
    )
    (tmp_path / "topics.txt").write_text("doubling")
    server = teacher(coding)
    with pytest.raises(UserError, match="no Landlock"):
        taught(Wanted("exercises:code", [str(tmp_path / "topics.txt")], count=1), str(tmp_path / "out"), server.url)
    assert not server.seen and not (tmp_path / "out").exists()


# a teacher that fails


def test_a_server_that_is_busy_is_asked_again(tmp_path, teacher):
    seen: Counter = Counter()

    def behave(handler, question):
        seen[question] += 1
        if seen[question] == 1:
            return handler.give({"error": "slow down"}, 429)
        return rewriting(handler, question) if seen[question] > 2 or "First" in question else handler.give({}, 503)

    source = write(tmp_path / "pool.jsonl", map(document, range(2)))
    assert taught(Wanted("rewrite", [source], votes=1), str(tmp_path / "out"), teacher(behave).url)["documents"]["out"] == 2


@pytest.mark.parametrize(
    ("behave", "said"),
    [
        (lambda h, q: h.give({"error": "no key very-secret"}, 401), r"1:\d+: HTTP 401 \(\$OPENAI_API_KEY is what it is asked with\)"),
        (lambda h, q: h.give({"error": {"message": "no model\nbig"}}, 404), r"127.0.0.1:\d+: HTTP 404 \(no model big\)"),
        (lambda h, q: h.give({"error": {"message": "it was very-secret"}}, 500), r"127.0.0.1:\d+: HTTP 500$"),
        (lambda h, q: h.give(b"<html>"), r"127.0.0.1:\d+: 8 questions in a row without an answer, the last one: no JSON"),
        (lambda h, q: h.give(b" " * (5 << 20)), "8 questions in a row without an answer, the last one: endless"),
        (lambda h, q: h.give({}, 400), "8 questions in a row without an answer, the last one: HTTP 400"),
        (lambda h, q: time.sleep(0.6), "8 questions in a row without an answer, the last one: timed out"),
    ],
)  # fmt: skip
def test_a_server_that_does_not_answer_is_one_line_and_leaves_nothing(tmp_path, teacher, behave, said, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "very-secret")
    monkeypatch.setattr(teachers, "TIMEOUT_S", 0.3 if "timed out" in said else 60.0)
    source = write(tmp_path / "pool.jsonl", map(document, range(12)))
    with pytest.raises(UserError, match=said) as error:
        taught(Wanted("rewrite", [source]), str(tmp_path / "out"), teacher(behave).url + "#big")
    assert "very-secret" not in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_dead_endpoint_is_one_line(tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    source = write(tmp_path / "pool.jsonl", [document(1)])
    for named in (url, url + "#model"):
        assert main(["data", "synth", "rewrite", source, "--teacher", named, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert url[7:-3] in error and "nobody answers" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_it_goes_on_where_it_was_and_asks_nothing_twice(tmp_path, teacher):
    """The server dies in the middle; then a line of what was kept is damaged and another cut short."""
    left = [9]

    def behave(handler, question):
        left[0] -= 1
        return rewriting(handler, question) if left[0] >= 0 else handler.give({}, 500)

    source = write(tmp_path / "pool.jsonl", map(document, range(6)))
    wanted, out = Wanted("rewrite", [source], seed=2), tmp_path / "out"
    with pytest.raises(CannotGoOn, match=r"HTTP 500; 9 answers are kept, and the same command goes on"):
        taught(wanted, str(out), teacher(behave).url)
    kept = out / ".work" / "answers.jsonl"
    whole = kept.read_bytes().splitlines(keepends=True)
    kept.write_bytes(b"".join([*whole[:3], whole[3].replace(b"tower", b"power").replace(b'"No."', b'"Yes"'), *whole[4:8], whole[8][:20]]))
    server = teacher(rewriting)  # another one, of the same model: what is under way to the first one may still come
    summary = taught(wanted, str(out), server.url)
    assert summary["asked"] == {
        "questions": 24,
        "earlier": 7,
        **{name: summary["asked"][name] for name in ("tokens_asked", "tokens_answered", "failed")},
    }
    assert len(server.seen) == 24 - 7
    undisturbed = taught(wanted, str(tmp_path / "other"), server.url)
    assert files(out) == files(tmp_path / "other")
    assert undisturbed["asked"] | {"earlier": 7} == summary["asked"]


def test_a_kill_costs_what_was_under_way(tmp_path, teacher):
    def behave(handler, question):
        time.sleep(0.02)
        return rewriting(handler, question)

    server = teacher(behave)
    source = write(tmp_path / "pool.jsonl", map(document, range(12)))
    command = [sys.executable, "-m", "sparing", "data", "synth", "rewrite", source, "--teacher", server.url, "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "SPARING_HOME": str(tmp_path / "home")})
    while len(server.seen) < 14 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    summary = taught(Wanted("rewrite", [source]), str(tmp_path / "out"), server.url)
    twice = Counter((body["messages"][0]["content"], body["seed"]) for body, _ in server.seen)
    assert len(twice) == 48 == summary["asked"]["questions"] and summary["documents"]["out"] == 12
    assert sum(count - 1 for count in twice.values()) <= 2 * teachers.AT_ONCE and summary["asked"]["earlier"] > 0


def test_an_interrupt_keeps_what_was_answered(tmp_path, teacher):
    def behave(handler, question):
        if len(handler.server.seen) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return rewriting(handler, question)

    server = teacher(behave)
    source = write(tmp_path / "pool.jsonl", map(document, range(6)))
    with pytest.raises(Interrupted, match="the same command goes on"):
        taught(Wanted("rewrite", [source]), str(tmp_path / "out"), server.url)
    assert taught(Wanted("rewrite", [source]), str(tmp_path / "out"), server.url)["asked"]["earlier"] >= 1


def test_a_budget_ends_it(tmp_path, teacher, monkeypatch, capsys):
    monkeypatch.setattr("sparing.curate.taught.BLOCK", 2)
    source = write(tmp_path / "pool.jsonl", map(document, range(9)))
    server = teacher(rewriting)
    summary = taught(Wanted("rewrite", [source], votes=0, budget="500tok"), str(tmp_path / "out"), server.url)
    assert summary["ended_by_budget"] and 0 < summary["documents"]["out"] < 9 and summary["documents"]["out"] % 2 == 0
    assert summary["asked"]["tokens_asked"] + summary["asked"]["tokens_answered"] < 500 + 4 * 100
    assert "--budget 500tok is used up" in capsys.readouterr().err
    assert not taught(Wanted("rewrite", [source], votes=0, budget="1Mtok"), str(tmp_path / "all"), server.url)["ended_by_budget"]


# real teachers


@pytest.fixture(scope="module")
def talker(run, tmp_path_factory):
    """The tiny run, for which a full stop and the end of a line end an answer."""
    folder = tmp_path_factory.mktemp("talker") / "talker"
    shutil.copytree(run, folder)
    config = read_config(folder / "config.toml")
    tokenizer = Tokenizer.load(folder / "tokenizer.json", config.tokens)
    ends = (*tokenizer.eos_ids, *tokenizer.encode(".", goes_on=True), *tokenizer.encode("\n", goes_on=True))
    (folder / "config.toml").write_text(write_config(replace(config, tokens=TokensConfig(eos=ends))))
    return folder


def test_a_run_is_a_teacher_and_gives_the_same_bytes(tmp_path, talker):
    source = write(tmp_path / "pool.jsonl", [document(number)[:150] for number in range(4)])
    found = [
        taught(Wanted("rewrite", [source], tokens=24, seed=seed), str(tmp_path / f"out{at}"), str(talker))
        for at, seed in enumerate((5, 5, 6))
    ]
    assert found[0]["documents"]["in"] == 4 and found[0]["teacher"]["teacher"] == talker.name
    assert len(found[0]["teacher"]["teacher_weights_sha256"]) == 64 and found[0]["asked"]["tokens_answered"] > 0
    assert files(tmp_path / "out0") == files(tmp_path / "out1")
    texts = [{row["text"] for row in lines(tmp_path / f"out{at}/rejected") + lines(tmp_path / f"out{at}/documents")} for at in (0, 2)]
    assert texts[0] != texts[1]


def test_a_run_answers_by_the_seed(talker):
    with_run = teachers.Run(str(talker))
    try:
        asks = [Ask("Say something.", 24, 1.0, number) for number in range(8)]
        one, again, other = (list(with_run.answers(asks, seed)) for seed in (1, 1, 2))
        assert one == again != other and len({answer.text for _, answer in one}) > 1
        assert dict(with_run.answers(asks[::-1], 1)) == {7 - place: answer for place, answer in one}, "whatever else is asked"
        found = dict(with_run.answers([Ask("word " * 600, 24, 1.0), asks[3]], 1))
        assert found[0].failed == "longer than the context" and found[1] == dict(one)[3]
        assert dict(with_run.answers([Ask("Say.", 1, 0.0)], 1))[0].failed in ("cut off", "empty")
    finally:
        with_run.close()


def test_our_own_server_is_a_teacher(tmp_path, run):
    server = Server(run, env={"SPARING_HOME": str(tmp_path / "home")})
    try:
        source = write(tmp_path / "pool.jsonl", [document(1)[:150]])
        summary = taught(Wanted("rewrite", [source], tokens=16), str(tmp_path / "out"), server.url + "/v1")
        assert summary["documents"]["in"] == 1 and summary["asked"]["questions"] >= 1
        assert summary["teacher"] == {"teacher": server.name, "teacher_host": server.url[7:]}
    finally:
        server.stop()


# parts


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Paris", "paris.", True), ("the Eiffel Tower", "Eiffel tower", True), ("1,000", "1000", True), ("3.50", "3.5", True),
        ("It was Paris", "Paris", True), ("not Paris", "Paris", False), ("Paris or Rome", "Paris", False), ("12", "13", False),
        ("5", "-5", False), ("1889 or so", "1889", False), ("between 1889 and 1890", "1889", False), ("", "", False),
        ("Émile", "Emile", True),
        ("Lyon", "Paris", False), ("a word and nine more words than anybody asked for here", "word", False),
    ],
)  # fmt: skip
def test_answers_agree(one, other, same):
    assert agree(one, other) is same and agree(other, one) is same


def test_pairs_are_read_however_they_are_marked():
    text = "Sure.\n**Question 1:** Who\ncame?\n- **Answer:** -5 of them\n\n2) Q: 2. Where?\nA: 3.5 km\n"
    text += "Q: Lost?\nQ: And?\nA:\nQ: Last?\nA: 1990."
    assert questions.pairs_of(text) == [("Who came?", "-5 of them"), ("Where?", "3.5 km"), ("Last?", "1990.")]


def test_a_question_stands_by_itself():
    assert questions.BARE.search("What does the author say?") and questions.BARE.search("According to this Passage, who came?")
    assert not questions.BARE.search("Who is the author of Hamlet?") and not questions.BARE.search("How far above the sea is it?")


def test_an_answer_rests_on_a_text():
    text = "In 1889 the tower, 300 metres high, was opened by Gustave Eiffel."
    assert supported("Gustave Eiffel", text) and supported("300 metres", text) and not supported("301 metres", text)
    assert not supported("Gustave Flaubert", text) and not supported("", text) and not supported("yes", text)
    assert new_numbers("It has 5 floors and 1,889 steps; 12 were new in 1889", text) == ["12"]


@given(st.text(alphabet="QA:. 1)\n*abc<>`assertExercise\x00é"))
def test_whatever_a_teacher_writes_is_read(text):
    assert all(one.strip() and other.strip() for one, other in questions.pairs_of(text))
    assert all(isinstance(part, str) for part in posed.sections(text).values())
    assert all(test.startswith("assert") for test in posed.tests_of(text)) and posed.empty(text)
    assert isinstance(posed.last_answer(Answer(text)), str)


def test_kept_answers_are_whole_or_absent(tmp_path):
    kept = Kept(tmp_path / "a.jsonl")
    kept.put("x", Answer("ünïcode\n", "", 3, 4))
    kept.put("y", Answer("", "empty", 3, 0))
    with open(tmp_path / "a.jsonl", "ab") as file:
        file.write(b'{"of": "z", "text": "ha')
    again = Kept(tmp_path / "a.jsonl")
    assert again.get("x") == Answer("ünïcode\n", "", 3, 4) and again.get("y").failed == "empty" and again.get("z") is None
    again.put("z", Answer("whole", "", 1, 1))
    assert Kept(tmp_path / "a.jsonl").get("z").text == "whole" and again.get("z").text == "whole"


def test_a_budget_in_time_and_a_question_that_is_put_twice(tmp_path):
    class Echo:
        name, facts = "echo", {}

        def answers(self, asks, seed, should_stop=None):
            for place, ask in reversed(list(enumerate(asks))):
                seconds.append(seconds[-1] + 4)
                yield place, Answer(f"{ask.prompt} {ask.number} {ask.seed(seed)}", "", 2, 1)

    seconds = [100.0]
    asking = Asking(Echo(), Kept(tmp_path / "a.jsonl"), 1, NoMeter(), Budget(10, "s"), clock=lambda: seconds[-1])
    one, two, again = asking([Ask("a", 9, 1.0), Ask("a", 9, 1.0, 1), Ask("a", 9, 1.0)])
    assert one == again != two and one.text.startswith("a 0 ") and asking.questions == 2 and not asking.spent()
    assert asking([Ask("b", 9, 1.0)])[0].text.startswith("b 0 ") and asking.spent()
    assert (asking.asked, asking.answered, asking.earlier) == (6, 3, 0)


def test_a_url_with_a_key_is_refused_without_saying_it():
    for url in ("http://me:hunter2@127.0.0.1/v1#m", "http://127.0.0.1/v1?key=hunter2#m"):
        with pytest.raises(UserError, match="OPENAI_API_KEY") as error:
            Served(url)
        assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("rewrite {tmp}/p.jsonl --out {tmp}/x", "data synth rewrite needs --teacher"),
        ("rewrite --teacher {tmp} --out {tmp}/x", "data synth rewrite needs PATH: documents"),
        ("exercises --teacher {tmp} --count 2 --out {tmp}/x", "needs a file of topics"),
        ("exercises {tmp}/p.jsonl --teacher {tmp} --out {tmp}/x", "--count is how many exercises to make and is needed"),
        ("rewrite {tmp}/p.jsonl --count 2 --teacher {tmp} --out {tmp}/x", "--count is how many exercises to make"),
        ("rewrite:code {tmp}/p.jsonl --teacher {tmp} --out {tmp}/x", "choose rewrite, questions, exercises, exercises:code"),
        ("words --teacher {tmp} --count 3 --out {tmp}/x", "choose rewrite, questions, exercises, exercises:code"),
        ("rewrite {tmp}/p.jsonl --style odd --teacher {tmp} --out {tmp}/x", "--style odd: choose plain, encyclopedic, dialogue"),
        ("questions {tmp}/p.jsonl --votes 0 --teacher {tmp} --out {tmp}/x", "--votes 0: must be from 1 to 99"),
        ("questions {tmp}/p.jsonl --budget $3 --teacher {tmp} --out {tmp}/x", "is limited in tokens or in time"),
        ("rewrite {tmp}/gone --teacher {tmp} --out {tmp}/x", "no such file or folder"),
        ("rewrite {tmp}/p.jsonl --teacher {tmp}/gone --out {tmp}/x", "gone"),
        ("rewrite {tmp}/p.jsonl --teacher http:///v1 --out {tmp}/x", "no host in the URL"),
        ("rewrite {tmp}/p.jsonl --teacher {tmp} --out {tmp}/x --workers 2", "data synth: unknown option --workers"),
        ("rewrite {tmp}/p.jsonl --teacher {tmp} --out {tmp}/x --against {tmp}/gone", "no such file or folder"),
        ("words --count 3 --out {tmp}/x --votes 2", "--votes goes with `data synth rewrite|questions|exercises`"),
    ],
)  # fmt: skip
def test_a_slip_is_one_line(tmp_path, capsys, words, said):
    write(tmp_path / "p.jsonl", [document(1)])
    assert main(["data", "synth", *words.format(tmp=tmp_path).split()]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "x").exists()
