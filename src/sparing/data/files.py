"""Finds the files that a user's paths and globs stand for, and gives them a fingerprint that changes when one of them does."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparing.base.config import UserError
from sparing.base.files import alike
from sparing.base.hardware import home
from sparing.base.run import looks_like_run
from sparing.data.hub import HUB, data_set

# Inside folders these are passed over in silence: nobody expects text in them. A file named by the user is always opened.
BINARY_SUFFIXES = frozenset(
    ".7z .a .avi .bin .bmp .class .dll .doc .dylib .eot .exe .flac .gif .ico .jar .jpeg .jpg .lib .mkv .mov .mp3 .mp4 .npy .npz "
    ".o .obj .odt .ogg .otf .pkl .png .ppt .pt .pyc .pyd .pyo .rar .safetensors .so .sqlite .sqlite3 .tar .tgz .tif .tiff .ttf "
    ".wasm .wav .webm .webp .whl .woff .woff2 .xls .xlsx .xz .zip".split()
)


CURATED = "curated.json"
"""Marks a folder that `sparing data` made: its texts are in the folder documents/ alone."""


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus, as it was when it was found."""

    path: str
    bytes: int
    """Size on disk."""
    mtime_ns: int
    licence: str = ""
    """Of the source tree that it is in; empty: none is noted."""


def find_files(paths: Sequence[str]) -> list[SourceFile]:
    """The regular files behind files, folders (recursive) and globs.

    `hf:OWNER/NAME` and `hf:OWNER/NAME/FOLDER` are data sets of the hub (`hub.data_set`). Folders leave out hidden entries, binaries by
    suffix, and what a `.gitignore` in them excludes; folders and globs leave out what Sparing wrote, run folders and $SPARING_HOME.
    Sorted by path and free of repetitions, so that the order of the arguments does not matter. No paths: the default corpus.
    Raises UserError for a path that does not exist (naming the nearest one that does), a glob or folder without files.
    """
    files: dict[str, SourceFile] = {}
    for file in _default_corpus() if not paths else _expand(paths):
        files.setdefault(file.path, file)
    return [files[path] for path in sorted(files)]


def absolute(path: str) -> str:
    """A path or glob that names the same files whatever the working folder is."""
    path = os.path.expanduser(str(path))
    if path.startswith(HUB):
        return path
    if os.path.lexists(path) or not glob.has_magic(path):
        return os.path.abspath(path)
    return path if os.path.isabs(path) else os.path.join(glob.escape(os.getcwd()), path)


def fingerprint(files: Iterable[SourceFile], *settings: object) -> str:
    """32 hex digits over names, sizes and modification times of the files, and whatever settings shape what is made of them."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.path}\0{file.bytes}\0{file.mtime_ns}\n".encode(errors="surrogateescape"))
    digest.update(repr(settings).encode())
    return digest.hexdigest()


def kind_of(path: str) -> str:
    """The suffix that says how a file is read, lower case, compression left out: `notes.jsonl.gz` is `jsonl`; no suffix: `text`."""
    name, suffix = os.path.splitext(os.path.basename(path).lower())
    if suffix in (".gz", ".bz2", ".zst"):
        suffix = os.path.splitext(name)[1]
    return suffix.removeprefix(".") or "text"


def _source(path: str, licence: str = "") -> SourceFile:
    try:
        status = os.stat(path)
    except OSError:  # whoever reads it will say why
        return SourceFile(os.path.abspath(path), 0, 0, licence)
    return SourceFile(os.path.abspath(path), status.st_size, status.st_mtime_ns, licence)


def _default_corpus() -> Iterator[SourceFile]:
    """The Python standard library's own source on this machine."""
    root = sysconfig.get_path("stdlib")
    files = [file for file in _walk(root, leave_out={"site-packages", "dist-packages", "__pycache__"}) if file.path.endswith(".py")]
    if not files:
        raise UserError(f"the default corpus, Python's own source, is not in {root}: name your text with --data PATH")
    return iter(files)


def _expand(paths: Sequence[str]) -> Iterator[SourceFile]:
    for argument in paths:
        path = os.path.expanduser(str(argument))
        if path.startswith(HUB):
            path = data_set(path)
        if os.path.lexists(path):
            matches = [path]
        elif glob.has_magic(path):
            matches = sorted(match for match in _glob(path) if not _in_ours(match, _literal(path)))
            if not matches:
                raise UserError(f"no file matches {argument!r}: {_nearest(path)}")
        else:
            raise UserError(f"no such file or folder: {argument} ({_nearest(path)})")
        for match in matches:
            if os.path.isdir(match):
                inside = list(_walk(match))
                if not inside and len(matches) == 1:
                    raise UserError(f"no files of text in the folder {argument} (hidden files, binaries and run folders do not count)")
                yield from inside
            elif os.path.isfile(match):
                yield _source(match)
            elif len(matches) > 1 and not os.path.exists(match):
                yield _source(match)
            elif len(matches) == 1:
                raise UserError(f"{argument} is neither a file nor a folder (a broken link, a pipe or a device): name a regular file")


def _glob(pattern: str) -> Iterator[str]:
    """What a glob matches, and, of `**`, the folders that cannot be looked into. Its `**` does not follow links to folders, of which two
    that form a loop would never end."""
    base = _literal(pattern)
    parts = os.path.relpath(pattern, base or os.curdir).split(os.sep)
    if "**" not in parts:
        yield from glob.iglob(pattern)
        return
    closed: list[str] = []
    tree = os.walk(base or os.curdir, onerror=lambda error: closed.append(error.filename))
    walked = ((folder, name, name in folders) for folder, folders, names in tree for name in folders + names)
    found = (path for folder, name, inner in walked if not (os.path.islink(path := os.path.join(folder, name)) and inner))
    yield from (path for path in found if _matches(os.path.relpath(path, base or os.curdir).split(os.sep), parts))
    yield from (path for path in closed if not any(part.startswith(".") for part in os.path.relpath(path, base or os.curdir).split(os.sep)))


def _matches(names: list[str], parts: list[str]) -> bool:
    """Whether a path matches a pattern, both in their parts. Hidden names are matched by what begins with a dot alone."""
    if not parts:
        return not names
    hidden = bool(names) and names[0].startswith(".")
    if parts[0] == "**":
        return _matches(names, parts[1:]) or (bool(names) and not hidden and _matches(names[1:], parts))
    fits = bool(names) and fnmatch.fnmatchcase(names[0], parts[0]) and (not hidden or parts[0].startswith("."))
    return fits and _matches(names[1:], parts[1:])


def _walk(root: str, leave_out: Iterable[str] = ()) -> Iterator[SourceFile]:
    """The files below a folder. Links to folders are not followed, so that none is read twice and no loop is walked. What a `.gitignore` in
    it excludes is left out; the licence of a source tree goes with its files. What cannot be looked at, a folder too, is among the files:
    reading it says why."""
    skip, rules, licences = set(leave_out), _Ignored(), {}
    closed: list[str] = []
    for folder, folders, names in os.walk(root, onerror=lambda error: closed.append(error.filename)):
        if _ours(folder):
            folders.clear()
            continue
        if CURATED in names:
            folders[:], names = ["documents"], []
        if ".gitignore" in names:
            rules.add(folder)
        licences[folder] = _licence(folder, names) or licences.get(os.path.dirname(folder), "")
        seen = (name for name in folders if not name.startswith(".") and name not in skip)
        folders[:] = sorted(name for name in seen if not rules.exclude(os.path.join(folder, name) + "/"))
        for name in sorted(names):
            path = os.path.join(folder, name)
            if name.startswith(".") or os.path.splitext(name)[1].lower() in BINARY_SUFFIXES or rules.exclude(path):
                continue
            if os.path.isfile(path) or not os.path.exists(path):
                yield _source(path, licences[folder])
    yield from (SourceFile(os.path.abspath(folder), 0, 0) for folder in closed)


class _Ignored:
    """The rules of the `.gitignore` files that were found."""

    def __init__(self):
        self._rules: dict[str, object] = {}

    def add(self, folder: str) -> None:
        from pathspec import GitIgnoreSpec

        try:
            with open(os.path.join(folder, ".gitignore"), encoding="utf-8", errors="replace") as file:
                self._rules[folder] = GitIgnoreSpec.from_lines(file.read(1 << 20).splitlines())
        except (OSError, ValueError):  # not a file that can be read, or no rules: git ignores it too
            pass

    def exclude(self, path: str) -> bool:
        """Whether the nearest file with a rule for the path excludes it. Of a folder the path ends with a slash."""
        folder = path.rstrip("/") if self._rules else ""
        while folder and (parent := os.path.dirname(folder)) != folder:
            folder = parent
            if spec := self._rules.get(folder):
                verdict = spec.check_file(path[len(folder) :].lstrip("/").replace(os.sep, "/")).include
                if verdict is not None:
                    return verdict
        return False


LICENCES = (
    ("Apache-2.0", r"apache license,? version 2\.0"),
    ("AGPL-3.0-only", r"gnu affero general public license version 3"),
    ("LGPL-3.0-only", r"gnu lesser general public license version 3"),
    ("LGPL-2.1-only", r"gnu lesser general public license version 2\.1"),
    ("GPL-3.0-only", r"gnu general public license version 3"),
    ("GPL-2.0-only", r"gnu general public license version 2"),
    ("MPL-2.0", r"mozilla public license,? version 2\.0"),
    ("EPL-2.0", r"eclipse public license - v 2\.0"),
    ("BSL-1.0", r"boost software license - version 1\.0"),
    ("CC0-1.0", r"cc0 1\.0 universal"),
    ("CC-BY-SA-4.0", r"attribution-sharealike 4\.0 international"),
    ("CC-BY-4.0", r"attribution 4\.0 international"),
    ("Unlicense", r"this is free and unencumbered software released into the public domain"),
    ("ISC", r"isc license|permission to use, copy, modify, and(/or)? distribute this software for any purpose"),
    ("MIT", r"mit license|permission is hereby granted, free of charge, to any person obtaining a copy of this software"),
    ("BSD-3-Clause", r"redistribution and use in source and binary forms.*neither the name"),
    ("BSD-2-Clause", r"redistribution and use in source and binary forms"),
)
"""SPDX identifiers, and what the beginning of the licence says, in lower case and with single spaces."""


def _licence(folder: str, names: Sequence[str]) -> str:
    """The licence that a folder's own LICENSE file gives; its name where the text is not recognised; empty without one."""
    for name in sorted(names):
        if not re.fullmatch(r"(licen[cs]e|copying|unlicense)([-._].*)?", name.lower()) or not os.path.isfile(os.path.join(folder, name)):
            continue
        try:
            with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
                text = file.read(4000)
        except OSError:
            continue
        if found := re.search(r"SPDX-License-Identifier:\s*([\w.+-]+)", text):
            return found[1]
        text = " ".join(text.lower().split())
        return next((licence for licence, words in LICENCES if re.search(words, text)), name)
    return ""


def _ours(folder: str) -> bool:
    """Whether Sparing wrote what is in this folder."""
    return looks_like_run(folder) or os.path.abspath(folder) == os.path.abspath(home())


def _in_ours(match: str, base: str) -> bool:
    """Whether a file that a glob found is in a folder of ours below `base`, the part of the glob that names a folder literally."""
    folder = os.path.dirname(match)
    while len(folder) > len(base):
        if _ours(folder):
            return True
        folder = os.path.dirname(folder)
    return False


def _literal(pattern: str) -> str:
    """The folder that a glob begins with."""
    while glob.has_magic(pattern):
        pattern = os.path.dirname(pattern)
    return pattern


def _nearest(path: str) -> str:
    """Advice after a miss: the path that looks most like what was written, or else the deepest folder that exists."""
    whole = Path(os.path.abspath(path))
    if like := alike(whole):
        return f"did you mean {like}?"
    return f"the nearest existing folder is {next(folder for folder in whole.parents if folder.is_dir())}"
