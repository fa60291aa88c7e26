"""Answers restricted to JSON, a JSON schema or a grammar, by llguidance (github.com/guidance-ai/llguidance)."""

from __future__ import annotations

import json
from functools import cached_property

import numpy as np

from sparing.data.tokenizer import Tokenizer
from sparing.serve.errors import ApiError, bad

MAX_SCHEMA = 100_000
"""Characters; compiling takes time in proportion to them."""


class Grammars:
    """Compiles schemas and grammars for one tokenizer, whose table is built at first use."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size

    @cached_property
    def _table(self):
        try:
            import llguidance
        except ImportError:
            raise ApiError(501, "This server cannot restrict answers: its llguidance package is not installed.") from None
        size = max(self._vocab_size, self._tokenizer.vocab_size)
        return llguidance.LLTokenizer(self._tokenizer.to_json(), n_vocab=size, eos_token=list(self._tokenizer.eos_ids))

    def json_schema(self, schema: dict) -> Matcher:
        """Compile a JSON schema. Raises ApiError 400 if that is impossible."""
        from llguidance import LLMatcher

        text = json.dumps(schema)
        if len(text) > MAX_SCHEMA:
            raise bad(f"The schema is longer than {MAX_SCHEMA} characters.", "response_format")
        try:
            # At most one blank: a weak model would write blanks for ever.
            grammar = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": "[ \n]?"})
        except ValueError as error:
            raise bad(f"The schema cannot be used: {str(error)[:200]}", "response_format") from None
        return self._matcher(grammar)

    def lark(self, text: str) -> Matcher:
        """Compile a grammar in llguidance's dialect of Lark. Raises ApiError 400."""
        from llguidance import LLMatcher

        if len(text) > MAX_SCHEMA:
            raise bad(f"The grammar is longer than {MAX_SCHEMA} characters.", "response_format")
        return self._matcher(LLMatcher.grammar_from_lark(text))

    def _matcher(self, grammar: str) -> Matcher:
        from llguidance import LLMatcher

        table = self._table
        matcher = LLMatcher(table, grammar, log_level=0)
        if matcher.is_error():
            raise bad(f"The grammar cannot be used: {matcher.get_error()[:200]}", "response_format")
        return Matcher(matcher, self._vocab_size)


class Matcher:
    """A compiled grammar and its state in one answer: an `infer.request.Grammar`."""

    def __init__(self, matcher, vocab_size: int):
        self._matcher, self._vocab_size = matcher, vocab_size

    def mask(self) -> np.ndarray:
        """(V,) booleans: which tokens may come next, with the tokens that end an answer where the text may end."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)

    def advance(self, token: int) -> None:
        self._matcher.consume_token(token)

    def copy(self) -> Matcher:
        """The same grammar for another choice of the request."""
        return Matcher(self._matcher.deep_copy(), self._vocab_size)
