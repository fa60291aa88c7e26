"""Bodies held to JSON Schema: `check` answers with OpenAI-style errors that name the field (`requests` has the schemas)."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from sparing.serve.errors import ApiError, bad

Schema = dict[str, Any]
KINDS = {
    "object": (dict, "an object"),
    "array": (list, "an array"),
    "string": (str, "a string"),
    "number": ((int, float), "a number"),
    "integer": (int, "an integer"),
    "boolean": (bool, "true or false"),
    "null": (type(None), "null"),
}


class WrongType(ApiError):
    """Not a value out of its range, but another kind of value."""


def wrong_type(message: str, param: str | None) -> WrongType:
    return WrongType(400, message, param)


def parse(body: bytes, schema: Schema) -> dict:
    """A request's body as the schema has it: fields that are null are left out. Raises ApiError 400 naming the field."""
    try:
        value = json.loads(body.decode(), parse_constant=_no_constant)
    except RecursionError:
        raise bad("The body is nested too deeply.") from None
    except ValueError as error:  # invalid UTF-8 and numbers of thousands of digits too
        raise bad(f"The body is not JSON: {str(error)[:200]}") from None
    return check(value, schema)


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON")


def check(value: Any, schema: Schema, where: str = "") -> Any:
    """`value` held to `schema`: a copy without the optional fields that are null, whole floats as integers. Raises ApiError 400."""
    if "anyOf" in schema:
        return _any_of(value, schema["anyOf"], where)
    if "enum" in schema and (not isinstance(value, str) or value not in schema["enum"]):
        complain = bad if isinstance(value, str) else wrong_type
        raise complain(f"{_the(where)} must be one of {', '.join(schema['enum'])}, not {_short(value)}.", where or None)
    kind = schema.get("type")
    if kind is None:
        return value
    if kind == "integer" and isinstance(value, float) and value.is_integer():
        value = int(value)
    python, name = KINDS[kind]
    if not isinstance(value, python) or (isinstance(value, bool) and kind != "boolean"):
        raise wrong_type(f"{_the(where)} must be {name}, not {_short(value)}.", where or None)
    if kind == "string":
        _check_text(value, schema, where)
    elif kind in ("number", "integer"):
        _check_number(value, schema, where)
    elif kind == "array":
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            raise bad(f"{_the(where)} must have {_span(schema)} entries, not {len(value)}.", where or None)
        return [check(item, schema["items"], f"{where}[{i}]") for i, item in enumerate(value)]
    elif kind == "object":
        return _check_object(value, schema, where)
    return value


def _any_of(value: Any, choices: list[Schema], where: str) -> Any:
    """The first that fits; else the complaint of the one that came furthest: rather about a value than about its type, rather inside."""
    best = None
    for choice in choices:
        try:
            return check(value, choice, where)
        except ApiError as error:
            far = (not isinstance(error, WrongType), len(error.param or ""))
            if best is None or far > best[0]:
                best = (far, error)
    raise best[1]


def _check_text(value: str, schema: Schema, where: str) -> None:
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise bad(f"{_the(where)} has a lone surrogate, which is no Unicode text.", where or None)
    if len(value) < schema.get("minLength", 0):
        raise bad(f"{_the(where)} must not be empty.", where or None)
    if "pattern" in schema and not re.search(schema["pattern"], value):
        raise bad(f"{_the(where)} must match {schema['pattern']}.", where or None)


def _check_number(value: float, schema: Schema, where: str) -> None:
    low, above, high = schema.get("minimum", -math.inf), schema.get("exclusiveMinimum", -math.inf), schema.get("maximum", math.inf)
    if not (math.isfinite(value) and low <= value <= high and value > above):
        floor = f"above {above:g}" if above > -math.inf else f"at least {low}"
        raise bad(f"{_the(where)} must be {floor} and at most {high}, not {_short(value)}.", where or None)


def _check_object(value: dict, schema: Schema, where: str) -> dict:
    fields, required, out = schema.get("properties", {}), schema.get("required", ()), {}
    for name, item in value.items():
        path = _join(where, name)
        if any("\ud800" <= char <= "\udfff" for char in name):
            raise bad(f"{_the(where)} has a name that is no Unicode text.", where or None)
        rest = schema.get("additionalProperties", {})
        if name not in fields and rest is False:
            raise bad(f"Unrecognized request argument supplied: {_short(name)}", path[:80], "unknown_parameter")
        if "propertyNames" in schema and not re.search(schema["propertyNames"]["pattern"], name):
            raise bad(f"{_the(where)}: {_short(name)} must match {schema['propertyNames']['pattern']}.", where)
        item = check(item, fields.get(name, rest), path)
        if item is not None or name in required:
            out[name] = item
    for name in required:
        if name not in value:
            raise bad(f"Missing required parameter: '{_join(where, name)}'.", _join(where, name), "missing_required_parameter")
    return out


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _the(where: str) -> str:
    return f"'{where}'" if where else "The body"


def _span(schema: Schema) -> str:
    low, high = schema.get("minItems", 0), schema.get("maxItems")
    return f"at least {low}" if high is None else f"{low} to {high}"


def _short(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    text = repr(value) if not isinstance(value, str) else value.encode("unicode_escape").decode()
    return text if len(text) <= 60 else text[:57] + "..."
