"""A real server, as `sparing serve` starts it, on a real (tiny) run."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("starlette")

from sparing import api

WISHES = {
    "model": {
        "hidden_size": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 512, "n_routed_experts": 4, "num_dense_layers": 1,
        "max_position_embeddings": 512, "mtp_depth": 1,
    },
    "train": {"seq_len": 64, "batch_size": 8, "threads": 1, "replicas": 1, "compile": False, "micro_batch_size": 8},
    "data": {"workers": 1},
}  # fmt: skip


class Server:
    """`sparing serve RUN OPTIONS` as a process; `url` is where it listens."""

    def __init__(self, run: Path, *options: str, env: dict[str, str] | None = None):
        command = [sys.executable, "-m", "sparing", "serve", str(run), "--port", "0", "--threads", "1", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})})
        self.log: list[str] = []
        self._up = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if not self._up.wait(120) or self.process.poll() is not None:
            self.process.kill()
            raise AssertionError("the server did not start: " + "".join(self.log))
        self.url = re.search(r"http://\S+", "".join(self.log))[0]
        self.name = run.name

    def _read(self) -> None:
        for line in self.process.stderr:
            self.log.append(line)
            if "http://" in line:
                self._up.set()
        self._up.set()

    def ask(self, method: str, path: str, body=None, **headers: str):
        """-> (status, headers, JSON or text). body: bytes as they are, anything else as JSON."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            raw = answer.read()
            found = dict(answer.headers.items())
            is_json = found.get("content-type", "").startswith("application/json")
            return answer.status, found, json.loads(raw) if is_json else raw.decode()
        finally:
            connection.close()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Exit status."""
        self.process.send_signal(number)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """Trained for a second on this Python's own source."""
    root = tmp_path_factory.mktemp("serve")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARING_HOME", str(root / "home"))
        api.train([str(Path(json.__file__).parent / "*.py")], "30ktok", str(root / "tiny"), WISHES, samples=0)
    return root / "tiny"


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def server(run, home):
    """One server for all tests that leave it as it was."""
    server = Server(run, env={"SPARING_HOME": str(home)})
    server.ask("POST", "/v1/completions", {"model": server.name, "prompt": "x", "max_tokens": 2})  # the first answer compiles kernels
    yield server
    assert server.process.poll() is None, "the server has died: " + "".join(server.log)
    assert server.stop() == 0
    assert "Traceback" not in "".join(server.log)


@pytest.fixture(scope="session")
def client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
