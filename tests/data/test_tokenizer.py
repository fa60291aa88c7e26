import json
import math
import random
import sysconfig
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.base.config import UserError
from sparing.data import tokenizer as module
from sparing.data.progress import Stopped
from sparing.data.tokenizer import END_OF_TEXT, MIN_VOCAB, SPECIAL_TOKENS, Tokenizer, train_tokenizer

bounded = settings(deadline=None, max_examples=300, derandomize=True)
anything = st.text(st.characters(exclude_categories=("Cs",)), max_size=200)
# Blanks, line ends, apostrophes and marks are where two regular expressions would part.
usual = st.text(st.sampled_from(" \t\n\r\v\f'’.,_-+(){}sStTdDmMrReEvVlLaxZ019éßµªÿſĀɏ\u00a0\u00ad“—€²½ÀI"), max_size=80)


@bounded
@given(anything | usual)
def test_round_trip(trained, text):
    assert trained.decode(trained.encode(text)) == text


@bounded
@given(anything | usual)
def test_looked_up_words_give_the_library_s_ids(trained, text):
    assert trained.encode_array(text).tolist() == trained._library.encode(text, add_special_tokens=False).ids


def test_long_texts_give_the_same_ids(trained, monkeypatch):
    text = "Naïve words, 123 🙂 <|end|>\n\n  \tcode()  " * 5
    ids = trained.encode(text)
    for size in (1, 3, 10, 25, 50):  # lines longer and shorter than that
        monkeypatch.setattr("sparing.data.tokenizer.LONG", size)
        assert trained.encode(text) == ids and trained.decode(ids) == text
    special = [trained.eot_id, *ids]
    assert trained.decode(special, skip_special_tokens=True) == text and trained.decode(special) == "<|endoftext|>" + text


def test_every_usual_character_is_classed_as_the_library_does(trained):
    usual = [chr(code) for code in range(0x3000) if not module._OTHER.search(chr(code))]
    assert len(usual) > 600
    for character in usual:
        for text in (f"a{character}b", f" {character}1", f"'{character} {character}", f"\n{character}\n  {character}"):
            assert trained.encode(text) == trained._library.encode(text, add_special_tokens=False).ids, repr(text)


def test_real_source_code_gives_the_library_s_ids(trained):
    root = Path(sysconfig.get_path("stdlib"))
    for name in ("argparse.py", "json/decoder.py", "re/_parser.py", "html/entities.py", "email/header.py"):
        path = root / name
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert np.array_equal(trained.encode_array(text), trained._by_library(text))


def test_special_tokens_come_first_and_are_plain_text_inside_text(trained):
    assert [trained.token_name(number) for number in range(len(SPECIAL_TOKENS))] == list(SPECIAL_TOKENS) and trained.eot_id == 0
    for token in SPECIAL_TOKENS:
        text = f"a{token} b 漢{token}"
        assert min(trained.encode(text)) > 4 and trained.decode(trained.encode(text)) == text
    ids = [2, *trained.encode("hi"), 4]
    assert trained.decode(ids) == "<|user|>hi<|end|>" and trained.decode(ids, skip_special_tokens=True) == "hi"


def test_digits_are_single(trained):
    assert len(trained.encode("2026")) == 4


def test_it_is_what_llama_cpp_calls_qwen2(trained):
    content = json.loads(trained.to_json())
    split, level = content["pre_tokenizer"]["pretokenizers"]
    assert split["pattern"]["Regex"] == module.PATTERN and "\\p{N}|" in module.PATTERN and level["use_regex"] is False
    assert content["normalizer"] is None and content["decoder"]["type"] == "ByteLevel"


def test_training_is_deterministic_and_ignores_order(texts, trained):
    assert train_tokenizer(reversed(texts), 400).to_json() == trained.to_json()


def test_vocabulary_sizes(texts, trained):
    assert trained.vocab_size == 400 and trained.dtype == np.uint16
    small = train_tokenizer(["ab ab ab"], 5000)
    assert MIN_VOCAB <= small.vocab_size < MIN_VOCAB + 5  # what there is, no more
    assert small.decode(small.encode("日本 any text")) == "日本 any text"
    assert train_tokenizer(texts, MIN_VOCAB).vocab_size == MIN_VOCAB
    with pytest.raises(UserError, match=f"at least {MIN_VOCAB}"):
        train_tokenizer(texts, MIN_VOCAB - 1)


def test_merging_helps_and_is_measured(trained, texts):
    size, tokens = sum(len(text.encode()) for text in texts), sum(len(trained.encode(text)) + 1 for text in texts)
    assert trained.bytes_per_token(texts) == pytest.approx(size / tokens) and size / tokens > 2


def test_training_stops_when_asked_while_reading_and_while_merging(texts):
    with pytest.raises(Stopped):
        train_tokenizer(iter(lambda: texts[0], None), 400, lambda: True)
    rng = random.Random(0)
    long = [" ".join("".join(rng.choices("abcdefgh", k=12)) for _ in range(1000)) for _ in range(30)]
    read = threading.Event()

    def texts_then_note():
        yield from long
        read.set()

    with pytest.raises(Stopped):
        train_tokenizer(texts_then_note(), 20_000, lambda: threading.current_thread() is threading.main_thread() and read.is_set())
    still_merging = [thread for thread in threading.enumerate() if thread.name == "tokenizer"]
    assert still_merging
    for thread in still_merging:
        thread.join()


def test_save_and_load(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert Tokenizer.load(path).encode("naïve <|user|>") == trained.encode("naïve <|user|>")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_bad_files_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no tokenizer: .*does not exist"):
        Tokenizer.load(tmp_path / "none.json")
    for raw in (b"{}", b"not json", b"\xff", b'{"model": {"type": "BPE"}}'):
        (tmp_path / "bad.json").write_bytes(raw)
        with pytest.raises(UserError, match=r"bad\.json") as error:
            Tokenizer.load(tmp_path / "bad.json")
        assert "\n" not in str(error.value)
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 10)
    (tmp_path / "bad.json").write_bytes(b" " * 100)
    with pytest.raises(UserError, match="larger than"):
        Tokenizer.load(tmp_path / "bad.json")


def test_other_tokenizers_work_through_the_library(tmp_path):
    import tokenizers

    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(["</s>"])
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    inner.enable_truncation(2)
    loaded = Tokenizer(inner.to_str())
    assert loaded.encode("a b b a") == [1, 2, 2, 1] and loaded.eot_id == 0 and loaded.vocab_size == 4
    with pytest.raises(UserError, match="no end-of-text token"):
        Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?")).to_str())


def test_the_word_cache_is_bounded(trained, monkeypatch):
    monkeypatch.setattr(module, "MAX_CACHED_WORDS", 10)
    fresh = Tokenizer(trained.to_json())
    for start in range(0, 1000, 5):
        text = " ".join("x" * (start + more) for more in range(5))
        assert fresh.decode(fresh.encode(text)) == text
        assert len(fresh._words) < 20
    assert END_OF_TEXT not in fresh._words


@pytest.mark.parametrize("word", ["ACGT" * 1000, "語" * 5000, "=" * 3000, " " * 2000, "a_" * 10, "ab" * 128])
def test_only_words_that_are_too_long_are_cut_for_training(word):
    text = f"an ordinary line of 100 words\n{word} and the rest."
    pieces = list(module._without_long_words(text))
    assert "".join(pieces) == text
    assert (len(pieces) > 1) == (len(word) > module.TRAINED_WORD)
    assert all(len(piece) <= module.TRAINED_WORD for piece in pieces[1:-1])


def test_ordinary_text_gives_the_tokenizer_that_it_gave(texts, trained, monkeypatch):
    monkeypatch.setattr(module, "_without_long_words", lambda text: [text])
    monkeypatch.setattr(module, "TRAINED_BYTES", math.inf)
    assert train_tokenizer(texts, 400).to_json() == trained.to_json()


def test_training_reads_no_more_once_it_has_seen_enough_different_words(texts, monkeypatch):
    monkeypatch.setattr(module, "TRAINED_BYTES", 2000)
    read = []

    def reading():
        for text in texts[:3] * 5 + [f"{'y' * i}x " for i in range(400)]:
            read.append(text)
            yield text

    train_tokenizer(reading(), 300)
    assert 15 < len(read) < 120, "words that come again do not count"


@pytest.mark.parametrize("alphabet", ["ACGT", "".join(map(chr, range(0x4E00, 0x4E00 + 500)))], ids=["dna", "cjk"])
def test_text_without_blanks_takes_no_longer_than_the_same_text_in_lines(alphabet):
    """In processor time. Uncut, a merge's time grows with the square of a word's length: it took a hundred times as long."""
    rng = random.Random(0)
    sections = ["".join(rng.choices(alphabet, k=65536 // len(alphabet[-1].encode()))) for _ in range(8)]
    lines = ["\n".join(section[i : i + 60] for i in range(0, len(section), 60)) for section in sections]
    took = []
    for texts in (lines, sections):
        before = time.process_time()
        tokenizer = train_tokenizer(texts, 1024)
        took.append(time.process_time() - before)
    assert took[1] < 6 * took[0], took
    assert tokenizer.decode(tokenizer.encode(sections[0])) == sections[0]
