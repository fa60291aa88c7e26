"""Makes an lm-eval task of a user's file of questions: JSON or JSON lines, each row in one of these shapes.

- `question`, `choices` and `answer` (the right choice, its number from 0 or its letter): the likeliest choice should be the right one;
- `instruction` and `answer` as LLM-Adapters writes them (arXiv 2304.01933, github.com/AGI-Edgerunners/LLM-Adapters): the same;
- `question` and `answer`: what the model writes on one line should be the answer, whatever its case and punctuation;
- `text`: the last word should be the likeliest way to go on, as in LAMBADA (arXiv 1606.06031).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from sparing.base.config import UserError
from sparing.base.files import read_text

_INSTRUCTION = re.compile(r"question: (.*?)\s+((?:Answer|Solution)1:.*?)\s+Answer format:", re.S)
_NUMBER = re.compile(r"\s*(?:Answer|Solution)\d+:\s*")
QUESTION = "Question: {{question}}\nAnswer:"
FORMS: dict[str, dict] = {
    "choices": {
        "output_type": "multiple_choice", "doc_to_text": QUESTION, "doc_to_target": "right", "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "answer": {
        "output_type": "generate_until", "doc_to_text": QUESTION, "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 64},
        "filter_list": [{"name": "line", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", "ignore_case": True, "ignore_punctuation": True}],
    },
    "word": {
        "output_type": "loglikelihood", "doc_to_text": "{{before}}", "doc_to_target": " {{word}}", "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    },
}  # fmt: skip
"""What lm-eval's task format says of each shape; `fields` makes the rows."""


def read(path: str | Path) -> tuple[str, list[dict]]:
    """-> (a key of FORMS, the rows' fields). Raises UserError for a file that cannot be read, naming the first row in no known shape."""
    text = read_text(path)
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    fields = [_fields(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]
    if len({form for form, _ in fields}) != 1:
        raise UserError(f"{path}: " + ("has rows of different shapes" if fields else "has no rows"))
    return fields[0][0], [row for _, row in fields]


def _fields(row, where: str) -> tuple[str, dict]:
    row = row if isinstance(row, dict) else {}
    question, choices, answer = row.get("question"), row.get("choices"), row.get("answer")
    if matched := _INSTRUCTION.search(str(row.get("instruction", ""))):
        question, choices = matched[1], _NUMBER.split(matched[2].strip())[1:]
        number = re.fullmatch(r"(?:answer|solution)(\d+)", str(answer))
        answer = int(number[1]) - 1 if number else None
    if isinstance(question, str) and isinstance(choices, list) and len(choices) > 1:
        choices = [str(choice).strip() for choice in choices]
        letter = "ABCDEFGHIJ".find(answer) if isinstance(answer, str) and len(answer) == 1 else -1
        right = choices.index(answer) if answer in choices else letter if letter >= 0 else answer
        if isinstance(right, int) and 0 <= right < len(choices):
            return "choices", {"question": question, "choices": choices, "right": right}
        raise UserError(f"{where}: answer {answer!r} is none of its {len(choices)} choices")
    if isinstance(question, str) and answer is not None:
        return "answer", {"question": question, "answer": str(answer)}
    words = str(row.get("text") or "").rsplit(None, 1)
    if len(words) == 2:
        return "word", {"before": words[0], "word": words[1]}
    raise UserError(f"{where}: has neither question, choices and answer, nor question and answer, nor text")


def task(path: str | Path) -> dict:
    """An lm-eval task named after the file, for `lm_eval.simple_evaluate(tasks=[...])`: no model and no network is needed for it."""
    import datasets  # lm-eval's own

    form, rows = read(path)
    splits = {"test": datasets.Dataset.from_list(rows)}
    return {"task": Path(path).stem, "test_split": "test", "custom_dataset": lambda **_: splits, **FORMS[form]}
