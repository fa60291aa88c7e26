"""Keys, limits, logs, the end: what an operator relies on."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.serve.conftest import Server

from sparing.base.config import UserError
from sparing.kernels.decode import library
from sparing.serve.audit import Audit
from sparing.serve.energy import Energy
from sparing.serve.server import _listening
from sparing.serve.service import Service
from sparing.serve.settings import Settings, read_keys

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
KEY = "a-key-of-some-length"


@pytest.fixture(scope="module")
def keyed(run, home, tmp_path_factory):
    """A server with keys, one place in its queue, one answer at a time, and a log with texts; its run folder may not be written."""
    folder = tmp_path_factory.mktemp("keyed")
    (folder / "keys").write_text(f"# clinic\n{KEY}\n\nanother-key-of-some-length\n")
    modes = {path: path.stat().st_mode for path in [run, *run.rglob("*")]}
    for path in modes:
        path.chmod(modes[path] & ~0o222)
    options = ["--api-key-file", str(folder / "keys"), "--batch", "1", "--queue", "1", "--audit-log", str(folder / "audit"), "--audit-text"]
    server = Server(run, *options, "--cors", "https://example.org", "--name", "tiny", env={"SPARING_HOME": str(home)})
    server.audit = folder / "audit"
    yield server
    assert server.stop() == 0
    for path, mode in modes.items():
        path.chmod(mode)
    assert "Traceback" not in "".join(server.log)


def test_keys(keyed):
    for path in ("/v1/models", "/metrics", "/v1/nothing"):
        status, headers, body = keyed.ask("GET", path)
        assert status == 401 and body["error"]["code"] == "missing_api_key" and headers["www-authenticate"] == "Bearer"
    status, _, body = keyed.ask("GET", "/v1/models", Authorization="Bearer wrong")
    assert status == 401 and body["error"]["code"] == "invalid_api_key" and "wrong" not in json.dumps(body)
    assert keyed.ask("GET", "/v1/models", Authorization="Basic " + KEY)[0] == 401
    for key in (KEY, "another-key-of-some-length"):
        assert keyed.ask("GET", "/v1/models", Authorization="Bearer " + key)[0] == 200
    for path in ("/", "/health", "/favicon.ico", "/openapi.json"):
        assert keyed.ask("GET", path)[0] == 200
    assert keyed.ask("GET", "/v1/models", Authorization="Bearer " + KEY, Host="clinic.example")[0] == 200, "with keys any name will do"


def test_cors_for_those_who_asked(keyed):
    headers = {"Origin": "https://example.org", "Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization"}
    status, found, _ = keyed.ask("OPTIONS", "/v1/chat/completions", **headers)
    assert status == 200 and found["access-control-allow-origin"] == "https://example.org"
    status, found, _ = keyed.ask("OPTIONS", "/v1/chat/completions", **{**headers, "Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in found


def test_a_full_queue_says_when_to_come_back(keyed):
    answers: list[tuple] = []
    body = CHAT | {"max_tokens": 300}
    ask = lambda: answers.append(keyed.ask("POST", "/v1/chat/completions", body, Authorization="Bearer " + KEY))  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [answer for answer in answers if answer[0] == 429]
    assert refused and len(refused) < 8, [answer[0] for answer in answers]
    assert all(int(headers["retry-after"]) >= 1 and body["error"]["type"] == "rate_limit_error" for _, headers, body in refused)
    assert all(answer[0] == 200 for answer in answers if answer not in refused)


def test_the_audit_log(keyed, server, home):
    asked = CHAT | {"messages": [{"role": "user", "content": "a secret question"}]}
    status, headers, answer = keyed.ask("POST", "/v1/chat/completions", asked, Authorization="Bearer " + KEY)
    assert status == 200
    last = json.loads(keyed.audit.read_text().splitlines()[-1])
    assert last["request"] == headers["x-request-id"] and last["key"] and KEY not in keyed.audit.read_text()
    assert last["completion_tokens"] == answer["usage"]["completion_tokens"] and last["joules"] > 0 and last["client"] == "127.0.0.1"
    assert "a secret question" in last["prompt"] and last["answers"] == [answer["choices"][0]["message"]["content"]]
    assert stat.S_IMODE(keyed.audit.stat().st_mode) == 0o600
    server.ask("POST", "/v1/chat/completions", asked)
    plain = (home / "audit.jsonl").read_text()
    last = json.loads(plain.splitlines()[-1])
    assert last["path"] == "/v1/chat/completions" and last["ended"] in ("stop", "length") and "prompt" not in last
    assert "a secret question" not in plain


def test_metrics_are_prometheus(server):
    server.ask("POST", "/v1/chat/completions", CHAT)
    server.ask("GET", "/v1/nothing-like-that")
    status, headers, text = server.ask("GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    values = {}
    for line in text.splitlines():
        if line.startswith("#"):
            assert re.fullmatch(r"# TYPE [a-z_]+ (counter|gauge)", line), line
        else:
            assert re.fullmatch(r'[a-z_]+(\{path="[^"]*",status="\d+"\})? \S+', line), line
            values[line.rsplit(" ", 1)[0]] = float(line.rsplit(" ", 1)[1])
    assert values['sparing_http_requests_total{path="/v1/chat/completions",status="200"}'] >= 1
    assert values['sparing_http_requests_total{path="other",status="404"}'] >= 1
    assert values["sparing_completion_tokens_total"] > 0 and values["sparing_energy_joules_total"] > 0
    assert values["sparing_resident_bytes"] > 1e7


COMPILED = pytest.mark.skipif(library() is None, reason="there is no C compiler")
DRAFTED = {"model": "tiny", "prompt": "import json", "max_tokens": 60, "temperature": 0, "ignore_eos": True}


@pytest.mark.parametrize(
    ("options", "compiler", "drafts", "says"),
    [
        pytest.param(["--speculate", "off"], True, False, "drafts off", marks=COMPILED),
        (["--device", "cpu"], False, False, "drafts are off, because they could change a text in plain PyTorch (there is no C compiler)"),
        (["--device", "cpu", "--speculate", "on"], False, True, "drafts are on as you asked, and can change a text"),
    ],
)
def test_drafts_are_the_operators_choice(server, run, tmp_path, options, compiler, drafts, says):
    env = {"SPARING_HOME": str(tmp_path)} | ({} if compiler else {"PATH": str(tmp_path)})
    other = Server(run, "--quantize", "none", *options, env=env)
    try:
        assert says in "".join(other.log)
        usage = other.ask("POST", "/v1/completions", DRAFTED)[2]["usage"]["completion_tokens_details"]
        metrics = other.ask("GET", "/metrics")[2]
        assert f"sparing_speculates {drafts:d}\n" in metrics
        assert (sum(usage.values()) > 0) == drafts == ("sparing_drafted_total" in metrics)
    finally:
        assert other.stop() == 0
    on = library() is not None  # nobody said anything
    assert f"sparing_speculates {on:d}\n" in server.ask("GET", "/metrics")[2] and ("drafts on" in "".join(server.log)) == on


def test_an_answer_that_takes_too_long_ends(run, home):
    server = Server(run, "--answer-s", "0.002", env={"SPARING_HOME": str(home)})
    try:
        status, _, body = server.ask("POST", "/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 500, "ignore_eos": True})
        assert status == 504 and body["error"]["code"] == "timeout"
        stream = {"model": "tiny", "prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": True}
        status, _, text = server.ask("POST", "/v1/completions", stream)
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert status == 200 and json.loads(events[-2])["error"]["code"] == "timeout" and events[-1] == "[DONE]"
    finally:
        assert server.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_at_the_end_answers_under_way_are_finished(run, home, number):
    server = Server(run, env={"SPARING_HOME": str(home)})
    found: list[tuple] = []
    body = {"model": "tiny", "prompt": "x", "max_tokens": 300, "ignore_eos": True, "stream": True}
    thread = threading.Thread(target=lambda: found.append(server.ask("POST", "/v1/completions", body)))
    thread.start()
    deadline = time.monotonic() + 600
    while "sparing_requests_running 1\n" not in server.ask("GET", "/metrics")[2]:
        assert time.monotonic() < deadline
    assert server.stop(number) == 0
    thread.join()
    status, _, text = found[0]
    assert status == 200 and text.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in text
    with pytest.raises(OSError):
        server.ask("GET", "/health")


def test_a_slow_reader_holds_nobody_up(server):
    """It asks for a long stream and reads none of it; others are answered meanwhile."""
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 400, "stream": True, "logprobs": 20, "n": 4}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow.connect((host, int(port)))
        slow.sendall(head.encode() + body)
        assert server.ask("POST", "/v1/chat/completions", CHAT)[0] == 200


IMPATIENT = """
import socket, sys
from pathlib import Path
# Its buffers are full after a few events, and the kernel does not give the connection up before we do, however slow the machine is.
listen = socket.socket.listen
def listen_with_small_buffers(self, *backlog):
    self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    listen(self, *backlog)
socket.socket.listen = listen_with_small_buffers
vars(socket).pop("TCP_USER_TIMEOUT", None)
from sparing.serve.audit import Audit
from sparing.serve.server import run_server
from sparing.serve.settings import Settings
run_server(sys.argv[1], Settings(port=0, send_s=0.5), Audit(Path(sys.argv[2])), threads=1)
"""


def test_a_reader_that_takes_nothing_is_given_up(run, home, tmp_path):
    server = Server(run, str(tmp_path / "audit"), env={"SPARING_HOME": str(home)}, program=IMPATIENT)
    try:
        host, port = server.url.removeprefix("http://").split(":")
        asked = {"model": "tiny", "prompt": ["x"] * 4, "max_tokens": 500, "stream": True, "logprobs": 20, "n": 16, "ignore_eos": True}
        body = json.dumps(asked).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        deadline = time.monotonic() + 600
        with socket.socket() as slow:  # more comes than the kernel's buffers hold
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            slow.connect((host, int(port)))
            slow.sendall(head.encode() + body)
            while not (tmp_path / "audit").read_text().endswith("\n"):
                assert time.monotonic() < deadline, "it is still being served"
                time.sleep(0.1)
        ended = json.loads((tmp_path / "audit").read_text())["ended"]
        assert ended in ("slow reader", "disconnected"), "by us, or on a busy machine by the kernel (TCP_USER_TIMEOUT)"
        while "sparing_requests_running 0\n" not in server.ask("GET", "/metrics")[2]:  # the engine hears of it between steps
            assert time.monotonic() < deadline, "it is still being computed"
            time.sleep(0.1)
    finally:
        assert server.stop() == 0


def test_mistakes_of_the_operator_are_one_line(run, tmp_path):
    def says(*options: str) -> str:
        command = [sys.executable, "-m", "sparing", "serve", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "SPARING_HOME": str(tmp_path)})
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    assert "--api-key-file" in says(str(run), "--host", "0.0.0.0")
    assert "no such run folder" in says(str(tmp_path / "nothing"))
    assert "must be from 0 to 65535" in says(str(run), "--port", "70000")
    (tmp_path / "keys").write_text("# none\n")
    assert "has no key" in says(str(run), "--api-key-file", str(tmp_path / "keys"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "is taken" in says(str(run), "--port", str(taken.getsockname()[1]))


def test_localhost_means_both_of_its_addresses(run, home):
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    server = Server(run, "--host", "LocalHost", env={"SPARING_HOME": str(home)})
    try:
        port = int(server.url.rsplit(":", 1)[1])
        for host in ("127.0.0.1", "::1"):
            with socket.create_connection((host, port), timeout=30) as connection:
                connection.sendall(f"GET /health HTTP/1.1\r\nHost: LOCALHOST:{port}\r\nConnection: close\r\n\r\n".encode())
                assert b" 200 " in connection.makefile("rb").readline()
    finally:
        assert server.stop() == 0


def test_a_host_that_does_not_exist_is_one_line():
    with (
        pytest.raises(UserError, match=r"cannot listen at no\.such\.host\.invalid port 1"),
        _listening(Settings("no.such.host.invalid", 1)),
    ):
        pass


BROKEN = """
import sys
from pathlib import Path
from sparing.serve.audit import Audit
from sparing.serve.completions import TextCompletion
from sparing.serve.server import run_server
from sparing.serve.service import Service
from sparing.serve.settings import Settings

class Full:
    def write(self, raw):
        raise OSError(28, "No space left on device")

def fails(*_):
    raise ZeroDivisionError("a fault of ours")

def fails_for_boom(self, *given, push=TextCompletion.push):
    return fails() if self.prompt_text == "boom" else push(self, *given)

def fails_for_detokenize(self, field, *given, check=Service.check_tokens):
    return fails() if field == "tokens" else check(self, field, *given)

Service.check_tokens, TextCompletion.push = fails_for_detokenize, fails_for_boom
log = Audit(Path(sys.argv[2]))
log._file = Full()
run_server(sys.argv[1], Settings(port=0), log, threads=1)
"""


def test_a_full_audit_log_costs_no_answer_and_faults_of_ours_are_json(run, home, tmp_path):
    server = Server(run, str(tmp_path / "audit"), env={"SPARING_HOME": str(home)}, program=BROKEN)
    try:
        for stream in (False, True, False):
            status, _, body = server.ask("POST", "/v1/chat/completions", CHAT | {"model": run.name, "stream": stream})
            assert status == 200 and (body.endswith("data: [DONE]\n\n") if stream else body["choices"])
        assert "sparing_audit_lost_total 3\n" in server.ask("GET", "/metrics")[2]
        assert "".join(server.log).count("cannot be written (No space left on device)") == 1
        asked = {"prompt": "boom", "max_tokens": 2}
        for path, body in (("/detokenize", {"tokens": [1]}), ("/v1/completions", asked)):
            status, headers, answer = server.ask("POST", path, body)
            assert status == 500 and headers["content-type"].startswith("application/json") and headers["x-request-id"]
            assert answer["error"]["type"] == "server_error" and "fault of ours" not in json.dumps(answer)
        status, _, text = server.ask("POST", "/v1/completions", asked | {"stream": True})
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert status == 200 and json.loads(events[-2])["error"]["code"] == "server_failed" and events[-1] == "[DONE]"
        assert server.ask("GET", "/health")[0] == 200 and "ZeroDivisionError: a fault of ours" in "".join(server.log)
    finally:
        assert server.stop() == 0


def test_an_audit_log_goes_on_when_there_is_room_again(tmp_path, capsys):
    class Disk:
        room = 0

        def write(self, raw: bytes) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            size = min(self.room, len(raw))
            real.write(raw[:size])
            return size

    audit = Audit(tmp_path / "audit")
    real, audit._file = audit._file, Disk()
    for room in (10**6, 10, 0, 10**6, 10**6):
        audit._file.room = room
        audit.write({"room": room}, {})
    lines = (tmp_path / "audit").read_text().splitlines()
    assert [json.loads(line)["room"] for line in (lines[0], *lines[2:])] == [10**6] * 3 and len(lines[1]) == 10, "one line is torn"
    assert audit.lost == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "no space left" in said[0] and "is written again; 2 lines are lost" in said[1]


def test_long_texts_do_not_keep_short_requests_waiting(server):
    """Eight clients count the tokens of megabytes; meanwhile a short completion is answered."""
    text, done = "some words of a long text, 12345\n" * 100_000, []
    long = [threading.Thread(target=lambda: done.append(server.ask("POST", "/tokenize", {"prompt": text})[0])) for _ in range(8)]
    for thread in long:
        thread.start()
    deadline = time.monotonic() + 120
    while not done:  # all of them have arrived: one is answered
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for _ in range(2):
        assert server.ask("POST", "/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 4})[0] == 200
    assert len(done) < 6, "it had to wait for the others"
    for thread in long:
        thread.join()
    assert done == [200] * 8


def test_long_bodies_beyond_the_limit_are_told_to_come_back(monkeypatch):
    async def ask(service: Service, *sizes: int) -> list:
        return await asyncio.gather(
            *(service.work(size, gate.wait, 60) for size in sizes), asyncio.to_thread(gate.set), return_exceptions=True
        )

    gate, service = threading.Event(), object.__new__(Service)
    service._turns, service._long = ThreadPoolExecutor(1), 0
    monkeypatch.setattr("sparing.serve.service.MAX_WAITING", 100_000)
    *answers, _ = asyncio.run(ask(service, 40_000, 40_000, 40_000, 10))
    assert answers[:2] == [True, True] and answers[3] is True and service._long == 0
    assert answers[2].status == 429 and answers[2].retry_after and answers[2].code == "queue_full"


def test_keys_must_be_long_and_are_compared_whole(tmp_path):
    (tmp_path / "keys").write_text("short\n")
    with pytest.raises(UserError, match="shorter than 16"):
        read_keys(tmp_path / "keys")
    settings = Settings(keys=(KEY,))
    assert settings.key_of(KEY) and settings.key_of(KEY[:-1]) is None and settings.key_of(KEY + "é") is None


def test_energy_is_shared_and_adds_up():
    class Counter:
        part, name, how, value = "cpu", "test", "measured", 0.0

        def joules(self) -> float:
            return self.value

    source = Counter()
    energy = Energy([source])
    source.value = 5.0  # nobody asked: nobody's
    one = energy.begin()
    source.value = 7.0
    two = energy.begin()
    source.value = 13.0
    assert energy.end(one) == 2 + 3
    source.value = 14.0
    assert energy.end(two) == 3 + 1
    source.value = 20.0
    assert energy.total() == 9 and energy.how == "measured"


def test_an_audit_log_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(UserError, match=r"--audit-log .*: Is a directory; choose another --audit-log, or --audit-log none"):
        Audit(tmp_path)
