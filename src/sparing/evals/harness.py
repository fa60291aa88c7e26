"""Runs lm-eval (github.com/EleutherAI/lm-evaluation-harness) in this process, over two callables: one that scores, one that writes.

The figures are those that its `local-completions` finds at our server: a context that is not empty begins without an end-of-text token.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

from sparing.base.config import UserError
from sparing.data.tokenizer import Tokenizer
from sparing.evals.tasks import task

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise UserError("eval --tasks needs lm-eval: pip install 'sparing[eval]'") from None

ScoreFn = Callable[[Iterable[list[int]]], Iterator[list[tuple[float, bool]]]]
"""Texts as token ids -> for each, of every token but the first: its log-probability in nats, and whether it was the likeliest."""
WriteFn = Callable[[Iterable[tuple[list[int], dict]]], Iterator[str]]
"""(prompt, settings) -> what the model writes; settings: max_tokens, temperature, stop, seed and whatever else a task says."""
SEED = 1234
"""lm-eval's own."""
MADE_TOKENS = 256
"""Where a task does not say how many."""


@cache
def _manager(defaults: bool) -> TaskManager:
    """Kept, because it reads the thousands of files of lm-eval's own tasks (`defaults`), which takes seconds."""
    return TaskManager(include_defaults=defaults)


class HarnessModel(TemplateLM):
    """Our model, as lm-eval sees it. context: the most tokens that it reads; as in a server, the last place is kept for a new token."""

    def __init__(self, tokenizer: Tokenizer, context: int, score: ScoreFn, write: WriteFn):
        super().__init__()
        self.tokenizer, self.room, self._score, self._write = tokenizer, context - 1, score, write

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eot_id

    @property
    def prefix_token_id(self) -> int:
        """Stands before a text that has no context."""
        return self.tokenizer.first_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return self.tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        """requests: (anything, context's ids, continuation's ids); what does not fit is cut off at the left."""
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest >= self.room:
            raise UserError(f"a text to be scored has {longest} tokens; the model reads {self.room} with what goes before it")
        texts = ((context + continuation)[-self.room :] for _, context, continuation in requests)
        counts = [len(continuation) for _, _, continuation in requests]
        return [_total(rows[len(rows) - count :]) for rows, count in zip(self._score(texts), counts, strict=True)]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        scores = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.prefix_token_id, max_seq_len=self.room - 1, context_len=1)
            parts = self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in windows])
            scores.append(sum(nats for nats, _ in parts))
        return scores

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        return list(self._write(self._prompt(*request.args) for request in requests))

    def _prompt(self, text: str, settings: dict) -> tuple[list[int], dict]:
        settings = {"temperature": 0, "seed": SEED, **settings}
        settings.pop("do_sample", None)
        until, default = settings.pop("until", None) or [], settings.pop("max_gen_toks", MADE_TOKENS)
        settings |= {"stop": (until,) if isinstance(until, str) else tuple(until), "max_tokens": settings.get("max_tokens", default)}
        return self.tok_encode(text)[-max(1, self.room - default) :], settings


def _total(rows: Sequence[tuple[float, bool]]) -> tuple[float, bool]:
    return sum(nats for nats, _ in rows), all(likeliest for _, likeliest in rows)


def _titles(files: Sequence[str], others: Sequence[str]) -> dict[str, str]:
    """A name for each file of questions: its own without the suffix, or the whole path where that is another's too. Raises UserError for a
    file that is given twice."""
    titles: dict[str, str] = {}
    stems = [Path(file).stem for file in files] + list(others)
    seen: dict[Path, str] = {}
    for file in files:
        if (path := Path(file).resolve()) in seen:
            raise UserError(f"--tasks: {file} and {seen[path]} are the same file")
        seen[path] = file
        titles[file] = Path(file).stem if stems.count(Path(file).stem) == 1 else file
    return titles


def _line(error: Exception) -> str:
    """What went wrong, in one line."""
    said = next((line for line in str(error.args[0] if error.args else error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said[:300]}" if said else type(error).__name__


def run_tasks(model: TemplateLM, tasks: Sequence[str], limit: int | None = None) -> list[dict]:
    """One {"name", "items", and the task's metrics with their standard errors (`acc`, `acc_stderr`, ...)} for each task.

    tasks: files of questions (`tasks.task`), lm-eval's own YAML files, or names that it knows, whose data it downloads. limit: items of
    each, from the beginning. Raises UserError for a task that is none of these.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval would fork this process, threads and all, for its standard errors
    files = [name for name in tasks if Path(name).suffix in (".json", ".jsonl")]
    titles = _titles(files, [name for name in tasks if name not in files])
    specs = [task(name, titles[name]) if name in titles else name for name in tasks]
    named = [spec for spec in specs if isinstance(spec, str) and Path(spec).suffix not in (".yaml", ".yml")]
    try:
        loaded = _manager(bool(named)).load(specs)
    except Exception as error:  # whatever lm-eval, its data sets and the network come up with
        if len(files) == len(specs):
            raise
        hint = " (the data of a named task comes from the internet; a file of questions needs none)" if named else ""
        raise UserError(f"--tasks {' '.join(name for name in tasks if name not in files)}: {_line(error)}{hint}") from None
    for one in loaded["tasks"].values():
        one.set_fewshot_seed(seed=SEED)
    with contextlib.redirect_stdout(sys.stderr):
        results = lm_eval.evaluate(model, loaded, limit=limit, bootstrap_iters=1000, log_samples=False)
    return [
        {"name": name, "items": results["n-samples"][name]["effective"]}
        | {key.split(",")[0]: value for key, value in values.items() if "," in key and value != "N/A"}
        for name, values in results["results"].items()
        if name in results["n-samples"]
    ]
