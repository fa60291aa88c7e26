"""The tokenizer in a GGUF file, as a tokenizer.json: byte-level BPE whose pre-tokeniser is known by llama.cpp's name for it.

A pre-tokeniser decides where text is cut before bytes are merged. A wrong one gives other tokens without any warning, so only names that
`gguf.PRE_TOKENIZERS` knows are read. Token ids are llama.cpp's (llama.cpp's src/llama-vocab.cpp): it composes no characters (NFC) first.
"""

from __future__ import annotations

import json

import numpy as np

from sparing.base.config import TokensConfig, UserError
from sparing.base.config_file import nearest
from sparing.data.tokenizer import Tokenizer
from sparing.interop.gguf import PRE_TOKENIZERS, WHOLE_WORDS
from sparing.interop.gguf_reader import GgufFile

SAME_CUTS = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "phi-2": "gpt-2",
}  # fmt: skip
"""Other names of llama.cpp's for the same cuts."""
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of tokens that are read (gguf.TokenType)."""
WITH_BOS = ("llama-bpe",)
"""Pre-tokenisers whose files begin texts with the beginning token unless they say otherwise."""


def read_tokenizer(file: GgufFile, vocab_size: int) -> tuple[str, TokensConfig, str | None, list[str]]:
    """-> (tokenizer.json, what begins and ends a text, chat template, notes). Raises UserError for tokenizers that are not read."""
    get, fail = file.metadata.get, lambda message: UserError(f"{file.path}: {message}")
    kind, pre = get("tokenizer.ggml.model"), get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise fail(f"tokenizer.ggml.model is {kind!r}, supported: 'gpt2' (byte-level BPE); import the model's Hugging Face folder instead")
    pre = SAME_CUTS.get(pre, pre) if isinstance(pre, str) else pre
    if pre not in PRE_TOKENIZERS:
        known = sorted({*PRE_TOKENIZERS, *SAME_CUTS})
        hint = f"; nearest: {nearest(pre, known)}" if isinstance(pre, str) else ""
        raise fail(f"tokenizer.ggml.pre is {pre!r}, known are {', '.join(known)}{hint}; another one would cut text into other tokens")
    names, merges = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.merges")
    kinds = get("tokenizer.ggml.token_type")
    kinds = np.full(len(names or ()), NORMAL) if kinds is None else kinds
    for key, value in (("tokens", names), ("merges", merges)):
        if not isinstance(value, list) or not value:
            raise fail(f"tokenizer.ggml.{key} is no list of texts")
    if not isinstance(kinds, np.ndarray) or len(kinds) != len(names) or len(names) > vocab_size:
        raise fail(f"has {len(names):,} tokens and {len(kinds):,} kinds of them for a vocabulary of {vocab_size:,}")
    vocabulary: dict[str, int] = {}
    added = []
    for number, (name, kind) in enumerate(zip(names, kinds.tolist(), strict=True)):
        if kind == UNUSED:
            continue
        if kind not in (NORMAL, CONTROL, USER_DEFINED):
            raise fail(f"token {number} ({name!r}) is of the kind {kind}, which byte-level BPE does not have")
        if name in vocabulary or not name:
            raise fail(f"token {number} ({name!r}) is {'there twice' if name else 'empty'}: the file is damaged")
        vocabulary[name] = number
        if kind != NORMAL:
            added.append(_added(number, name, kind == CONTROL))
    raw = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": _cutting(PRE_TOKENIZERS[pre]),
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": pre in WHOLE_WORDS, "vocab": vocabulary,
            "merges": [_merge(merge, vocabulary, fail) for merge in merges],
        },
    }  # fmt: skip
    text = json.dumps(raw, ensure_ascii=False)
    tokens, notes = _ends(file, text, pre, vocabulary)
    chat = get("tokenizer.chat_template")
    if chat is not None and not isinstance(chat, str):
        raise fail("tokenizer.chat_template is no text")
    return text, tokens, chat, notes


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


def _ends(file: GgufFile, text: str, pre: str, vocabulary: dict[str, int]) -> tuple[TokensConfig, list[str]]:
    """-> (what begins and ends a text, notes)."""
    notes, numbers = [], {}
    for key in ("bos", "eos", "eot", "eom"):
        number = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is None or number == 0xFFFFFFFF:  # -1: none
            continue
        if type(number) is not int or number not in vocabulary.values():
            notes.append(f"tokenizer.ggml.{key}_token_id {number} is no token of this model: left out")
            continue
        numbers[key] = number
    add_bos = bool(file.metadata.get("tokenizer.ggml.add_bos_token", pre in WITH_BOS)) and "bos" in numbers
    if file.metadata.get("tokenizer.ggml.add_eos_token"):
        notes.append("the file asks for an end token behind every text (add_eos_token): it is put where a text ends, not behind a prompt")
    eos = [numbers[key] for key in ("eos", "eot", "eom") if key in numbers]
    tokens = TokensConfig(numbers.get("bos"), add_bos, tuple(dict.fromkeys(eos)))
    try:
        ends = Tokenizer(text, tokens).named_ends
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from None
    return TokensConfig(tokens.bos, tokens.add_bos, tuple(dict.fromkeys([*eos, *ends]))), notes
