"""Make a virtual environment with Sparing in it: `python tools/environment.py ENV [--extra dev|gguf,serve] [--torch auto|cpu|cuda]`.

Standard library only. Keeps a torch that already satisfies pyproject.toml's range, says what will be downloaded before it downloads,
and does nothing when ENV is up to date (ENV/installed holds a hash of all that the result depends on).
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # on Linux, PyPI's torch carries CUDA; the CPU builds live here
# Download sizes, dependencies included ("cuda": NVIDIA's libraries), measured with torch 2.13.0 for Python 3.11 on Linux x86-64.
MB = {"cpu": 192, "cuda": 2731, "sparing": 101, "dev": 185, "gguf,serve": 7}
PROBE = "import torch; print(torch.__version__, torch.version.cuda, torch.__file__, sep='\\n')"


def stop(message: str):
    sys.exit(f"sparing: {message}")


def say(message: str):
    print(message, file=sys.stderr, flush=True)


def installed_torch(python: str) -> tuple[str, bool, Path] | None:
    """(version, is a CUDA build, site-packages folder) of the torch that `python` imports; None when it imports none."""
    result = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, cwd="/")
    lines = result.stdout.split("\n")
    return (lines[0], lines[1] != "None", Path(lines[2]).parent.parent) if result.returncode == 0 and len(lines) >= 3 else None


def satisfies(version: str, requirement: str) -> bool:
    """Whether a torch version lies in a range like `torch>=2.11,<2.14`. Pre-releases don't, as pip sees it."""
    if not re.fullmatch(r"\d+(\.\d+)*(\+.*)?", version):
        return False

    def key(text: str):
        return tuple(int(part) for part in text.split("+")[0].split("."))

    low, high = (re.search(mark + r"([\d.]+)", requirement).group(1) for mark in (">=", "<(?!=)"))
    return key(low) <= key(version) < key(high)


def is_environment(python: str) -> bool:
    """Whether this is a working interpreter with pip, of the version that runs us."""
    try:
        result = subprocess.run([python, "-c", "import sys, pip; print(sys.version)"], capture_output=True, text=True)
    except OSError:
        return False
    return result.returncode == 0 and result.stdout.strip() == sys.version.strip()


def has_nvidia_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


def reachable(url: str) -> bool:
    if os.environ.get("PIP_NO_INDEX"):
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
        return True
    except (OSError, ValueError):
        return False


def announce(torch_kept: bool, torch_builds: list[str], extra: str):
    """Print how much will be downloaded. pip can't be asked: its dry run downloads the packages to look into them."""
    rest = MB["sparing"] + (MB[extra] if extra else 0)
    if torch_kept:
        say(f"to download: about {rest} MB at most (less what is there or cached)")
    else:
        either = " or ".join(f"{rest + MB[build]} MB with PyTorch's {build.upper()} build" for build in torch_builds)
        say(f"to download: about {either} (less what is there or cached)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("env", type=Path)
    parser.add_argument("--extra", choices=["dev", "gguf,serve"], default="")
    parser.add_argument("--torch", choices=["auto", "cpu", "cuda"], default="auto")
    args = parser.parse_args()

    project = (ROOT / "pyproject.toml").read_bytes()
    env = (ROOT / args.env).resolve()
    key = json.dumps([hashlib.sha256(project + Path(__file__).read_bytes()).hexdigest(), str(env), sys.version, args.extra, args.torch])
    stamp, python = env / "installed", str(env / "bin" / "python")
    if stamp.exists() and stamp.read_text() == key and Path(python).exists():
        return
    requirement = next(line for line in tomllib.loads(project.decode())["project"]["dependencies"] if line.startswith("torch"))

    if not is_environment(python):
        say(f"making {args.env} with Python {sys.version.split()[0]}")
        made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(env)], capture_output=True, text=True)
        if made.returncode != 0:
            stop(f"{sys.executable} cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)")
    stamp.unlink(missing_ok=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check"]

    cuda = {"cpu": False, "cuda": True, "auto": sys.platform == "linux" and has_nvidia_gpu()}[args.torch]

    def usable(found) -> bool:  # a CUDA build also runs on the CPU; a CPU build does not run on the GPU
        return found is not None and satisfies(found[0], requirement) and (found[1] or not cuda)

    extra_index, builds = [], ["cuda" if cuda else "cpu"]
    kept_from = next((env / "lib").glob("python3*/site-packages")) / "kept-torch.pth"
    ours = installed_torch(python)
    if not usable(ours) and kept_from.exists():  # what was kept before no longer does
        kept_from.unlink()
        ours = installed_torch(python)
    kept = usable(ours)
    if kept:
        say(f"keeping torch {ours[0]}")
    else:
        if ours is not None and satisfies(ours[0], requirement):
            subprocess.run([*pip, "uninstall", "-qq", "--yes", "torch"], check=True)  # in range, but the wrong build: pip would keep it
        theirs = installed_torch(sys.executable)
        kept = usable(theirs)
        if kept:
            # Behind the environment's own packages, so that only what is missing there comes from here.
            kept_from.write_text(f"{theirs[2]}\n")
            say(f"keeping torch {theirs[0]} of {sys.executable}")
        elif not cuda and sys.platform == "linux":
            if reachable(f"{CPU_INDEX}/torch/"):
                extra_index = ["--extra-index-url", CPU_INDEX]
            else:
                say(f"{CPU_INDEX} is not reachable: pip takes the torch that its own index has, which may be a CUDA build")
                builds = ["cpu", "cuda"]
    announce(kept, builds, args.extra)
    wanted = [*extra_index, requirement, "--editable", f"{ROOT}[{args.extra}]" if args.extra else str(ROOT)]
    # In a terminal pip shows its progress; in a log only its errors.
    if subprocess.run([*pip, "install", *([] if sys.stderr.isatty() else ["-qq"]), *wanted]).returncode != 0:
        stop(f"pip failed, see above; run make again to go on, or remove {args.env} to start anew")
    got = installed_torch(python)
    if got is None:
        stop(f"the installed torch does not import; try: {python} -c 'import torch'")
    say(f"installed in {args.env}: torch {got[0]} ({'CUDA' if got[1] else 'CPU'} build)")
    if cuda and not got[1]:
        say("note: a CUDA build was wanted, and pip's index offered a CPU build")
    stamp.write_text(key)


if __name__ == "__main__":
    main()
