"""Data sets by name, from a hub of the test's own."""

import json
import os
import subprocess
import sys

import pytest
from tests.hub import hub_with

from sparing.base.config import UserError
from sparing.data.files import absolute
from sparing.data.hub import data_set
from sparing.data.pipes import python_path

FILES = {
    "README.md": b"# a card\n",
    "train/a.jsonl": b'{"text": "one", "meta": {"pile_set_name": "Books"}}\n{"x": 1}\n',
    "other/b.jsonl": b'{"text": "two"}\n',
    "load.py": b"raise SystemExit\n",
}


@pytest.fixture
def hub():
    """-> (its address, the files that were asked for)."""
    with hub_with("datasets", "somebody/texts", lambda: FILES) as served:
        yield served


READ = """
import json, sys
from sparing.base.config import CannotGoOn, UserError
from sparing.data.sources import documents
for path in sys.argv[1:]:
    try:
        rejected = []
        print(json.dumps([[document.text, document.meta] for document in documents([path], reject=rejected.append)]), len(rejected))
    except (UserError, CannotGoOn) as error:
        print(type(error).__name__, error)
"""


def read(endpoint: str, home, *paths: str) -> list[str]:
    """In a process of its own: the library reads the environment when it is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    environment |= {"PYTHONPATH": python_path(), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", READ, *paths], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_data_set_is_read_by_its_name_and_then_without_a_network(hub, tmp_path):
    pytest.importorskip("huggingface_hub")
    endpoint, asked = hub
    whole, part, other = read(endpoint, tmp_path, "hf:somebody/texts", "hf:somebody/texts/train", "hf:somebody/nothing")
    one = ["one", {"pile_set_name": "Books", "format": "json"}]
    assert json.loads(whole.rsplit(" ", 1)[0]) == [["two", {"format": "json"}], one] and whole.endswith(" 1")
    assert json.loads(part.rsplit(" ", 1)[0]) == [one]
    assert other.startswith("UserError somebody/nothing: the hub has no such repository")
    assert set(asked) == {"train/a.jsonl", "other/b.jsonl"}, "no program, and nothing that holds no rows"
    again, missing = read("http://127.0.0.1:9", tmp_path, "hf:somebody/texts", "hf:somebody/elsewhere")
    assert again == whole
    assert missing.startswith("CannotGoOn somebody/elsewhere: the hub cannot be reached")


def test_names_that_cannot_be():
    for path in ("hf:", "hf:texts", "hf:somebody/texts/../x"):
        with pytest.raises(UserError, match="is hf:OWNER/NAME or hf:OWNER/NAME/FOLDER"):
            data_set(path)
    assert absolute("hf:somebody/texts") == "hf:somebody/texts"
