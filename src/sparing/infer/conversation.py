"""A conversation with a run's model, by the run's own chat template. The oldest turns are forgotten when the context is full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sparing.base.config import UserError
from sparing.base.preempt import Interrupted
from sparing.base.run import RunFolder
from sparing.data.chat import PLAIN_STOPS, ChatTemplate, template_text
from sparing.infer.engine import Engine
from sparing.infer.request import Sampling

LEAST_ROOM = 0.25
"""Share of the context that is kept free for an answer: older turns are forgotten before an answer would have to be shorter."""


class Conversation:
    """Messages, and the engine that answers them. `answer` may be left by a KeyboardInterrupt: what was written by then is kept."""

    def __init__(self, engine: Engine, run: RunFolder, sampling: Sampling, system: str | None = None):
        """sampling: of each answer; its `max_tokens` is the longest. Raises UserError for a template that is none."""
        self.engine, self.sampling = engine, sampling
        self.template = ChatTemplate(template_text(run))
        if self.template.plain:
            self.sampling = replace(sampling, stop=(*sampling.stop, *PLAIN_STOPS))
        self.system = system
        self.turns: list[list[dict[str, Any]]] = []
        """[question, answer] each."""
        self.forgotten = 0
        """Turns that the context had no room for any more."""

    def reset(self) -> None:
        """Forget all turns; the system's message stays."""
        self.turns, self.forgotten = [], 0

    def answer(self, text: str, show: Callable[[str], None] = lambda piece: None) -> dict[str, Any]:
        """Answer a message. show: called with each piece of the answer.

        -> {"answer", "finish_reason" (stop, length, cancelled), "prompt_tokens", "completion_tokens", "forgotten_turns"}.
        Raises UserError where the message alone does not fit the context, or the template refuses it: the message is then no part of the
        conversation. Raises RuntimeError if the engine fails.
        """
        question = {"role": "user", "content": text}
        prompt = self._prompt(question)
        room = self.engine.context - len(prompt)
        request = self.engine.submit(prompt, replace(self.sampling, max_tokens=min(self.sampling.max_tokens, room)))
        pieces: list[str] = []

        def read() -> None:
            for piece in request:
                if piece.text:
                    pieces.append(piece.text)
                    show(piece.text)

        try:
            read()
        except Interrupted:  # the whole program is to end
            request.cancel()
            raise
        except KeyboardInterrupt:
            request.cancel()
            read()
        if request.finish_reason in ("error", "grammar"):
            raise RuntimeError(f"the engine stopped: {request.error or request.finish_reason}")
        answer = "".join(pieces).strip() if self.template.plain else "".join(pieces)
        self.turns.append([question, {"role": "assistant", "content": answer}])
        counts = {name: request.usage[name] for name in ("prompt_tokens", "completion_tokens")}
        return {"answer": answer, "finish_reason": request.finish_reason, **counts, "forgotten_turns": self.forgotten}

    def _prompt(self, question: dict[str, Any]) -> list[int]:
        """Token ids of the conversation with one more question; the oldest turns are dropped until an answer has room."""
        least = max(1, min(self.sampling.max_tokens, int(LEAST_ROOM * self.engine.context)))
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        turns, forgotten = self.turns, 0
        while True:
            messages = [*before, *(message for turn in turns for message in turn), question]
            ids = self.template.encode(self.engine.tokenizer, messages)
            if len(ids) + least <= self.engine.context:
                break
            if not turns:
                if len(ids) < self.engine.context:
                    break
                raise UserError(f"the message is too long: {len(ids)} tokens with what the template adds, of {self.engine.context}")
            turns, forgotten = turns[1:], forgotten + 1
        self.turns, self.forgotten = turns, self.forgotten + forgotten
        return ids
