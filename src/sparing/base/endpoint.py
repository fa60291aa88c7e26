"""OpenAI's HTTP interface, from the client's side: one question, one answer.

What the other side says is not to be trusted: an answer may come late, drip, never end, be cut off, be empty, or lie about its length.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from sparing.base.config import UserError

TIMEOUT_S = 60.0
"""Of an answer, from the request to its last byte."""
TOKENS = 512
"""Of an answer, at most; the teacher is told."""
MOST_CHARACTERS = 16
"""Characters of a token, at most, by which an answer is longer than was asked."""
MOST_BYTES = 4 << 20
CHARACTERS = 4.0
"""Of a token, on average: by it texts are counted whose tokens nobody has told."""
MODEL = 200
"""Characters of a model's name, at most."""
TOLD = 200
"""Characters of a server's error message that are passed on."""
PASSING = (408, 425, 429, 500, 502, 503, 504, 529)
"""Statuses of a server that may answer later."""
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before a question is put again to a server that did not answer; it may ask for longer ones."""
MOST_WAIT_S = 60.0
QUIET = ("timed out", "ended before its length", "the connection broke")
"""It may be the question's fault: tried twice, and then left out."""


class Failed(Exception):
    """No usable answer, and why, in a few words that are counted."""

    def __init__(self, why: str, said: bool = False, passing: bool = False, status: int = 0, after: float = 0.0, told: str = ""):
        super().__init__(why)
        self.said = said
        """The model has answered, and what it said cannot be used."""
        self.passing = passing
        """Asked again later, the server may answer."""
        self.status, self.after = status, after
        """HTTP's, where there is one; seconds after which the server wants to be asked again."""
        self.told = told
        """What the server said about it, without control characters; empty where it may have repeated the key."""


class Reply(NamedTuple):
    """An answer."""

    text: str
    asked: int
    """Tokens of the question: what the server says, or else by CHARACTERS."""
    answered: int


def is_url(teacher: str) -> bool:
    return teacher.startswith(("http://", "https://"))


def patiently(ask: Callable[[], Reply], left: threading.Event) -> Reply:
    """`ask`, and again after a while where the server may answer later. left: nobody waits for the answer any more. Raises Failed."""
    waits = iter(WAITS)
    for tries in itertools.count(1):
        try:
            return ask()
        except Failed as failure:
            wait = next(waits, None)
            if not failure.passing or wait is None or (str(failure) in QUIET and tries == 2):
                raise
            if left.wait(max(wait, min(failure.after, MOST_WAIT_S))):
                raise
    raise AssertionError


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The key is for the server that the user named."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _InTime:
    """A connection on which the head of an answer, too, has to come within the time for the whole, however it drips."""

    def getresponse(self):
        late = threading.Event()
        timer = threading.Timer(self.timeout, _cut, [self.sock, late])
        timer.daemon = True
        timer.start()
        try:
            response = super().getresponse()
        except (OSError, http.client.HTTPException):
            if not late.is_set():
                raise
        finally:
            timer.cancel()
        if late.is_set():  # what was cut off may look like anything
            raise TimeoutError
        return response


def _cut(sock: socket.socket, late: threading.Event) -> None:
    late.set()
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


class _Http(_InTime, http.client.HTTPConnection):
    pass


class _Https(_InTime, http.client.HTTPSConnection):
    pass


class _HttpHandler(urllib.request.HTTPHandler):
    def http_open(self, request):
        return self.do_open(_Http, request)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def https_open(self, request):
        return self.do_open(_Https, request, context=self._context)


class Endpoint:
    """URL is what OpenAI's clients call the base, such as http://127.0.0.1:8000/v1; behind a # the model's name (default: its first one).
    $OPENAI_API_KEY is sent where it is set."""

    def __init__(self, url: str, timeout: float = TIMEOUT_S):
        """Raises UserError where nobody answers there, and for a URL with a password or a key in it, which would be written down."""
        try:
            parts = urlsplit(url)
            self.host = parts.hostname + (f":{parts.port}" if parts.port else "") if parts.hostname else ""
        except ValueError:
            self.host = ""
        if not self.host:
            raise UserError("--teacher: no host in the URL; expected one such as http://127.0.0.1:8000/v1#MODEL")
        if parts.username is not None or parts.query:
            raise UserError(f"--teacher: a URL of {self.host} with a password or a query in it; put the key into $OPENAI_API_KEY")
        self.url, _, self.model = url.partition("#")
        self.url, self.timeout = self.url.rstrip("/"), timeout
        self._opener = urllib.request.build_opener(_NoRedirects, _HttpHandler, _HttpsHandler)
        if not self.model:
            try:
                self.model = self._call("/models", None)["data"][0]["id"]
                if not (isinstance(self.model, str) and self.model.isprintable() and 0 < len(self.model) <= MODEL):
                    raise TypeError
            except (Failed, KeyError, IndexError, TypeError) as error:
                why = error if isinstance(error, Failed) else "it names no model"
                raise UserError(f"--teacher {url}: {why}; expected OpenAI's interface, such as http://127.0.0.1:8000/v1#MODEL") from None

    def answer(self, messages: list[dict], tokens: int = TOKENS, temperature: float = 1.0, seed: int | None = None) -> Reply:
        """An answer of at most `tokens` tokens. Raises Failed."""
        body = {"model": self.model, "messages": messages, "max_tokens": tokens, "temperature": temperature}
        found = self._call("/chat/completions", body if seed is None else body | {"seed": seed})
        try:
            choice, usage = found["choices"][0], found.get("usage") or {}
            text, reason = choice["message"].get("content"), choice.get("finish_reason")
            told, asked = usage.get("completion_tokens"), usage.get("prompt_tokens")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise Failed("no chat completion") from None
        if not isinstance(text, str) or not text.strip():
            raise Failed("empty", said=True)
        if reason == "length":
            raise Failed("cut off", said=True)
        if len(text) > MOST_CHARACTERS * tokens:
            raise Failed("longer than was asked", said=True)
        if told is not None and not (type(told) is int and len(text) / MOST_CHARACTERS <= told <= tokens):
            raise Failed("lies about its length", said=True)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Failed("not Unicode text", said=True) from None
        size = sum(len(str(message.get("content"))) for message in messages)
        known = type(asked) is int and 0 <= asked <= MOST_BYTES
        return Reply(text, asked if known else round(size / CHARACTERS), round(len(text) / CHARACTERS) if told is None else told)

    def _call(self, path: str, body: dict | None) -> dict:
        """One request; the whole of it ends in `timeout`, its head too. Raises Failed."""
        ends = time.monotonic() + self.timeout
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY", "").strip():
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, headers)
            with self._opener.open(request, timeout=self.timeout) as response:
                parts, size = [], 0
                while part := response.read1(1 << 16):
                    parts.append(part)
                    size += len(part)
                    if size > MOST_BYTES:
                        raise Failed("endless")
                    if time.monotonic() > ends:
                        raise Failed("timed out", passing=True)
                promised = response.headers.get("Content-Length")
                if promised is not None and promised.strip() != str(size):
                    raise Failed("ended before its length", passing=True)
            found = json.loads(b"".join(parts))
        except TimeoutError:
            raise Failed("timed out", passing=True) from None
        except urllib.error.HTTPError as error:
            told = _told(error)
            error.close()
            raise Failed(f"HTTP {error.code}", False, error.code in PASSING, error.code, _after(error), told) from None
        except (http.client.IncompleteRead, http.client.BadStatusLine):
            raise Failed("ended before its length", passing=True) from None
        except urllib.error.URLError as error:
            raise Failed("timed out" if isinstance(error.reason, TimeoutError) else "nobody answers", passing=True) from None
        except (OSError, http.client.HTTPException):
            raise Failed("the connection broke", passing=True) from None
        except (ValueError, RecursionError):
            raise Failed("no JSON") from None
        if not isinstance(found, dict):
            raise Failed("no chat completion")
        return found


def _told(error: urllib.error.HTTPError) -> str:
    """OpenAI's error message, of a request that was let in."""
    if error.code in (401, 403):
        return ""
    try:
        text = json.loads(error.read1(1 << 16))["error"]["message"]
        text = "".join(char if char.isprintable() else " " for char in text)[:TOLD]
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException, RecursionError):
        return ""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    return "" if key and key in text else text


def _after(error: urllib.error.HTTPError) -> float:
    """Seconds after which a server wants to be asked again, where it says so."""
    with suppress(TypeError, ValueError):
        return max(0.0, min(float(error.headers.get("Retry-After")), 3600.0))
    return 0.0
