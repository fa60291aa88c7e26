"""Sentencepiece's BPE in GGUF files: the tokens that llama.cpp makes, and what is refused."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.interop import ggml
from tests.interop.test_gguf_in import LLAMA, TEXTS

from sparing import api
from sparing.base.config import TokensConfig, UserError
from sparing.data import chat
from sparing.data.chat import ChatTemplate
from sparing.data.tokenizer import Tokenizer
from sparing.interop.gguf import gguf_tensors
from sparing.interop.gguf_model import ARCHITECTURES, read_gguf

gguf = pytest.importorskip("gguf")

SOURCE = Path(__file__).read_text() + Path(chat.__file__).read_text()
PROSE = [
    *TEXTS,
    SOURCE,
    " leading, and    four   blanks   ",
    "\n\n\ttabs\tand\r\nlines\n",
    "a" * 37 + "-" * 25 + "=" * 14 + " " * 33 + "ababababababa" + "." * 9,
    "<unk> <s>x</s> [INST]",
    "[INST] <0x41> <|user|> x<|user|>",
    "smörgåsbord, Ελληνικά, русский, 日本語, 🏳️‍🌈 \u2581 \x00\x7f",
]


BARE = "\n\t\r"
"""Characters that are bytes alone."""
NAMES = ("<unk>", "<s>", "</s>", "<|user|>")


def pieces() -> list[tuple[str, float, int]]:
    """(name, score, kind): as Llama 2's vocabulary is laid out, learnt from SOURCE."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    library = Library(models.BPE(byte_fallback=True, unk_token="<unk>"))
    library.normalizer = normalizers.Replace(" ", "▁")
    library.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    library.train_from_iterator([SOURCE, *PROSE * 2], trainers.BpeTrainer(vocab_size=900, limit_alphabet=90, show_progress=False))
    learnt = sorted(library.get_vocab().items(), key=lambda pair: pair[1])
    joined = [name for name, _ in learnt if len(name) > 1] + ["▁" * n for n in (2, 3, 4, 8, 16)] + ["--", "----", "---", "aaa", "aba"]
    joined = [name for name in dict.fromkeys(joined) if not name.startswith("<0x") and name not in NAMES and not set(name) & set(BARE)]
    single = [name for name, _ in learnt if len(name) == 1 and name not in BARE]
    table = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256))]
    table += [(name, -float(rank), 1) for rank, name in enumerate(joined)]
    table += [(name, -float(len(joined) + rank), 1) for rank, name in enumerate(single)]
    return [*table, ("<|user|>", -1000.0, 4)]


@pytest.fixture
def written(random_model, tmp_path):
    """A file of a tiny Llama with these pieces. changes: keys -> values, None leaves one out; table: changes the pieces."""

    def make(table=lambda found: found, **changes) -> Path:
        found, file = table(pieces()), tmp_path / "m.gguf"
        c = replace(LLAMA, vocab_size=len(found), hidden_size=32, num_layers=1, num_dense_layers=1)
        writer = gguf.GGUFWriter(file, "llama")
        keys = {
            "llama.block_count": 1, "llama.context_length": 512, "llama.embedding_length": 32, "llama.feed_forward_length": 96,
            "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.attention.key_length": 16,
            "llama.attention.value_length": 16, "llama.rope.dimension_count": 16, "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "tokenizer.ggml.model": "llama", "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
        } | changes  # fmt: skip
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
        for key, value in keys.items():
            if value is not None:
                add[type(value)](key, value)
        writer.add_token_list([name for name, _, _ in found])
        writer.add_token_scores([score for _, score, _ in found])
        writer.add_token_types([kind for _, _, kind in found])
        state = random_model(c).state_dict()
        for one in gguf_tensors(c, ARCHITECTURES["llama"]):
            writer.add_tensor(one.name, one.make(state[one.ours]).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file

    return make


def scrambled(seed: int) -> list[str]:
    """Texts of few characters, in which neighbours can be joined in many ways."""
    draw = random.Random(seed)
    return ["".join(draw.choice(" aab-=.\n") for _ in range(draw.randint(1, 60))) for _ in range(150)]


@pytest.mark.parametrize("prefix", [None, True, False])
def test_tokens_are_llama_cpps(prefix, written):
    pytest.importorskip("xllamacpp")
    file = written(**{"tokenizer.ggml.add_space_prefix": prefix})
    found = read_gguf(file)
    tokenizer = Tokenizer(found.tokenizer, found.tokens)
    assert found.tokens == TokensConfig(1, True, (2,)) and tokenizer.special == {"<unk>": 0, "<s>": 1, "</s>": 2}
    texts = PROSE + scrambled(1)
    for text, theirs in zip(texts, ggml.token_ids(str(file), texts), strict=True):
        if any(name in text for name in tokenizer.special):
            # llama.cpp joins pieces of ordinary text to the name of a special token; here a message can't forge one.
            assert not set(tokenizer.encode(text)) & set(tokenizer.special.values())
            assert tokenizer.decode(tokenizer.encode(text)) == text or "<|user|>" in text
            continue
        assert tokenizer.encode(text) == theirs, text[:60]
        if "▁" not in text and "<|user|>" not in text:
            assert tokenizer.decode(theirs) == text
            assert b"".join(map(tokenizer.token_bytes, theirs)).decode() == (" " if prefix is not False and text else "") + text


def test_text_that_goes_on_gets_no_blank(written):
    found = read_gguf(written())
    tokenizer = Tokenizer(found.tokenizer, found.tokens)
    first, rest = tokenizer.encode("the prompt"), tokenizer.encode(" of the text", goes_on=True)
    assert tokenizer.decode([*first, *rest]) == "the prompt of the text" and tokenizer.decode(rest, goes_on=True) == " of the text"
    assert tokenizer.encode("of", goes_on=True) != tokenizer.encode("of")
    assert not set(tokenizer.encode("<s>", goes_on=True)) & set(tokenizer.special.values())


def test_an_imported_run_reads_and_writes(written, tmp_path):
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    file = written(**{"tokenizer.chat_template": template})
    api.import_(str(file), str(tmp_path / "run"))
    made = api.generate(str(tmp_path / "run"), "The text", 8, temperature=0)
    assert made["tokens"] > 0
    tokenizer = Tokenizer.load(tmp_path / "run/tokenizer.json", read_gguf(file).tokens)
    prompt = ChatTemplate(template).encode(tokenizer, [{"role": "user", "content": "</s> is a name"}])
    assert prompt.count(2) == 1, "what a message says is no special token"


@pytest.mark.parametrize("prefix", [True, False])
def test_a_file_that_is_written_again_has_the_same_tokens(prefix, written, tmp_path):
    pytest.importorskip("xllamacpp")
    file = written(**{"tokenizer.ggml.add_space_prefix": prefix})
    api.import_(str(file), str(tmp_path / "run"))
    api.export(str(tmp_path / "run"), "gguf", str(tmp_path / "again.gguf"), type="f32")
    texts = PROSE + scrambled(2)
    assert ggml.token_ids(str(tmp_path / "again.gguf"), texts) == ggml.token_ids(str(file), texts)
    first, again = read_gguf(file), read_gguf(tmp_path / "again.gguf")
    assert again.tokens == first.tokens and json.loads(again.tokenizer) == json.loads(first.tokenizer)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw["model"]["merges"].pop(), "made in every way there is"),
        (lambda raw: raw["model"]["merges"].insert(0, raw["model"]["merges"].pop()), "made in every way there is"),
        (lambda raw: raw.update(normalizer={"type": "NFKC"}), "this tokenizer changes texts otherwise"),
    ],
)
def test_pieces_that_no_scores_can_say_are_not_exported(change, says, written, tmp_path):
    api.import_(str(written()), str(tmp_path / "run"))
    raw = json.loads((tmp_path / "run/tokenizer.json").read_text())
    change(raw)
    (tmp_path / "run/tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=says) as error:
        api.export(str(tmp_path / "run"), "gguf", str(tmp_path / "again.gguf"), type="f32")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "table", "says"),
    [
        ({"tokenizer.ggml.precompiled_charsmap": "x"}, None, "precompiled_charsmap is not known in a tokenizer of pieces"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, None, "tokenizer.ggml.pre is 'llama-bpe' in a tokenizer of pieces"),
        ({"tokenizer.ggml.add_space_prefix": 1}, None, "add_space_prefix is 1, expected true or false"),
        ({"tokenizer.ggml.model": "t5"}, None, "tokenizer.ggml.model is 't5', supported: 'gpt2' .* and 'llama'"),
        ({}, lambda found: [one for one in found if one[0] != "<0x41>"], "the token <0x41> is missing"),
        ({}, lambda found: [(name, np.nan, kind) for name, _, kind in found], "scores is no list with a number for each token"),
        ({}, lambda found: [(name, 0.0, kind) for name, _, kind in found], "have the same score: which of them is made first"),
        ({}, lambda found: [*found, ("\n\n", -1e6, 1)], r"the piece '\\n\\n' has a character that is no piece"),
        ({}, lambda found: [(name, score, 9 if name == "</s>" else kind) for name, score, kind in found], "is of the kind 9"),
    ],
)
def test_what_is_not_understood_is_one_line(changes, table, says, written):
    with pytest.raises(UserError, match=says) as error:
        read_gguf(written(table or (lambda found: found), **changes))
    assert "\n" not in str(error.value)
