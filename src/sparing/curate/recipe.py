"""What is done with a corpus: rules, and what counts as a duplicate; from `--rules TOML`."""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from sparing.base.config import UserError
from sparing.base.config_file import check_section
from sparing.base.files import file_sha256, read_text
from sparing.curate.minhash import DuplicateSettings
from sparing.curate.rules import Rules

LEFT_OUT = "none"


@dataclass(frozen=True)
class Recipe:
    """The stages of a corpus; those that are None are left out."""

    rules: Rules | None = field(default_factory=Rules.default)
    duplicates: DuplicateSettings | None = field(default_factory=DuplicateSettings)

    @property
    def digest(self) -> str:
        """Changes when a stage, one of its settings, or what is in a file that a rule names does."""
        files = self.rules.files() if self.rules is not None else []
        known = [repr(self), *(file_sha256(Path(path)) for path in files)]
        return hashlib.blake2b("\n".join(known).encode(), digest_size=4).hexdigest()

    @classmethod
    def from_toml(cls, path: str | Path) -> Recipe:
        """The default stages as a file changes them.

        `[duplicates]` sets the fields of `DuplicateSettings`, and `duplicates = "none"` leaves duplicates in. Any other section is a rule
        (`Rules.from_values`). Raises UserError for what cannot be read or is not known."""
        try:
            values = tomllib.loads(read_text(path))
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{path}: not valid TOML: {error}") from None
        duplicates = values.pop("duplicates", {})
        if duplicates == LEFT_OUT:
            settings = None
        elif isinstance(duplicates, dict):
            settings = DuplicateSettings(**check_section(duplicates, DuplicateSettings, f"{path}: duplicates."))
        else:
            raise UserError(f'{path}: duplicates is a section, or "{LEFT_OUT}"')
        return cls(Rules.from_values(values, str(path)), settings)
