"""Finds the files that a user's paths and globs stand for, and gives them a fingerprint that changes when one of them does."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparing.base.config import UserError
from sparing.base.files import alike
from sparing.base.hardware import home
from sparing.base.run import looks_like_run

# Inside folders these are passed over in silence: nobody expects text in them. A file named by the user is always opened.
BINARY_SUFFIXES = frozenset(
    ".7z .a .avi .bin .bmp .class .dll .doc .docx .dylib .eot .exe .flac .gif .ico .jar .jpeg .jpg .lib .mkv .mov .mp3 .mp4 .npy .npz "
    ".o .obj .odt .ogg .otf .pdf .pkl .png .ppt .pptx .pt .pyc .pyd .pyo .rar .safetensors .so .sqlite .sqlite3 .tar .tgz .tif .tiff .ttf "
    ".wasm .wav .webm .webp .whl .woff .woff2 .xls .xlsx .xz .zip".split()
)


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

    Folders leave out hidden entries and binaries by suffix; folders and globs leave out what Sparing wrote, run folders and $SPARING_HOME.
    Sorted by path and free of repetitions, so that the order of the arguments does not matter. No paths: the default corpus.
    Raises UserError for a path that does not exist (naming the nearest one that does), a glob or folder without files.
    """
    files: dict[str, SourceFile] = {}
    for path in _default_corpus() if not paths else _expand(paths):
        path = os.path.abspath(path)
        if path not in files:
            status = os.stat(path)
            files[path] = SourceFile(path, status.st_size, status.st_mtime_ns)
    return [files[path] for path in sorted(files)]


def absolute(path: str) -> str:
    """A path or glob that names the same files whatever the working folder is."""
    path = os.path.expanduser(str(path))
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


def _default_corpus() -> Iterator[str]:
    """The Python standard library's own source on this machine."""
    root = sysconfig.get_path("stdlib")
    files = [path for path in _walk(root, leave_out={"site-packages", "dist-packages", "__pycache__"}) if path.endswith(".py")]
    if not files:
        raise UserError(f"the default corpus, Python's own source, is not in {root}: name your text with --data PATH")
    return iter(files)


def _expand(paths: Sequence[str]) -> Iterator[str]:
    for argument in paths:
        path = os.path.expanduser(str(argument))
        if os.path.lexists(path):
            matches = [path]
        elif glob.has_magic(path):
            matches = sorted(match for match in glob.glob(path, recursive=True) if not _in_ours(match, _literal(path)))
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
                yield match
            elif len(matches) == 1:
                raise UserError(f"{argument} is neither a file nor a folder (a broken link, a pipe or a device): name a regular file")


def _walk(root: str, leave_out: Iterable[str] = ()) -> Iterator[str]:
    skip = set(leave_out)
    for folder, folders, names in os.walk(root):
        if _ours(folder):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skip)
        for name in sorted(names):
            path = os.path.join(folder, name)
            if not name.startswith(".") and os.path.splitext(name)[1].lower() not in BINARY_SUFFIXES and os.path.isfile(path):
                yield path


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
