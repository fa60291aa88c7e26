"""/v1/completions: a text goes on. Several prompts and choices in one request, token ids as prompts, log-probabilities, echo."""

from __future__ import annotations

from sparing.infer.request import Piece, Request, TokenLogprob
from sparing.serve.chat import top_by_name
from sparing.serve.errors import bad
from sparing.serve.requests import MAX_PROMPTS
from sparing.serve.service import DEFAULT_TOKENS, Service
from sparing.serve.streams import Ask


class Completion:
    """One request: `asks` for the engine; `push` and `choice` for the answer. Choice i·n + j is the j-th of prompt i."""

    path, prefix, whole_object, chunk_object = "/v1/completions", "cmpl-", "text_completion", "text_completion"

    def __init__(self, service: Service, body: dict):
        """Tokenises: call it beside the event loop. Raises ApiError."""
        self.service, self.body = service, body
        self.requests: list[Request] = []
        """Those of `asks`, once they are under way."""
        given = body["prompt"]
        prompts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
        n, logprobs, limit = body.get("n", 1), body.get("logprobs"), body.get("max_tokens", DEFAULT_TOKENS)
        if len(prompts) * n > MAX_PROMPTS:
            raise bad(f"{len(prompts)} prompts with {n} choices each: at most {MAX_PROMPTS} answers in one request.", "n")
        self.asks: list[Ask] = []
        self._echo: list[str] = []
        self.prompt_text = str(given)
        for prompt in prompts:
            ids = self._ids(prompt)
            # No token wanted: the engine is asked for one all the same, and its answer left out.
            scored = bool(body.get("echo")) and logprobs is not None
            self.asks += [(ids, s) for s in service.sampling(body, ids, max(1, limit), logprobs, chat=False, scored=scored)]
            text = prompt if isinstance(prompt, str) else service.engine.tokenizer.decode(prompt)
            self._echo += [text if body.get("echo") else ""] * n
        self._silent = limit == 0
        self._content = list(self._echo)
        self._begun = [False] * len(self.asks)
        self._rows: list[dict] = [self._no_rows() for _ in self.asks]

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return self.service.text_prompt(prompt)
        size = self.service.engine.config.vocab_size
        wrong = next((token for token in prompt if token >= size), None)
        if wrong is not None:
            raise bad(f"'prompt': {wrong} is no token; they end at {size - 1}.", "prompt")
        return prompt

    @staticmethod
    def _no_rows() -> dict:
        return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def push(self, index: int, piece: Piece | None, finish: str | None) -> list[dict]:
        """The chunks' choices that a piece makes; `finish`: why the answer ended, with a piece of None."""
        text, rows = "", []
        if not self._begun[index]:
            self._begun[index] = True
            text, rows = self._echo[index], self._prompt_rows(index)
        if piece is not None and not self._silent:
            text += piece.text
            rows += piece.logprobs or []
            self._content[index] += piece.text
        rows = self._logprobs(index, rows)
        if not text and not rows and piece is not None:
            return []
        finish = "length" if self._silent and finish == "stop" else finish
        return [{"index": index, "text": text, "logprobs": rows, "finish_reason": finish}]

    def choice(self, index: int, finish: str) -> dict:
        """The whole answer, after every piece."""
        rows = self._rows[index] if self.body.get("logprobs") is not None else None
        return {"index": index, "text": self._content[index], "logprobs": rows, "finish_reason": "length" if self._silent else finish}

    def text(self) -> list[str]:
        return self._content

    def _prompt_rows(self, index: int) -> list[TokenLogprob]:
        """The prompt's tokens, where its scores were asked for. Nothing comes before the first of token ids: it has none."""
        prompt, found = self.asks[index][0], self.requests[index].prompt_logprobs
        if not self.asks[index][1].prompt_logprobs:
            return []
        ours = isinstance(self.body["prompt"], str) or isinstance(self.body["prompt"][index // self.body.get("n", 1)], str)
        return found if ours else [TokenLogprob(prompt[0], None, ()), *found]

    def _logprobs(self, index: int, found: list[TokenLogprob]) -> dict | None:
        """OpenAI's four lists, and the same kept for the whole answer."""
        if not found:
            return None
        rows, kept = self._no_rows(), self._rows[index]
        at = kept["text_offset"][-1] + len(kept["tokens"][-1]) if kept["tokens"] else len(self._echo[index])
        at = 0 if not kept["tokens"] and self.asks[index][1].prompt_logprobs else at
        for row in found:
            text = self.service.engine.tokenizer.token_bytes(row.token).decode(errors="replace")
            rows["tokens"].append(text)
            rows["token_logprobs"].append(row.logprob)
            rows["top_logprobs"].append(None if row.logprob is None else top_by_name(self.service, row))
            rows["text_offset"].append(at)
            at += len(text)
        for name, values in rows.items():
            kept[name] += values
        return rows
