"""Budgets and sizes as people write them: `20m`, `1h30m`, `50Mtok`, `3e17flop`, `$5`, `0.2kWh`, `8GB`."""

from __future__ import annotations

import re

from sparing.base.config import Budget, UserError

FORMS = "90s 20m 2h 1h30m, 50Mtok, 3e17flop, $5, 0.2kWh"
_NUMBER = r"(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_SECONDS = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), 3600),
    **dict.fromkeys(("d", "day", "days"), 86400),
}
_PREFIX = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12, "p": 1e15, "e": 1e18, "z": 1e21}
_ENERGY = {"wh": 1e-3, "kwh": 1.0, "mwh": 1e3}  # mwh: megawatt hours; nobody budgets milliwatt hours
_COUNTS = {"tok": "tok", "token": "tok", "tokens": "tok", "flop": "flop", "flops": "flop"}
# Outside these it is a slip of the pen, not a budget.
_LIMITS = {
    "s": (1.0, 10 * 365 * 86400.0, "1 second to 10 years"),
    "tok": (1.0, 1e16, "1 token to 1e16 tokens"),
    "flop": (1e6, 1e30, "1e6 to 1e30 FLOP"),
    "usd": (1e-4, 1e10, "$0.0001 to $1e10"),
    "kwh": (1e-6, 1e9, "1e-6 to 1e9 kWh"),
}


def parse_budget(text: str) -> Budget:
    """What the user can spend: seconds, tokens, FLOP, US dollars or kilowatt hours.

    Units are read without regard to case; counts take the prefixes k M G (or B) T P E Z.

    Raises:
        UserError: no number, no unit, an unknown unit, not positive, or absurd; the line names the valid forms.
    """
    compact = re.sub(r"\s+", "", text)
    if re.match(r"[+-]", compact):
        problem = "must be positive" if compact[0] == "-" else "a leading + is for `sparing resume`, which extends a run"
        raise UserError(f"budget {text!r}: {problem}; write one of {FORMS}")
    if re.fullmatch(r"(nan|inf(inity)?)\D*", compact, re.IGNORECASE):
        raise UserError(f"budget {text!r} is not a finite number; write one of {FORMS}")
    if compact.startswith("$"):
        compact = compact[1:] + "usd"
    pairs = re.findall(rf"({_NUMBER})([^\d.]*)", compact)
    if not pairs or "".join(number + unit for number, unit in pairs) != compact:
        raise UserError(f"budget {text!r} is not a number with a unit; write one of {FORMS}")
    if len(pairs) > 1:
        if any(unit.lower() not in _SECONDS for _, unit in pairs):
            raise UserError(f"budget {text!r}: only times have several parts, as 1h30m; write one of {FORMS}")
        return _checked(sum(_number(number, text) * _SECONDS[unit.lower()] for number, unit in pairs), "s", text)
    number, unit = pairs[0]
    amount = _number(number, text)
    scale, kind = _unit(unit, number, text)
    return _checked(amount * scale, kind, text)


def _unit(unit: str, number: str, text: str) -> tuple[float, str]:
    low = unit.lower()
    if not low:
        raise UserError(
            f"budget {text!r} has no unit; write {number}s, {number}m, {number}h, ${number}, {number}kWh, {number}Mtok or {number}flop"
        )
    if low in _SECONDS:
        return _SECONDS[low], "s"
    if low in _ENERGY:
        return _ENERGY[low], "kwh"
    if low in ("usd", "$", "dollar", "dollars"):
        return 1.0, "usd"
    for count, kind in _COUNTS.items():
        if low.endswith(count) and low.removesuffix(count) in _PREFIX:
            return _PREFIX[low.removesuffix(count)], kind
    raise UserError(f"budget {text!r}: unknown unit {unit!r}; write one of {FORMS}")


def _number(number: str, text: str) -> float:
    value = float(number.replace("_", ""))
    if value == float("inf"):
        raise UserError(f"budget {text!r} is not a finite number; write one of {FORMS}")
    return value


def _checked(amount: float, kind: str, text: str) -> Budget:
    low, high, words = _LIMITS[kind]
    if amount == 0:
        raise UserError(f"budget {text!r} is zero; write one of {FORMS}")
    if not low <= amount <= high:
        raise UserError(f"budget {text!r} is out of range; allowed: {words}")
    return Budget(amount, kind)


def parse_extension(text: str) -> Budget:
    """`+20m`: what `sparing resume` adds to a run. Raises `UserError` as `parse_budget` does, and when the plus is missing."""
    if not text.strip().startswith("+"):
        raise UserError(f"budget {text!r}: resume extends a run by an amount with a plus sign, as +20m")
    return parse_budget(text.strip()[1:])


def format_budget(budget: Budget) -> str:
    """The shortest form that `parse_budget` turns back into exactly this budget: `1h30m`, `50Mtok`, `$5`."""
    amount = float(budget.amount)
    if budget.unit == "usd":
        return f"${_plain(amount)}"
    if budget.unit == "kwh":
        return f"{_plain(amount)}kWh"
    if budget.unit == "s":
        if not amount.is_integer():
            return f"{_plain(amount)}s"
        hours, rest = divmod(int(amount), 3600)
        minutes, seconds = divmod(rest, 60)
        parts = [f"{value}{unit}" for value, unit in ((hours, "h"), (minutes, "m"), (seconds, "s")) if value]
        return "".join(parts) or "0s"
    forms = [f"{_plain(amount / _PREFIX[prefix.lower()])}{prefix}{budget.unit}" for prefix in ("", "k", "M", "G", "T", "P", "E")]
    return min((form for form in forms if _exact(form, amount)), key=len)


def _exact(form: str, amount: float) -> bool:
    number, unit = re.fullmatch(rf"({_NUMBER})(.*)", form).groups()
    return float(number) * _unit(unit, number, form)[0] == amount


def _plain(value: float) -> str:
    return repr(value).removesuffix(".0")


_SIZE = {"": 1, **{p: 1000**n for n, p in enumerate("kmgt", 1)}, **{f"{p}i": 1024**n for n, p in enumerate("kmgt", 1)}}


def parse_size(text: str) -> int:
    """Bytes of `8GB` (powers of 1000), `8GiB` (powers of 1024), `512M`, `1000B`, `1000`.

    Raises:
        UserError: not a positive, finite size; the line names the valid forms.
    """
    forms = "write one of 512MB, 8GB, 8GiB, 1.5TB"
    match = re.fullmatch(rf"({_NUMBER})([a-z]*?)b?", re.sub(r"\s+", "", text), re.IGNORECASE)
    if match is None:
        raise UserError(f"size {text!r} is not a positive number with a unit; {forms}")
    number, prefix = match.groups()
    if prefix.lower() not in _SIZE:
        raise UserError(f"size {text!r}: unknown unit; {forms}")
    size = float(number.replace("_", "")) * _SIZE[prefix.lower()]
    if not 1 <= size <= 1e18:
        raise UserError(f"size {text!r} is out of range; allowed: 1 byte to 1e18 bytes")
    return round(size)
