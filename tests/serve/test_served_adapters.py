"""`serve --adapter NAME=RUN`: several models over one run's weights, chosen by the request."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tests.infer.test_adapters import adapter_of
from tests.serve.conftest import MODEL, Server

from sparing.base.config import Config, UserError
from sparing.base.config_file import write_config
from sparing.base.run import RunFolder, write_tensors
from sparing.data.tokenizer import train_tokenizer
from sparing.kernels.decode import library
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer
from sparing.serve.entry import serve


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A run whose adapters can be served beside it."""
    root, tokenizer = tmp_path_factory.mktemp("dense"), train_tokenizer([json.__doc__ * 20], 400)
    config = replace(MODEL, attention="gqa", num_kv_heads=1, head_dim=16, num_dense_layers=2, mtp_depth=0, vocab_size=tokenizer.vocab_size)
    run, model = RunFolder.create(root / "base"), Transformer(config)
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5, generator=generator)
    write_tensors(run.weights_file, model.state_dict())
    run.config_file.write_text(write_config(replace(Config(), model=config)))
    tokenizer.save(run.tokenizer_file)
    for seed, name in enumerate(("left", "right")):
        adapter_of(run.path, root / name, seed + 1)
    (root / "right/chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    return root


@pytest.mark.skipif(library() is not None, reason="there is a C compiler")
def test_without_a_compiler_it_says_what_to_do(dense, tmp_path):
    with pytest.raises(UserError, match=r"there is no C compiler.*sparing merge"):
        serve(str(dense / "base"), port=0, adapter=(f"left={dense / 'left'}",))


@pytest.mark.skipif(library() is None, reason="there is no C compiler")
def test_models_are_chosen_by_name(dense, tmp_path):
    server = Server(dense / "base", "--adapter", f"left={dense / 'left'}", f"right={dense / 'right'}", env={"SPARING_HOME": str(tmp_path)})
    try:
        models = server.ask("GET", "/v1/models")[2]["data"]
        assert [(m["id"], m.get("parent"), m["kind"]) for m in models] == [
            ("base", None, "base"), ("left", "base", "base"), ("right", "base", "chat")
        ]  # fmt: skip
        assert server.ask("GET", "/v1/models/right")[2]["id"] == "right"
        texts = {}
        for name in ("base", "left", "right", ""):
            body = {"model": name, "prompt": "JSON is", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
            answer = server.ask("POST", "/v1/completions", body)[2]
            texts[name] = answer["choices"][0]["text"]
            assert answer["model"] == (name or "base")
        assert texts[""] == texts["base"] and len(set(texts.values())) == 3
        chat = {"model": "right", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        shorter = server.ask("POST", "/v1/chat/completions", chat)[2]["usage"]["prompt_tokens"]
        longer = server.ask("POST", "/v1/chat/completions", chat | {"model": "left"})[2]["usage"]["prompt_tokens"]
        assert shorter < longer, "each with its own template"
        status, _, error = server.ask("POST", "/v1/completions", {"model": "middle", "prompt": "x"})
        assert status == 404 and "`base`, `left`, `right`" in error["error"]["message"]
        audit = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
        assert [line["model"] for line in audit[:3]] == ["base", "left", "right"]
    finally:
        assert server.stop() == 0


@pytest.mark.parametrize("adapter, complaint", [("left", "say NAME=RUN"), ("=x", "say NAME=RUN"), ("a=x,a=y", "is x already")])
def test_names_that_cannot_be(dense, adapter, complaint):
    with pytest.raises(UserError, match=complaint):
        serve(str(dense / "base"), adapter=adapter.split(","))


def test_an_adapter_of_another_run_is_one_line(dense):
    command = [sys.executable, "-m", "sparing", "serve", str(dense / "left"), "--port", "0", "--adapter", f"right={dense / 'right'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "was trained on other weights" in done.stderr and "Traceback" not in done.stderr
