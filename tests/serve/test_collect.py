"""`serve --collect`: what people accept or correct is kept, nothing else, and goes again when it is asked to."""

from __future__ import annotations

import json
import stat

import pytest
from tests.serve.chrome import Page
from tests.serve.conftest import Server
from tests.serve.test_page import chat, say

from sparing.base.config import UserError
from sparing.data.chats import chats
from sparing.serve.collect import Collection
from sparing.serve.errors import ApiError

ASKED = {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}]}
ID, OTHER = "chatcmpl-" + "a" * 24, "chatcmpl-" + "b" * 24


def choice(text: str, finish: str = "stop") -> dict:
    return {"index": 0, "message": {"role": "assistant", "content": text, "refusal": None}, "finish_reason": finish}


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def collection(tmp_path):
    collection = Collection(str(tmp_path / "feedback.jsonl"), 1 << 20)
    collection.remember(ID, None, "tiny", ASKED, [choice("A ship."), choice("A sh", "length")])
    return collection


def test_what_is_kept_of_a_verdict(collection):
    assert lines(collection.path) == [] and stat.S_IMODE(collection.path.stat().st_mode) == 0o600
    assert collection.judge(None, ID, "accepted", None) == {"id": ID, "verdict": "accepted", "stored": True}
    (line,) = lines(collection.path)
    assert line["messages"] == [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A ship."}]
    assert line["model"] == "tiny" and "answer" not in line
    collection.judge(None, ID, "corrected", "A boat.")
    (line,) = lines(collection.path)
    assert line["messages"][-1]["content"] == "A boat." and line["answer"] == "A ship." and line["verdict"] == "corrected"
    assert [found.messages for found in chats([str(collection.path)])] == [line["messages"]], "`adapt` reads it"
    assert collection.judge(None, ID, "rejected", None)["stored"] is False and lines(collection.path) == []
    assert stat.S_IMODE(collection.path.stat().st_mode) == 0o600


def test_a_later_server_can_change_and_delete_what_an_earlier_one_kept(collection):
    collection.judge(None, ID, "corrected", "A boat.")
    left = collection.path.with_name(f".{collection.path.name}.123.tmp")
    left.write_bytes(collection.path.read_bytes())
    later = Collection(str(collection.path), 1 << 20)
    assert not left.exists(), "what a killed server was writing"
    later.remember(OTHER, None, "tiny", ASKED, [choice("A car.")])
    later.judge(None, OTHER, "accepted", None)
    later.judge(None, ID, "accepted", None)
    assert [line["messages"][-1]["content"] for line in lines(collection.path)] == ["A car.", "A ship."]
    assert later.delete(None, ID) == {"id": ID, "deleted": True}
    assert [line["id"] for line in lines(collection.path)] == [OTHER] and b"ship" not in collection.path.read_bytes()
    with pytest.raises(ApiError, match="no answer"):
        later.delete(None, ID)


@pytest.mark.parametrize(
    "arguments, status, said",
    [
        (("key", ID, "accepted", None), 404, "no answer"), ((None, OTHER, "accepted", None), 404, "no answer"),
        ((None, ID, "corrected", " "), 400, "must be given"), ((None, ID, "accepted", "x"), 400, "does not go with"),
        ((None, ID, "accepted", None, 1), 400, "cut at its length limit"), ((None, ID, "accepted", None, 2), 400, "at most 1"),
        ((None, ID, "corrected", "x" * (1 << 20)), 507, "is full"),
    ],
)  # fmt: skip
def test_what_is_refused(collection, arguments, status, said):
    with pytest.raises(ApiError, match=said) as refused:
        collection.judge(*arguments)
    assert refused.value.status == status and lines(collection.path) == []


def test_only_the_newest_answers_wait_for_a_verdict(collection, monkeypatch):
    monkeypatch.setattr("sparing.serve.collect.PENDING_BYTES", 1000)
    collection.remember(OTHER, None, "tiny", ASKED, [choice("x" * 700)])
    with pytest.raises(ApiError, match="too long ago"):
        collection.judge(None, ID, "accepted", None)
    assert collection.judge(None, OTHER, "accepted", None)["stored"]


def test_files_that_cannot_be_deleted_from_are_refused(tmp_path):
    with pytest.raises(UserError, match="--collect"):
        Collection("/dev/null", 1 << 20)
    with pytest.raises(UserError, match="there is no folder"):
        Collection(str(tmp_path / "no" / "file"), 1 << 20)
    (tmp_path / "open.jsonl").write_text("")
    (tmp_path / "open.jsonl").chmod(0o644)
    assert stat.S_IMODE(Collection(str(tmp_path / "open.jsonl"), 1).path.stat().st_mode) == 0o600


@pytest.fixture(scope="module")
def collecting(run, home, tmp_path_factory):
    file = tmp_path_factory.mktemp("collect") / "feedback.jsonl"
    server = Server(run, "--collect", str(file), env={"SPARING_HOME": str(home)})
    server.file = file
    yield server
    assert server.stop() == 0
    assert "Traceback" not in "".join(server.log)


def test_over_http(collecting):
    assert "are kept in" in "".join(collecting.log)
    assert collecting.ask("GET", "/v1/models")[2]["data"][0]["collects"] is True
    body = {"messages": [{"role": "user", "content": "import json"}], "max_tokens": 4, "temperature": 0}
    answer = collecting.ask("POST", "/v1/chat/completions", body)[2]
    said = collecting.ask("POST", "/v1/feedback", {"id": answer["id"], "verdict": "corrected", "correction": "import os"})
    assert said[0] == 200 and said[2] == {"id": answer["id"], "verdict": "corrected", "stored": True}
    (line,) = lines(collecting.file)
    assert line["answer"] == answer["choices"][0]["message"]["content"] and line["messages"][-1]["content"] == "import os"
    stream = collecting.ask("POST", "/v1/chat/completions", body | {"stream": True})[2]
    streamed = json.loads(stream.split("\n\n")[0].removeprefix("data: "))["id"]
    assert collecting.ask("POST", "/v1/feedback", {"id": streamed, "verdict": "corrected", "correction": "import re"})[0] == 200
    assert collecting.ask("DELETE", f"/v1/feedback/{answer['id']}")[2] == {"id": answer["id"], "deleted": True}
    assert [line["id"] for line in lines(collecting.file)] == [streamed]
    assert collecting.ask("DELETE", f"/v1/feedback/{answer['id']}")[0] == 404
    assert collecting.ask("POST", "/v1/feedback", {"id": "../etc", "verdict": "accepted"})[0] == 400
    assert collecting.ask("POST", "/v1/feedback", {"id": answer["id"], "verdict": "great"})[0] == 400
    collecting.ask("DELETE", f"/v1/feedback/{streamed}")


def test_by_default_nothing_is_collected(server):
    assert server.ask("GET", "/v1/models")[2]["data"][0]["collects"] is False
    status, _, body = server.ask("POST", "/v1/feedback", {"id": ID, "verdict": "accepted"})
    assert status == 404 and body["error"]["code"] == "feedback_off"
    assert server.ask("DELETE", f"/v1/feedback/{ID}")[0] == 404


def test_the_page_says_so_and_asks(collecting, tmp_path):
    with Page(tmp_path) as page:
        page.go(collecting.url)
        page.until("document.querySelector('#model').textContent.startsWith('tiny')")
        chat(page)
        page.until("document.querySelector('#kept').textContent.includes('keeps the answers that you call good or correct')")
        say(page, "import json")
        press = "[...document.querySelectorAll('#log > li:last-child button')].find(b => b.textContent == {}).click()"
        page.js(press.format("'Correct it'"))
        page.js("document.querySelector('#correction').value = 'import sys'")
        page.js("document.querySelector('#correcting button.first').click()")
        page.until("document.querySelector('#log [aria-pressed=true]')?.textContent == 'Correct it'")
        assert lines(collecting.file)[-1]["messages"][-1]["content"] == "import sys"
        page.js(press.format("'Bad'"))
        page.until("document.querySelector('#log [aria-pressed=true]')?.textContent == 'Bad'")
        assert lines(collecting.file) == [] and page.problems == []
