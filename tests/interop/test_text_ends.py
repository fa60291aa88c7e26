"""Beginning and end of a text survive import and export: transformers and llama.cpp write what our engine writes."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests.interop import llama_cpp
from tests.interop.test_gguf import MODEL
from tokenizers import Tokenizer as Library
from tokenizers.processors import TemplateProcessing

from sparing import api
from sparing.base.config import TokensConfig, UserError
from sparing.base.config_file import read_config
from sparing.data.chat import ChatTemplate
from sparing.data.loader import Loader
from sparing.data.tokenizer import Tokenizer, train_tokenizer
from sparing.evals.bpb import bpb
from sparing.infer.engine import Engine
from sparing.infer.request import Sampling
from sparing.interop.huggingface import export_hf

PROMPTS = ["def f(x):", "The naïve 世界", "1, 2, 3,", "a", "import json\n"]
TOKENS = 24
END, TURN, BOS = 0, 4, 1
"""Ids of the tokenizer below."""
PREPENDS = TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)])
FOLDERS = {
    "add_bos_token": ({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}, {"bos_token_id": 1, "eos_token_id": [0, 4]}, None),
    "post-processor": ({"bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "</s>"}, {"eos_token_id": [0, 4]}, PREPENDS),
    "no beginning": ({"bos_token": "<s>", "eos_token": "<|turn|>"}, {"bos_token_id": 1, "eos_token_id": 4}, None),
    "told otherwise": ({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}, {"eos_token_id": [0, 4]}, PREPENDS),
    "ids alone": ({}, {"bos_token_id": 1, "eos_token_id": [0, 4]}, PREPENDS),
}
BEGINS = {"add_bos_token": [BOS], "post-processor": [BOS], "no beginning": [], "told otherwise": [BOS], "ids alone": [BOS]}


@pytest.fixture(scope="module")
def foreign() -> str:
    """A tokenizer.json whose text begins with another token than it ends with, and whose turns end with a name nobody knows."""
    text = train_tokenizer([(json.__doc__ or "") * 3, "naïve Straße 中文 🙂 αβγ " * 5], 384).to_json()
    for ours, theirs in (("<|endoftext|>", "</s>"), ("<|system|>", "<s>"), ("<|end|>", "<|turn|>")):
        text = text.replace(f'"{ours}"', f'"{theirs}"')
    return text


@pytest.fixture(scope="module")
def model(random_model):
    """Weights that tell tokens apart."""
    return random_model(replace(MODEL, mtp_depth=0))


def folder_of(path, model, tokenizer: str, settings: dict, generation: dict, processor=None) -> None:
    export_hf(model.config, model.state_dict(), None, path)
    library = Library.from_str(tokenizer)
    if processor is not None:
        library.post_processor = processor
    library.save(str(path / "tokenizer.json"))
    config = json.loads((path / "config.json").read_text())
    for name, value in (
        ("config.json", config | dict.fromkeys(("bos_token_id", "eos_token_id"))),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **settings}),
        ("generation_config.json", generation),
    ):
        (path / name).write_text(json.dumps(value))


def ours(run) -> list[tuple[str, str]]:
    """(text, why it ended) of each prompt."""
    with Engine(run, weights="float32", speculate=False, threads=1) as engine:
        requests = [engine.submit(engine.tokenizer.encode_prompt(prompt), Sampling(TOKENS, 0)) for prompt in PROMPTS]
        return [(request.text(), request.finish_reason) for request in requests]


def theirs(folder) -> list[str]:
    transformers = pytest.importorskip("transformers")
    write = transformers.pipeline("text-generation", str(folder), dtype=torch.float32, device="cpu")
    return [write(p, do_sample=False, max_new_tokens=TOKENS, return_full_text=False)[0]["generated_text"] for p in PROMPTS]


def with_an_end(model, run) -> torch.Tensor:
    """The head's row for the end of a turn that ends the first answer after some tokens: that of a token in it, but more of it."""
    with Engine(run, weights="float32", speculate=False, threads=1) as engine:
        request = engine.submit(engine.tokenizer.encode_prompt(PROMPTS[0]), Sampling(TOKENS, 0, logit_bias={END: -100, TURN: -100}))
        made = [token for piece in request for token in piece.tokens]
    return 1.1 * model.state_dict()["lm_head.weight"][made[5]]


@pytest.fixture(scope="module", params=[*FOLDERS, "our own"])
def run(request, model, foreign, tmp_path_factory):
    """A run that begins and ends its texts in one of the ways that folders have, and the folder that it was imported from."""
    path, name = tmp_path_factory.mktemp("ends"), request.param
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = dict(before)
    for attempt in ("probe", "final"):
        model.load_state_dict(state)
        if name == "our own":
            own = train_tokenizer([(json.__doc__ or "") * 3, "naïve Straße 中文 🙂 αβγ " * 5], 384)
            own.save(path / f"{attempt}.json")
            export_hf(model.config, model.state_dict(), path / f"{attempt}.json", path / attempt)
        else:
            settings, generation, processor = FOLDERS[name]
            folder_of(path / attempt, model, foreign, settings, generation, processor)
        api.import_(str(path / attempt), str(path / f"{attempt}-run"))
        if attempt == "probe":
            state["lm_head.weight"] = state["lm_head.weight"].clone()
            state["lm_head.weight"][TURN] = with_an_end(model, path / "probe-run")
    model.load_state_dict(before)
    return SimpleNamespace(name=name, folder=path / "final", path=path / "final-run", scratch=path)


def test_an_import_begins_and_ends_as_transformers_does(run):
    written = ours(run.path)
    assert written[0][1] == "stop" and "length" in {why for _, why in written}
    if run.name != "add_bos_token":  # transformers 5 leaves out the token that this folder's model was trained with
        assert [text for text, _ in written] == theirs(run.folder)
    config = read_config(run.path / "config.toml")
    tokenizer = Tokenizer.load(run.path / "tokenizer.json", config.tokens)
    assert tokenizer.start == BEGINS.get(run.name, [END]) and {END, TURN} == set(tokenizer.eos_ids)


def test_an_export_writes_our_texts_in_transformers(run):
    api.export(str(run.path), "hf", str(run.scratch / "hf"))
    assert theirs(run.scratch / "hf") == [text for text, _ in ours(run.path)]
    generation = json.loads((run.scratch / "hf/generation_config.json").read_text())
    assert set(generation["eos_token_id"]) == {END, TURN}
    api.import_(str(run.scratch / "hf"), str(run.scratch / "again"))
    before, after = (read_config(path / "config.toml").tokens for path in (run.path, run.scratch / "again"))
    assert after == before, "and comes back as it went"


def test_a_gguf_file_writes_our_texts_in_llama_cpp(run):
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    file = run.scratch / "model.gguf"
    api.export(str(run.path), "gguf", str(file))
    written = ours(run.path)
    [found] = llama_cpp.run({"model": str(file), "prompts": PROMPTS, "tokens": TOKENS, "ends": True})
    tokenizer = Tokenizer.load(run.path / "tokenizer.json", read_config(run.path / "config.toml").tokens)
    assert [one["prompt_tokens"] for one in found] == [len(tokenizer.encode_prompt(prompt)) for prompt in PROMPTS]
    assert [one["finish"] for one in found] == [why for _, why in written]
    for one, (text, _) in zip(found, written, strict=True):
        assert one["text"].replace("\ufffd", "") == text.replace("\ufffd", "")
    fields = gguf.GGUFReader(file)
    ids = [fields.get_field(f"tokenizer.ggml.{name}_token_id").contents() for name in ("eos", "eot")]
    assert set(ids) == {END, TURN}
    assert fields.get_field("tokenizer.ggml.add_bos_token").contents() == bool(tokenizer.start)
    if tokenizer.start:
        assert fields.get_field("tokenizer.ggml.bos_token_id").contents() == tokenizer.start[0]


def test_documents_and_templates_begin_with_the_right_token(foreign):
    """Scores, training and chats of a model that begins with another token than it ends with."""
    tokenizer = Tokenizer(foreign, TokensConfig(bos=BOS, add_bos=True, eos=(TURN, END)))
    seen = []
    bpb(lambda tokens, targets: seen.append(tokens[:, 0].tolist()) or targets.float(), tokenizer, ["abc", "def"], 8)
    assert seen == [[BOS, BOS]]
    assert ChatTemplate("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}").encode(tokenizer, [{"content": "a"}])[::2] == [BOS, TURN]
    assert ChatTemplate(None).encode(tokenizer, [{"role": "user", "content": "a"}])[0] == BOS
    stream = torch.tensor([END, 7, 8, END, 9, END]).numpy()
    store = SimpleNamespace(
        starts=torch.tensor([0, 3]).numpy(), lengths=torch.tensor([3, 2]).numpy(), eot_id=END, take=lambda at: stream[at]
    )
    batch = Loader(store, 3, 2, first_id=tokenizer.first_id).rows(torch.arange(2).numpy())
    assert sorted(batch.tokens[:, 0].tolist()) == [BOS, BOS], "an input begins a document"
    assert END not in batch.tokens and (batch.targets == END).sum() == 2, "and its last target ends it"


@pytest.mark.parametrize("run", ["post-processor"], indirect=True)
def test_a_run_that_starts_from_an_import_keeps_them(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARING_HOME", str(tmp_path / "home"))
    (tmp_path / "a.txt").write_text("some words to go on with, and others\n" * 400)
    out = tmp_path / "on"
    api.train([str(tmp_path / "a.txt")], "2ktok", str(out), {"train": {"seq_len": 64, "batch_size": 4}}, samples=0, start=str(run.path))
    assert read_config(out / "config.toml").tokens == read_config(run.path / "config.toml").tokens


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id is 'x', expected a whole number"),
        ("generation_config.json", "{", "generation_config.json: not valid JSON"),
        ("tokenizer.json", "{}", "tokenizer.json: not a tokenizer.json"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "a Git LFS pointer"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "no Jinja template"),
        ("chat_template.jinja", "{{ messages[ }}", "no Jinja template"),
    ],
)
def test_files_that_cannot_be_used_are_one_line_and_leave_nothing(name, content, says, model, foreign, tmp_path):
    folder_of(tmp_path / "hf", model, foreign, {}, {})
    (tmp_path / "hf" / name).write_text(content)
    with pytest.raises(UserError, match=says) as error:
        api.import_(str(tmp_path / "hf"), str(tmp_path / "run"))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_ids_of_no_token_are_noted_and_left_out(model, foreign, tmp_path):
    folder_of(tmp_path / "hf", model, foreign, {}, {"bos_token_id": 9999, "eos_token_id": [2, 5000]})
    notes = api.import_(str(tmp_path / "hf"), str(tmp_path / "run"))["notes"]
    assert sum("is no token of this model" in note for note in notes) == 2
    assert read_config(tmp_path / "run/config.toml").tokens == TokensConfig(None, False, (2, END))


def test_a_config_that_names_no_token_of_the_tokenizer_is_refused(foreign):
    with pytest.raises(UserError, match=r"no token 4000, which \[tokens\] names"):
        Tokenizer(foreign, TokensConfig(eos=(4000,)))
