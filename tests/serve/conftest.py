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
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.losses import loss_of

from sparing.base.config import Config, ModelConfig
from sparing.base.config_file import write_config
from sparing.base.run import RunFolder, write_tensors
from sparing.data.tokenizer import train_tokenizer
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer

pytest.importorskip("starlette")

MODEL = ModelConfig(
    vocab_size=512, hidden_size=32, num_layers=2, intermediate_size=64, num_heads=2, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16,
    qk_rope_head_dim=16, v_head_dim=16, n_routed_experts=4, moe_intermediate_size=32, mtp_depth=1, max_position_embeddings=512,
)  # fmt: skip


class Server:
    """`sparing serve RUN OPTIONS` as a process, or a program that serves; `url` is where it listens."""

    def __init__(self, run: Path, *options: str, env: dict[str, str] | None = None, program: str | None = None):
        command = [sys.executable, "-m", "sparing", "serve", str(run), "--port", "0", "--threads", "1", *options]
        if program is not None:
            command = [sys.executable, "-c", program, str(run), *options]
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
    """Trained for seconds on this Python's own source: it writes words, and no end of text."""
    torch.manual_seed(0)
    texts = [path.read_text() for path in sorted(Path(json.__file__).parent.glob("*.py"))]
    tokenizer = train_tokenizer(texts, MODEL.vocab_size)
    model = Transformer(replace(MODEL, vocab_size=tokenizer.vocab_size))
    init_weights(model, 0)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    ids = torch.tensor([id for text in texts for id in tokenizer.encode(text)])
    for _ in range(80):
        rows = ids[torch.randint(len(ids) - 66, (8, 1)) + torch.arange(66)]
        optimizer.zero_grad()
        loss_of(model, rows[:, :64], torch.stack([rows[:, 1:65], rows[:, 2:66]], -1)).total.backward()
        optimizer.step()
    run = RunFolder.create(tmp_path_factory.mktemp("serve") / "tiny")
    write_tensors(run.weights_file, model.state_dict())
    run.config_file.write_text(write_config(replace(Config(), model=model.config)))
    tokenizer.save(run.tokenizer_file)
    return run.path


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
