"""Makes an lm-eval task of a user's file of questions: JSON or JSON lines, each row in one of these shapes.

- `question`, `choices` and `answer` (the right choice, its number from 0 or its letter): the likeliest choice should be the right one.
  `choices` is a list of two texts or more, or ARC's {"text": [...], "label": [...]} (arXiv 1803.05457) with the label as `answerKey`;
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
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    fields = [_fields(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]
    if len({form for form, _ in fields}) != 1:
        raise UserError(f"{path}: " + ("has rows of different shapes" if fields else "has no rows"))
    return fields[0][0], [row for _, row in fields]


def _fields(row, where: str) -> tuple[str, dict]:
    row = row if isinstance(row, dict) else {}
    question, choices, answer = row.get("question"), row.get("choices"), row.get("answer", row.get("answerKey"))
    if matched := _INSTRUCTION.search(str(row.get("instruction", ""))):
        question, choices = matched[1], _NUMBER.split(matched[2].strip())[1:]
        number = re.fullmatch(r"(?:answer|solution)(\d+)", str(answer))
        answer = int(number[1]) - 1 if number else None
    if isinstance(question, str) and choices is not None:
        choices, right = _choices(choices, answer, where)
        return "choices", {"question": question, "choices": choices, "right": right}
    if isinstance(question, str) and answer is not None:
        if not isinstance(answer, str | int | float):
            raise UserError(f"{where}: answer is {answer!r}, expected text or a number")
        return "answer", {"question": question, "answer": str(answer)}
    words = row["text"].rsplit(None, 1) if isinstance(row.get("text"), str) else []
    if len(words) == 2:
        return "word", {"before": words[0], "word": words[1]}
    keys = f" (keys: {', '.join(map(str, list(row)[:8]))})" if row else ""
    raise UserError(f"{where}: has neither question, choices and answer, nor question and answer, nor text of two words or more{keys}")


def _choices(choices: object, answer: object, where: str) -> tuple[list[str], int]:
    """-> (the choices, the number of the right one). Raises UserError for what is no list of choices, and where none of them is right."""
    labels, labelled = list("ABCDEFGHIJ"), isinstance(choices, dict) and isinstance(choices.get("label"), list)
    if labelled:
        choices, labels = choices.get("text"), choices["label"]
    if not isinstance(choices, list) or not all(type(choice) in (str, int, float) for choice in choices):
        raise UserError(f"{where}: choices is {str(choices)[:60]!r}, expected a list of texts, or ARC's lists under text and label")
    texts = [str(choice).strip() for choice in choices]
    if len(texts) < 2 or "" in texts:
        what = f"choice {texts.index('')} is empty" if "" in texts else f"there is {len(texts)} choice"
        raise UserError(f"{where}: {what}, expected two texts or more")
    said = answer.strip() if isinstance(answer, str) else str(answer) if answer in choices and type(answer) is not bool else None
    if said in texts and not labelled:
        right = texts.index(said)
    else:
        right = labels.index(answer) if answer in labels else answer
    if type(right) is int and 0 <= right < len(texts):
        return texts, right
    raise UserError(f"{where}: answer {answer!r} is none of its {len(texts)} choices")


def task(path: str | Path, name: str | None = None) -> dict:
    """An lm-eval task for `lm_eval.simple_evaluate(tasks=[...])`, named after the file unless `name` is given: no model and no network is
    needed for it."""
    import datasets  # lm-eval's own

    form, rows = read(path)
    splits = {"test": datasets.Dataset.from_list(rows)}
    return {"task": name or Path(path).stem, "test_split": "test", "custom_dataset": lambda **_: splits, **FORMS[form]}
