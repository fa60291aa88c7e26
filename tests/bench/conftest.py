"""Real text small enough for seconds, and machines that were measured before."""

import argparse
import difflib
import json
import shutil
import textwrap
from pathlib import Path

import pytest

from sparing.base.hardware import machine, save_calibration


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A folder with train/ and val/."""
    folder = tmp_path_factory.mktemp("text")
    for part, modules in (("train", (argparse, difflib, json.decoder)), ("val", (textwrap,))):
        (folder / part).mkdir()
        for module in modules:
            shutil.copy(module.__file__, folder / part)
    return folder


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A function: from here on this machine has these measurements, and no others."""

    def set_home(**values: object) -> None:
        path = tmp_path / "home"
        path.mkdir()
        monkeypatch.setenv("SPARING_HOME", str(path))
        save_calibration(machine(), values)

    return set_home


@pytest.fixture
def slow_formats(measured):
    """A processor that multiplies float32 well and everything else badly."""
    measured(formats={"float32": 1e11, "bfloat16": 1e9, "float16": 1e9, "int8": 2e9})
