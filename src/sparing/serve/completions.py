"""Chats and text completions: from a request's body to prompts for the engine, from the engine's pieces to OpenAI's objects."""

from __future__ import annotations

import codecs
import json

from sparing.infer.request import Piece, Request, Sampling, TokenLogprob
from sparing.serve.errors import bad
from sparing.serve.requests import MAX_PROMPTS
from sparing.serve.service import DEFAULT_TOKENS, Service
from sparing.serve.tools import CallReader, forced


class Completion:
    """What both kinds share: `prompts` for the engine. Then `push` turns each piece into `choices` of the chunks to send (the last piece is
    None, with the reason why the answer ended), and `choice` gives the whole answer."""

    def __init__(self, service: Service, body: dict, prompt_text: str, prompts: list[tuple[list[int], Sampling]]):
        """prompt_text: for the audit log. prompts: one for each choice."""
        self.service, self.body, self.prompt_text, self.prompts = service, body, prompt_text, prompts
        self.requests: list[Request] = []
        """Those of `prompts`, once they are submitted."""
        self.texts = [""] * len(prompts)
        """What each choice has written so far."""
        self._begun = [False] * len(prompts)

    def _token_text(self, token: int) -> str:
        return self.service.engine.tokenizer.token_bytes(token).decode(errors="replace")


class ChatCompletion(Completion):
    """/v1/chat/completions: an answer to messages, with tool calls."""

    path, prefix, whole_object, chunk_object = "/v1/chat/completions", "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, service: Service, body: dict):
        """Tokenises, which takes time: not on the event loop. Raises ApiError."""
        limit = body.get("max_completion_tokens", body.get("max_tokens"))
        if limit == 0:
            raise bad("'max_tokens' must be at least 1.", "max_tokens")
        top = body.get("top_logprobs")
        if top and not body.get("logprobs"):
            raise bad("'top_logprobs' needs 'logprobs': true.", "top_logprobs")
        prompt = service.chat_prompt(body)
        logprobs = (top or 0) if body.get("logprobs") else None
        prompts = [(prompt, s) for s in service.sampling(body, prompt, limit, logprobs, chat=True)]
        super().__init__(service, body, json.dumps(body["messages"], ensure_ascii=False), prompts)
        self._wants_logprobs = logprobs is not None
        must_call = forced(body) is not None
        may_call = must_call or (body.get("tools") and body.get("tool_choice") != "none")
        self._readers = [CallReader(must_call) if may_call else None for _ in prompts]
        self._calls: list[list[dict]] = [[] for _ in prompts]
        self._logprobs: list[list[dict]] = [[] for _ in prompts]

    def push(self, index: int, piece: Piece | None, finish: str | None) -> list[dict]:
        text, new_calls, calls = piece.text if piece else "", [], self._calls[index]
        if self._readers[index]:
            text, new_calls = self._readers[index].push(text, last=piece is None, cut=finish == "length")
            if self.body.get("parallel_tool_calls") is False:
                new_calls = new_calls[: max(0, 1 - len(calls))]
        logprobs = [self._logprob(row) for row in piece.logprobs] if piece and piece.logprobs is not None else []
        self.texts[index] += text
        self._logprobs[index] += logprobs
        chunks = []
        if not self._begun[index]:
            self._begun[index] = True
            chunks.append(self._chunk(index, {"role": "assistant", "content": ""}))
        if text or logprobs:
            chunks.append(self._chunk(index, {"content": text}, logprobs))
        for call in new_calls:
            chunks.append(self._chunk(index, {"tool_calls": [{"index": len(calls), **call}]}))
            calls.append(call)
        if piece is None:
            chunks.append(self._chunk(index, {}, finish=self._reason(index, finish)))
        return chunks

    def _reason(self, index: int, finish: str | None) -> str | None:
        called = self._calls[index] and not self._readers[index].unfinished
        return "tool_calls" if called and finish == "stop" else finish

    def _chunk(self, index: int, delta: dict, logprobs: list | None = None, finish: str | None = None) -> dict:
        content = {"content": logprobs, "refusal": None} if logprobs else None
        return {"index": index, "delta": delta, "logprobs": content, "finish_reason": finish}

    def choice(self, index: int, finish: str) -> dict:
        calls = self._calls[index]
        message = {"role": "assistant", "content": self.texts[index] or (None if calls else ""), "refusal": None}
        if calls:
            message["tool_calls"] = calls
        logprobs = {"content": self._logprobs[index], "refusal": None} if self._wants_logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": self._reason(index, finish)}

    def _logprob(self, row: TokenLogprob) -> dict:
        return {**self._token(row.token, row.logprob), "top_logprobs": [self._token(*pair) for pair in row.top]}

    def _token(self, token: int, logprob: float) -> dict:
        raw = self.service.engine.tokenizer.token_bytes(token)
        return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}


class TextCompletion(Completion):
    """/v1/completions: the continuation of one or more prompts, texts or token ids. Choice i·n + j is the j-th of prompt i."""

    path, prefix, whole_object, chunk_object = "/v1/completions", "cmpl-", "text_completion", "text_completion"

    def __init__(self, service: Service, body: dict):
        """Tokenises, which takes time: not on the event loop. Raises ApiError."""
        given = body.get("prompt", "")
        inputs = [given] if isinstance(given, str) or isinstance(given[0], int) else given
        n, logprobs, limit = body.get("n", 1), body.get("logprobs"), body.get("max_tokens", DEFAULT_TOKENS)
        if body.get("best_of", n) != n:
            raise bad(f"'best_of' must be {n}, as 'n' is: this server returns all answers that it writes.", "best_of")
        if len(inputs) * n > MAX_PROMPTS:
            raise bad(f"{len(inputs)} prompts with {n} choices each: at most {MAX_PROMPTS} answers in one request.", "n")
        echo, scored = bool(body.get("echo")), bool(body.get("echo")) and logprobs is not None
        prompts: list[tuple[list[int], Sampling]] = []
        self._echo: list[str] = []
        for prompt in inputs:
            is_text = isinstance(prompt, str)
            if not is_text:
                service.check_tokens("prompt", prompt)
            ids = service.text_prompt(prompt) if is_text else prompt
            prompts += [(ids, s) for s in service.sampling(body, ids, max(1, limit), logprobs, chat=False, scored=scored)]
            self._echo += [(prompt if is_text else service.engine.tokenizer.decode(prompt)) if echo else ""] * n
        super().__init__(service, body, str(given), prompts)
        self.texts = list(self._echo)
        self._silent = limit == 0  # the engine still generates one token, which is left out
        self._rows: list[dict] = [self._no_rows() for _ in prompts]
        self._offsets: list[int | None] = [None] * len(prompts)  # where the next token's text begins; None: before the first
        self._characters = [codecs.getincrementaldecoder("utf-8")("replace") for _ in prompts]

    @staticmethod
    def _no_rows() -> dict:
        return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def push(self, index: int, piece: Piece | None, finish: str | None) -> list[dict]:
        text, rows, echoed = "", [], 0
        if not self._begun[index]:
            self._begun[index] = True
            text, rows = self._echo[index], self._prompt_logprobs(index)
            echoed = len(rows)
        if piece is not None and not self._silent:
            text += piece.text
            rows = [*rows, *(piece.logprobs or [])]
            self.texts[index] += piece.text
        logprobs = self._logprobs(index, rows, echoed)
        if not text and not logprobs and piece is not None:
            return []
        finish = "length" if self._silent and finish == "stop" else finish
        return [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}]

    def choice(self, index: int, finish: str) -> dict:
        rows = self._rows[index] if self.body.get("logprobs") is not None else None
        return {"index": index, "text": self.texts[index], "logprobs": rows, "finish_reason": "length" if self._silent else finish}

    def _prompt_logprobs(self, index: int) -> list[TokenLogprob]:
        """Scores of the prompt's tokens, if they are wanted. A prompt of token ids has its first token too, without a score."""
        prompt, sampling = self.prompts[index]
        rows = self.requests[index].prompt_logprobs
        if not sampling.prompt_logprobs:
            return []
        given = self.body.get("prompt", "")
        is_text = isinstance(given, str) or isinstance(given[index // self.body.get("n", 1)], str)
        begun = is_text and bool(self.service.engine.tokenizer.start)  # the first token is no part of the text
        return rows if begun else [TokenLogprob(prompt[0], None, ()), *rows]

    def _logprobs(self, index: int, new_rows: list[TokenLogprob], echoed: int) -> dict | None:
        """OpenAI's four lists for new tokens, the first `echoed` of them the prompt's; also appended to those of the whole answer."""
        if not new_rows:
            return None
        rows, whole, tokenizer = self._no_rows(), self._rows[index], self.service.engine.tokenizer
        offset = self._offsets[index]
        if offset is None:
            offset = 0 if self.prompts[index][1].prompt_logprobs else len(self._echo[index])
        for number, row in enumerate(new_rows):
            rows["tokens"].append(self._token_text(row.token))
            rows["token_logprobs"].append(row.logprob)
            rows["top_logprobs"].append(None if row.logprob is None else self._top(row))
            rows["text_offset"].append(offset)
            # A character counts with the token that completes it: one split over three tokens is one character of the text, not three.
            # Special tokens have a name, but no text in an answer.
            if number < echoed or tokenizer.token_name(row.token) not in tokenizer.special:
                offset += len(self._characters[index].decode(tokenizer.token_bytes(row.token)))
        self._offsets[index] = offset
        for name, values in rows.items():
            whole[name] += values
        return rows

    def _top(self, row: TokenLogprob) -> dict[str, float]:
        """{token's text: logprob} of the likeliest tokens; of two with the same text, the likelier."""
        top: dict[str, float] = {}
        for token, logprob in row.top:
            top.setdefault(self._token_text(token), logprob)
        return top
