"""GGUF files: llama.cpp computes what we compute, cuts text as we do, drafts with our MTP module; and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from tests.interop import llama_cpp
from tests.losses import loss_of
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from sparing.base.config import ModelConfig, UserError, YarnConfig
from sparing.base.files import DamagedError
from sparing.base.run import StoredTensors, write_tensors
from sparing.data.tokenizer import Tokenizer, train_tokenizer
from sparing.interop.gguf import PRE_TOKENIZERS, export_gguf
from sparing.model.transformer import Transformer

pytest.importorskip("gguf")

MODEL = ModelConfig(
    vocab_size=384, hidden_size=64, num_layers=3, intermediate_size=96, num_heads=2, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=32,
    qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=8, moe_intermediate_size=32, mtp_depth=1, max_position_embeddings=512,
)  # fmt: skip
GROUPED = {"attention": "gqa", "num_heads": 6, "num_kv_heads": 2, "head_dim": 16, "mtp_depth": 0}
DENSE = {**GROUPED, "num_dense_layers": 3}
YARN = YarnConfig(factor=4.0, original_max_position_embeddings=64, mscale=0.8, mscale_all_dim=0.8)
VARIANTS = {
    "as trained": {},
    "no q-lora, no MTP": {"q_lora_rank": None, "mtp_depth": 0},
    "no q-lora in 26 layers": {"q_lora_rank": None, "num_layers": 26, "num_dense_layers": 26, "mtp_depth": 0},
    "all dense": {"num_dense_layers": 3, "mtp_depth": 0},
    "all dense with MTP": {"num_dense_layers": 3},
    "tied": {"tie_word_embeddings": True},
    "no shared expert": {"n_shared_experts": 0},
    "two shared experts": {"n_shared_experts": 2},
    "softmax gate, weights as they are": {"scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "root of softplus": {"scoring_func": "sqrtsoftplus"},
    "groups of experts": {"n_group": 2, "topk_group": 1},
    "YaRN": {"yarn": YARN, "rope_theta": 5000.0},
    "two MTP modules": {"mtp_depth": 2},
    "grouped queries": DENSE,
    "as many keys as queries, in wide heads": {**DENSE, "num_heads": 2, "head_dim": 48, "tie_word_embeddings": True},
    "grouped queries with YaRN": {**DENSE, "yarn": YARN, "rope_theta": 5000.0},
    "grouped queries with YaRN of another temperature": {
        **DENSE,
        "yarn": replace(YARN, mscale=0.0, mscale_all_dim=0.0),
        "rope_theta": 5000.0,
    },
    "grouped queries with MTP": {**DENSE, "mtp_depth": 1},
    "grouped mixture": GROUPED,
    "grouped mixture without shared experts": {**GROUPED, "n_shared_experts": 0, "num_dense_layers": 2, "n_group": 2, "topk_group": 1},
    "grouped mixture, softmax gate": {**GROUPED, "scoring_func": "softmax", "norm_topk_prob": False, "n_shared_experts": 2},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    made = train_tokenizer([textwrap.__doc__ * 3, (json.__doc__ or "") * 3, "naïve Straße 中文 🙂 αβγ " * 5], 384)
    made.save(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")
    return made


@pytest.fixture
def written(random_model, tokenizer, tmp_path):
    """(changes, type) -> (the model, its GGUF file, notes)."""

    def write(changes=None, type="f32", name="model"):
        config = replace(MODEL, **(changes or {}))
        model = random_model(config)
        write_tensors(tmp_path / f"{name}.safetensors", model.state_dict())
        tokenizer.save(tmp_path / "tokenizer.json")
        file = tmp_path / f"{name}.gguf"
        notes = export_gguf(config, StoredTensors(tmp_path / f"{name}.safetensors"), tmp_path / "tokenizer.json", file, type)
        return model, str(file), notes

    return write


@torch.no_grad()
def greedy(model: Transformer, prompt: list[int], count: int, ends=(0, 4)) -> tuple[list[int], list[float], float]:
    """-> (tokens, their log-probabilities, the smallest distance between first and second best), without what ends texts (`llama_cpp`)."""
    made, logprobs, margin = [], [], float("inf")
    model.eval()
    for _ in range(count):
        z = model(torch.tensor([prompt + made]))[0, -1]
        allowed = z.index_fill(0, torch.tensor(ends), -torch.inf)
        best = (allowed - z.logsumexp(-1)).topk(2)
        made.append(int(best.indices[0]))
        logprobs.append(float(best.values[0]))
        margin = min(margin, float(best.values[0] - best.values[1]))
    return made, logprobs, margin


def close(theirs: list[float], ours: list[float]) -> int:
    """Log-probabilities of the same tokens, as many as llama.cpp reports; how many."""
    assert all(abs(a - b) < 1e-3 for a, b in zip(theirs, ours))
    return len(theirs)


def prompts(number: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 40, (number,), generator=generator).tolist()
    return [[0, *torch.randint(1, 384, (length,), generator=generator).tolist()] for length in lengths]


@pytest.mark.parametrize("changes", [{}, DENSE], ids=["latent", "grouped"])
def test_llama_cpp_writes_our_greedy_tokens(changes, written):
    """64 tokens on each of 20 prompts, in float32."""
    pytest.importorskip("xllamacpp")
    model, file, notes = written(changes)
    assert notes == []
    [theirs] = llama_cpp.run({"model": file, "prompts": prompts(20), "tokens": 64})
    different, compared = set(), 0
    for prompt, found in zip(prompts(20), theirs, strict=True):
        made, logprobs, margin = greedy(model, prompt, 64)
        assert margin > 2e-5, "a tie: this prompt decides nothing"
        assert found["tokens"] == made
        compared = close(found["logprobs"], logprobs) + compared
        different |= set(made)
    assert compared > 100
    assert len(different) > 20, "a model that repeats itself proves little"


def test_every_variant_computes_the_same(written):
    pytest.importorskip("xllamacpp")
    compared = 0
    models = {name: written(changes, name=f"v{i}")[:2] for i, (name, changes) in enumerate(VARIANTS.items())}
    found = llama_cpp.run(*({"model": file, "prompts": prompts(2), "tokens": 12} for _, file in models.values()))
    for (name, (model, _)), answers in zip(models.items(), found, strict=True):
        for prompt, theirs in zip(prompts(2), answers, strict=True):
            made, logprobs, _ = greedy(model, prompt, 12)
            assert theirs["tokens"] == made, name
            compared += close(theirs["logprobs"], logprobs)
    assert compared > 50


@pytest.mark.parametrize(("type", "near"), [("f16", 0.03), ("bf16", 0.2), ("q8_0", 0.2), ("q4_0", 2.0)])
def test_smaller_types_stay_near(type, near, written):
    """The first token's log-probability after a prompt; how near depends on the bits, and is far for other weights."""
    pytest.importorskip("xllamacpp")
    model, file, _ = written(type=type)
    [found] = llama_cpp.run({"model": file, "prompts": prompts(6), "tokens": 1})
    errors = []
    for prompt, theirs in zip(prompts(6), found, strict=True):
        with torch.no_grad():
            z = model(torch.tensor([prompt]))[0, -1].log_softmax(-1)
        errors += [abs(float(z[theirs["tokens"][0]]) - logprob) for logprob in theirs["logprobs"]]
    assert len(errors) >= 3
    assert sum(errors) / len(errors) < near, errors


TEXTS = [
    "def f(x):\n    return x  # comment\n\n\n\nclass A:\n\tpass\n",
    "It's 12345.678, isn't it?  We'LL see...   \n \n  next",
    "naïve Straße 中文字 🙂🙃 αβγ \u00a0\u2003wide blanks, ٣٤٥, ½²",
    "<|endoftext|> is text here, <|user|> too",
    "",
]


def test_text_becomes_the_same_tokens(written, tokenizer):
    """The text goes to llama.cpp as text; what follows depends on every token of it. (In a prompt, it reads special tokens' names as
    such: those we leave out.)"""
    pytest.importorskip("xllamacpp")
    model, file, _ = written()
    texts = [text for text in TEXTS if "<|" not in text]
    [found] = llama_cpp.run({"model": file, "prompts": texts, "tokens": 8})
    for text, theirs in zip(texts, found, strict=True):
        ids = [tokenizer.eot_id, *tokenizer.encode(text)]
        assert theirs["prompt_tokens"] == len(ids), text
        assert theirs["tokens"] == greedy(model, ids, 8)[0], text


CUTS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    **{
        name: pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(expression), "isolated") for expression in PRE_TOKENIZERS[name]),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        for name in ("llama-bpe", "deepseek-v3")
    },
}
"""As the published tokenizers spell them."""


@pytest.mark.parametrize("pre", CUTS)
def test_text_is_cut_as_a_published_tokenizer_cuts_it(pre, random_model, tmp_path):
    pytest.importorskip("xllamacpp")
    gguf = pytest.importorskip("gguf")
    texts = [text for text in TEXTS if "<|" not in text and text]
    library = Library(models.BPE(ignore_merges=pre == "llama-bpe"))
    library.pre_tokenizer, library.decoder = CUTS[pre], decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    library.train_from_iterator([*texts, "a  12345  b\n\n 中中文 ١٢٣٤ x̧ąb (foo_bar)[0]"] * 3, trainer)
    library.save(str(tmp_path / "t.json"))
    model = random_model(replace(MODEL, **DENSE))
    write_tensors(tmp_path / "m.safetensors", model.state_dict())
    notes = export_gguf(model.config, StoredTensors(tmp_path / "m.safetensors"), tmp_path / "t.json", tmp_path / "m.gguf")
    assert notes == []
    assert gguf.GGUFReader(tmp_path / "m.gguf").get_field("tokenizer.ggml.pre").contents() == pre
    tokenizer = Tokenizer.load(tmp_path / "t.json")
    [found] = llama_cpp.run({"model": str(tmp_path / "m.gguf"), "prompts": texts, "tokens": 8})
    for text, theirs in zip(texts, found, strict=True):
        ids = [tokenizer.eot_id, *tokenizer.encode(text)]
        assert theirs["prompt_tokens"] == len(ids), text
        assert theirs["tokens"] == greedy(model, ids, 8, ends=[0])[0], text


def test_llama_cpp_drafts_with_the_mtp_module(tokenizer, tmp_path):
    """A model trained for seconds on counting: a draft of the wrong state, position or order of inputs would be refused all the time."""
    pytest.importorskip("xllamacpp")
    torch.manual_seed(0)
    model = Transformer(replace(MODEL, num_layers=2, tie_word_embeddings=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1) if parameter.dim() > 1 else parameter.fill_(1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(250):
        text = 5 + (torch.randint(32, (8, 1)) + torch.arange(26) * torch.randint(1, 4, (8, 1))) % 32
        loss = loss_of(model, text[:, :24], torch.stack([text[:, 1:25], text[:, 2:26]], -1), mtp_weight=1.0)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    assert loss.loss < 0.5 and loss.mtp_loss < 0.5, "it has not learnt to count"
    write_tensors(tmp_path / "m.safetensors", model.state_dict())
    tokenizer.save(tmp_path / "tokenizer.json")
    export_gguf(model.config, StoredTensors(tmp_path / "m.safetensors"), tmp_path / "tokenizer.json", tmp_path / "m.gguf")
    request = {"model": str(tmp_path / "m.gguf"), "prompts": [[5, 6, 7, 8, 9], [8, 10, 12, 14], [6, 9, 12, 15]], "tokens": 16}
    plain, drafted = llama_cpp.run(request, request | {"mtp": True})
    assert [p["tokens"] for p in plain] == [d["tokens"] for d in drafted]
    assert [p["tokens"] for p in plain] == [greedy(model, prompt, 16)[0] for prompt in request["prompts"]]
    assert sum(p["drafted"] for p in plain) == 0
    assert sum(d["accepted"] for d in drafted) >= 0.8 * sum(d["drafted"] for d in drafted) > 10


def test_what_is_in_the_file(written, tokenizer):
    from gguf import GGUFReader

    reader = GGUFReader(written()[1])
    assert reader.get_field("deepseek2.nextn_predict_layers").contents() == 1
    assert reader.get_field("deepseek2.block_count").contents() == 4
    assert reader.get_field("tokenizer.ggml.pre").contents() == "qwen2"
    assert reader.get_field("tokenizer.ggml.add_bos_token").contents() is True
    assert reader.get_field("tokenizer.ggml.tokens").contents()[0] == "<|endoftext|>"
    names = {tensor.name: tensor for tensor in reader.tensors}
    assert {"blk.3.nextn.eh_proj.weight", "blk.1.exp_probs_b.bias", "blk.1.ffn_gate_exps.weight", "output.weight"} <= set(names)
    assert "output.weight" not in {tensor.name for tensor in GGUFReader(written({"tie_word_embeddings": True}, name="t")[1]).tensors}
    small = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(written(type="q4_0", name="q")[1]).tensors}
    assert small["blk.1.ffn_gate_exps.weight"] == "Q4_0"
    assert small["blk.1.ffn_gate_inp.weight"] == small["output_norm.weight"] == small["blk.1.exp_probs_b.bias"] == "F32"


@pytest.mark.parametrize(
    ("changes", "type", "says"),
    [
        ({"num_layers": 27}, "f32", "27 layers"),
        ({"yarn": YarnConfig(mscale=1.0, mscale_all_dim=0.7)}, "f32", "mscale = mscale_all_dim, not 1.0 and 0.7"),
        ({"moe_intermediate_size": 40}, "q8_0", "ffn_down_exps.weight has rows of 40"),
        ({}, "q5_k", "choose one of f32"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused_in_one_line(changes, type, says, written, tmp_path):
    with pytest.raises(UserError, match=says) as error:
        written(changes, type)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*.tmp"))


def test_notes_say_what_is_left_out(written):
    assert "dense MTP modules" in written({"num_dense_layers": 3}, name="a")[2][0]
    assert "the first of 2" in written({"mtp_depth": 2}, name="b")[2][0]
    assert "without q_lora_rank" in written({"q_lora_rank": None}, name="c")[2][0]


def test_nothing_half_written_stays(written, tokenizer, random_model, tmp_path, monkeypatch):
    model, _, _ = written(name="whole")
    with pytest.raises(UserError, match="already exists"):
        written(name="whole")
    state = model.state_dict()
    state["model.norm.weight"] = torch.zeros(3)
    write_tensors(tmp_path / "wrong.safetensors", state)
    with pytest.raises(UserError, match=r"model.norm.weight has shape \[3\]"):
        export_gguf(MODEL, StoredTensors(tmp_path / "wrong.safetensors"), tmp_path / "tokenizer.json", tmp_path / "w.gguf")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:5000])
    with pytest.raises(DamagedError, match=r"cut\.safetensors"):
        export_gguf(MODEL, StoredTensors(tmp_path / "cut.safetensors"), tmp_path / "tokenizer.json", tmp_path / "w.gguf")
    other = json.loads(tokenizer.to_json())
    other["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"other\.json: .* pre-tokenisers that llama\.cpp calls qwen2, gpt-2, smollm, .*; this is another"):
        export_gguf(MODEL, StoredTensors(tmp_path / "whole.safetensors"), tmp_path / "other.json", tmp_path / "w.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {
        "whole.gguf", "whole.safetensors", "wrong.safetensors", "cut.safetensors", "tokenizer.json", "other.json"
    }  # fmt: skip


FULL_DISK = """
import resource, sys
from pathlib import Path
from sparing.base.config import ModelConfig, UserError
from sparing.interop.gguf import export_gguf
from sparing.model.transformer import Transformer
from sparing.model.init import init_weights
from sparing.base.run import StoredTensors, write_tensors
config = ModelConfig(vocab_size=512, hidden_size=64, num_layers=1)
model = Transformer(config)
init_weights(model, 0)
folder = Path(sys.argv[1])
write_tensors(folder / "m.safetensors", model.state_dict())
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    export_gguf(config, StoredTensors(folder / "m.safetensors"), None, folder / "m.gguf")
except UserError as error:
    print(error)
"""


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "no room left" in done.stdout and done.stdout.count("\n") == 1, done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
