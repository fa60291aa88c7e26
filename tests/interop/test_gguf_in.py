"""GGUF files in: the model that llama.cpp and transformers see in them, its tokenizer, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.interop import ggml, llama_cpp

from sparing import api
from sparing.base.config import Llama3RopeConfig, ModelConfig, TokensConfig, UserError, YarnConfig
from sparing.base.layers import shapes
from sparing.base.origin import Origin, origin_of
from sparing.base.run import RunFolder, read_tensors, run_tensors
from sparing.data.tokenizer import Tokenizer, train_tokenizer
from sparing.infer.generate import load
from sparing.interop.gguf import PRE_TOKENIZERS, QWEN3_GATE, export_gguf, gguf_tensors
from sparing.interop.gguf_model import ARCHITECTURES, read_gguf
from sparing.interop.gguf_reader import GgufFile
from sparing.interop.gguf_tokenizer import SAME_CUTS
from sparing.model.linear import Linear
from sparing.model.transformer import Transformer

gguf = pytest.importorskip("gguf")

VOCABULARY = 640
LLAMA = ModelConfig(
    vocab_size=VOCABULARY, hidden_size=64, num_layers=2, num_dense_layers=2, intermediate_size=96, attention="gqa", num_heads=4,
    num_kv_heads=2, head_dim=16, max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=True,
)  # fmt: skip
LATENT = ModelConfig(
    vocab_size=VOCABULARY, hidden_size=64, num_layers=3, intermediate_size=96, num_heads=2, q_lora_rank=32, kv_lora_rank=32,
    qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=8, moe_intermediate_size=32, max_position_embeddings=512,
)  # fmt: skip
MODELS = {
    "llama": ("llama", LLAMA),
    "llama, own head, own width of heads": ("llama", replace(LLAMA, tie_word_embeddings=False, head_dim=32, rope_theta=50000.0)),
    "llama, stretched as Llama 3.1": ("llama", replace(LLAMA, llama3=Llama3RopeConfig(8.0, 1.0, 4.0, 8192), rope_theta=500000.0)),
    "llama, stretched evenly": ("llama", replace(LLAMA, linear_rope_factor=4.0)),
    "qwen2": ("qwen2", replace(LLAMA, attention_bias=True)),
    "qwen2, YaRN": ("qwen2", replace(LLAMA, attention_bias=True, yarn=YarnConfig(4.0, 64, mscale=1.0, mscale_all_dim=1.0))),
    "qwen3": ("qwen3", replace(LLAMA, head_norm=True, head_dim=32)),
    "qwen3, heads of 128": ("qwen3", replace(LLAMA, head_norm=True, head_dim=128, num_heads=2, num_kv_heads=1)),
    "qwen3moe": (
        "qwen3moe",
        replace(LLAMA, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, tie_word_embeddings=False, **QWEN3_GATE),
    ),
    "deepseek2": ("deepseek2", replace(LATENT, mtp_depth=1)),
    "deepseek2, softmax gate": (
        "deepseek2",
        replace(LATENT, q_lora_rank=None, scoring_func="softmax", selection_bias=False, norm_topk_prob=False, routed_scaling_factor=1.0),
    ),
    "deepseek2, no shared expert, YaRN": (
        "deepseek2",
        replace(LATENT, n_shared_experts=1, yarn=YarnConfig(4.0, 64, mscale=0.8, mscale_all_dim=0.8)),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([json.dumps(dict(enumerate("the quick brown fox jumps 123 over naïve 中文 dogs".split()))) * 30], VOCABULARY)


def write(path: Path, arch: str, config: ModelConfig, model: Transformer, tokenizer: Tokenizer, **changes) -> Path:
    """A file as llama.cpp's own converter lays it out. changes: keys without the architecture's name -> values; None leaves one out."""
    writer = gguf.GGUFWriter(path, arch)
    c = config
    keys = {
        "block_count": c.num_layers, "context_length": c.max_position_embeddings, "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size, "attention.head_count": c.num_heads, "attention.head_count_kv": c.num_kv_heads,
        "attention.key_length": c.head_dim, "attention.value_length": c.head_dim, "rope.dimension_count": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps, "rope.freq_base": c.rope_theta, "vocab_size": c.vocab_size,
    }  # fmt: skip
    if c.linear_rope_factor != 1:
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": c.linear_rope_factor}
    if arch == "qwen3moe":
        keys |= {"expert_count": c.n_routed_experts, "expert_used_count": c.num_experts_per_tok}
        keys["expert_feed_forward_length"] = c.moe_intermediate_size
    if c.yarn:
        original = c.yarn.original_max_position_embeddings
        keys |= {"rope.scaling.type": "yarn", "rope.scaling.factor": c.yarn.factor, "rope.scaling.original_context_length": original}
    for key, value in (keys | changes).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool, list: writer.add_array}
        if value is not None:
            add[type(value)](f"{arch}.{key}" if not key.startswith(("general.", "tokenizer.", "split.")) else key, value)
    raw = json.loads(tokenizer.to_json())
    names = {number: word for word, number in raw["model"]["vocab"].items()} | {one["id"]: one["content"] for one in raw["added_tokens"]}
    special = {one["id"] for one in raw["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(c.vocab_size)])
    writer.add_token_types([3 if i in special else 1 if i in names else 5 for i in range(c.vocab_size)])
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in raw["model"]["merges"]])
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    state = model.state_dict()
    for one in gguf_tensors(c, ARCHITECTURES[arch]):
        writer.add_tensor(one.name, one.make(state[one.ours]).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def written(random_model, tokenizer, tmp_path):
    """(architecture, config, changes of keys) -> (model, its file)."""

    def make(arch: str, config: ModelConfig, name: str = "m", **changes):
        model = random_model(config)
        file = tmp_path / f"{name}.gguf"
        if config.attention == "mla":
            tokenizer.save(tmp_path / "tokenizer.json")
            export_gguf(config, model.state_dict(), tmp_path / "tokenizer.json", file)
        else:
            write(file, arch, config, model, tokenizer, **changes)
        return model, file

    return make


@pytest.mark.parametrize("name", MODELS)
def test_the_model_in_a_file_is_the_one_that_was_written(name, written):
    model, file = written(*MODELS[name])
    found = read_gguf(file)
    expected = MODELS[name][1]
    own = ("head_dim", "num_kv_heads") if expected.attention == "mla" else ("scoring_func", "selection_bias")
    unread = [key for key in vars(expected) if key.startswith(("q_lora", "kv_lora", "qk_", "v_head")) and expected.attention == "gqa"]
    expected = replace(expected, **{key: getattr(found.config, key) for key in (*own, *unread)})  # without a meaning in this kind of model
    for field, value in vars(expected).items():
        assert getattr(found.config, field) == (pytest.approx(value) if isinstance(value, float) else value) or field == "yarn", field
    if expected.yarn:
        assert vars(found.config.yarn) == pytest.approx(vars(expected.yarn))
    tensors = dict(found.tensors)
    assert list(tensors) == list(shapes(expected)) and tensors.keys() == model.state_dict().keys()
    for ours, tensor in model.state_dict().items():
        assert torch.equal(tensors[ours], tensor), ours
    assert found.tokens == TokensConfig(None if expected.attention == "gqa" else 0, expected.attention == "mla", (0, 4))


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("deepseek2")])
def test_an_import_writes_as_llama_cpp_does(name, written, tmp_path):
    """deepseek2 files are compared with llama.cpp in test_gguf.py, and with what was written above."""
    pytest.importorskip("xllamacpp")
    _, file = written(*MODELS[name])
    api.import_(str(file), str(tmp_path / "run"))
    prompts = [[7, 200, 31, 5], list(range(100, 180))]
    [theirs] = llama_cpp.run({"model": str(file), "prompts": prompts, "tokens": 12})
    network = load(tmp_path / "run").network
    for prompt, found in zip(prompts, theirs, strict=True):
        ids = list(prompt)
        for token, logprob in zip(found["tokens"], found["logprobs"], strict=False):
            with torch.no_grad():
                logits = network(torch.tensor([ids]))[0, -1]
            assert logits.log_softmax(-1)[token].item() == pytest.approx(logprob, abs=1e-3)
            logits[[0, 4]] = -torch.inf  # what llama.cpp was told not to end with
            assert logits.argmax() == token
            ids.append(token)


@pytest.mark.parametrize("name", ["llama", "llama, own head, own width of heads", "qwen2", "qwen3, heads of 128"])
def test_an_import_computes_what_transformers_does(name, written, tmp_path):
    transformers = pytest.importorskip("transformers")
    _, file = written(*MODELS[name])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    tokens = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    api.import_(str(file), str(tmp_path / "run"))
    with torch.no_grad():
        expected, found = theirs(tokens).logits, load(tmp_path / "run").network(tokens)
    assert (found - expected).abs().max() / expected.abs().max() < 1e-4


def test_rows_that_are_paired_otherwise_would_be_noticed(written, tmp_path):
    """The comparisons above can fail: the same file, read as the other pairing of rotary dimensions, is another model."""
    model, file = written("qwen2", replace(LLAMA, attention_bias=True))
    found = dict(read_gguf(file).tensors)
    name = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(found[name], model.state_dict()[name])
    assert not torch.equal(GgufFile(file).read("blk.0.attn_k.weight"), model.state_dict()[name])
    llama, _ = written("llama", LLAMA, name="l")
    assert torch.equal(GgufFile(tmp_path / "l.gguf").read("blk.0.attn_k.weight"), llama.state_dict()[name])


REFUSED = {
    "another architecture": ({"general.architecture": "gemma"}, "general.architecture is 'gemma', supported: llama, qwen2"),
    "an unknown key": ({"attention.logit_softcap": 50.0}, r"llama\.attention\.logit_softcap is not supported.*nearest"),
    "experts": ({"expert_count": 8}, r"llama\.expert_count is not supported"),
    "a sliding window": ({"attention.sliding_window": 64}, "sliding_window is 64"),
    "part of a head rotated": ({"rope.dimension_count": 8}, "dimension_count is 8, supported: the whole head, 16"),
    "another kind of scaling": ({"rope.scaling.type": "longrope"}, "scaling.type is 'longrope', supported: none, linear, yarn"),
    "no layers said": ({"block_count": None}, "block_count is missing"),
    "billions of layers": ({"block_count": 2**31 - 1}, "block_count is 2147483647, and there are 2[01] tensors"),
    "layers of two kinds": ({"attention.head_count_kv": [1, 2]}, "head_count_kv is 2 different values, expected a whole number"),
    "heads that do not fit": ({"attention.head_count_kv": 3}, r"num_heads \(4\) is not a multiple of num_kv_heads \(3\)"),
    "no heads": ({"attention.head_count": 0}, "head_count is not possible"),
    "text for a number": ({"context_length": "long"}, "context_length is 'long', expected a whole number"),
    "another width": ({"embedding_length": 32}, "has shape"),
    "another vocabulary": ({"vocab_size": 5}, "vocab_size is 5, token_embd.weight has 640 rows"),
    "a part of a file": ({"split.count": 3}, "one of 3 parts"),
    "another tokenizer": ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model is 't5', supported: 'gpt2'"),
    "an unknown pre-tokeniser": ({"tokenizer.ggml.pre": "smolm"}, "tokenizer.ggml.pre is 'smolm', known are .*nearest: smollm"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_computed_is_one_line_that_names_the_key(name, written, tmp_path, monkeypatch):
    changes, says = REFUSED[name]
    for method, key in (("add_tokenizer_model", "tokenizer.ggml.model"), ("add_tokenizer_pre", "tokenizer.ggml.pre")):
        if key in changes:
            monkeypatch.setattr(gguf.GGUFWriter, method, lambda self, value: None)
    other = changes.get("general.architecture")
    changes = {key: value for key, value in changes.items() if key != "general.architecture"}
    _, file = written("llama", LLAMA, **changes)
    if other:
        file.write_bytes(file.read_bytes().replace(b"llama", other.encode(), 1))
    with pytest.raises(UserError, match=says) as error:
        api.import_(str(file), str(tmp_path / "run"))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_tensors_that_are_missing_or_too_many_are_named(written, monkeypatch):
    config, add = replace(LLAMA, attention_bias=True), gguf.GGUFWriter.add_tensor

    def without(writer, name, *rest):
        if name != "blk.1.attn_k.bias":
            add(writer, name, *rest)

    def with_another(writer, name, *rest):
        add(writer, name, *rest)
        if name == "blk.1.attn_k.bias":
            add(writer, "blk.1.odd.weight", np.zeros(64, np.float32))

    _, file = written("llama", config, name="biases")
    assert read_gguf(file).config.attention_bias, "those of a llama are read too"
    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", without)
    _, file = written("qwen2", config)
    with pytest.raises(UserError, match=r"tensor blk\.1\.attn_k\.bias is missing \(nearest present: blk\.\d\.attn_[kq]\.(bias|weight)\)"):
        read_gguf(file)
    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", with_another)
    _, file = written("qwen2", config, name="more")
    with pytest.raises(UserError, match=r"tensor blk\.1\.odd\.weight is not part of this model"):
        read_gguf(file)


def test_dtypes_of_stored_weights(written, tmp_path):
    model, file = written("qwen3", replace(LLAMA, head_norm=True, tie_word_embeddings=False))
    stored = {}
    for dtype in ("float32", "bfloat16", "int8"):
        result = api.import_(str(file), str(tmp_path / dtype), dtype)
        assert result["dtype"] == dtype
        stored[dtype] = dict(read_tensors(RunFolder(tmp_path / dtype).weights_file))
    assert all(torch.equal(stored["float32"][name], tensor) for name, tensor in model.state_dict().items())
    half = {name: tensor.dtype for name, tensor in stored["bfloat16"].items()}
    assert half["model.layers.0.mlp.up_proj.weight"] == half["model.embed_tokens.weight"] == torch.bfloat16
    assert half["model.norm.weight"] == half["model.layers.1.self_attn.q_norm.weight"] == torch.float32
    name = "model.layers.1.mlp.down_proj.weight"
    linear = Linear(96, 64)
    linear.weight.data.copy_(model.state_dict()[name])
    linear.freeze("int8")
    assert torch.equal(stored["int8"][name], linear.weight) and torch.equal(stored["int8"][name + "_scale"], linear.weight_scale)
    assert stored["int8"]["model.embed_tokens.weight"].dtype == torch.bfloat16 and stored["int8"]["lm_head.weight"].dtype == torch.int8
    tokens = torch.arange(30)[None]
    exact = load(tmp_path / "float32").logits(tokens)
    for dtype, tolerance in (("bfloat16", 0.02), ("int8", 0.05)):
        found = load(tmp_path / dtype).logits(tokens)
        assert 1e-6 < (found - exact).abs().max() / exact.abs().max() < tolerance
        assert api.generate(str(tmp_path / dtype), "the quick", 4, temperature=0)["tokens"] > 0
    api.export(str(tmp_path / "int8"), "hf", str(tmp_path / "hf"))
    again = dict(run_tensors(RunFolder(tmp_path / "int8")))
    api.import_(str(tmp_path / "hf"), str(tmp_path / "back"))
    assert all(torch.equal(tensor.float(), again[ours].float()) for ours, tensor in run_tensors(RunFolder(tmp_path / "back")))
    with pytest.raises(UserError, match="--dtype int4: choose one of float32, bfloat16, int8"):
        api.import_(str(file), str(tmp_path / "x"), "int4")


def test_where_a_model_came_from_goes_with_it(written, tmp_path):
    said = {"general.license": "apache-2.0", "general.organization": "Somebody", "general.source.url": "https://huggingface.co/somebody/m"}
    _, file = written("llama", LLAMA, **said)
    result = api.import_(str(file), str(tmp_path / "run"))
    origin = origin_of(RunFolder(tmp_path / "run"))
    assert origin.licence == "Apache-2.0" and origin.publisher == "Somebody" and origin.source == "m.gguf" and len(origin.sha256) == 64
    assert origin.parameters == result["parameters"] and Origin(**result["origin"]) == origin
    card = (tmp_path / "run/MODEL_CARD.md").read_text()
    assert "Licence: Apache-2.0" in card and "by Somebody" in card and origin.sha256 in card
    api.export(str(tmp_path / "run"), "hf", str(tmp_path / "hf"))
    assert (tmp_path / "hf/README.md").read_text().startswith("---\nlicense: apache-2.0\nbase_model: somebody/m\n---\n")
    api.export(str(tmp_path / "run"), "gguf", str(tmp_path / "again.gguf"))
    assert GgufFile(tmp_path / "again.gguf").metadata["general.license"] == "Apache-2.0"
    for source in ("hf", "again.gguf"):
        api.import_(str(tmp_path / source), str(tmp_path / f"{source}-run"))
        again = origin_of(RunFolder(tmp_path / f"{source}-run"))
        assert again.licence == "Apache-2.0" and again.publisher.lower() == "somebody", source
    _, silent = written("llama", LLAMA, name="silent")
    api.import_(str(silent), str(tmp_path / "unknown"))
    assert "Licence: not stated" in (tmp_path / "unknown/MODEL_CARD.md").read_text()


def test_nothing_of_a_broken_import_stays(written, tmp_path):
    """Damage inside a tensor shows only on the way."""
    _, file = written("llama", LLAMA)
    place = GgufFile(file).tensors["blk.1.ffn_down.weight"].offset
    with open(file, "r+b") as raw:
        raw.seek(place)
        raw.write(b"\xff\xff\xff\xff")
    with pytest.raises(UserError, match=r"blk\.1\.ffn_down\.weight has numbers that are not finite"):
        api.import_(str(file), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not finite"):
        api.import_(str(file), str(tmp_path / "empty"))
    assert [path.name for path in (tmp_path / "empty").iterdir()] in ([], [".lock"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("years")
    with pytest.raises(UserError, match="not empty"):
        api.import_(str(file), str(tmp_path / "full"))


def test_a_broken_template_is_told_before_anything_is_written(written, tmp_path):
    _, file = written("llama", LLAMA, **{"tokenizer.chat_template": "{{ messages[ }}"})
    with pytest.raises(UserError, match="no Jinja template"):
        api.import_(str(file), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def small_file(tokenizer, random_model, tmp_path_factory) -> bytes:
    """A whole file of a tiny model, with a tokenizer of bytes alone in front of its tensors."""
    config = replace(LLAMA, hidden_size=16, num_layers=1, num_dense_layers=1, intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8)
    path = tmp_path_factory.mktemp("small") / "m.gguf"
    return write(path, "llama", config, random_model(config), tokenizer).read_bytes()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_bytes_make_half_a_model(small_file, tmp_path_factory, data):
    """A file with some bytes of its header changed is read whole, or refused in one line."""
    changed = bytearray(small_file)
    keys, listed = small_file.index(b"llama.block_count"), small_file.index(b"token_embd.weight")
    for _ in range(data.draw(st.integers(1, 3))):
        begin, end = data.draw(st.sampled_from([(0, keys), (keys, keys + 900), (listed - 30, listed + 700)]))
        at = data.draw(st.integers(begin, end))
        large = st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\1\0\0\0", b"\0\0\0\x40"])
        piece = data.draw(st.one_of(st.binary(min_size=1, max_size=4), large))
        changed[at : at + len(piece)] = piece
    path = tmp_path_factory.getbasetemp() / "mutant.gguf"
    path.write_bytes(changed)
    try:
        found = read_gguf(path)
        assert {name: tuple(tensor.shape) for name, tensor in found.tensors} == shapes(found.config)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attention.layer_norm_rms_epsilon": -1.0}, "rms_norm_eps must be at least 0"),
        ({"rope.freq_base": 0.0}, "rope_theta must be more than 0"),
        ({"tokenizer.chat_template": "x" * (1 << 21)}, "its chat template is larger than 1 MiB"),
    ],
)
def test_what_no_run_could_be_read_with_is_refused_before(changes, says, written, tmp_path):
    _, file = written("llama", LLAMA, **changes)
    with pytest.raises(UserError, match=says):
        api.import_(str(file), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# tokenizers

TEXTS = [
    "Hello, world! It's 12345 o'clock; don't we'll  do   it?\n\n  def f(x):\n\treturn x**2  # naïve\r\n",
    "  a  12  b\n\n\n   \n c \t\t d",
    "中文字符 ひらがな カタカナ 한국어 🙂🙂 αβγ ÀÉÎ ﬁ ½ ² ٣٤ Ⅷ",
    "x" * 300 + " " * 40 + "1" * 20,
    "\u00a0\u2003 \u200b\ufeff|",
    "",
    "https://example.org/a?b=c&d=e#f {\"json\": [1, 2.50, -3e+10]} <|endoftext|> </s> 'S 'LL I'VE",
]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_tokens_are_llama_cpps(pre, random_model, tmp_path):
    pytest.importorskip("xllamacpp")
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    cuts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in PRE_TOKENIZERS[pre]]
    library = Library(models.BPE(ignore_merges=pre == "llama-bpe"))
    library.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    library.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    source = Path(json.__file__).read_text() + Path(Path(json.__file__).parent, "decoder.py").read_text()
    library.train_from_iterator([source, *TEXTS * 3], trainer)
    (tmp_path / "tokenizer.json").write_text(library.to_str())
    config = replace(LLAMA, vocab_size=1200, hidden_size=32, num_layers=1, num_dense_layers=1)
    export_gguf(config, random_model(config).state_dict(), tmp_path / "tokenizer.json", tmp_path / "m.gguf")
    assert GgufFile(tmp_path / "m.gguf").metadata["tokenizer.ggml.pre"] == pre
    found = read_gguf(tmp_path / "m.gguf")
    tokenizer = Tokenizer(found.tokenizer, found.tokens)
    texts = [*TEXTS, source]
    ours, theirs = [tokenizer.encode(text) for text in texts], ggml.token_ids(str(tmp_path / "m.gguf"), texts)
    for text, a, b in zip(texts, ours, theirs, strict=True):
        assert a == b, text[:60]
        assert tokenizer.decode(a) == text
    own = Tokenizer(library.to_str())
    assert ours == [own.encode(text) for text in texts]
    assert tokenizer.special == {name: number for number, name in enumerate(special)}


def test_other_names_mean_cuts_that_are_known():
    assert set(SAME_CUTS.values()) <= set(PRE_TOKENIZERS)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"add_token_merges": lambda merges: [*merges, "zz qq"]}, "the merge 'zz qq' does not join two tokens"),
        ({"add_token_merges": lambda merges: [*merges, "zzqq"]}, "the merge 'zzqq' does not join"),
        ({"add_token_types": lambda kinds: kinds[:-1]}, "640 tokens and 639 kinds"),
        ({"add_token_types": lambda kinds: [6, *kinds[1:]]}, "is of the kind 6"),
        ({"add_token_list": lambda names: [names[1], *names[1:]]}, "is there twice"),
    ],
)
def test_a_damaged_vocabulary_is_one_line(changes, says, written, monkeypatch):
    for method, change in changes.items():
        add = getattr(gguf.GGUFWriter, method)
        monkeypatch.setattr(gguf.GGUFWriter, method, lambda self, values, add=add, change=change: add(self, change(values)))
    _, file = written("llama", LLAMA)
    with pytest.raises(UserError, match=says):
        read_gguf(file)
