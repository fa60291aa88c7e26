"""A teacher behind a URL: whatever it does, it is counted in one line, and what it says well is learnt."""

import json
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.adapt.test_sft import TRAIN, say, write
from tests.adapt.test_sft import workplace as workplace
from tests.teacher import Teacher, completion

from sparing import api
from sparing.adapt.asked import collect, questions
from sparing.base import endpoint as asked
from sparing.base.config import UserError
from sparing.base.endpoint import Endpoint, Failed
from sparing.base.files import read_lines
from sparing.base.run import RunFolder
from sparing.budget.units import parse_budget
from sparing.data.accounts import Accounts
from sparing.data.sources import Tally


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(asked, "WAITS", ())


@pytest.fixture
def teacher():
    servers = []

    def start(behave) -> Teacher:
        servers.append(Teacher(behave))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def drip(handler, _):
    """A byte now and then, without an end."""
    handler.send_response(200)
    handler.end_headers()
    while not handler.server._BaseServer__shutdown_request:
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.02)


def hang(handler, _):
    while not handler.server._BaseServer__shutdown_request:
        time.sleep(0.02)


FAILURES = {
    "empty": lambda h, q: h.give(completion("  ")),
    "cut off": lambda h, q: h.give(completion("Because", "length")),
    "longer than was asked": lambda h, q: h.give(completion("x" * 9000)),
    "lies about its length": lambda h, q: h.give(completion("word " * 100, tokens=2)),
    "no chat completion": lambda h, q: h.give({"choices": []}),
    "no JSON": lambda h, q: h.give(b"[" * 100_000),
    "HTTP 500": lambda h, q: h.give({}, 500),
    "HTTP 302": lambda h, q: h.give({}, 302),
    "ended before its length": lambda h, q: h.give(b"{}", length=10),
    "endless": lambda h, q: h.give(b" " * (asked.MOST_BYTES + 1)),
    "not Unicode text": lambda h, q: h.give(b'{"choices": [{"message": {"content": "\\ud800"}}]}'),
    "timed out": drip,
}


@pytest.mark.parametrize("why", FAILURES)
def test_what_is_no_answer(teacher, why):
    endpoint = Endpoint(teacher(FAILURES[why]).url, timeout=0.3 if why == "timed out" else 60.0)
    assert endpoint.model == "big"
    with pytest.raises(Failed, match=f"^{why}$"):
        endpoint.answer([{"role": "user", "content": "Why?"}])


def drip_head(handler, _):
    """A head that never ends."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while not handler.server._BaseServer__shutdown_request:
        handler.wfile.write(b"a")
        time.sleep(0.02)


def test_a_head_that_drips(teacher):
    with pytest.raises(Failed, match="timed out"):
        Endpoint(teacher(drip_head).url + "#m", timeout=0.3).answer([{"role": "user", "content": "Why?"}])


def test_silence_and_nobody(teacher):
    with pytest.raises(Failed, match="timed out"):
        Endpoint(teacher(hang).url + "#m", timeout=0.2).answer([{"role": "user", "content": "Why?"}])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(UserError, match="nobody answers; expected OpenAI's interface"):
            Endpoint(url)


def test_a_run_learns_the_answers(workplace, tmp_path, teacher, monkeypatch, capsys):
    """Of 80 questions some fail; nothing is asked twice; the key goes along; the run goes on without the teacher."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("SPARING_HOME", str(tmp_path / "home"))
    failing = list(FAILURES)[:8]

    def behave(handler, question):
        number = int("".join(filter(str.isdigit, question)))
        if number % 10 == 9:
            return FAILURES[failing[number // 10]](handler, question)
        return handler.give(completion(f"It is number {number} of the ship.", tokens=9))

    server = teacher(behave)
    bare = [{"question": f"What is {number}?"} for number in range(60, 80)]
    file = write(tmp_path / "q.jsonl", [*map(say, range(60)), *bare, {}])
    wishes = {"train": TRAIN | {"batch_size": 8, "seq_len": 64, "evals": 0}}
    summary = api.distill(str(workplace / "base"), server.url, [file], "8ktok", str(tmp_path / "run"), wishes=wishes, samples=0)
    assert summary["after"]["new"]["loss"] < summary["before"]["new"]["loss"]
    told = summary["teacher"]
    assert told["answers"] == 72 and told["failed"] == dict.fromkeys(failing, 1) and told["model"] == "big"
    assert summary["documents"] == {"in": 81, "out": 72, "rejected": 8, "quarantined": 1}
    assert [line["line"] for line in read_lines(tmp_path / "run/quarantine.jsonl")] == [81]
    assert "72 answers; left out: 1 × " in capsys.readouterr().err
    assert all(key == "Bearer secret" and body["max_tokens"] == asked.TOKENS for body, key in server.seen) and len(server.seen) == 80
    assert "secret" not in (tmp_path / "run/config.toml").read_text()
    lines = read_lines(RunFolder(tmp_path / "run").path / "answers.jsonl")
    assert len(lines) == 72 and all(line["messages"][-1]["content"].endswith("of the ship.") for line in lines)
    api.distill(str(workplace / "base"), server.url, [file], "4ktok", str(tmp_path / "again"), wishes=wishes, samples=0)
    assert len(server.seen) == 88, "only what failed is asked again"
    server.shutdown()
    assert api.resume(str(tmp_path / "run"), "+4ktok", samples=0)["tokens"] > 8000


def test_a_teacher_that_only_fails_is_given_up(workplace, tmp_path, teacher):
    server = teacher(FAILURES["HTTP 500"])
    file = write(tmp_path / "q.jsonl", map(say, range(50)))
    with pytest.raises(UserError, match=r"no usable answer \(8 × HTTP 500\)"):
        api.distill(str(workplace / "base"), server.url, [file], "8ktok", str(tmp_path / "run"), samples=0)
    assert len(server.seen) < 30 and not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="1 × no question"):
        api.distill(str(workplace / "base"), server.url, [write(tmp_path / "n.jsonl", [{"x": 1}])], "8ktok", str(tmp_path / "run"))
    with pytest.raises(UserError, match="name one, not a recipe"):
        api.distill("laptop", server.url, [file], "8ktok", str(tmp_path / "run"))


def collected(tmp_path, monkeypatch, url: str, rows, lasts: float | None = None) -> list[str]:
    """What a teacher answered to rows, for a budget in seconds, or in tokens."""
    monkeypatch.setenv("SPARING_HOME", str(tmp_path / "home"))
    began = time.monotonic()
    job = SimpleNamespace(
        run=RunFolder.create(tmp_path / "run"), lasts=lambda _: lasts, clock=SimpleNamespace(seconds=lambda: time.monotonic() - began),
        signals=SimpleNamespace(check=lambda: None),
    )  # fmt: skip
    found = collect(job, url, [write(tmp_path / "q.jsonl", rows)], parse_budget("1Mtok"))
    return [line["messages"][-1]["content"] for line in read_lines(found)]


def test_a_teacher_that_dies_on_the_way_is_given_up(tmp_path, monkeypatch, teacher, capsys):
    """In any budget; what it has said is learnt. One that answers badly now and then is none."""
    answers = iter([completion("Yes."), *[completion("")] * 12, completion("No."), *[None] * 99])

    def behave(handler, _):
        answer = next(answers)
        return handler.give({}, 401) if answer is None else handler.give(answer)

    monkeypatch.setattr("sparing.adapt.asked.AT_ONCE", 1)
    server = teacher(behave)
    assert collected(tmp_path, monkeypatch, server.url, map(say, range(100))) == ["Yes.", "No."]
    assert len(server.seen) <= 14 + 10
    assert "8 questions in a row without an answer, the last one: HTTP 401" in capsys.readouterr().err


def test_rows_that_ask_nothing_are_no_failures_of_the_teacher(tmp_path, monkeypatch, teacher):
    answers = iter([completion("")] * 2)
    server = teacher(lambda handler, _: handler.give(next(answers, completion("Yes."))))
    assert collected(tmp_path, monkeypatch, server.url, [{}] * 20 + [say(number) for number in range(4)]) == ["Yes."] * 2


def test_a_busy_server_is_asked_again(tmp_path, monkeypatch, teacher):
    monkeypatch.setattr(asked, "WAITS", (0.01,))
    answers = iter([503, 429])
    server = teacher(lambda handler, _: handler.give(completion("Yes."), next(answers, 200)))
    assert collected(tmp_path, monkeypatch, server.url, map(say, range(3))) == ["Yes."] * 3 and len(server.seen) == 5


def test_nothing_is_waited_for_beyond_the_share(tmp_path, monkeypatch, teacher):
    server = teacher(hang)
    with pytest.raises(UserError, match=r"no usable answer \(none in its share"):
        collected(tmp_path, monkeypatch, server.url, map(say, range(3)), lasts=0.2)
    assert not any(thread.name == "sparing-asking" and not thread.daemon for thread in threading.enumerate())


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)))
def test_any_row_is_a_question_or_counted(tmp_path_factory, value):
    file = tmp_path_factory.mktemp("rows") / "q.jsonl"
    message = {"role": "user", "content": value}
    file.write_text("".join(json.dumps(row) + "\n" for row in ({"messages": value}, {"prompt": value}, {"messages": [message]})))
    accounts = Accounts(lost := Tally())
    found = questions([str(file)], accounts)
    assert all(isinstance(asking[-1]["content"], str) and asking[-1]["content"].strip() for asking in found)
    text = isinstance(value, str) and bool(value.strip())
    assert len(found) == int(text) and accounts.into == 3 and lost.reasons["no question"] == (1 if text else 3)
