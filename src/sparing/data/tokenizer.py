"""The byte-level BPE tokenizer: trained on a sample of the corpus, fast on ordinary text, saved as the `tokenizers` library's JSON."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from sparing.base.config import TokensConfig, UserError
from sparing.base.files import read_text, write_atomic
from sparing.data.progress import check, result_of

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
MIN_VOCAB = 256 + len(SPECIAL_TOKENS)
MAX_FILE_BYTES = 64 << 20
MAX_CACHED_WORDS = 200_000
LONG = 1 << 16
"""Characters, or tokens: more are taken in pieces, or left to those functions of the library that release Python's lock (for batches)."""
TRAINED_WORD = 128
"""Characters. For training the tokenizer, longer words are cut: a merge takes time with the length of each word that it is in, and text
without blanks (DNA, CJK on one line) is one word of 64 kB after the other."""
TRAINED_BYTES = 1_000_000
"""Of different words, after which training the tokenizer reads no more: it takes time with them. 10 MB of source code have a third of that;
in text without blanks no word comes twice."""

# Qwen2's pre-tokenisation (its tokenizer.json, Apache-2.0; llama.cpp knows it as "qwen2"): words with one leading character, digits singly,
# punctuation, line ends, blanks.
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The same for Python's `re`, over characters whose classes never change: ASCII, Latin-1 (0xb5, 0xdf ... letters), Latin Extended-A/B,
# general punctuation. The long s is left out (it folds to "s"), control characters 0x1c-0x1f and 0x85 too (opinions on blanks differ).
_L = "A-Za-z\u00aa\u00b5\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f"
_N = "0-9\u00b2\u00b3\u00b9\u00bc-\u00be"
_S = "\t-\r \u00a0"
_WORDS = re.compile(
    rf"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\r\n{_L}{_N}]?[{_L}]+|[{_N}]| ?[^{_S}{_L}{_N}]+[\r\n]*"
    rf"|[{_S}]*[\r\n]+|[{_S}]+(?![^{_S}])|[{_S}]+"
)
_OTHER = re.compile("[^\t-\r -~\u00a0-\u017e\u0180-\u024f\u2010-\u2027\u2030-\u205e]")
_LONG = re.compile(rf"[^\W\d_]{{{TRAINED_WORD + 1},}}|(?:[^\w\s]|_){{{TRAINED_WORD + 1},}}|\s{{{TRAINED_WORD + 1},}}")
"""Letters, signs, blanks: what PATTERN makes one word of."""
_LETTERS = re.compile(r"[^\W\d_]+")
_LINES = re.compile(r"(?<=\n)(?=\S)")
_EOT_NAMES = (END_OF_TEXT, "<｜end▁of▁sentence｜>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "</s>", "<eos>", "<|end|>")
END_NAMES = ("<|end|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end_of_text|>", "<｜end▁of▁sentence｜>")
"""Tokens that end a chat turn. Like the end-of-text token they end an answer."""


BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
"""Sentencepiece's name of a byte that is in no piece."""

# GPT-2's alphabet: printable bytes stand for themselves, the others, in order, for U+0100 and on (github.com/openai/gpt-2, encoder.py).
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = {chr(byte): byte for byte in _PRINTABLE}
_BYTES |= {chr(0x100 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)}


class Tokenizer:
    """A tokenizer.json of the `tokenizers` library, with what training and serving need around it."""

    def __init__(self, text: str, tokens: TokensConfig | None = None):
        """text: the content of a tokenizer.json. tokens: what begins and ends a text; None: what the names of its tokens say.

        Raises UserError when it is no tokenizer.json, has no end-of-text token, or lacks one of `tokens`.
        """
        try:
            self._library = tokenizers.Tokenizer.from_str(text)
            content = json.loads(text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"not a tokenizer.json of the `tokenizers` library: {str(error).splitlines()[0][:200]}") from None
        self._text = text
        self._byte_level = (content.get("decoder") or {}).get("type") == "ByteLevel"
        self._pieces = bool((content.get("model") or {}).get("byte_fallback"))
        bare = _without_prefix(content)
        self._bare = self._library if bare is None else tokenizers.Tokenizer.from_str(json.dumps(bare))
        """The same for text that goes on from other text, before which no blank is put."""
        for library in (self._library, self._bare):
            library.no_padding()
            library.no_truncation()
            library.encode_special_tokens = True  # means: as ordinary text
        self.vocab_size: int = 1 + max(self._library.get_vocab(with_added_tokens=True).values(), default=-1)
        """One more than the largest id; a model's vocabulary may be larger."""
        for number in () if tokens is None else (tokens.bos, *tokens.eos):
            if number is not None and self._library.id_to_token(number) is None:
                raise UserError(f"the tokenizer has no token {number}, which [tokens] names; its ids end at {self.vocab_size - 1}")
        ids = (self._library.token_to_id(name) for name in _EOT_NAMES)
        found = next((number for number in ids if number is not None), tokens.eos[0] if tokens and tokens.eos else None)
        if found is None:
            raise UserError(f"the tokenizer has no end-of-text token: none of {', '.join(_EOT_NAMES)}")
        self.eot_id: int = found
        """Stands between documents."""
        ends = (self._library.token_to_id(name) for name in END_NAMES)
        self.named_ends: tuple[int, ...] = tuple(dict.fromkeys([found, *(number for number in ends if number is not None)]))
        """The tokens whose names say that they end an answer."""
        tokens = TokensConfig(found, True, self.named_ends) if tokens is None else tokens
        self.bos_id: int | None = tokens.bos
        self.eos_ids: tuple[int, ...] = tokens.eos or self.named_ends
        """Each ends an answer; the first is the tokenizer's own end token."""
        self.start: list[int] = [tokens.bos] if tokens.add_bos and tokens.bos is not None else []
        """What a prompt begins with."""
        self.first_id: int = self.start[0] if self.start else found
        """What a document begins with in training and scoring, where something has to stand before the first word."""
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        """Smallest unsigned type that holds every id."""
        self.special: dict[str, int] = {token["content"]: token["id"] for token in content.get("added_tokens", []) if token.get("special")}
        """Names and ids of the tokens that stand for no text."""
        self._words = _WordCache(self._library, self.dtype) if _is_ours(content) else None

    def encode(self, text: str, goes_on: bool = False) -> list[int]:
        """Token ids. Names of special tokens in the text are ordinary text. Meanwhile other threads go on.

        goes_on: from text before it, so that a tokenizer which puts a blank before the first word puts none."""
        if goes_on and self._bare is not self._library:
            return self._bare.encode_batch_fast([text], add_special_tokens=False)[0].ids
        if len(text) <= LONG:
            return self.encode_array(text).tolist()
        ids: list[int] = []
        for piece in [text] if self._words is None else _pieces(text):
            if len(piece) > 2 * LONG:
                ids += self._library.encode_batch_fast([piece], add_special_tokens=False)[0].ids
            else:
                ids += self.encode_array(piece).tolist()
        return ids

    def encode_array(self, text: str) -> np.ndarray:
        """Like `encode`, as an array of `dtype`. Ordinary words are looked up, the rest goes through the library; same ids."""
        if self._words is None:
            return self._by_library(text)
        if _OTHER.search(text) is None:
            return self._lookup(text)
        parts, run, usual = [], [], True
        for line in _LINES.split(text):
            if (_OTHER.search(line) is None) != usual:
                if run:
                    parts.append(self._lookup("".join(run)) if usual else self._by_library("".join(run)))
                run, usual = [], not usual
            run.append(line)
        parts.append(self._lookup("".join(run)) if usual else self._by_library("".join(run)))
        return np.concatenate(parts)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, with what the model's texts begin with; never empty."""
        return [*self.start, *self.encode(text)] or [self.first_id]

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = False, goes_on: bool = False) -> str:
        """Text; bytes that are not UTF-8 (a token cut in the middle of a character) become U+FFFD.

        goes_on: from tokens before these, so that a tokenizer which takes a blank off the first word takes none."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        library = self._bare if goes_on else self._library
        if len(ids) > LONG:
            return library.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0]
        return library.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, number: int) -> bytes:
        """The bytes that one token stands for; its name where it is special, nothing where there is none."""
        name = self._library.id_to_token(number) or ""
        if self._pieces and (byte := BYTE_PIECE.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        if name in self.special or not self._byte_level:
            return self.decode([number], goes_on=True).encode()
        return bytes(_BYTES[char] for char in name if char in _BYTES)

    def token_name(self, number: int) -> str | None:
        return self._library.id_to_token(number)

    def bytes_per_token(self, texts: Iterable[str]) -> float:
        """UTF-8 bytes per token over the texts, end-of-text tokens (one a text) counted."""
        size = tokens = 0
        for text in texts:
            size += len(text.encode())
            tokens += len(self.encode_array(text)) + 1
        return size / max(1, tokens)

    def to_json(self) -> str:
        return self._text

    def save(self, path: str | Path) -> None:
        """All of it or nothing."""
        write_atomic(path, self._text)

    @classmethod
    def load(cls, path: str | Path, tokens: TokensConfig | None = None) -> Tokenizer:
        """From a tokenizer.json or the folder that holds one. Raises UserError."""
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.exists():
            raise UserError(f"no tokenizer: {path} does not exist")
        text = read_text(path, limit=MAX_FILE_BYTES)
        try:
            return cls(text, tokens)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def _by_library(self, text: str) -> np.ndarray:
        return np.array(self._library.encode(text, add_special_tokens=False).ids, self.dtype)

    def _lookup(self, text: str) -> np.ndarray:
        if len(self._words) > MAX_CACHED_WORDS:
            self._words.clear()
        return np.frombuffer(b"".join(map(self._words.__getitem__, _WORDS.findall(text))), self.dtype)


def _pieces(text: str) -> Iterator[str]:
    """The text in whole lines, about LONG characters at a time: their ids are those of the whole text."""
    lines, size = [], 0
    for line in _LINES.split(text):
        if lines and size + len(line) > LONG:
            yield "".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    yield "".join(lines)


class _WordCache(dict):
    """Word -> the bytes of its ids. Words repeat so much that this is three to five times as fast as the library alone."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, dtype: np.dtype):
        super().__init__()
        self._tokenizer, self._dtype = tokenizer, dtype

    def __missing__(self, word: str) -> bytes:
        ids = np.array(self._tokenizer.encode(word, add_special_tokens=False).ids, self._dtype).tobytes()
        if len(word) <= 64:
            self[word] = ids
        return ids


def train_tokenizer(texts: Iterable[str], vocab_size: int, should_stop: Callable[[], bool] | None = None) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` entries (a small sample may not fill it: see `Tokenizer.vocab_size`).

    Ids 0-4 are SPECIAL_TOKENS, end of text first, then the 256 bytes. The result depends on the texts only, not on threads, nor on their
    order unless they have more than TRAINED_BYTES of different words. Raises UserError for a vocabulary that cannot hold the bytes, Stopped
    when asked to.
    """
    if vocab_size < MIN_VOCAB:
        raise UserError(f"vocabulary of {vocab_size}: at least {MIN_VOCAB} are needed (256 bytes and {len(SPECIAL_TOKENS)} special tokens)")

    def watched():
        tokens, words, size = set(), set(), 0
        for text in texts:
            for piece in _without_long_words(text):
                check(should_stop)
                yield piece
                fresh = set(piece.split()) - tokens
                tokens |= fresh
                different = set(_LETTERS.findall(" ".join(fresh))) - words
                words |= different
                size += sum(len(word.encode()) for word in different)
                if size > TRAINED_BYTES:
                    return

    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = _pre_tokenizer()
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    # The library cannot be interrupted: a thread waits for it, and is left behind when it is no longer wanted.
    ended: Future = Future()

    def work() -> None:
        try:
            ended.set_result(inner.train_from_iterator(watched(), trainer))
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=work, daemon=True, name="tokenizer").start()
    result_of(ended, should_stop)
    return Tokenizer(inner.to_str())


def _without_long_words(text: str) -> Iterator[str]:
    """The text in pieces, cut only inside words that are longer than TRAINED_WORD."""
    start = 0
    for word in _LONG.finditer(text):
        for cut in range(word.start() + TRAINED_WORD, word.end(), TRAINED_WORD):
            yield text[start:cut]
            start = cut
    yield text[start:]


def _is_ours(content: dict) -> bool:
    """Whether words can be looked up: our pre-tokenisation, nothing before it, and the same word always the same ids."""
    return (
        content.get("normalizer") is None
        and content.get("pre_tokenizer") == json.loads(_pre_tokenizer().__getstate__())
        and content["model"].get("type") == "BPE"
        and not content["model"].get("dropout")
        and all(token.get("special") for token in content.get("added_tokens", []))
    )


def _without_prefix(content: dict) -> dict | None:
    """A tokenizer.json like this one that neither puts a blank before a text nor takes one off; None: it does not."""
    normalizer, cuts, decoder = (content.get(name) or {} for name in ("normalizer", "pre_tokenizer", "decoder"))
    steps = normalizer.get("normalizers") or [normalizer]
    kept = [step for step in steps if step.get("type") != "Prepend"]
    blank = cuts.get("type") == "Metaspace" and cuts.get("prepend_scheme", "always") != "never"
    if len(kept) == len(steps) and not blank:
        return None
    bare = content | {"normalizer": {"type": "Sequence", "normalizers": kept} if normalizer and kept else None}
    if blank:
        bare["pre_tokenizer"] = cuts | {"prepend_scheme": "never"}
    if decoder.get("type") == "Metaspace":
        bare["decoder"] = decoder | {"prepend_scheme": "never"}
    elif decoder.get("type") == "Sequence":
        bare["decoder"] = decoder | {"decoders": [step for step in decoder["decoders"] if step.get("type") != "Strip"]}
    return bare


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)])
