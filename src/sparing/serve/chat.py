"""/v1/chat/completions: pieces of the engine to OpenAI's chunks and messages."""

from __future__ import annotations

import json

from sparing.infer.request import Piece, Request, TokenLogprob
from sparing.serve.errors import bad
from sparing.serve.service import Service
from sparing.serve.streams import Ask
from sparing.serve.tools import CallReader, forced


class Chat:
    """One request: `asks` for the engine; `delta` and `choice` for the answer."""

    path, prefix, whole_object, chunk_object = "/v1/chat/completions", "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, service: Service, body: dict):
        """Tokenises: call it beside the event loop. Raises ApiError."""
        limit = body.get("max_completion_tokens", body.get("max_tokens"))
        if limit == 0:
            raise bad("'max_tokens' must be at least 1.", "max_tokens")
        top = body.get("top_logprobs")
        if top is not None and not body.get("logprobs"):
            raise bad("'top_logprobs' needs 'logprobs': true.", "top_logprobs")
        self.service, self.body = service, body
        self.requests: list[Request] = []
        self.prompt_text = json.dumps(body["messages"], ensure_ascii=False)
        prompt = service.chat_prompt(body)
        logprobs = (top or 0) if body.get("logprobs") else None
        self.asks: list[Ask] = [(prompt, s) for s in service.sampling(body, prompt, limit, logprobs, chat=True)]
        self._wants_logprobs = logprobs is not None
        must = forced(body) is not None
        calls = must or (body.get("tools") and body.get("tool_choice") != "none")
        self._readers = [CallReader(must) if calls else None for _ in self.asks]
        self._called = [0] * len(self.asks)
        self._begun = [False] * len(self.asks)
        self._content = [""] * len(self.asks)
        self._calls: list[list[dict]] = [[] for _ in self.asks]
        self._logprobs: list[list[dict]] = [[] for _ in self.asks]

    def push(self, index: int, piece: Piece | None, finish: str | None) -> list[dict]:
        """The chunks' choices that a piece makes; `finish`: why the answer ended, with a piece of None."""
        text, calls = piece.text if piece else "", []
        if self._readers[index]:
            text, calls = self._readers[index].push(text, last=piece is None)
            if self.body.get("parallel_tool_calls") is False:
                calls = calls[: max(0, 1 - self._called[index])]
        logprobs = self._logprob_content(piece)
        self._content[index] += text
        self._logprobs[index] += logprobs or []
        chunks = []
        if not self._begun[index]:
            self._begun[index] = True
            chunks.append(self._chunk(index, {"role": "assistant", "content": ""}))
        if text or logprobs:
            chunks.append(self._chunk(index, {"content": text}, logprobs))
        for call in calls:
            self._calls[index].append(call)
            chunks.append(self._chunk(index, {"tool_calls": [{"index": self._called[index], **call}]}))
            self._called[index] += 1
        if piece is None:
            chunks.append(self._chunk(index, {}, finish=self._reason(index, finish)))
        return chunks

    def _reason(self, index: int, finish: str | None) -> str | None:
        return "tool_calls" if self._calls[index] and finish == "stop" else finish

    def _chunk(self, index: int, delta: dict, logprobs: list | None = None, finish: str | None = None) -> dict:
        found = {"content": logprobs, "refusal": None} if logprobs else None
        return {"index": index, "delta": delta, "logprobs": found, "finish_reason": finish}

    def choice(self, index: int, finish: str) -> dict:
        """The whole answer, after every piece."""
        calls = self._calls[index]
        message = {"role": "assistant", "content": self._content[index] or (None if calls else ""), "refusal": None}
        if calls:
            message["tool_calls"] = calls
        logprobs = {"content": self._logprobs[index], "refusal": None} if self._wants_logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": self._reason(index, finish)}

    def text(self) -> list[str]:
        return self._content

    def _logprob_content(self, piece: Piece | None) -> list[dict] | None:
        if piece is None or piece.logprobs is None:
            return None
        return [{**self._token(row.token, row.logprob), "top_logprobs": [self._token(*pair) for pair in row.top]} for row in piece.logprobs]

    def _token(self, number: int, logprob: float) -> dict:
        raw = self.service.engine.tokenizer.token_bytes(number)
        return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}


def top_by_name(service: Service, row: TokenLogprob) -> dict[str, float]:
    """{token's text: logprob} of the likeliest, as completions report them; the likelier of two that look alike."""
    found: dict[str, float] = {}
    for number, logprob in row.top:
        found.setdefault(service.engine.tokenizer.token_bytes(number).decode(errors="replace"), logprob)
    return found
