"""The server's settings: address, keys, limits."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from pathlib import Path

from sparing.base.config import UserError
from sparing.base.files import read_text

LOCAL = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Settings:
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    """The model's name for clients; None: the run folder's."""
    keys: tuple[str, ...] = ()
    """Bearer keys; none: anyone who reaches the port is served."""
    origins: tuple[str, ...] = ()
    """Web origins that may call from a browser (CORS)."""
    max_body: int = 4 << 20
    """Most bytes of a request's body."""
    body_s: float = 30.0
    """Seconds for a request's body to arrive."""
    send_s: float = 30.0
    """Seconds after which a client that reads nothing is dropped."""
    answer_s: float = 600.0
    """Seconds for an answer, its time in the queue included."""
    drain_s: float = 30.0
    """Seconds for running answers after SIGTERM."""

    def key_of(self, given: str) -> str | None:
        """A name of the given key for the logs, None if it is wrong. Takes equally long for every wrong key."""
        name = None
        for key in self.keys:
            if hmac.compare_digest(key.encode(), given.encode(errors="replace")):
                name = hashlib.sha256(key.encode()).hexdigest()[:8]
        return name


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file, one a line; empty lines and lines that begin with # are ignored. Raises UserError."""
    lines = [line.strip() for line in read_text(path, "--api-key-file").splitlines()]
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise UserError(f"--api-key-file {path}: has no key; write one a line, for example from: openssl rand -hex 24")
    short = next((number for number, key in enumerate(keys, 1) if len(key) < 16), None)
    if short is not None:
        raise UserError(f"--api-key-file {path}: key {short} is shorter than 16 characters; make one with: openssl rand -hex 24")
    return keys
