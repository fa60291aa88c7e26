"""Reading someone else's JSON with complaints that a user can act on."""

from __future__ import annotations

import difflib
import json
import math
from pathlib import Path

from sparing.base.config import UserError


def read_json(path: Path) -> dict:
    """A JSON object from a file; UserError if it is missing, not JSON or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent}: there is no {path.name}, so this is not a Hugging Face model folder") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are both ValueErrors
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


class Fields:
    """Values of a JSON object; each complaint is one line that names file and key."""

    def __init__(self, raw: dict, where: Path):
        self.raw = raw
        self.where = where

    def fail(self, message: str) -> UserError:
        return UserError(f"{self.where}: {message}")

    def get(self, key: str, kind: type, *default):
        """A value of the type; `default` where it is absent or null (without one, absence is an error)."""
        value = self.raw.get(key)
        if value is None:
            if default:
                return default[0]
            near = difflib.get_close_matches(key, self.raw, n=1)
            raise self.fail(f"{key} is missing" + (f" (nearest present: {near[0]})" if near else ""))
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (kind is int and value < 0) or (kind is float and not math.isfinite(value)):
            raise self.fail(f"{key} is {value!r}, expected {'a whole number >= 0' if kind is int else kind.__name__}")
        return value

    def only(self, key: str, *allowed) -> None:
        """Refuse values that the model has no means to compute; absent or null is fine."""
        value = self.raw.get(key)
        if value is not None and value not in allowed:
            raise self.fail(f"{key} is {value!r}, supported: {', '.join(repr(a) for a in allowed)}")
