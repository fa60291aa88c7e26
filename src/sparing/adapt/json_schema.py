"""Says whether a JSON value keeps to a JSON schema (draft 2020-12): its own checker of the keywords that people use for answers.

The serve extra's llguidance knows schemas as grammars, which also fix the order of keys. A keyword that is not known here is refused and
not passed over.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
    "number": lambda value: _is_number(value),
    "integer": lambda value: _is_number(value) and value == int(value),
}
SAYS_NOTHING = frozenset(
    ("title", "description", "default", "examples", "$schema", "$comment", "$id", "$defs", "definitions", "format", "deprecated",
     "readOnly", "writeOnly")
)  # fmt: skip
"""Keywords that no value can offend; `format` is one unless a validator is told otherwise."""
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
DEEPEST = 100
"""Schemas within schemas; one that refers to itself without going into the value has no end."""


class BadSchema(ValueError):
    """A schema that cannot be used, and why."""


def parse_json(text: str) -> Any:
    """A JSON value. Raises ValueError, of what only Python would read too."""

    def refuse(name: str):
        raise ValueError(f"{name} is no JSON")

    def number(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else refuse(digits)

    try:
        return json.loads(text, parse_constant=refuse, parse_float=number)
    except RecursionError:
        raise ValueError("too deep") from None


def check_schema(schema: Any) -> None:
    """Raises BadSchema for what is no schema, and for keywords that are not known here."""
    _check(schema, schema, 0)


def _check(schema: Any, root: Any, depth: int) -> None:
    if depth > DEEPEST:
        raise BadSchema("is nested too deeply")
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise BadSchema(f"{schema!r:.60} is no schema")
    for name, value in schema.items():
        if name in CHILDREN:
            _check(value, root, depth + 1)
        elif name in LISTS:
            if not (isinstance(value, list) and value):
                raise BadSchema(f"{name} is no list of schemas")
            for one in value:
                _check(one, root, depth + 1)
        elif name in MAPS:
            if not isinstance(value, dict):
                raise BadSchema(f"{name} is no object of schemas")
            for one in value.values():
                _check(one, root, depth + 1)
        elif name == "$ref":
            _referred(value, root)
        elif name not in SAYS_NOTHING:
            _check_value(name, value)


def _check_value(name: str, value: Any) -> None:
    if name not in KEYWORDS:
        raise BadSchema(f"keyword {name!r:.60} is not known here")
    types = value if isinstance(value, list) else [value]
    if name == "type":
        good = bool(types) and all(isinstance(one, str) and one in TYPES for one in types)
    elif name in COUNTS:
        good = TYPES["integer"](value) and value >= 0
    elif name in NUMBERS:
        good = _is_number(value) and (name != "multipleOf" or value > 0)
    elif name == "required":
        good = isinstance(value, list) and all(isinstance(one, str) for one in value)
    elif name == "enum":
        good = isinstance(value, list)
    elif name == "uniqueItems":
        good = isinstance(value, bool)
    elif name == "pattern":
        try:
            good = isinstance(value, str) and bool(re.compile(value))
        except (re.error, RecursionError, OverflowError):
            good = False
    else:
        good = True
    if not good:
        raise BadSchema(f"{name} is {value!r:.60}")


def _referred(path: Any, root: Any) -> Any:
    """What a $ref within the document names. Raises BadSchema."""
    if not isinstance(path, str) or not path.startswith("#"):
        raise BadSchema(f"$ref {path!r:.60} is not within the schema")
    found = root
    for part in path[1:].lstrip("/").split("/") if path != "#" else []:
        part = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, dict) or part not in found:
            raise BadSchema(f"$ref {path!r:.60} names nothing")
        found = found[part]
    if not isinstance(found, dict | bool):
        raise BadSchema(f"$ref {path!r:.60} names no schema")
    return found


def keeps_to(value: Any, schema: Any) -> bool:
    """Whether a value keeps to a schema that `check_schema` has passed. Raises BadSchema where that has no end."""
    return _keeps(value, schema, schema, 0)


def _keeps(value: Any, schema: Any, root: Any, depth: int) -> bool:
    if isinstance(schema, bool):
        return schema
    if depth > DEEPEST:
        raise BadSchema("refers to itself without end, or the value is too deep")
    inner = lambda one, child: _keeps(one, child, root, depth + 1)  # noqa: E731
    return all(KEYWORDS[name](value, wanted, schema, inner) for name, wanted in schema.items() if name in KEYWORDS) and (
        "$ref" not in schema or inner(value, _referred(schema["$ref"], root))
    )


# keywords: (value, what the keyword says, the schema around it, keeps(value, schema)) -> whether the value keeps to it


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def same(a: Any, b: Any) -> bool:
    """JSON's equality: 1 is 1.0, and true is not 1."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _of(kind: str, holds: Callable[[Any, Any], bool]):
    """A keyword that says something of one type of value."""
    return lambda value, wanted, *_: not TYPES[kind](value) or holds(value, wanted)


def _additional(value: Any, wanted: Any, schema: dict, keeps: Callable[[Any, Any], bool]) -> bool:
    known = schema.get("properties", {})
    return not isinstance(value, dict) or all(keeps(one, wanted) for key, one in value.items() if key not in known)


def _multiple(value: float, of: float) -> bool:
    if isinstance(value, int) and isinstance(of, int):
        return value % of == 0
    quotient = value / of
    return math.isfinite(quotient) and quotient == int(quotient)


KEYWORDS: dict[str, Callable[[Any, Any, dict, Callable[[Any, Any], bool]], bool]] = {
    "type": lambda value, wanted, *_: any(TYPES[one](value) for one in (wanted if isinstance(wanted, list) else [wanted])),
    "enum": lambda value, wanted, *_: any(same(value, one) for one in wanted),
    "const": lambda value, wanted, *_: same(value, wanted),
    "minimum": _of("number", lambda value, least: value >= least),
    "maximum": _of("number", lambda value, most: value <= most),
    "exclusiveMinimum": _of("number", lambda value, least: value > least),
    "exclusiveMaximum": _of("number", lambda value, most: value < most),
    "multipleOf": _of("number", _multiple),
    "minLength": _of("string", lambda value, least: len(value) >= least),
    "maxLength": _of("string", lambda value, most: len(value) <= most),
    "pattern": _of("string", lambda value, pattern: re.search(pattern, value) is not None),
    "minItems": _of("array", lambda value, least: len(value) >= least),
    "maxItems": _of("array", lambda value, most: len(value) <= most),
    "uniqueItems": _of("array", lambda value, unique: not unique or not any(same(a, b) for i, a in enumerate(value) for b in value[:i])),
    "minProperties": _of("object", lambda value, least: len(value) >= least),
    "maxProperties": _of("object", lambda value, most: len(value) <= most),
    "required": _of("object", lambda value, names: all(name in value for name in names)),
    "prefixItems": lambda value, wanted, _, keeps: not isinstance(value, list) or all(map(keeps, value, wanted)),
    "items": lambda value, wanted, schema, keeps: (
        not isinstance(value, list) or all(keeps(one, wanted) for one in value[len(schema.get("prefixItems", ())) :])
    ),
    "properties": lambda value, wanted, _, keeps: (
        not isinstance(value, dict) or all(keeps(value[key], child) for key, child in wanted.items() if key in value)
    ),
    "additionalProperties": _additional,
    "allOf": lambda value, wanted, _, keeps: all(keeps(value, one) for one in wanted),
    "anyOf": lambda value, wanted, _, keeps: any(keeps(value, one) for one in wanted),
    "oneOf": lambda value, wanted, _, keeps: sum(keeps(value, one) for one in wanted) == 1,
    "not": lambda value, wanted, _, keeps: not keeps(value, wanted),
}
CHILDREN, LISTS = ("items", "additionalProperties", "not"), ("prefixItems", "allOf", "anyOf", "oneOf")
MAPS = ("properties", "$defs", "definitions")
"""Keywords whose value is a schema, a list of schemas, schemas by name."""
