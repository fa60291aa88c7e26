"""Answers that people accepted or corrected, kept in a file that `sparing adapt` learns from, if the operator asks for that.

One JSON line an answer: id, time, key (a name of the client's, as in the audit log), model, verdict, messages with the answer last, tools;
`answer`, what the model said instead, where it was corrected. What nobody judged stays in memory, the newest answers alone, and is never
written. The file is its owner's alone (0600) and bounded; a line is deleted by its id, and with it the text.
"""

from __future__ import annotations

import glob
import json
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from sparing.base.config import UserError
from sparing.base.files import name_beside, output_file, sync_folder
from sparing.data.chat import flat
from sparing.serve.errors import ApiError, bad

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PENDING, PENDING_BYTES = 1000, 64 << 20
"""Answers that wait for a verdict, and their bytes."""


class Collection:
    """The file, and the answers that may still come into it."""

    def __init__(self, named: str, limit: int):
        """named: the file as --collect has it. limit: its most bytes. Raises UserError where it cannot be written."""
        self.path, self.limit = output_file(named, "--collect"), limit
        self._pending: OrderedDict[str, dict] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UserError(f"--collect {named}: must be a file, from which answers can be deleted")
            if hasattr(os, "fchmod"):
                os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)
        with self._alone():
            self._clear()

    def remember(self, answer_id: str, key: str | None, model: str, body: dict, choices: list[dict]) -> None:
        """Hold an answer until somebody judges it. body: the chat that it answers. choices: as OpenAI's object has them."""
        answers = [{"message": _message(choice["message"]), "cut": choice["finish_reason"] == "length"} for choice in choices]
        asked = {"messages": [flat(message) for message in body["messages"]]} | ({"tools": body["tools"]} if body.get("tools") else {})
        entry = {"key": key, "model": model, "asked": asked, "answers": answers}
        entry["size"] = len(json.dumps(entry, ensure_ascii=False))
        with self._lock:
            self._pending[answer_id] = entry
            self._bytes += entry["size"]
            while len(self._pending) > PENDING or self._bytes > PENDING_BYTES:
                self._bytes -= self._pending.popitem(last=False)[1]["size"]

    def judge(self, key: str | None, answer_id: str, verdict: str, correction: str | None, index: int = 0) -> dict:
        """Keep a verdict: -> {"id", "verdict", "stored"}. Raises ApiError 404, 400, 507."""
        if verdict == "corrected" and not (correction or "").strip():
            raise bad("'correction' must be given with the verdict corrected.", "correction")
        if verdict != "corrected" and correction is not None:
            raise bad(f"'correction' does not go with the verdict {verdict}.", "correction")
        with self._lock, self._alone():
            before = self._written(answer_id)
            entry = self._pending.get(answer_id) or (before and _entry(before))
            if entry is None or entry["key"] != key:
                raise _unknown(answer_id)
            if index >= len(entry["answers"]):
                raise bad(f"'choice' must be at most {len(entry['answers']) - 1}.", "choice")
            answer = entry["answers"][index]
            if verdict == "accepted" and answer["cut"]:
                raise bad("This answer was cut at its length limit: it can be corrected, not accepted.", "verdict")
            line = None
            if verdict != "rejected":
                message = answer["message"] if correction is None else {"role": "assistant", "content": correction}
                line = {"id": answer_id, "time": datetime.now(UTC).isoformat(timespec="seconds"), "key": key, "model": entry["model"]}
                line |= {"verdict": verdict, "messages": [*entry["asked"]["messages"], message]}
                line |= {name: value for name, value in entry["asked"].items() if name != "messages"}
                line |= {"answer": answer["message"]["content"], "cut": answer["cut"]} if correction is not None else {}
            self._write(answer_id if before else None, line)
        return {"id": answer_id, "verdict": verdict, "stored": line is not None}

    def delete(self, key: str | None, answer_id: str) -> dict:
        """Forget an answer, in the file and in memory: -> {"id", "deleted"}. Raises ApiError 404."""
        with self._lock, self._alone():
            before, pending = self._written(answer_id), self._pending.get(answer_id)
            owner = (pending or before or {}).get("key")
            if not (pending or before) or owner != key:
                raise _unknown(answer_id)
            if pending:
                self._bytes -= self._pending.pop(answer_id)["size"]
            if before:
                self._write(answer_id, None)
            self._clear()
        return {"id": answer_id, "deleted": True}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other server changes the file meanwhile."""
        if fcntl is None:
            yield
            return
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _clear(self) -> None:
        """Remove what a server was writing when it was killed: there may be texts in it that are to be forgotten."""
        if fcntl is None:  # another server may be at it
            return
        begins, ends = name_beside(self.path).name.rsplit(f".{os.getpid()}.", 1)
        for left in self.path.parent.glob(f"{glob.escape(begins)}.*.{ends}"):
            left.unlink(missing_ok=True)

    def _lines(self) -> list[bytes]:
        try:
            return self.path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:  # its owner has moved it away: it begins anew
            return []

    def _written(self, answer_id: str) -> dict | None:
        """The line of an id."""
        begins = _begins(answer_id)
        found = next((line for line in self._lines() if line.startswith(begins)), None)
        return found and json.loads(found)

    def _write(self, without: str | None, line: dict | None) -> None:
        """Append a line, and leave out that of the id `without`. Raises ApiError 507 where there is no room."""
        raw = b"" if line is None else json.dumps(line, ensure_ascii=False).encode() + b"\n"
        kept = self._lines()
        if without is not None:
            kept = [one for one in kept if not one.startswith(_begins(without))]
        if raw and sum(map(len, kept)) + len(raw) > self.limit:
            raise ApiError(507, "The file of feedback is full; its operator has to make room.", code="feedback_full")
        if kept and not kept[-1].endswith(b"\n"):  # a line that a full disk cut short
            kept[-1] += b"\n"
        beside = name_beside(self.path)
        try:
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.writelines([*kept, raw])
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise ApiError(507, f"The feedback cannot be kept: {error.strerror}.", code="feedback_full") from None
        finally:
            Path(beside).unlink(missing_ok=True)


def _begins(answer_id: str) -> bytes:
    return json.dumps({"id": answer_id}, ensure_ascii=False).encode()[:-1] + b","


def _message(message: dict) -> dict:
    """An answer as conversations have it."""
    calls = {"tool_calls": message["tool_calls"]} if message.get("tool_calls") else {}
    return {"role": "assistant", "content": message.get("content") or ""} | calls


def _entry(line: dict) -> dict:
    """What `remember` held, from the line that came of it."""
    *asked, said = line["messages"]
    answer = {"role": "assistant", "content": line["answer"]} if "answer" in line else said
    of = {"messages": asked} | ({"tools": line["tools"]} if "tools" in line else {})
    return {"key": line["key"], "model": line["model"], "asked": of, "answers": [{"message": answer, "cut": line.get("cut", False)}]}


def _unknown(answer_id: str) -> ApiError:
    return ApiError(404, f"There is no answer {answer_id} to judge: it may be too long ago.", "id", "answer_not_found")
