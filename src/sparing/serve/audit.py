"""The audit log: one JSON line a request, with client, time and token counts. It has prompts and answers only if the operator says so."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from pathlib import Path

from sparing.base.config import UserError
from sparing.base.files import open_log


class Audit:
    """Appends to `path` (None: keeps no log). Each line is one write, so several servers may share the file."""

    def __init__(self, path: Path | None, with_text: bool = False, option: str = "--audit-log"):
        """option: what the user named it by. Raises UserError if the file cannot be written."""
        self.path, self.with_text = path, with_text
        self._lock = threading.Lock()
        if path is not None:
            try:
                self._file = open_log(path, option)
            except UserError as error:
                raise UserError(f"{error}, or --audit-log none") from None

    def write(self, entry: dict, text: dict) -> None:
        """entry: fields that are always written; text: fields that are written only if `with_text`."""
        if self.path is None:
            return
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **entry, **(text if self.with_text else {})}
        with self._lock:
            self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
