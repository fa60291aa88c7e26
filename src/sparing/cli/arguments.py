"""Parses a verb's command line into its dataclass and the overrides behind it. Builds the parser of that verb only.

Own options are the dataclass's fields, parsed by tyro. Overrides are every field of a recipe by its dotted name (`--model.num-layers 8`)
for verbs whose class says `takes = "recipe"`, and any name at all for `takes = "anything"`. With `takes = "command"` all words from the
first that is no option on are another verb's. Every mistake is a one-line `UserError`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
from typing import Any, TextIO, get_origin, get_type_hints

from sparing.base.config import UserError
from sparing.base.config_file import describe, nearest, options, parse_text

MAY_BE_EMPTY = ("--prompt",)
"""Options whose value is text; that of any other is a name, a path or a number, and an empty one is the work of an unset variable."""
HELP_FLAGS = {"--help", "-h"}


@dataclasses.dataclass
class Call:
    """What a verb needs besides its own arguments."""

    verb: str
    started: float
    overrides: dict[str, Any]
    out: TextIO
    """Standard output, which belongs to results; with --json, what anything else prints goes to standard error."""
    verbs: dict[str, type]
    """All of them, by name."""

    @property
    def api(self):
        import sparing.api

        return sparing.api

    def need(self, **values: Any) -> None:
        """One line for the first value that is missing; lower-case names are options."""
        for name, value in values.items():
            if not value:
                what = f"--{name}" if name.islower() else name
                raise UserError(f"{self.verb} needs {what}; see `sparing {self.verb} --help`")

    def choice(self, option: str, value: str, choices: tuple[str, ...]) -> None:
        if value not in choices:
            raise UserError(f"{option} {value}: not available; choose {' or '.join(choices)}")


def choose(argv: list[str], verbs: dict[str, type]) -> tuple[str, list[str]]:
    """(the verb that `argv` names, its arguments). A verb with ways, such as `data curate`, is named by two words; where the second is
    missing and help is asked for, the first alone is given back. Raises UserError with the nearest."""
    names = list(dict.fromkeys(verb.partition(" ")[0] for verb in verbs))
    if not argv or argv[0] not in names:
        hint = f"unknown verb {argv[0]!r}; nearest: {nearest(argv[0], names)}; all" if argv else "no verb given; choose"
        raise UserError(f"{hint}: {', '.join(names)}")
    first, *rest = argv
    if first in verbs:
        return first, rest
    kinds = ways_of(first, verbs)
    switches = {flag_of(field.name) for kind in kinds.values() for field in dataclasses.fields(kind) if field.type == "bool"}
    at = 0
    while at < len(rest) and rest[at].startswith("-") and rest[at] not in HELP_FLAGS:  # options may stand before the way
        at += 1 if "=" in rest[at] or rest[at] in switches else 2
    if at < len(rest) and rest[at] in kinds:
        return f"{first} {rest[at]}", rest[:at] + rest[at + 1 :]
    if HELP_FLAGS & set(rest):
        return first, rest
    hint = f"unknown way {rest[at]!r}; nearest: {nearest(rest[at], kinds)}; all" if at < len(rest) else "no way given; choose"
    raise UserError(f"{first}: {hint}: {', '.join(kinds)}")


def ways_of(verb: str, verbs: dict[str, type]) -> dict[str, type]:
    """The ways of a verb that has them, by their names."""
    return {name.removeprefix(f"{verb} "): kind for name, kind in verbs.items() if name.startswith(f"{verb} ")}


def flag_of(name: str) -> str:
    """The option of a field; `from_` is --from, which Python keeps for itself."""
    return "--" + name.rstrip("_").replace("_", "-")


def _type_of(field: dataclasses.Field) -> str:
    """A field's type as text, without what it tells tyro."""
    return re.sub(r"^Annotated\[(.*), tyro\..*\]$", r"\1", field.type)


def recipe_options() -> dict[str, tuple[Any, Any, str]]:
    """The fields of a recipe that are options, by dotted name; budget, start and conversations have options of their own, and an imported
    model's tokens come with it, as a grown one's domains do."""
    hidden = {f"growth.{name}" for name in ("domains", "domain", "root_sha256", "stored", "dense", "keep", "apart")}
    hidden |= {f"reason.{name}" for name in ("task", "data", "cold", "student", "method")}
    shown = {name: row for name, row in options().items() if name not in hidden}
    return {name: row for name, row in shown.items() if name.partition(".")[0] not in ("budget", "start", "chats", "tokens")}


def parse(verb: str, kind: type, argv: list[str]) -> tuple[Any, dict[str, Any]]:
    """`argv` -> (`kind`, a verb's dataclass; overrides by dotted name).

    Options may be written `--flag value` or `--flag=value`, with - or _. Given twice, the last one counts; lists add up.
    """
    own = {flag_of(field.name): _type_of(field) for field in dataclasses.fields(kind) if "Positional" not in field.type}
    takes = getattr(kind, "takes", "nothing")
    dotted = {flag_of(name): name for name in recipe_options()} if takes == "recipe" else {}
    lists = {flag for flag, hint in own.items() if hint == "list[str]"} | ({"--data", "--val"} if takes == "anything" else set())
    lists |= {flag for flag, name in dotted.items() if get_origin(recipe_options()[name][0]) is tuple}

    words: dict[str, list[str]] = {}
    positional: list[str] = []
    wants: str | None = None  # the option that takes the next word
    for at, token in enumerate(argv):
        if takes == "command" and wants is None and not token.startswith("-"):
            positional += argv[at:]
            break
        if token[:1] == "-" and "-" + token in own:  # of one letter
            token = "-" + token
        if token.startswith("--") and not any(char.isspace() for char in token.split("=")[0]):
            name, equals, value = token.partition("=")
            flag = name.replace("_", "-")
            if flag not in own and flag not in dotted and takes != "anything":
                raise UserError(f"{verb}: unknown option {name}; nearest: {nearest(flag, [*own, *dotted])}")
            many = flag in lists
            words[flag] = (words.get(flag, []) if many else []) + ([value] if equals else [])
            wants = None if own.get(flag) == "bool" or (equals and not many) else flag
        elif wants is not None:
            words[wants].append(token)
            wants = wants if wants in lists else None
        else:
            positional.append(token)

    for flag, values in words.items():
        if "" in values and flag not in MAY_BE_EMPTY:
            raise UserError(f"{verb}: {flag} needs a value, not an empty one")
        if own.get(flag) == "bool" and values:
            raise UserError(f"{verb}: {flag} takes no value")
        if own.get(flag) != "bool" and not values:
            raise UserError(f"{verb}: {flag} needs a value")
    places = [field.type for field in dataclasses.fields(kind) if "Positional" in field.type]
    if len(positional) > len(places) and not any("list" in place for place in places):
        raise UserError(f"{verb}: unexpected {positional[-1]!r}; see `sparing {verb} --help`")

    overrides: dict[str, Any] = {}
    for flag, values in words.items():
        if flag in dotted:
            overrides[dotted[flag]] = parse_text(values, recipe_options()[dotted[flag]][0], flag)
        elif flag not in own:
            overrides[flag[2:].replace("-", "_")] = values if len(values) > 1 else _literal(values[0])
    words = {flag: values for flag, values in words.items() if flag in own}
    if takes == "command":
        return dataclasses.replace(_build(verb, kind, own, [], words), command=positional), overrides
    return _build(verb, kind, own, positional, words), overrides


def _literal(text: str) -> Any:
    """An option that nobody declared: number, truth value or text."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return {"true": True, "false": False}.get(text.lower(), text)


def _build(verb: str, kind: type, own: dict[str, str], positional: list[str], words: dict[str, list[str]]) -> Any:
    """The dataclass, by tyro; its boxed complaint becomes one line."""
    arguments = [*positional]
    for flag, values in words.items():
        # `--flag=value` keeps a value that begins with a dash a value; a list goes as it is.
        arguments += [flag, *values] if own[flag] in ("bool", "list[str]") else [f"{flag}={values[0]}"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return _tyro(verb, kind, arguments)
    except SystemExit:
        text = " ".join(re.sub(r"[─│╭╮╰╯]", " ", said.getvalue()).split())
    flag = next((flag for flag in words if f"parsing {flag}:" in text), None)
    if flag is None:
        raise UserError(f"{verb}: {text}")
    hint = {flag_of(name): hint for name, hint in get_type_hints(kind).items()}[flag]
    raise UserError(f"{flag}: {words[flag][0]!r} is not a {describe(hint).removesuffix('|none')}")


def _tyro(verb: str, kind: type, arguments: list[str]) -> Any:
    import tyro

    sys.modules[kind.__module__].tyro = tyro  # the verbs' annotations name it, and are text until now
    style = (tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff)
    return tyro.cli(kind, prog=f"sparing {verb}", args=arguments, config=style)


def print_help(verb: str, verbs: dict[str, type]) -> None:
    """The verb's own options, and below them what may be overridden; of a verb with ways, these."""
    if verb not in verbs:
        ways = ways_of(verb, verbs)
        print(f"usage: sparing {verb} {'|'.join(ways)} ...\n")
        for way, kind in ways.items():
            print(f"  sparing {verb} {way:8}{' '.join(kind.__doc__.split())}")
        print(f"\n`sparing {verb} {next(iter(ways))} --help` lists its options, such as --out and --json; so do the others.")
        return
    kind = verbs[verb]
    with contextlib.suppress(SystemExit):
        _tyro(verb, kind, ["--help"])
    if getattr(kind, "takes", "nothing") == "recipe":
        print("Every field of a recipe is an option too. What is not set is derived; in brackets the built-in value.\n")
        for name, (hint, default, text) in recipe_options().items():
            shown = "none" if default is None or isinstance(default, tuple) else default
            shown = str(shown).lower() if isinstance(shown, bool) else shown
            print(f"  {flag_of(name)} {describe(hint)} [{shown}]" + (f"  {text}" if text else ""))
