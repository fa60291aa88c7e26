"""Count the files under src/sparing that one training step and one served token pass through.

A file counts if one of its functions is called, on any thread. The training step is a warm one of a small mixture with an MTP module,
trained by `sparing.api.train`. The token is one of a streamed completion, whose request enters at the server's ASGI application.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src" / "sparing"
sys.path.insert(0, str(SOURCE.parent))
STEP_FILES, TOKEN_FILES = 15, 12
"""The most that we aim at."""
WARM_STEPS = 4
ANSWER_TOKENS = 1500
OFTEN = 20
"""Calls in an answer of so many tokens from which a function belongs to its tokens and not to the request: tokens may share a step of the
engine, and an event of the server."""
WISHES = {
    "model": {
        "hidden_size": 64, "num_layers": 3, "num_dense_layers": 1, "intermediate_size": 96, "num_heads": 2, "q_lora_rank": 32,
        "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mtp_depth": 1, "vocab_size": 512,
        "max_position_embeddings": 2048,
    },
    "train": {"seq_len": 64, "batch_size": 8, "micro_batch_size": 8, "threads": 2, "replicas": 2, "compile": False, "evals": 0},
}  # fmt: skip


Calls = dict[str, list[str]]
"""Functions called, by their file's path relative to src/sparing."""


class Recorder:
    """Collects what is called between `start` and `stop`."""

    def __init__(self) -> None:
        self.called: Counter[tuple[str, str]] | None = None

    def __call__(self, frame, event: str, argument: object) -> None:
        if self.called is not None and event == "call":
            self.called[frame.f_code.co_filename, frame.f_code.co_name] += 1

    def start(self) -> None:
        self.called = Counter()

    def stop(self, least: int = 1) -> tuple[Calls, Calls]:
        """(what was called at least so often, what was called less often)."""
        called, self.called = self.called or Counter(), None
        often: Calls = {}
        seldom: Calls = {}
        for (file, function), count in sorted(called.items()):
            if file.startswith(str(SOURCE)):
                calls = often if count >= least else seldom
                calls.setdefault(str(Path(file).relative_to(SOURCE)), []).append(function)
        return often, seldom


def training_step(recorder: Recorder, run: str) -> tuple[Calls, Calls]:
    """-> (files of one `Trainer.step`; those between two steps, where the pace, the meter and the log are)."""
    from sparing.api import train
    from sparing.train.trainer import Trainer

    found: dict[str, Calls] = {}
    step = Trainer.step

    def traced(trainer: Trainer, total: int):
        if trainer.state.step == WARM_STEPS + 1 and "between" not in found:
            found["between"], _ = recorder.stop()
        if trainer.state.step != WARM_STEPS:
            return step(trainer, total)
        recorder.start()
        values = step(trainer, total)
        found["step"], _ = recorder.stop()
        recorder.start()
        return values

    Trainer.step = traced
    try:
        train([], "5ktok", run, WISHES | {"data": {"max_tokens": 20_000}}, seed=0, samples=0)
    finally:
        Trainer.step = step
    return found["step"], found["between"]


def served_token(recorder: Recorder, run: str) -> tuple[Calls, Calls]:
    """-> (files of the tokens of a streamed completion; of the rest of its request)."""
    from sparing.base.run import RunFolder
    from sparing.data.chat import ChatTemplate, template_text
    from sparing.infer.engine import Engine
    from sparing.serve.app import application
    from sparing.serve.audit import Audit
    from sparing.serve.energy import Energy
    from sparing.serve.service import Service
    from sparing.serve.settings import Settings

    folder = RunFolder.open(run)
    with Engine(run, threads=2) as engine:
        service = Service(engine, ChatTemplate(template_text(folder)), Settings(), Energy([]), Audit(None, False))
        app = application(service)
        asyncio.run(_complete(app, service.name))  # a first answer, so that the second one is warm
        recorder.start()
        asyncio.run(_complete(app, service.name))
        return recorder.stop(OFTEN)


async def _complete(app, model: str) -> None:
    """Ask `app`, an ASGI application, for a streamed completion."""
    body = {"model": model, "prompt": "def ", "max_tokens": ANSWER_TOKENS, "stream": True, "temperature": 0, "ignore_eos": True}
    headers = [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http", "path": "/v1/completions",
        "raw_path": b"/v1/completions", "query_string": b"", "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
    }  # fmt: skip
    requests: asyncio.Queue = asyncio.Queue()
    requests.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
    bodies: list[bytes] = []

    async def send(message: dict) -> None:
        bodies.append(message.get("body", b""))

    await app(scope, requests.get, send)
    if len(bodies) < OFTEN:
        raise RuntimeError(f"{len(bodies)} pieces: {bodies[-1]!r}")


def show(title: str, calls: Calls, aim: int | None = None) -> None:
    print(f"{title}: {len(calls)} files" + (f" (aim: at most {aim})" if aim else ""))
    for file, functions in calls.items():
        print(f"  {file:28} {', '.join(functions)}")
    print()


def without(calls: Calls, others: Calls) -> Calls:
    return {file: functions for file, functions in calls.items() if file not in others}


def main() -> None:
    recorder = Recorder()
    threading.setprofile(recorder)
    sys.setprofile(recorder)
    with tempfile.TemporaryDirectory(prefix="sparing-trace-") as folder:
        run = str(Path(folder, "run"))
        step, between = training_step(recorder, run)
        token, request = served_token(recorder, run)
    show("A training step", step, STEP_FILES)
    show("Between two steps, besides", without(between, step))
    show("A served token", token, TOKEN_FILES)
    show("The rest of its request", without(request, token))


if __name__ == "__main__":
    main()
