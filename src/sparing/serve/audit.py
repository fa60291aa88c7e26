"""The audit log: one JSON line a request, with client, time and token counts. It has prompts and answers only if the operator says so."""

from __future__ import annotations

import json
import sys
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
        self.lost = 0
        """Lines that could not be written."""
        self._lock = threading.Lock()
        self._failing = self._torn = False  # torn: the file ends in the middle of a line
        if path is not None:
            try:
                self._file = open_log(path, option)
            except UserError as error:
                raise UserError(f"{error}, or --audit-log none") from None

    def write(self, entry: dict, text: dict) -> None:
        """entry: fields that are always written; text: fields that are written only if `with_text`.

        A file that takes no more, on a full disk for example, costs its lines and no answer; it is said once, on standard error.
        """
        if self.path is None:
            return
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **entry, **(text if self.with_text else {})}
        raw = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            raw = b"\n" * self._torn + raw
            try:
                written, problem = self._file.write(raw), "no space left"
            except OSError as error:
                written, problem = 0, error.strerror
            failing = written < len(raw)
            self._torn = 0 < written < len(raw) or (self._torn and not written)
            self.lost += failing
            if failing != self._failing:
                what = (
                    f"cannot be written ({problem}): answers go on without it"
                    if failing
                    else f"is written again; {self.lost} lines are lost"
                )
                print(f"the audit log {self.path} {what}", file=sys.stderr, flush=True)
            self._failing = failing
