"""The tokenizer in a GGUF file, as a tokenizer.json: byte-level BPE ("gpt2"), or sentencepiece's BPE with a score for each piece ("llama").

A pre-tokeniser decides where text is cut before bytes are merged. A wrong one gives other tokens without any warning, so only names that
`gguf.PRE_TOKENIZERS` knows are read. Token ids are llama.cpp's (llama.cpp's src/llama-vocab.cpp): it composes no characters (NFC) first.

Sentencepiece's joins the two neighbours whose piece has the highest score, and what is no piece in the end is written in bytes. As a list
of merges that is each piece's every way to be made of two others, the best piece first.
"""

from __future__ import annotations

import json

import numpy as np

from sparing.base.config import TokensConfig, UserError
from sparing.base.config_file import nearest
from sparing.data.tokenizer import Tokenizer
from sparing.interop.gguf import BLANK, BLANKS, PRE_TOKENIZERS, PREFIX, WHOLE_WORDS, halves
from sparing.interop.gguf_reader import GgufFile

SAME_CUTS = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "phi-2": "gpt-2",
}  # fmt: skip
"""Other names of llama.cpp's for the same cuts."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens that are read (gguf.TokenType)."""
PIECES_KEYS = (
    "model", "pre", "tokens", "scores", "token_type", "merges", "bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id",
    "unknown_token_id", "padding_token_id", "seperator_token_id", "add_bos_token", "add_eos_token", "add_space_prefix",
    "remove_extra_whitespaces",
)  # fmt: skip
"""Keys that files with pieces may have below `tokenizer.ggml.`: llama.cpp reads the others for other kinds of tokenizers. Blanks are not
removed: llama.cpp leaves them, whatever the file says."""
WITH_BOS = ("llama-bpe",)
"""Pre-tokenisers whose files begin texts with the beginning token unless they say otherwise."""


def read_tokenizer(file: GgufFile, vocab_size: int) -> tuple[str, TokensConfig, str | None, list[str]]:
    """-> (tokenizer.json, what begins and ends a text, chat template, notes). Raises UserError for tokenizers that are not read."""
    get, fail = file.metadata.get, lambda message: UserError(f"{file.path}: {message}")
    kind, pre = get("tokenizer.ggml.model"), get("tokenizer.ggml.pre")
    if kind not in ("gpt2", "llama"):
        known = "'gpt2' (byte-level BPE) and 'llama' (sentencepiece's BPE)"
        raise fail(f"tokenizer.ggml.model is {kind!r}, supported: {known}; import the model's Hugging Face folder instead")
    if kind == "gpt2":
        raw, vocabulary = _bytes_merged(file, vocab_size, fail)
        starts = SAME_CUTS.get(pre, pre) in WITH_BOS
    else:
        raw, vocabulary = _pieces_joined(file, vocab_size, fail)
        starts = True
    text = json.dumps(raw, ensure_ascii=False)
    tokens, notes = _ends(file, text, starts, vocabulary)
    chat = get("tokenizer.chat_template")
    if chat is not None and not isinstance(chat, str):
        raise fail("tokenizer.chat_template is no text")
    return text, tokens, chat, notes


def _bytes_merged(file: GgufFile, vocab_size: int, fail) -> tuple[dict, dict[str, int]]:
    """-> (byte-level BPE, its vocabulary)."""
    pre = file.metadata.get("tokenizer.ggml.pre")
    pre = SAME_CUTS.get(pre, pre) if isinstance(pre, str) else pre
    if pre not in PRE_TOKENIZERS:
        known = sorted({*PRE_TOKENIZERS, *SAME_CUTS})
        hint = f"; nearest: {nearest(pre, known)}" if isinstance(pre, str) else ""
        raise fail(f"tokenizer.ggml.pre is {pre!r}, known are {', '.join(known)}{hint}; another one would cut text into other tokens")
    merges = _list(file, "merges", fail)
    vocabulary, added, _ = _vocabulary(file, vocab_size, (NORMAL, CONTROL, USER_DEFINED), "byte-level BPE", fail)
    model = {
        "ignore_merges": pre in WHOLE_WORDS, "vocab": vocabulary, "merges": [_merge(merge, vocabulary, fail) for merge in merges],
    }  # fmt: skip
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return _json(added, None, _cutting(PRE_TOKENIZERS[pre]), decoder, model), vocabulary


def _pieces_joined(file: GgufFile, vocab_size: int, fail) -> tuple[dict, dict[str, int]]:
    """-> (sentencepiece's BPE, its vocabulary)."""
    for key in file.metadata:
        inner = key.removeprefix("tokenizer.ggml.")
        if inner != key and inner not in PIECES_KEYS:
            raise fail(f"{key} is not known in a tokenizer of pieces; nearest that is: {nearest(inner, PIECES_KEYS)}")
    if (pre := file.metadata.get("tokenizer.ggml.pre", "default")) != "default":
        raise fail(f"tokenizer.ggml.pre is {pre!r} in a tokenizer of pieces, supported: 'default'")
    prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    if not isinstance(prefix, bool):
        raise fail(f"tokenizer.ggml.add_space_prefix is {prefix!r}, expected true or false")
    kinds_read = (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE)
    vocabulary, added, kinds = _vocabulary(file, vocab_size, kinds_read, "sentencepiece's BPE", fail)
    scores = file.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(kinds) or not np.isfinite(scores).all():
        raise fail("tokenizer.ggml.scores is no list with a number for each token")
    for byte in range(256):
        number = vocabulary.get(name := f"<0x{byte:02X}>")
        if number is None or kinds[number] != BYTE:
            raise fail(f"the token {name} is missing: what is no piece is written in bytes")
    unknown = next((name for name, number in vocabulary.items() if kinds[number] == UNKNOWN), None)
    pieces = {name: float(scores[number]) for name, number in vocabulary.items() if kinds[number] == NORMAL}
    made = sorted((name for name in pieces if len(name) > 1), key=pieces.__getitem__, reverse=True)
    merges, taken = [], {}
    for name in made:
        ways = halves(name, pieces)
        if not all(character in pieces for character in name):
            raise fail(f"the piece {name!r} has a character that is no piece: how it is joined is not known here")
        if ways and (other := taken.setdefault(pieces[name], name)) != name:
            raise fail(f"the pieces {other!r} and {name!r} have the same score: which of them is made first is not known here")
        merges += ways
    steps = [PREFIX, BLANKS] if prefix else [BLANKS]
    undone: list[dict] = [{"type": "Replace", "pattern": {"String": BLANK}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    undone += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    model = {
        "unk_token": unknown, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": vocabulary,
        "merges": [list(way) for way in merges],
    }  # fmt: skip
    return _json(added, {"type": "Sequence", "normalizers": steps}, None, {"type": "Sequence", "decoders": undone}, model), vocabulary


def _list(file: GgufFile, key: str, fail) -> list[str]:
    value = file.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or not value:
        raise fail(f"tokenizer.ggml.{key} is no list of texts")
    return value


def _vocabulary(file: GgufFile, vocab_size: int, read: tuple, kind_of: str, fail) -> tuple[dict[str, int], list[dict], np.ndarray]:
    """-> (name -> number, added_tokens of a tokenizer.json, each token's kind). read: kinds of tokens that the tokenizer has."""
    names = _list(file, "tokens", fail)
    kinds = file.metadata.get("tokenizer.ggml.token_type")
    kinds = np.full(len(names), NORMAL) if kinds is None else kinds
    if not isinstance(kinds, np.ndarray) or len(kinds) != len(names) or len(names) > vocab_size:
        raise fail(f"has {len(names):,} tokens and {len(kinds):,} kinds of them for a vocabulary of {vocab_size:,}")
    vocabulary: dict[str, int] = {}
    added = []
    for number, (name, kind) in enumerate(zip(names, kinds.tolist(), strict=True)):
        if kind == UNUSED:
            continue
        if kind not in read:
            raise fail(f"token {number} ({name!r}) is of the kind {kind}, which {kind_of} does not have")
        if name in vocabulary or not name:
            raise fail(f"token {number} ({name!r}) is {'there twice' if name else 'empty'}: the file is damaged")
        vocabulary[name] = number
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            added.append(_added(number, name, kind != USER_DEFINED))
    return vocabulary, added, kinds


def _json(added: list[dict], normalizer: dict | None, cuts: dict | None, decoder: dict, model: dict) -> dict:
    """The content of a tokenizer.json with a BPE. model: what is not as usual."""
    usual = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False,
    }  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": cuts,
        "post_processor": None,
        "decoder": decoder,
        "model": usual | model,
    }


def _added(number: int, name: str, special: bool) -> dict:
    return {
        "id": number, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special,
    }  # fmt: skip


def _cutting(expressions: tuple[str, ...]) -> dict:
    """A pre-tokeniser that makes each match of each expression, one after the other, a word of its own."""
    steps: list[dict] = [{"type": "Split", "pattern": {"Regex": one}, "behavior": "Isolated", "invert": False} for one in expressions]
    return {
        "type": "Sequence",
        "pretokenizers": [*steps, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}],
    }


def _merge(merge: str, vocabulary: dict[str, int], fail) -> list[str]:
    parts = merge.split(" ")
    if len(parts) != 2 or not all(part in vocabulary for part in (*parts, "".join(parts))):
        raise fail(f"the merge {merge[:80]!r} does not join two tokens into a third: the file is damaged")
    return parts


def _ends(file: GgufFile, text: str, starts: bool, vocabulary: dict[str, int]) -> tuple[TokensConfig, list[str]]:
    """-> (what begins and ends a text, notes). starts: whether texts have a beginning token where the file does not say."""
    notes, numbers = [], {}
    for key in ("bos", "eos", "eot", "eom"):
        number = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is None or number == 0xFFFFFFFF:  # -1: none
            continue
        if type(number) is not int or number not in vocabulary.values():
            notes.append(f"tokenizer.ggml.{key}_token_id {number} is no token of this model: left out")
            continue
        numbers[key] = number
    add_bos = bool(file.metadata.get("tokenizer.ggml.add_bos_token", starts)) and "bos" in numbers
    if file.metadata.get("tokenizer.ggml.add_eos_token"):
        notes.append("the file asks for an end token behind every text (add_eos_token): it is put where a text ends, not behind a prompt")
    eos = [numbers[key] for key in ("eos", "eot", "eom") if key in numbers]
    tokens = TokensConfig(numbers.get("bos"), add_bos, tuple(dict.fromkeys(eos)))
    try:
        ends = Tokenizer(text, tokens).named_ends
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from None
    return TokensConfig(tokens.bos, tokens.add_bos, tuple(dict.fromkeys([*eos, *ends]))), notes
