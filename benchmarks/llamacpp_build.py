"""Builds llama.cpp for named instruction sets, from the sources that llama-cpp-python's release on the package index has."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from sparing.base.config import UserError
from sparing.base.messages import say

PACKAGE = "llama-cpp-python==0.3.36"
OPTIONS = {
    "avx512": ("AVX", "AVX2", "FMA", "F16C", "BMI2", "AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16"),
    "avx2": ("AVX", "AVX2", "FMA", "F16C", "BMI2"),
}
"""llama.cpp's GGML_* options. None has AMX: a build with it died of an illegal instruction on an Intel processor that has AMX."""
LEFT_OUT = ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER")


def build(folder: Path, isa: str, jobs: int = 1) -> Path:
    """A folder with the package `llama_cpp` and its libraries for the instruction set; made in `folder` where it is not there yet (a
    quarter of an hour on one core). A build that was interrupted goes on."""
    made = folder / isa
    if (made / "llama_cpp" / "lib" / "libllama.so").exists():
        return made
    sources = _sources(folder)
    options = [f"-DGGML_{name}=ON" for name in OPTIONS[isa]] + [f"-DLLAMA_BUILD_{name}=OFF" for name in LEFT_OUT]
    work = folder / f"build-{isa}"
    say(f"building llama.cpp for {isa} in {work}")
    common = ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DGGML_NATIVE=OFF", "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON"]
    _run("cmake", "-S", sources / "vendor" / "llama.cpp", "-B", work, *common, *options)
    _run("cmake", "--build", work, "--target", "llama", "-j", jobs)
    libraries = made / "llama_cpp" / "lib"
    libraries.mkdir(parents=True, exist_ok=True)
    (made / "llama_cpp" / "__init__.py").touch()  # the package's own asks for more packages
    for name in ("llama_cpp.py", "_ctypes_extensions.py", "_ggml.py"):
        shutil.copy2(sources / "llama_cpp" / name, made / "llama_cpp" / name)
    for file in sorted((work / "bin").glob("*.so*"), key=lambda path: "libllama" in path.name):  # its presence says that all are there
        shutil.copy2(file, libraries / file.name)
    return made


def _sources(folder: Path) -> Path:
    if found := next(folder.glob("llama_cpp_python-*/vendor/llama.cpp/CMakeLists.txt"), None):
        return found.parents[2]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _run(sys.executable, "-m", "pip", "-q", "download", "--no-binary", ":all:", "--no-deps", PACKAGE, "-d", scratch)
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            archive.extractall(scratch, filter="data")
        unpacked = next(path for path in Path(scratch).iterdir() if path.is_dir())
        return unpacked.rename(folder / unpacked.name)


def _run(*command: object) -> None:
    try:
        subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not installed: the comparison builds llama.cpp with it") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"{command[0]} failed: {(error.stderr or error.stdout).strip()[-500:]}") from None
