import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("environment", ROOT / "tools" / "environment.py")
environment = importlib.util.module_from_spec(spec)
spec.loader.exec_module(environment)


@pytest.mark.parametrize(
    ("version", "kept"),
    [
        ("2.11", True),
        ("2.11.0", True),
        ("2.13.0+cpu", True),
        ("2.13.9+cu130", True),
        ("2.10.1", False),
        ("2.14.0", False),
        ("2.14", False),
        ("2.13.0a0+git1", False),
        ("3.0", False),
    ],
)
def test_which_torch_is_kept(version, kept):
    assert environment.satisfies(version, "torch>=2.11,<2.14") == kept


def test_the_torch_that_runs_these_tests_is_in_range():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    requirement = next(line for line in dependencies if line.startswith("torch"))
    version, _, folder = environment.installed_torch(sys.executable)
    assert environment.satisfies(version, requirement)
    assert (folder / "torch").is_dir()


def test_no_torch_is_none(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True)
    assert environment.installed_torch(str(tmp_path / "bin" / "python")) is None
    assert not environment.is_environment(str(tmp_path / "bin" / "python"))
    assert not environment.is_environment(str(tmp_path / "missing"))
    assert environment.is_environment(sys.executable)


def test_an_index_that_does_not_answer():
    assert not environment.reachable("http://127.0.0.1:9/simple")
    assert not environment.reachable("not a url")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is what is tested")
def test_make_without_a_new_enough_python_is_one_clear_line():
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}  # `make test` may have called
    command = ["make", "quickstart", "PYTHON=/nonexistent/python"]
    result = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True)
    assert result.returncode != 0
    assert result.stderr.splitlines()[0].startswith("sparing: needs Python 3.11 or newer")
    assert result.stdout == ""
