"""The engine: texts in, tokens out, on a thread of its own."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from sparing.base.config import UserError
from sparing.base.config_file import read_config
from sparing.base.hardware import cores
from sparing.base.layers import layers
from sparing.base.run import RunFolder
from sparing.data.tokenizer import Tokenizer
from sparing.infer.adapt import Choosers
from sparing.infer.approximate import Approximate, Approximation, begin, note
from sparing.infer.cache import BLOCK, BlockPool
from sparing.infer.compiled import CompiledNetwork
from sparing.infer.loaded import Model, load
from sparing.infer.network import Rows, TorchNetwork
from sparing.infer.pack import open_pack
from sparing.infer.place import settle, slower
from sparing.infer.request import Busy, Piece, Request, Sampling
from sparing.infer.sample import choose, logprob
from sparing.infer.scheduler import Scheduler, Share, Text
from sparing.infer.speculate import propose
from sparing.infer.text import TextStream

MAX_DRAFT = 3
CHUNK = (32, 512)
"""Fewest and most rows that a step gives to prompts."""
PATIENCE = 0.25
"""Seconds that a step may take while texts wait for their next token."""
END_NAMES = ("<|end|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>")
"""Tokens that end a turn of a conversation; the tokenizer's end of text ends a text anyway."""


class Engine:
    """A model, that of a run folder or one in memory, ready to continue texts. Close it, or use it in a `with`.

    weights: how they are kept: "float32", "bfloat16", "int8" (a scale per row), "int4" (a scale per 32), or "auto": what measures fastest
    here. cache_bytes: the most that the key-value cache may take (default: room for `max_batch` texts of the full context, 1 GiB at most).
    max_batch: texts in one step. max_queue: requests that may wait. speculate: draft tokens with the model's MTP module and verify them;
    None: where it pays and cannot change a text. threads: None: one per core. expert_bytes: keep at most so many bytes of routed experts in
    memory, the rest on disk (default: no limit). device: "cpu", "cuda", or "auto": a GPU where there is one, unless the weights are int8 or
    int4. approximate: requests may ask for fewer experts. The run folder is only read, but for weights in that format and calibrations,
    where it can be written. Raises UserError for a folder without weights or tokenizer, for what this machine cannot run.
    """

    def __init__(
        self,
        run: Path | str | Model,
        *,
        weights: str = "auto",
        cache_bytes: int | None = None,
        max_batch: int | None = None,
        max_queue: int = 256,
        speculate: bool | None = None,
        threads: int | None = None,
        expert_bytes: int | None = None,
        device: str = "auto",
        approximate: Approximate | None = None,
    ):
        held = run if isinstance(run, Model) else None
        folder = held.run if held else RunFolder.open(run)
        self.name = folder.path.resolve().name
        self.config = held.config.model if held else read_config(folder.config_file).model
        if not held and not folder.tokenizer_file.exists():
            raise UserError(f"{run} has no tokenizer.json: it cannot read or write text")
        self.tokenizer = held.tokenizer if held else Tokenizer.load(folder.tokenizer_file)
        self.device, self.weights, self.plain = settle(self.config, device, weights, held and held.network)
        plain = self.plain
        if (weights != "auto" or plain) and not held and (slow := slower(self.weights, plain, self.device)):
            print(slow, file=sys.stderr)
        self.speculates: bool = not plain and self.config.mtp_depth > 0 if speculate is None else speculate
        """Whether tokens are drafted and verified; how many at a time follows what measures fastest."""
        if self.speculates and not self.config.mtp_depth:
            raise UserError("speculate: the model has no MTP module")
        if plain and expert_bytes:
            raise UserError(f"a limit for experts needs the compiled step ({plain})")
        self.context: int = self.config.max_position_embeddings
        self.max_batch, self.max_queue = max_batch or 16, max_queue
        numbers = 2 if plain and self.weights == "bfloat16" else 4
        per_block = BLOCK * sum(layer.attention.cache_width for layer in layers(self.config)) * numbers
        whole = self.max_batch * -(-self.context // BLOCK)
        self.cache_bytes = min(whole * per_block, 1 << 30) if cache_bytes is None else cache_bytes
        blocks = min(whole, self.cache_bytes // per_block)
        if blocks < 1:
            raise UserError(f"a cache of {self.cache_bytes} bytes: one block of {BLOCK} tokens takes {per_block}")
        self.cache_bytes = blocks * per_block
        self._pool = BlockPool(blocks)
        self._network: TorchNetwork | CompiledNetwork
        if plain:
            self._network = TorchNetwork((held or load(run, self.device, getattr(torch, self.weights))).network, blocks)
        else:
            self.pack = open_pack(folder, self.config, self.weights)
            self._network = CompiledNetwork(self.config, self.pack, self.weights, blocks, threads or cores(), expert_bytes or 0)
        self.approximate = Approximation(approximate, folder, self._network, self.tokenizer) if approximate else None
        self._scheduler = Scheduler(self._pool, self.max_batch, CHUNK[1])
        self._pace = 0.0  # rows a second of steps with a prompt in them
        self._drafts, self._draft_length = Choosers(range(MAX_DRAFT + 1) if self.speculates else [0]), 0
        self.threads: int = self._network.threads
        self._threads = Choosers(sorted({self.threads, max(1, self.threads // 2), 1}, reverse=True))
        ends = (self.tokenizer.token_id(name) for name in END_NAMES)
        self._ends = {self.tokenizer.eot_id, *(i for i in ends if i is not None)}
        self._counts: Counter[str] = Counter()
        self._news = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    # what callers use

    def submit(self, prompt: Sequence[int], sampling: Sampling, on_piece: Callable[[Piece | None], None] | None = None) -> Request:
        """Queue a prompt of token ids; returns at once. See `Request` for reading the answer.

        Raises Busy when the queue is full or the engine is closing; UserError for an empty prompt, ids outside the vocabulary, and what
        does not fit the context or the cache. `max_tokens` beyond the context means up to its end.
        """
        if not len(prompt):
            raise UserError("the prompt has no tokens")
        size = self.config.vocab_size
        if any(not 0 <= token < size for token in (*prompt, *sampling.logit_bias)):
            raise UserError(f"token ids must be from 0 to {size - 1}")
        room = min(self.context, self._pool.blocks * BLOCK) - len(prompt)
        if room < 1:
            raise UserError(f"the prompt has {len(prompt)} tokens; there is room for {self.context} with its continuation")
        request = Request(prompt, sampling, on_piece)
        text = Text(request, TextStream(self.tokenizer, sampling.stop), min(sampling.max_tokens, room))
        request._wake = self._wake
        if sampling.approximate:
            begin(self.approximate, text)
        with self._news:
            if self._closing:
                raise Busy("the engine is shutting down")
            if len(self._scheduler.waiting) >= self.max_queue:
                raise Busy(f"{self.max_queue} requests are waiting already")
            self._scheduler.waiting.append(text)
            self._news.notify_all()
        return request

    def metrics(self) -> dict[str, float]:
        """Counters since the start (`*_total`) and the present state, by name."""
        with self._news:
            state = {
                "requests_running": len(self._scheduler.running),
                "requests_waiting": len(self._scheduler.waiting),
                "cache_bytes": self.cache_bytes,
                "cache_blocks": self._pool.blocks,
                "cache_blocks_free": self._pool.free,
                "cache_blocks_reusable": self._pool.cached,
                "cache_evictions_total": self._pool.evicted,
                "max_batch": self.max_batch,
                "prefill_chunk": self._scheduler.max_rows,
                "speculates": self.speculates,
                "draft_length": self._draft_length,
                "threads": self._network.threads,
                "queue_limit": self.max_queue,
            }
            state |= {**self._counts, **self._network.metrics(), **(self.approximate.metrics() if self.approximate else {})}
            return {name: float(value) for name, value in state.items()}

    def close(self) -> None:
        """Cancel what is under way and stop."""
        with self._news:
            self._closing = True
            self._news.notify_all()
        self._thread.join()
        self._network.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # the engine's thread

    def _wake(self) -> None:
        with self._news:
            self._news.notify_all()

    def _work(self) -> None:
        scheduler = self._scheduler
        while True:
            with self._news:
                self._news.wait_for(lambda: self._closing or scheduler.running or scheduler.waiting)
                gone = [t for t in (*scheduler.running, *scheduler.waiting) if self._closing or t.request.cancelled]
                for text in gone:
                    self._end(text, "cancelled")
                if self._closing:
                    return
                scheduler.admit()
                scheduler.max_rows = self._chunk()
                rows, work = scheduler.step()
            if not work:
                continue
            try:
                self._step(rows, work)
            except Exception as error:  # one broken request must not take the others' server down
                traceback.print_exc()
                for share in work:
                    if share.text in scheduler.running:
                        self._end(share.text, "error", f"{type(error).__name__}: {error}")

    def _chunk(self) -> int:
        """Rows for the next step: what takes PATIENCE seconds while other texts wait for their next token."""
        waiting = any(not text.prefilling for text in self._scheduler.running)
        return int(min(max(self._pace * PATIENCE, CHUNK[0]), CHUNK[1])) if waiting and self._pace else CHUNK[1]

    def _step(self, rows: Rows, shares: list[Share]) -> None:
        """Compute a step, draw the tokens that it is for, and draft."""
        start, decoding = time.perf_counter(), [share.text for share in shares if not share.text.prefilling]
        texts = max(1, len(self._scheduler.running))
        drafts, wanted = self._drafts.of(texts), sum(len(text.draft) for text in decoding)
        threads = self._threads.of(len(rows.tokens))
        self._network.threads = chosen = threads.pick()
        logits = iter(self._network.forward(rows))
        took = time.perf_counter() - start
        if self.approximate and self._network.used is not None:
            self.approximate.count(shares, self._network.used)
        threads.report(chosen, len(rows.tokens), took)
        made = self._counts["completion_tokens_total"]
        self._counts["forward_seconds_total"] += took
        if len(rows.tokens) >= CHUNK[0]:
            self._pace = len(rows.tokens) / took
        self._counts["steps_total"] += 1
        self._counts["rows_total"] += len(rows.tokens)
        for share in shares:
            text = share.text
            for number in range(share.start + 1, share.start + 1 + share.scored):
                text.request.prompt_logprobs.append(logprob(next(logits), text.targets[number], text.request.sampling.logprobs or 0))
            text.computed += share.count
            if text.computed == len(text.tokens):
                self._advance(text, [next(logits) for _ in range(1 + len(text.draft))])
            text.seal(self._pool)
        self._draft_length = length = drafts.pick() if self.speculates else 0
        if length or wanted:
            propose(self._network, shares, length)
        if len(decoding) == len(shares) and (wanted > 0) == (length > 0):
            drafts.report(length, self._counts["completion_tokens_total"] - made, time.perf_counter() - start)

    def _advance(self, text: Text, lines: list[np.ndarray]) -> None:
        """Draw a text's next tokens, as long as they are those that its draft guessed; end it where one was the last."""
        request, s = text.request, text.request.sampling
        made, ended = Piece("", [], None if s.logprobs is None else []), None
        for i, logits_V in enumerate(lines):
            token = choose(logits_V, s, request.seed, len(text.tokens), request.prompt, text.made if s.edits_logits else ())
            if token is None or (token in self._ends and not s.ignore_eos):
                ended = "stop", True
                break
            if s.grammar is not None:
                s.grammar.advance(token)
            text.tokens.append(token)
            if text.noted is not None:
                note(text, logits_V)
            request.usage["completion_tokens"] += 1
            self._counts["completion_tokens_total"] += 1
            piece, stopped = text.stream.push(token, None if s.logprobs is None else logprob(logits_V, token, s.logprobs))
            if piece:
                made.extend(piece)
            guessed = i < len(text.draft) and token == text.draft[i]
            if i < len(text.draft):
                for counts, suffix in ((request.usage, ""), (self._counts, "_total")):
                    counts["drafted" + suffix] += 1
                    counts["accepted" + suffix] += guessed
            if stopped:
                ended = "stop", False
            elif request.usage["completion_tokens"] == text.max_tokens:
                ended = "length", True
            if ended or not guessed:
                break
            text.computed += 1
        if made.text or made.tokens:
            request.give(made)
        if ended:
            reason, flush = ended
            self._end(text, reason, flush=flush)

    def _end(self, text: Text, reason: str, error: str | None = None, flush: bool = True) -> None:
        with self._news:
            self._scheduler.drop(text)
            for name in ("prompt_tokens", "cached_tokens"):
                self._counts[name + "_total"] += text.request.usage[name]
            self._counts["requests_total"] += 1
            self._counts[f"requests_{reason}_total"] += 1
            self._scheduler.waiting.extend(self.approximate.again(text, reason) if self.approximate else ())
            self._news.notify_all()
        last = text.stream.finish() if flush else None
        if last:
            text.request.give(last)
        text.request.finish(reason, error)
