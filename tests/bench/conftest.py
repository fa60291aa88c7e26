"""Real text small enough for seconds."""

import argparse
import difflib
import json
import shutil
import textwrap
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A folder with train/ and val/."""
    folder = tmp_path_factory.mktemp("text")
    for part, modules in (("train", (argparse, difflib, json.decoder)), ("val", (textwrap,))):
        (folder / part).mkdir()
        for module in modules:
            shutil.copy(module.__file__, folder / part)
    return folder
