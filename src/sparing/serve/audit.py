"""Who asked for how much, and when: one JSON line a request. Prompts and answers are in it only where that was asked for."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from pathlib import Path

from sparing.base.config import UserError


class Audit:
    """Appends to a file; a line is one write, so that several servers may share it. None: keeps nothing."""

    def __init__(self, path: Path | None, with_text: bool = False):
        """Raises UserError where the file cannot be written."""
        self.path, self.with_text = path, with_text
        self._lock = threading.Lock()
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(path, "ab", buffering=0)
                path.chmod(0o600)
            except OSError as error:
                raise UserError(f"--audit-log {path}: {error.strerror}; choose another file, or none") from None

    def write(self, entry: dict, text: dict) -> None:
        """entry: what is always kept; text: what is kept only with `with_text`."""
        if self.path is None:
            return
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **entry, **(text if self.with_text else {})}
        with self._lock:
            self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
