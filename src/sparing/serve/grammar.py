"""Answers restricted to JSON, a JSON schema or a grammar, by llguidance (github.com/guidance-ai/llguidance)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cached_property

import numpy as np

from sparing.data.tokenizer import Tokenizer
from sparing.infer.request import GrammarFailed
from sparing.serve.errors import ApiError, bad

MAX_SCHEMA = 100_000
"""Characters; compiling takes time in proportion to them."""
MAX_ITEMS = 5_000
"""Things that a grammar may allow at one place: about four for each optional property."""
MAX_SYMBOLS = 30_000
"""Symbols of a grammar. Compiling takes the square of the optional properties in time: about 2 s for 1,200, and 3,000 are too many."""
PROBED = 8
"""Tokens of the two trial answers that a grammar must survive before it is used."""
BLANKS = "[ \n]?"
"""Between the parts of JSON at most one: a weak model would write blanks for ever."""
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
"""The arguments of a function without `parameters`: OpenAI's words are "a function with an empty parameter list"."""


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
        return self._matcher(f"start: {_json(schema)}\n", "schema", "response_format")

    def lark(self, text: str) -> Matcher:
        """Compile a grammar in llguidance's dialect of Lark. Raises ApiError 400."""
        return self._matcher(text, "grammar", "response_format")

    def call(self, functions: list[dict]) -> Matcher:
        """Compile a call of one of the functions: {"name": ..., "arguments": {...}}. Raises ApiError 400.

        Each function's parameters are a JSON document of their own, so that references in them ("#/$defs/...") mean what they say.
        """
        rules = [f"start: {' | '.join(f'call{i}' for i in range(len(functions)))}"]
        for i, function in enumerate(functions):
            parameters = {"type": "object"} | function.get("parameters", NO_PARAMETERS)
            begin = json.dumps(f'{{"name": "{function["name"]}", "arguments": ')
            rules.append(f'call{i}: {begin} arguments{i} "}}"\narguments{i}: {_json(parameters)}')
        return self._matcher("\n".join(rules) + "\n", "functions", "tools")

    def _matcher(self, grammar: str, what: str, field: str) -> Matcher:
        table = self._table
        from llguidance import LLMatcher, LLParserLimits

        if len(grammar) > MAX_SCHEMA:
            raise bad(f"The {what} take up more than {MAX_SCHEMA} characters.", field)
        limits = LLParserLimits(max_items_in_row=MAX_ITEMS, max_grammar_size=MAX_SYMBOLS, verbose_errors=False)
        compiled = LLMatcher(table, LLMatcher.grammar_from_lark(grammar), log_level=0, limits=limits)
        if compiled.is_error():
            raise bad(f"The {what} cannot be used: {_reason(compiled)}", field)
        matcher = Matcher(compiled, self._vocab_size)
        try:
            matcher.probe(lambda allowed: allowed[0])
            matcher.probe(lambda allowed: allowed[-1])
        except GrammarFailed as error:
            raise bad(f"The {what} cannot be used: no answer keeps to them here ({error}).", field) from None
        return matcher


def _json(schema: dict) -> str:
    """A JSON schema as a term of Lark."""
    options = schema.get("x-guidance")
    return "%json " + json.dumps({**schema, "x-guidance": (options if isinstance(options, dict) else {}) | {"whitespace_pattern": BLANKS}})


def _reason(matcher) -> str:
    """What llguidance says, without the excerpt that follows, nor the place of a schema in the grammar that we made for it."""
    return re.sub(r"^Parser Error: |^at [0-9()]+: failed to compile JSON schema: ", "", matcher.get_error().split("\n")[0])[:200]


class Matcher:
    """A compiled grammar and its state in one answer: an `infer.request.Grammar`."""

    def __init__(self, matcher, vocab_size: int):
        self._matcher, self._vocab_size = matcher, vocab_size

    def mask(self) -> np.ndarray:
        """(V,) booleans: which tokens may come next, with the tokens that end an answer where the text may end. Raises GrammarFailed."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)
        if self._matcher.is_error():  # it allows the end of text then
            raise GrammarFailed(_reason(self._matcher))
        if self._matcher.is_stopped():
            return np.zeros_like(allowed)
        if not allowed.any():
            raise GrammarFailed("the model has no token that it allows")
        return allowed

    def advance(self, token: int) -> None:
        self._matcher.consume_token(token)

    def copy(self) -> Matcher:
        """The same grammar for another choice of the request."""
        return Matcher(self._matcher.deep_copy(), self._vocab_size)

    def probe(self, pick: Callable[[np.ndarray], int]) -> None:
        """Begin an answer on a copy, with the tokens that `pick` takes of those allowed. Raises GrammarFailed."""
        trial = self.copy()
        for _ in range(PROBED):
            allowed = np.flatnonzero(trial.mask())
            if not len(allowed):
                return
            trial.advance(int(pick(allowed)))
        trial.mask()
