"""The engine: continues many token sequences at once, on a thread of its own."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from sparing.base.config import UserError
from sparing.base.config_file import read_config
from sparing.base.files import DamagedError
from sparing.base.hardware import cores
from sparing.base.layers import layers
from sparing.base.run import RunFolder, StoredTensors, weights_sha256
from sparing.data.tokenizer import Tokenizer
from sparing.infer.approximate import Approximate, ApproximateTier, draw_for_check
from sparing.infer.live import LiveWeights
from sparing.infer.network import (
    CompiledNetwork,
    Factors,
    Rows,
    TorchNetwork,
    cannot_adapt,
    choose_backend,
    load_transformer,
    slow_format,
)
from sparing.infer.packed_weights import open_packed
from sparing.infer.request import Busy, GrammarFailed, Piece, Request, Sampling, TextStream
from sparing.infer.sample import choose, logprob, propose
from sparing.infer.scheduler import BlockManager, Scheduler, Span, SpeedTuner, TokenSequence
from sparing.kernels import native
from sparing.kernels.sizes import CACHE_BLOCK as BLOCK
from sparing.model.transformer import Transformer

MAX_DRAFT = 3
CHUNK = (32, 256)
"""Fewest and most rows of a step: with more, weights are read less often, but what is computed between products leaves the cache."""
MAX_STEP_S = 0.25
"""Longest step while running sequences wait for their next token."""


class Engine:
    """A run's model, ready for requests. Close it, or use it in a `with`.

    weights: number format: "float32", "bfloat16", "int8" (a scale per row), "int4" (a scale per 32), or "auto": the fastest here.
    cache_bytes: most memory of the key-value cache (default: room for `max_batch` full contexts, at most 1 GiB).
    max_batch: sequences in one step. max_queue: requests that may wait. speculate: draft tokens with the model's MTP module and verify
    them; None: where that cannot change a text. threads: default: one per core. expert_bytes: keep at most so many bytes of routed experts
    in memory, the others on disk (default: no limit). device: "cpu", "cuda", or "auto": a GPU if there is one, unless the weights are
    int8 or int4. approximate: let requests ask for fewer experts. network: the run's model in memory, instead of its weights on disk.
    adapters: adapter runs of this run by the names that `Sampling.adapter` gives them. Their updates are added to the run's own products,
    so that one step may have rows of several. live: weights of the run's model in memory, which may change between requests (`renew`).

    Writes nothing into the run folder but packed weights and calibrations, and those only if it can. Raises UserError for a folder
    without weights or tokenizer, and for what this machine cannot run.
    """

    def __init__(
        self,
        run: Path | str,
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
        network: Transformer | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        live: LiveWeights | None = None,
    ):
        folder = RunFolder.open(run)
        self.name = folder.path.resolve().name
        config = read_config(folder.config_file)
        self.config = network.config if network else config.model
        if not folder.tokenizer_file.exists():
            raise UserError(f"{run} has no tokenizer.json: it cannot read or write text")
        self.tokenizer = Tokenizer.load(folder.tokenizer_file, config.tokens)
        weights = live.format if live else weights
        self.device, self.weights, self.plain = backend = choose_backend(self.config, device, weights, network)
        if (weights != "auto" or self.plain) and not network and (message := slow_format(backend)):
            print(message, file=sys.stderr)
        self.speculates: bool = not self.plain and self.config.mtp_depth > 0 if speculate is None else speculate
        """Whether tokens are drafted and verified; how many at a time follows the measured speed."""
        if self.speculates and not self.config.mtp_depth:
            raise UserError("speculate: the model has no MTP module")
        if self.plain and expert_bytes:
            raise UserError(f"a limit for experts needs the compiled step ({self.plain})")
        factors = {name: _factors(name, path, folder) for name, path in (adapters or {}).items()}
        if factors and (why := self.plain or cannot_adapt(self.config)):
            raise UserError(f"adapters beside this model cannot be computed ({why}): `sparing merge` makes a run of each")
        self.adapters = list(factors)
        """Names."""
        self.context: int = self.config.max_position_embeddings
        self.max_batch, self.max_queue = max_batch or 16, max_queue
        number_bytes = 2 if self.plain and self.weights == "bfloat16" else 4
        block_bytes = BLOCK * sum(layer.attention.cache_width for layer in layers(self.config)) * number_bytes
        most = self.max_batch * -(-self.context // BLOCK)
        self.cache_bytes = min(most * block_bytes, 1 << 30) if cache_bytes is None else cache_bytes
        blocks = min(most, self.cache_bytes // block_bytes)
        if blocks < 1:
            raise UserError(f"a cache of {self.cache_bytes} bytes: one block of {BLOCK} tokens takes {block_bytes}")
        self.cache_bytes = blocks * block_bytes
        self._manager = BlockManager(blocks)
        self._network: TorchNetwork | CompiledNetwork
        if self.plain:
            assert live is None, "the plain network reads no packed weights"
            network = network or load_transformer(folder, self.config, self.device, getattr(torch, self.weights))
            self._network = TorchNetwork(network, blocks)
        else:
            self.packed_weights = live or open_packed(folder, self.config, self.weights)
            sizes = blocks, threads or cores(), expert_bytes or 0
            self._network = CompiledNetwork(self.config, self.packed_weights, self.weights, *sizes, adapters=list(factors.values()))
        self.approximate = ApproximateTier(approximate, folder, self._network, self.tokenizer) if approximate else None
        self._scheduler = Scheduler(self._manager, self.max_batch, CHUNK[1])
        self._rows_per_s = 0.0  # of steps with a prompt in them
        draft_lengths = range(MAX_DRAFT + 1) if self.speculates else [0]
        self._draft_tuners, self._draft_length = defaultdict(lambda: SpeedTuner(draft_lengths)), 0
        self.threads: int = self._network.threads
        thread_counts = sorted({self.threads, max(1, self.threads // 2), 1}, reverse=True)
        self._thread_tuners = defaultdict(lambda: SpeedTuner(thread_counts, least=2))  # both by the bits of a step's size
        self._ends = set(self.tokenizer.eos_ids)
        native.trim_heap()  # what reading the tokenizer took is more than a step will
        self._counts: Counter[str] = Counter()
        """The engine's thread changes it all the time; others read `_published`."""
        self._published: dict[str, float] = {}
        self._publish()
        self._news = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    # for callers

    def submit(self, prompt: Sequence[int], sampling: Sampling, on_piece: Callable[[Piece | None], None] | None = None) -> Request:
        """Queue a prompt of token ids and return at once; `Request` says how to read the answer.

        An answer ends with the context, whatever `max_tokens` is. Raises Busy if the queue is full or the engine is closing; UserError for
        an empty prompt, ids outside the vocabulary, and prompts that do not fit the context or the cache.
        """
        if not len(prompt):
            raise UserError("the prompt has no tokens")
        size = self.config.vocab_size
        if any(not 0 <= token < size for token in (*prompt, *sampling.logit_bias)):
            raise UserError(f"token ids must be from 0 to {size - 1}")
        room = min(self.context, self._manager.count * BLOCK) - len(prompt)
        if room < 1:
            raise UserError(f"the prompt has {len(prompt)} tokens; there is room for {self.context} with its continuation")
        request = Request(prompt, sampling, on_piece)
        seq = TokenSequence(request, TextStream(self.tokenizer, sampling.stop), min(sampling.max_tokens, room))
        request._wake = self._wake
        if sampling.adapter is not None:
            if sampling.adapter not in self.adapters:
                raise UserError(f"this engine has no adapter {sampling.adapter!r}: {', '.join(self.adapters) or 'it has none'}")
            seq.adapter = self.adapters.index(sampling.adapter)
        if sampling.approximate:
            if self.approximate is None:
                raise UserError("this engine answers exactly only: its operator has not allowed `approximate`")
            self.approximate.begin(seq)
        with self._news:
            if self._closing:
                raise Busy("the engine is shutting down")
            if len(self._scheduler.waiting) >= self.max_queue:
                raise Busy(f"{self.max_queue} requests are waiting already")
            self._scheduler.waiting.append(seq)
            self._news.notify_all()
        return request

    def metrics(self) -> dict[str, float]:
        """Counters since the start (`*_total`) and the current state, by name."""
        with self._news:
            state = {
                "requests_running": len(self._scheduler.running),
                "requests_waiting": len(self._scheduler.waiting),
                "cache_bytes": self.cache_bytes,
                "cache_blocks": self._manager.count,
                "cache_blocks_free": self._manager.free,
                "cache_blocks_reusable": self._manager.cached,
                "cache_evictions_total": self._manager.evicted,
                "max_batch": self.max_batch,
                "prefill_chunk": self._scheduler.max_rows,
                "speculates": self.speculates,
                "draft_length": self._draft_length,
                "threads": self._network.threads,
                "queue_limit": self.max_queue,
            }
            return {name: float(value) for name, value in (state | self._published).items()}

    def renew(self) -> None:
        """Forget what is cached: the weights in memory have changed. No request may be under way."""
        with self._news:
            assert not self._scheduler.running and not self._scheduler.waiting
            self._manager = self._scheduler.manager = BlockManager(self._manager.count)

    def close(self) -> None:
        """Cancel all requests and stop."""
        with self._news:
            self._closing = True
            self._news.notify_all()
        self._thread.join()
        self._network.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # on the engine's thread

    def _wake(self) -> None:
        with self._news:
            self._news.notify_all()

    def _work(self) -> None:
        scheduler = self._scheduler
        while True:
            with self._news:
                self._publish()
                self._news.wait_for(lambda: self._closing or scheduler.running or scheduler.waiting)
                for seq in [s for s in (*scheduler.running, *scheduler.waiting) if self._closing or s.request.cancelled]:
                    self._end(seq, "cancelled")
                if self._closing:
                    return
                scheduler.admit()
                scheduler.max_rows = self._max_rows()
                rows, spans = scheduler.step()
            if not spans:
                continue
            try:
                self._step(rows, spans)
            except Exception as error:  # ends the step's requests, not the server
                traceback.print_exc()
                for span in spans:
                    if span.seq in scheduler.running:
                        self._end(span.seq, "error", f"{type(error).__name__}: {error}")

    def _publish(self) -> None:
        """Copy the counters for `metrics`; `_news` is held."""
        self._published = {**self._counts, **self._network.metrics(), **(self.approximate.metrics() if self.approximate else {})}

    def _max_rows(self) -> int:
        """Rows of the next step: as many as take MAX_STEP_S if sequences wait for their next token."""
        waiting = any(not seq.prefilling for seq in self._scheduler.running)
        return int(min(max(self._rows_per_s * MAX_STEP_S, CHUNK[0]), CHUNK[1])) if waiting and self._rows_per_s else CHUNK[1]

    def _step(self, rows: Rows, spans: list[Span]) -> None:
        """Compute a step, sample the next tokens, and draft those after them."""
        start, decoding = time.perf_counter(), [span.seq for span in spans if not span.seq.prefilling]
        draft_tuner = self._draft_tuners[max(1, len(self._scheduler.running)).bit_length()]
        drafted = any(seq.draft for seq in decoding)
        thread_tuner = self._thread_tuners[len(rows.tokens).bit_length()]
        self._network.threads = threads = thread_tuner.pick()
        logits = iter(self._network.forward(rows))
        took = time.perf_counter() - start
        if self.approximate and self._network.used is not None:
            self.approximate.count(spans, self._network.used)
        thread_tuner.report(threads, len(rows.tokens), took)
        generated = self._counts["completion_tokens_total"]
        self._counts["forward_seconds_total"] += took
        if len(rows.tokens) >= CHUNK[0]:
            self._rows_per_s = len(rows.tokens) / took
        self._counts["steps_total"] += 1
        self._counts["rows_total"] += len(rows.tokens)
        for span in spans:
            seq = span.seq
            if seq.request.sampling.routes:
                assert self._network.routes is not None and not seq.draft
                seq.request.routes.append(self._network.routes[span.row : span.row + span.count])
            for position in range(span.start + 1, span.start + 1 + span.scored):
                alternatives = seq.request.sampling.logprobs or 0
                seq.request.prompt_logprobs.append(logprob(next(logits), seq.targets[position], alternatives))
            seq.computed += span.count
            if seq.computed == len(seq.tokens):
                self._advance(seq, [next(logits) for _ in range(1 + len(seq.draft))])
            seq.seal(self._manager)
        self._draft_length = length = draft_tuner.pick() if self.speculates else 0
        if length or drafted:
            propose(self._network, spans, length)
        if len(decoding) == len(spans) and drafted == (length > 0):
            draft_tuner.report(length, self._counts["completion_tokens_total"] - generated, time.perf_counter() - start)

    def _advance(self, seq: TokenSequence, logits: list[np.ndarray]) -> None:
        """Sample a sequence's next token, and further ones while they agree with its draft; end the sequence after its last token."""
        request, s = seq.request, seq.request.sampling
        final = Piece("", [], None if s.logprobs is None else [])
        reason, error, flush = "", None, True
        for i, logits_V in enumerate(logits):
            try:
                token = choose(logits_V, s, request.seed, len(seq.tokens), request.prompt, seq.generated if s.edits_logits else ())
            except GrammarFailed as failure:
                reason, error = "grammar", str(failure)
                break
            if token is None or (token in self._ends and not s.ignore_eos):
                reason = "stop"
                if token is not None and s.logprobs is not None:
                    request.end = logprob(logits_V, token, s.logprobs)
                break
            if s.grammar is not None:
                s.grammar.advance(token)
            seq.tokens.append(token)
            if seq.drawn is not None:
                draw_for_check(seq, logits_V)
            request.usage["completion_tokens"] += 1
            self._counts["completion_tokens_total"] += 1
            piece, stopped = seq.stream.push(token, None if s.logprobs is None else logprob(logits_V, token, s.logprobs))
            if piece:
                final.extend(piece)
            accepted = i < len(seq.draft) and token == seq.draft[i]
            if i < len(seq.draft):
                for counts, suffix in ((request.usage, ""), (self._counts, "_total")):
                    counts["drafted" + suffix] += 1
                    counts["accepted" + suffix] += accepted
            if stopped:
                reason, flush = "stop", False
            elif request.usage["completion_tokens"] == seq.max_tokens:
                reason = "length"
            if reason or not accepted:
                break
            seq.computed += 1
        if final.text or final.tokens:
            request.give(final)
        if reason:
            self._end(seq, reason, error, flush)

    def _end(self, seq: TokenSequence, reason: str, error: str | None = None, flush: bool = True) -> None:
        """Finish a request. flush: give the text that was held back first."""
        with self._news:
            self._scheduler.drop(seq)
            for name in ("prompt_tokens", "cached_tokens"):
                self._counts[name + "_total"] += seq.request.usage[name]
            self._counts["requests_total"] += 1
            self._counts[f"requests_{reason}_total"] += 1
            self._scheduler.waiting.extend(self.approximate.exact_check(seq, reason) if self.approximate else ())
            self._publish()
            self._news.notify_all()
        last = seq.stream.finish() if flush else None
        if last:
            seq.request.give(last)
        seq.request.finish(reason, error)


def _factors(name: str, path: str | Path, base: RunFolder) -> Factors:
    """The updates of the adapter run at `path`. Raises UserError where that is none, or one of other weights than `base` has."""
    run = RunFolder.open(path)
    config = read_config(run.config_file)
    if config.adapter is None or not run.adapter_file.exists():
        raise UserError(f"adapter {name}: {path} is no adapter run" + (" (yet)" if config.adapter else ""))
    if config.start.weights_sha256 != weights_sha256(base):
        raise UserError(f"adapter {name}: {path} was trained on other weights than {base} has ({config.start.run})")
    try:
        return Factors(dict(StoredTensors(run.adapter_file)), config.adapter.rank, config.adapter.alpha)
    except DamagedError as error:
        raise UserError(f"adapter {name}: {error}") from None
