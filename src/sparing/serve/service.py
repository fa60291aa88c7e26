"""What all routes share: the engine and the chat template, prompts and sampling settings from bodies, usage, counters."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from sparing.base.config import UserError
from sparing.data.chat import PLAIN_STOPS, ChatTemplate, flat
from sparing.infer.engine import Engine
from sparing.infer.request import Sampling
from sparing.serve.audit import Audit
from sparing.serve.collect import Collection
from sparing.serve.energy import Energy
from sparing.serve.errors import ApiError, bad
from sparing.serve.grammar import Grammars, Matcher
from sparing.serve.settings import Settings
from sparing.serve.tools import forced

DEFAULT_TOKENS = 16
"""`max_tokens` of a completion that doesn't say (OpenAI's); a chat's answer may fill the context."""
LONG_BODY = 16 << 10
"""Bytes of a body: longer ones (long texts, large schemas) take turns, so that they cannot keep short ones waiting."""
MAX_WAITING = 64 << 20
"""Bytes of all long bodies that wait for their turn."""
PARAMETERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos")


class Service:
    def __init__(
        self,
        engine: Engine,
        template: ChatTemplate,
        settings: Settings,
        energy: Energy,
        audit: Audit,
        templates: Mapping[str, ChatTemplate] | None = None,
        collection: Collection | None = None,
    ):
        """templates: the adapters' own, by name. collection: where answers go that people accept; None: nowhere."""
        self.collection = collection
        self.engine, self.settings, self.energy, self.audit = engine, settings, energy, audit
        self.name = settings.name or engine.name
        self.templates = {self.name: template} | {name: (templates or {}).get(name, template) for name in engine.adapters}
        """Of each model that can be asked for: the run itself first, then its adapters."""
        if self.name in engine.adapters:
            raise UserError(f"--adapter {self.name}=...: the run itself has this name; choose another, or say --name")
        self.started = int(time.time())
        self.draining = False
        self.counts: Counter[tuple[str, int]] = Counter()
        """Answers by (path, status)."""
        self._turns, self._long = ThreadPoolExecutor(1, "long-bodies"), 0  # bytes
        tokenizer = engine.tokenizer
        self.vocab_size = max(engine.config.vocab_size, tokenizer.vocab_size)
        self.grammars = Grammars(tokenizer, engine.config.vocab_size)
        self._longest = max(len(tokenizer.token_bytes(number)) for number in range(tokenizer.vocab_size))

    async def work(self, size: int, function: Callable, *arguments):
        """The result of a function that takes time, in another thread. size: bytes of the request's body. Raises ApiError 429."""
        if size < LONG_BODY:
            return await asyncio.to_thread(function, *arguments)
        if self._long + size > MAX_WAITING:
            raise ApiError(429, "The server is busy: many long requests are waiting already.", code="queue_full", retry_after=10)
        self._long += size
        try:
            return await asyncio.get_running_loop().run_in_executor(self._turns, function, *arguments)
        finally:
            self._long -= size

    def collecting(self) -> Collection:
        """Raises ApiError 404 where this server collects nothing."""
        if self.collection is None:
            raise ApiError(404, "This server collects no feedback; its operator would have to say --collect.", code="feedback_off")
        return self.collection

    def check_model(self, model: str) -> None:
        """Raises ApiError 404 for another model's name."""
        if model not in self.templates:
            there = ", ".join(f"`{name}`" for name in self.templates)
            raise ApiError(404, f"The model `{model[:100]}` does not exist; this server has {there}.", "model", "model_not_found")

    def model_of(self, body: dict) -> str:
        """The name of the model that a body asks for."""
        return body.get("model") or self.name

    def check_tokens(self, field: str, tokens: Iterable[int], size: int | None = None) -> None:
        """Raises ApiError 400 for a token id that is not below `size` (default: the model's vocabulary)."""
        size = size or self.engine.config.vocab_size
        wrong = next((token for token in tokens if token >= size), None)
        if wrong is not None:
            raise bad(f"'{field}': {wrong} is no token; they end at {size - 1}.", field)

    # prompts

    def chat_prompt(self, body: dict) -> list[int]:
        """Token ids of a chat's messages."""
        messages = [flat(message) for message in body["messages"]]
        tools = None if body.get("tool_choice") == "none" else body.get("tools")
        self._not_too_long(sum(len(message["content"].encode()) for message in messages))
        try:
            return self.templates[self.model_of(body)].encode(self.engine.tokenizer, messages, tools)
        except UserError as error:
            raise bad(str(error), "messages") from None

    def text_prompt(self, text: str) -> list[int]:
        """Token ids of a text, after the token that begins every document where the model has one."""
        self._not_too_long(len(text.encode()))
        return self.engine.tokenizer.encode_prompt(text)

    def _not_too_long(self, size: int) -> None:
        """Refuse, before the tokenizer spends seconds on it, a text that cannot fit even if all its tokens were the longest one."""
        if size > self.engine.context * self._longest:
            raise self._too_long(f"your prompt has {size} bytes")

    def _too_long(self, what: str) -> ApiError:
        limit = f"This model's maximum context length is {self.engine.context} tokens"
        return bad(f"{limit}; {what}.", "messages", "context_length_exceeded")

    # sampling

    def sampling(
        self, body: dict, prompt: list[int], limit: int | None, logprobs: int | None, chat: bool, scored: bool = False
    ) -> list[Sampling]:
        """Settings of each of the `n` choices. limit: `max_tokens`; None: to the end of the context. scored: with log-probabilities of
        the prompt. Raises ApiError 400."""
        room = self.engine.context - len(prompt)
        if room < 1:
            raise self._too_long(f"your prompt has {len(prompt)} tokens, and an answer needs one")
        if limit is not None and limit > room:
            raise self._too_long(f"you asked for {len(prompt)} in the prompt and {limit} in the answer")
        stop = body.get("stop") or ()
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        bias = {int(token): value for token, value in body.get("logit_bias", {}).items()}
        self.check_tokens("logit_bias", bias)
        if body.get("tier") == "approximate" and self.engine.approximate is None:
            message = "'tier': this server answers exactly only; its operator has not allowed `approximate`."
            raise bad(message, "tier", "tier_not_available")
        grammar, model = self._grammar(body), self.model_of(body)
        n, seed = body.get("n", 1), body.get("seed")
        common = {name: body[name] for name in PARAMETERS if name in body}
        common |= {"stop": stop + (PLAIN_STOPS if chat and self.templates[model].plain else ()), "top_k": max(0, body.get("top_k", 0))}
        common |= {"max_tokens": room if limit is None else limit, "logprobs": logprobs, "logit_bias": bias}
        common |= {"prompt_logprobs": scored, "approximate": body.get("tier") == "approximate"}
        common |= {"adapter": None if model == self.name else model}
        try:
            return [
                # Choice i has seed + i: with one seed all n texts would be equal.
                Sampling(seed=None if seed is None else (seed + i) % 2**63, grammar=grammar.copy() if grammar else None, **common)
                for i in range(n)
            ]
        except UserError as error:
            raise bad(str(error)) from None

    def _grammar(self, body: dict) -> Matcher | None:
        functions, form = forced(body), body.get("response_format", {"type": "text"})
        if functions is not None:
            return self.grammars.call(functions)
        if form["type"] == "json_object":
            return self.grammars.json_schema({"type": "object"} | form.get("schema", {}))
        if form["type"] == "json_schema":
            return self.grammars.json_schema(form["json_schema"]["schema"])
        return self.grammars.lark(form["grammar"]) if form["type"] == "grammar" else None

    # answers

    def usage(self, counted: dict[str, int], joules: float | None, approximate: dict | None = None) -> dict:
        """OpenAI's `usage`, with the energy and the tier besides. counted: `Choices.usage`. approximate: `Request.approximate`."""
        layers, most = counted["approximate_layers"], self.engine.config.num_experts_per_tok
        experts = {"experts_per_token": round(counted["approximate_experts"] / layers, 3) if layers else most, "experts_exact": most}
        prompt, completion = counted["prompt_tokens"], counted["completion_tokens"]
        accepted, drafted = counted["accepted"], counted["drafted"]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": counted["cached_tokens"]},
            "completion_tokens_details": {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": drafted - accepted},
            "energy": {"joules": None if joules is None else round(joules, 3), "how": self.energy.how},
            "tier": "approximate" if layers else "exact",
            **({} if approximate is None else {"approximate": experts | approximate}),
            "weights": self.engine.weights,
        }
