"""Reads and writes configurations as TOML, and checks what a user sets: recipes, command-line options, arguments of the library.

TOML has no null: a field that is None by default is left out when it is None, any other says "none".
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import re
import tomllib
import types
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import sparing.base.config as vocabulary  # not `from sparing`: that would ask the package's lazy re-exports
from sparing.base.config import Config, UserError
from sparing.base.config_limits import contradiction, in_range
from sparing.base.files import is_text, read_text


def nearest(word: str, choices) -> str:
    """The choice most like `word`, for an error line."""
    return max(choices, key=lambda choice: difflib.SequenceMatcher(None, word.lower(), choice.lower()).ratio())


def unwrap(hint: Any) -> tuple[Any, bool]:
    """(type, may be None) of an annotation: `int | None` -> (int, True)."""
    if get_origin(hint) in (Union, types.UnionType):
        rest = [arg for arg in get_args(hint) if arg is not type(None)]
        assert len(rest) == 1, hint
        return rest[0], True
    return hint, False


def describe(hint: Any) -> str:
    """An annotation in the user's words."""
    kind, optional = unwrap(hint)
    if get_origin(kind) is Literal:
        text = "|".join(get_args(kind))
    elif get_origin(kind) is tuple:
        text = "list of whole numbers" if get_args(kind)[0] is int else "list of text"
    else:
        text = {bool: "true|false", int: "whole number", float: "number", str: "text"}.get(kind, "section")
    return f"{text}|none" if optional else text


def check(value: Any, hint: Any, where: str) -> Any:
    """`value`, as TOML gives it, in the field's type.

    Raises:
        UserError: one line naming `where`, the value and what is allowed.
    """
    kind, optional = unwrap(hint)
    if optional and (value is None or (kind is not str and isinstance(value, str) and value.lower() == "none")):
        return None
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return check_section(value, kind, where)
    if get_origin(kind) is Literal and value in get_args(kind):
        return value
    if get_origin(kind) is tuple and isinstance(value, list | tuple) and all(type(item) is get_args(kind)[0] for item in value):
        return tuple(value)
    if kind in (bool, int, str) and type(value) is kind:
        return value
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if get_origin(kind) is Literal:
        raise UserError(f"{where}: {value!r} is not one of {', '.join(get_args(kind))}; nearest: {nearest(str(value), get_args(kind))}")
    raise UserError(f"{where}: {value!r} is not a {describe(hint)}".replace("not a text", "not text"))


def check_section(values: dict, kind: type, where: str) -> dict:
    """`values`, checked as fields of the dataclass `kind`. An unknown key is a `UserError` that names the nearest one."""
    hints = get_type_hints(kind)
    prefix = where if where.endswith(": ") or not where else f"{where}."
    for key in values:
        if key not in hints:
            raise UserError(f"{prefix}{key}: unknown key; nearest: {nearest(key, hints)}")
    return {key: in_range(kind, key, check(value, hints[key], f"{prefix}{key}"), f"{prefix}{key}") for key, value in values.items()}


def parse_text(words: list[str], hint: Any, where: str) -> Any:
    """A field's value from the words behind its command-line option, checked as TOML values are."""
    kind, optional = unwrap(hint)
    if get_origin(kind) is tuple:
        return tuple(words)
    text = words[0]
    if optional and text.lower() == "none":
        return None
    value: Any = text
    try:
        if kind is bool:
            value = {"true": True, "false": False}.get(text.lower(), text)
        elif kind is int:  # 50e6 is a whole number too
            value = int(text) if re.fullmatch(r"[+-]?[\d_]+", text) else (int(float(text)) if float(text).is_integer() else text)
        elif kind is float:
            value = float(text)
    except (ValueError, OverflowError):
        pass  # still text: `check` says what was expected
    return check(value, hint, where)


@cache
def options() -> dict[str, tuple[Any, Any, str]]:
    """Every field of `Config` by its dotted name: (annotation, default, explanation). Sections come without a row of their own."""
    texts = _docstrings()
    rows: dict[str, tuple[Any, Any, str]] = {}

    def walk(kind: type, prefix: str):
        hints = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            inner, optional = unwrap(hints[field.name])
            name = f"{prefix}{field.name}"
            if not dataclasses.is_dataclass(inner) or optional:
                rows[name] = (hints[field.name], field.default, texts.get((kind.__name__, field.name), ""))
            if dataclasses.is_dataclass(inner):
                walk(inner, f"{name}.")

    walk(Config, "")
    return rows


def _docstrings() -> dict[tuple[str, str], str]:
    """The text under each field of config.py, so that it is written once."""
    texts = {}
    for node in ast.parse(inspect.getsource(vocabulary)).body:
        if isinstance(node, ast.ClassDef):
            for field, text in zip(node.body, node.body[1:]):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                    texts[node.name, field.target.id] = " ".join(str(text.value.value).split())
    return texts


BELONGS = {
    "adapter": "sft", "chats": "sft", "esft": "sft --method esft", "growth": "grow", "distill": "distill --teacher",
    "drafts": "distill --mtp", "dpo": "dpo", "grpo": "grpo", "use": "adapt", "reason": "reason",
}  # fmt: skip
"""The verb that each section of one kind of learning is for."""


def refuse(wishes: Wishes, verb: str, *takes: str) -> None:
    """Raises UserError where `wishes` have a section of BELONGS that is none of those that `verb` takes, or a sample to choose texts by."""
    for name, other in BELONGS.items():
        if name not in takes and wishes.get(name) is not None:
            raise UserError(f"{name}: {verb} has no use for this section, which is for `sparing {other}`; leave it out")
    if wishes.value("data.sample") and verb != "train":
        raise UserError(f"data.sample: {verb} learns from all of its data; `sparing train --for` and `sparing data select --for` choose")


def nested(dotted: dict[str, Any]) -> dict:
    """{"model": {"yarn": {"factor": 2.0}}} of {"model.yarn.factor": 2.0}."""
    result: dict = {}
    for name, value in dotted.items():
        *sections, key = name.split(".")
        inner = result
        for section in sections:
            if not isinstance(inner.get(section), dict):
                inner[section] = {}
            inner = inner[section]
        inner[key] = value
    return result


class Wishes(dict):
    """What the user set, checked, and nothing else: {"model": {"num_layers": 8}}. `resolve` derives the rest."""

    @classmethod
    def of(cls, *parts: dict | None, where: str = "") -> Wishes:
        """Merge nested dicts, the later ones winning. Parts that are `Wishes` already are not checked again.

        where: begins error lines. Raises UserError for an unknown key, a value of the wrong type, or one out of its range.
        """
        result = cls()
        for part in parts:
            _merge(result, part if isinstance(part, Wishes) else check_section(part or {}, Config, where))
        return result

    def value(self, name: str, default: Any = None) -> Any:
        """The value of a field such as "train.device"; `default` where it was not set."""
        section, _, field = name.partition(".")
        return self.get(section, {}).get(field, default)

    def sets(self, name: str) -> bool:
        section, _, field = name.partition(".")
        return field in self.get(section, {})

    def config(self) -> Config:
        """A configuration in which every other field has its default."""
        return build(Config, self)


def _merge(into: dict, part: dict) -> None:
    for key, value in part.items():
        if isinstance(value, dict):
            into[key] = dict(into.get(key) or {})
            _merge(into[key], value)
        else:
            into[key] = value


def _load(path: str | Path) -> dict:
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None


def presets() -> dict[str, Path]:
    """The package's recipes by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent.parent / "presets").glob("*.toml"))}


def recipe_path(name: str | Path) -> Path:
    """A recipe's file: the path itself, or a preset of that name. Raises UserError where neither is there."""
    if Path(name).exists() or str(name).endswith(".toml") or "/" in str(name):
        return Path(name)
    if str(name) not in presets():
        raise UserError(f"{name}: no such recipe; nearest preset: {nearest(str(name), presets())}; or give the path of a TOML file")
    return presets()[str(name)]


class Recipe(NamedTuple):
    """What a TOML file of wishes says."""

    wishes: Wishes
    budget: str | None
    """As it is written ("20m"), or what a [budget] section says."""
    plan: dict
    """The section for `sparing plan` alone, as it is."""


def read_recipe(name: str | Path | None) -> Recipe:
    """Read a recipe: a file, or a preset by its name. None: an empty one.

    Raises:
        UserError: unreadable, not TOML, an unknown key, a value of the wrong type.
    """
    if not name:
        return Recipe(Wishes(), None, {})
    path = recipe_path(name)
    values = _load(path)
    plan, budget = values.pop("plan", {}), values.get("budget")
    if not isinstance(plan, dict):
        raise UserError(f"{path}: plan must be a section, [plan]")
    if isinstance(budget, str):
        del values["budget"]
    wishes = Wishes.of(values, where=f"{path}: ")
    if section := wishes.pop("budget", None):
        if set(section) != {"amount", "unit"}:
            raise UserError(f'{path}: a [budget] section needs amount and unit; or write budget = "20m"')
        budget = f"{section['amount']!r}{section['unit']}"
    return Recipe(wishes, budget, plan)


def read_config(path: str | Path) -> Config:
    """The resolved configuration that `write_config` wrote; fields that the file lacks have their defaults. Raises UserError, as
    `read_recipe`, and for a model whose sizes contradict each other."""
    config = build(Config, check_section(_load(path), Config, f"{path}: "))
    if wrong := contradiction(config.model, lambda name: f"model.{name}"):
        raise UserError(f"{path}: {wrong}")
    return config


def build(kind: type, values: dict) -> Any:
    """A dataclass from nested dicts of checked values; every other field has its default."""
    hints = get_type_hints(kind)
    return kind(**{key: build(unwrap(hints[key])[0], value) if isinstance(value, dict) else value for key, value in values.items()})


def write_config(config: Config, reasons: dict[str, str] | None = None) -> str:
    """TOML text that `read_config` turns back into an equal `Config`.

    Args:
        reasons: by dotted name (`model.num_layers`): why a derived value is what it is; becomes the comment behind it.
    """
    lines = ["# The whole recipe of this run. A comment behind a value says why it was chosen; values without one are defaults or wishes."]

    def section(value: Any, prefix: str):
        nested = []
        for field in dataclasses.fields(value):
            name, item = f"{prefix}{field.name}", getattr(value, field.name)
            if dataclasses.is_dataclass(item):
                nested.append((name, item))
            elif not (item is None and field.default is None):
                reason = " ".join((reasons or {}).get(name, "").split())
                lines.append(f"{field.name} = {_toml(item, name)}" + (f"  # {_printable(reason)}" if reason else ""))
        for name, item in nested:
            lines.extend(["", f"[{name}]"])
            section(item, f"{name}.")

    section(config, "")
    return "\n".join(lines) + "\n"


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)


def _toml(value: Any, name: str) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        assert math.isfinite(value), name
        return repr(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item, name) for item in value) + "]"
    if not is_text(value):
        raise UserError(f"{name}: {value!r} is not valid UTF-8 and cannot be written to a configuration; rename the file")
    escaped = "".join(
        f"\\u{ord(char):04x}" if ord(char) < 32 or ord(char) == 127 else char for char in value.replace("\\", "\\\\").replace('"', '\\"')
    )
    return f'"{escaped}"'
