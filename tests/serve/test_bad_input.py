"""Whatever comes in, what goes out is an OpenAI-style error, never a stack trace, and the server lives."""

from __future__ import annotations

import json
import socket
import time

import pytest

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
COMPLETION = {"model": "tiny", "prompt": "hi", "max_tokens": 2}


def refused(found, status: int, says: str = "", param: str | None = None) -> dict:
    got, headers, body = found
    assert got == status, (got, body)
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert says in body["error"]["message"], body
    assert param is None or body["error"]["param"] == param, body
    assert "Traceback" not in json.dumps(body) and headers["x-request-id"]
    return body["error"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "must be an object"),
        (b"null", "must be an object"),
        (b'"text"', "must be an object"),
        (b'{"model": "tiny", "prompt": "\xff\xfe"}', "not JSON"),
        (b'{"model": "tiny", "prompt": "hi", "temperature": NaN}', "NaN is no JSON"),
        (b'{"model": "tiny", "prompt": "hi", "temperature": 1e999}', "temperature"),
        (b'{"model": "tiny", "prompt": "hi", "seed": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"model": "tiny", "prompt": "hi", "seed": 99999999999999999999}', "seed"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', "surrogate"),
        (b'{"model": "tiny", "prompt": "hi", "\\ud800": 1}', "no Unicode"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested"),
        (b"[" * 100_000, "nested"),
    ],
)
def test_bodies_that_are_no_request(server, body, says):
    refused(server.ask("POST", "/v1/completions", body), 400, says)


@pytest.mark.parametrize(
    ("change", "says", "param"),
    [
        ({"temperature": -1}, "at least 0", "temperature"),
        ({"temperature": "hot"}, "must be a number", "temperature"),
        ({"temperature": True}, "must be a number", "temperature"),
        ({"top_p": -0.1}, "at least 0", "top_p"),
        ({"top_p": 1.5}, "at most 1", "top_p"),
        ({"n": 10**9}, "at most 16", "n"),
        ({"n": 0}, "at least 1", "n"),
        ({"n": 1.5}, "must be an integer", "n"),
        ({"max_tokens": 10**9}, "maximum context length is 512", None),
        ({"max_tokens": 10**30}, "at most", "max_tokens"),
        ({"max_tokens": -1}, "at least 0", "max_tokens"),
        ({"stop": ["a"] * 17}, "at most 16 entries, not 17", "stop"),
        ({"stop": ""}, "must not be empty", "stop"),
        ({"stop": [1]}, "must be a string", "stop[0]"),
        ({"logit_bias": {"x": 1}}, "must match", "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "no token", "logit_bias"),
        ({"logit_bias": {"5": 1000}}, "at most 100", "logit_bias.5"),
        ({"logit_bias": {"5": None}}, "must be a number", "logit_bias.5"),
        ({"stream": "yes"}, "true or false", "stream"),
        ({"presence_penalty": 3}, "at most 2", "presence_penalty"),
        ({"surprise": 1}, "Unrecognized request argument supplied: surprise", "surprise"),
        ({"model": 5}, "must be a string", "model"),
        ({"response_format": {"type": "xml"}}, "must be one of", "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "cannot be used", "response_format"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_fields_out_of_range(server, path, change, says, param):
    body = (CHAT if "chat" in path else COMPLETION) | change
    refused(server.ask("POST", path, body), 400, says, param)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"messages": []}, "at least 1"),
        ({"functions": [{"name": "f"}]}, "'functions' must be left out, empty or null: this server does not support it, not an array."),
        ({"modalities": ["text", "audio"]}, "'modalities[1]' must be one of text, not \"audio\""),
        ({"web_search_options": {}}, "'web_search_options' must be left out"),
        ({"moderation": {"model": "x"}}, "'moderation' must be left out"),
        ({"messages": "hi"}, "must be an array"),
        ({"messages": [5]}, "must be an object"),
        ({"messages": [{"content": "hi"}]}, "Missing required parameter: 'messages[0].role'"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "must be one of system, developer"),
        ({"messages": [{"role": "user", "content": 5}]}, "must be"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "must be one of text"),
        ({"top_logprobs": 2}, "needs 'logprobs'"),
        ({"max_tokens": 0}, "at least 1"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "must match"),
        ({"tool_choice": "required"}, "not in 'tools'"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, "maximum context length"),
        ({"messages": [{"role": "user", "content": "x" * 1_000_000}]}, "maximum context length"),
    ],
)
def test_chats_that_cannot_be(server, change, says):
    refused(server.ask("POST", "/v1/chat/completions", CHAT | change), 400, says)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": []}, "at least 1"),
        ({"prompt": [[]]}, "at least 1"),
        ({"prompt": [-1]}, "at least 0"),
        ({"prompt": [100_000]}, "no token"),
        ({"prompt": {"a": 1}}, "'prompt' must be"),
        ({"prompt": ["a"] * 65}, "at most 64 entries, not 65"),
        ({"prompt": ["a"] * 60, "n": 2}, "at most 64 answers"),
        ({"prompt": list(range(500)) * 2}, "maximum context length"),
        ({"suffix": "x"}, 'does not support it, not "x"'),
        ({"best_of": 3}, "must be 1, as 'n' is"),
        ({"best_of": 2, "n": 3}, "must be 3, as 'n' is"),
    ],
)
def test_completions_that_cannot_be(server, change, says):
    refused(server.ask("POST", "/v1/completions", COMPLETION | change), 400, says)


def test_unknown_models_paths_methods_and_types(server):
    bodies = {
        "/v1/completions": COMPLETION,
        "/v1/chat/completions": CHAT,
        "/tokenize": {"prompt": "hi"},
        "/detokenize": {"tokens": [1]},
    }
    for path, body in bodies.items():
        error = refused(server.ask("POST", path, body | {"model": "gpt-4"}), 404, "`gpt-4` does not exist; this server has `tiny`", "model")
        assert error["code"] == "model_not_found" and error["type"] == "invalid_request_error"
    refused(server.ask("GET", "/v1/models/"), 404, "does not exist")
    refused(server.ask("GET", "/v1/nothing"), 404)
    refused(server.ask("GET", "/v1/models/%2e%2e/%2e%2e/etc/passwd"), 404)
    refused(server.ask("GET", "/v1/completions"), 405)
    refused(server.ask("DELETE", "/v1/models"), 405)
    refused(server.ask("POST", "/v1/completions", b"{}", Content_Type="text/plain"), 415, "application/json")
    refused(server.ask("POST", "/detokenize", {"tokens": [10**6]}), 400, "no token")


def test_nulls_and_ignored_fields_are_as_if_absent(server):
    nothing = dict.fromkeys(["temperature", "top_p", "n", "stop", "seed", "logit_bias", "stream", "stream_options", "user", "max_tokens"])
    status, _, body = server.ask("POST", "/v1/completions", COMPLETION | nothing)
    assert status == 200 and body["usage"]["completion_tokens"] <= 16
    assert server.ask("POST", "/v1/completions", COMPLETION | {"user": "me", "metadata": {"a": 1}, "seed": 3.0})[0] == 200


def test_fields_at_their_defaults_are_accepted(server):
    """Client libraries send them; OpenAI's own documents name these defaults."""
    chat = ["modalities", "audio", "prediction", "web_search_options", "functions", "function_call", "moderation", "prompt_cache_retention"]
    defaults = {"modalities": ["text"], "functions": [], "function_call": "none", "top_p": 0, "top_logprobs": 0, "tools": [], "stop": []}
    for more in (dict.fromkeys(chat), defaults, {"prediction": {"type": "content", "content": "hello"}}):
        status, _, body = server.ask("POST", "/v1/chat/completions", CHAT | more)
        assert status == 200, body
    for more in ({"best_of": None, "suffix": None}, {"best_of": 1, "suffix": ""}, {"best_of": 2, "n": 2}, {"prompt": None}, {"prompt": ""}):
        status, _, body = server.ask("POST", "/v1/completions", COMPLETION | more)
        assert status == 200 and len(body["choices"]) == more.get("n", 1), body
    likeliest = [
        server.ask("POST", "/v1/completions", COMPLETION | {"max_tokens": 20} | more)[2] for more in ({"temperature": 0}, {"top_p": 0})
    ]
    assert likeliest[0]["choices"][0]["text"] == likeliest[1]["choices"][0]["text"]


def test_bodies_too_large_are_refused_before_they_are_read(server):
    refused(server.ask("POST", "/v1/completions", {**COMPLETION, "prompt": "x" * 10_000_000}), 413, "longer than 4194304 bytes")
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:  # chunked: no length was promised
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        try:
            for _ in range(100):
                connection.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert b" 413 " in connection.recv(65536).split(b"\r\n")[0]


def raw(server, data: bytes, wait: float = 0.0) -> bytes:
    """What comes back on a connection that is cut off after `data`."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(data)
        if wait:
            connection.settimeout(wait)
            try:
                return connection.recv(65536)
            except TimeoutError:
                return b""
    return b""


def test_disconnects_at_any_byte(server):
    body = json.dumps(CHAT | {"max_tokens": 200, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    whole = head.encode() + body
    for cut in [*range(0, len(whole), 11), len(whole)]:
        raw(server, whole[:cut])
    for seconds in (0.05, 0.2, 0.5):  # in the middle of the answer
        raw(server, whole, wait=seconds)
    body = body.replace(b"true", b"null")  # nor is a whole answer written for nobody
    raw(server, head.encode() + body, wait=0.1)
    deadline = time.monotonic() + 300
    while "sparing_requests_running 0\n" not in server.ask("GET", "/metrics")[2]:
        assert time.monotonic() < deadline, "answers for clients that are gone still run"
        time.sleep(0.1)
    assert server.ask("GET", "/health")[2] == {"status": "ok"}


def test_what_is_not_http(server):
    raw(server, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", wait=2)  # TLS
    raw(server, b"GET / HTTP/1.1\r\nHost: " + b"x" * 100_000 + b"\r\n\r\n", wait=2)
    raw(server, b"\x00" * 5000, wait=2)
    assert server.ask("GET", "/health")[0] == 200


def test_a_strange_host_is_turned_away(server):
    refused(server.ask("GET", "/v1/models", Host="evil.example"), 403, "localhost only")
    refused(server.ask("GET", "/v1/models", Host="localhost.evil.example"), 403, "localhost only")
    for name in ("localhost:1234", "LocalHost", "localhost.", "127.0.0.1:80", "[::1]:5"):
        assert server.ask("GET", "/v1/models", Host=name)[0] == 200, name


def test_no_cors_unless_asked(server):
    assert not any(name.lower().startswith("access-control") for name in server.ask("GET", "/v1/models", Origin="https://example.org")[1])
