"""A request's body held to its model (`requests`): pydantic checks, and its errors become one of OpenAI's that names the field."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ValidationError

from sparing.serve.errors import ApiError, bad

MUST = {
    "dict_type": "be an object",
    "model_type": "be an object",
    "model_attributes_type": "be an object",
    "list_type": "be an array",
    "string_type": "be a string",
    "float_type": "be a number",
    "int_type": "be an integer",
    "bool_type": "be true or false",
    "greater_than_equal": "be at least {ge}",
    "greater_than": "be above {gt}",
    "less_than_equal": "be at most {le}",
    "literal_error": "be one of {expected}",
    "union_tag_invalid": "be one of {expected_tags}",
    "string_too_short": "not be empty",
    "string_pattern_mismatch": "match {pattern}",
    "too_short": "have at least {min_length} entries",
    "too_long": "have at most {max_length} entries",
}
"""What a value must, by pydantic's name of the error (docs.pydantic.dev/latest/errors/validation_errors)."""
MAX_ERRORS = 10_000
"""Listing them takes pydantic a second per 200,000, during which the server answers nobody. Only objects make many: arrays fail fast."""


def parse(body: bytes, model: type[BaseModel]) -> dict:
    """A request's body as `check` returns it. Raises ApiError 400 naming the field."""
    try:
        value = json.loads(body.decode(), parse_constant=_no_constant)
        if b"\\u" in body:  # the only way in for half of a surrogate pair, which no answer and no log could repeat
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise bad("The body is nested too deeply.") from None
    except UnicodeEncodeError:
        raise bad("The body has a lone surrogate, which is no Unicode text.") from None
    except ValueError as error:  # invalid UTF-8 and numbers of thousands of digits too
        raise bad(f"The body is not JSON: {str(error)[:200]}") from None
    return check(value, model)


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON")


def check(value: Any, model: type[BaseModel]) -> dict:
    """`value` held to `model`: a copy without the fields that are null, whole floats as integers. Raises ApiError 400."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        if error.error_count() > MAX_ERRORS:
            raise bad(f"The body has {error.error_count()} mistakes.") from None
        raise _complaint(error.errors(include_url=False), value) from None


def _complaint(errors: list[dict], body: Any) -> ApiError:
    """One of pydantic's errors, in OpenAI's words.

    Each type of a union makes an error. The one that came furthest counts: rather about a value than about its type, rather inside,
    rather late in an array. Errors that came equally far at the same place are joined.
    """
    places = [_place(error, body) for error in errors]
    place = max(places, key=lambda place: place[0])
    same = [error for error, other in zip(errors, places) if other == place]
    error, path = same[0], place[1]
    where = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")
    if error["type"] in ("missing", "union_tag_not_found"):
        return bad(f"Missing required parameter: '{where}'.", where, "missing_required_parameter")
    if error["type"] == "extra_forbidden":
        return bad(f"Unrecognized request argument supplied: {_short(path[-1])}", where[:80], "unknown_parameter")
    context = error.get("ctx", {})
    got = _short(context.get("actual_length", context.get("tag", error["input"])))
    what = ("A key of " if error["loc"][-1:] == ("[key]",) else "") + (f"'{where}'" if where else "The body")
    must = " or ".join(dict.fromkeys(map(_must, same))).replace(" or be ", " or ")
    return bad(f"{what} must {must}{got and ', not '}{got}.", where or None)


def _place(error: dict, body: Any) -> tuple[tuple[bool, int, int], list[str | int]]:
    """How far an error came, and the fields and indices to it: its `loc` without the names of a union's types and of wrong keys."""
    kind, loc, path = error["type"], error["loc"], []
    for step in loc[:-2] if loc[-1:] == ("[key]",) else loc:
        if step in body if isinstance(body, dict) else isinstance(body, list) and isinstance(step, int):
            path.append(step)
            body = body[step]
    path += [loc[-1]] if kind == "missing" else ["type"] if kind.startswith("union_tag") else []
    about_type = kind.endswith("_type") or kind == "missing" or (kind == "literal_error" and not isinstance(error["input"], str))
    return (not about_type, len(path), path[-1] if path and isinstance(path[-1], int) else -1), path


def _must(error: dict) -> str:
    context = {name: str(value).removesuffix(".0").replace("'", "").replace(" or ", ", ") for name, value in error.get("ctx", {}).items()}
    return MUST.get(error["type"], "be valid").format(**context)


def _short(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    text = repr(value) if not isinstance(value, str) else value.encode("unicode_escape").decode()
    return text if len(text) <= 60 else text[:57] + "..."
