"""The tokenizer of a Hugging Face folder in and out, with the tokens that begin and end a text.

Five files of a folder name those tokens. What begins a text is what tokenizer.json's post-processor puts before it: transformers 5 goes by
that alone. Where it puts nothing there, tokenizer_config.json's `add_bos_token` counts, by which transformers 4 and llama.cpp's converter
go: DeepSeek-V3's and Llama's first folders say it there. What ends a text is each `eos_token_id` of generation_config.json, or else of
config.json. `read_tokens` reads them so, and `tokenizer_files` writes them all alike.
"""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path

import tokenizers

from sparing.base.config import ModelConfig, TokensConfig, UserError
from sparing.base.files import POINTER, is_pointer, read_text
from sparing.data.tokenizer import MAX_FILE_BYTES, Tokenizer
from sparing.interop.hf_config import read_json


def read_tokens(folder: Path, config: ModelConfig) -> tuple[TokensConfig, list[str]]:
    """-> (what begins and ends the texts of the model in `folder`, notes for the user).

    Raises UserError for files that cannot be used, and for a tokenizer of which no file says what ends a text.
    """
    names = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
    model, generation, settings, special = (read_json(folder / name) if (folder / name).exists() else {} for name in names)
    file, notes = folder / "tokenizer.json", []
    library = _library(file) if file.exists() else None

    def usable(numbers: list[int], source: str) -> list[int]:
        known = [n for n in numbers if n < config.vocab_size and (library is None or library.id_to_token(n) is not None)]
        notes.extend(f"{source} {number} is no token of this model: left out" for number in numbers if number not in known)
        return known

    def named(key: str) -> list[int]:
        """Of a token that the tokenizer's settings name: "</s>", or {"content": "</s>"}."""
        name = settings.get(key) or special.get(key)
        name = name.get("content") if isinstance(name, dict) else name
        number = library.token_to_id(name) if library and isinstance(name, str) else None
        return [] if number is None else usable([number], f"{key} {name}")

    def numbered(key: str) -> list[int]:
        for raw, where in ((generation, folder / names[1]), (model, folder / names[0])):
            value = raw.get(key)
            numbers = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(number) is int and number >= 0 for number in numbers):
                raise UserError(f"{where}: {key} is {value!r}, expected a whole number >= 0 or a list of them")
            if numbers:
                return usable(numbers, f"{where.name}: {key}")
        return []

    bos = named("bos_token") or numbered("bos_token_id")
    before = (_added(library)[0] if library else []) or (bos if settings.get("add_bos_token") is True else [])
    if len(before) > 1:
        words = " ".join(library.id_to_token(number) for number in before)
        notes.append(f"{file} puts {words} before a text: only the first of them is kept")
    eos = [*named("eos_token"), *numbered("eos_token_id")]
    tokens = TokensConfig(next(iter([*before, *bos]), None), bool(before), tuple(dict.fromkeys(eos)))
    if library:
        ends = Tokenizer.load(file, tokens).named_ends
        known = [number for number in [*eos, *ends] if number < config.vocab_size]
        tokens = TokensConfig(tokens.bos, tokens.add_bos, tuple(dict.fromkeys(known)))
    return tokens, notes


def read_tokenizer(file: Path, vocab_size: int) -> tuple[str, list[str]]:
    """-> (tokenizer.json as the run keeps it, notes for the user).

    Added tokens that the model has no embedding for are left out: many a fine-tuned model's folder names one to pad with, and a text that
    holds it could not be read. Raises UserError where the tokenizer's own vocabulary is larger than the model's."""
    text, library = read_text(file, limit=MAX_FILE_BYTES), _library(file)
    own, last = library.get_vocab(with_added_tokens=False), vocab_size - 1
    if own and max(own.values()) > last:
        raise UserError(f"{file}: has a token with id {max(own.values())}, the model's vocabulary ends at {last}: another model's?")
    beyond = {name: number for name, number in library.get_vocab(with_added_tokens=True).items() if number > last}
    if not beyond:
        return text, []
    raw = json.loads(text)
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] not in beyond]
    names = ", ".join(f"{name!r} ({number})" for name, number in list(beyond.items())[:3])
    note = f"{file.name}: the model's vocabulary ends at {last}; added tokens behind it are left out: {names}"
    return json.dumps(raw, ensure_ascii=False), [note]


def tokenizer_files(
    config: ModelConfig, path: Path | None, tokens: TokensConfig | None, chat_template: str | None
) -> tuple[dict[str, str], TokensConfig, list[str]]:
    """-> (file name -> text, what begins and ends a text, notes). tokens: None where the tokenizer's names say it."""
    if path is None:
        return {}, tokens or TokensConfig(), ["there is no tokenizer: the folder has weights only"]
    raw = read_json(path)
    tokenizer = Tokenizer.load(path, tokens)
    if tokenizer.vocab_size > config.vocab_size:
        largest, last = tokenizer.vocab_size - 1, config.vocab_size - 1
        raise UserError(f"{path}: has a token with id {largest}, the model's vocabulary ends at {last}")
    settings: dict = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(tokenizer.start),
        "eos_token": tokenizer.token_name(tokenizer.eos_ids[0]),
    }
    if tokenizer.bos_id is not None:
        settings["bos_token"] = tokenizer.token_name(tokenizer.bos_id)
    if chat_template is not None:
        settings["chat_template"] = chat_template
    text = tokenizer.to_json()
    if _added(_library(path)) != (tokenizer.start, []):
        raw["post_processor"] = _prepending(settings["bos_token"], tokenizer.bos_id) if tokenizer.start else None
        text = json.dumps(raw, ensure_ascii=False)
    ends = TokensConfig(tokenizer.bos_id, bool(tokenizer.start), tokenizer.eos_ids)
    return {"tokenizer.json": text, "tokenizer_config.json": to_json(settings)}, ends, []


def generation_config(tokens: TokensConfig) -> dict:
    """generation_config.json: transformers stops at each of its `eos_token_id`."""
    eos = tokens.eos[0] if len(tokens.eos) == 1 else list(tokens.eos) or None
    return {"_from_model_config": True, "bos_token_id": tokens.bos, "eos_token_id": eos}


def to_json(value: dict) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _library(path: Path) -> tokenizers.Tokenizer:
    if is_pointer(path):
        raise UserError(f"{path}: {POINTER}")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: not a tokenizer.json of the `tokenizers` library: {str(error).splitlines()[0][:200]}") from None


def _added(library: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids that the post-processor puts (before, behind) a text."""
    encoding = library.encode("a")
    pairs = list(zip(encoding.ids, encoding.special_tokens_mask, strict=True))
    before = [number for number, _ in takewhile(lambda pair: pair[1], pairs)]
    behind = [number for number, _ in takewhile(lambda pair: pair[1], reversed(pairs[len(before) :]))]
    return before, behind[::-1]


def _prepending(name: str, number: int) -> dict:
    """A post-processor that puts one token before each text."""

    def text(which: str, type_id: int) -> list[dict]:
        return [{"SpecialToken": {"id": name, "type_id": type_id}}, {"Sequence": {"id": which, "type_id": type_id}}]

    special = {name: {"id": name, "ids": [number], "tokens": [name]}}
    return {"type": "TemplateProcessing", "single": text("A", 0), "pair": text("A", 0) + text("B", 1), "special_tokens": special}
