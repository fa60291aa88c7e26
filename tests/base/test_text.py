"""Text files that people write: with or without a byte order mark, and one line for what is no UTF-8."""

import json

import pytest

from sparing.account.prices import tables
from sparing.base.config import UserError
from sparing.base.config_file import read_recipe
from sparing.base.files import decoded, read_text
from sparing.base.run import RunFolder
from sparing.data.chat import template_text
from sparing.evals.tasks import read
from sparing.interop.hf_config import read_json
from sparing.serve.settings import read_keys

MARK = b"\xef\xbb\xbf"
KEY = "a-key-of-more-than-16-characters"


@pytest.fixture
def readers(tmp_path, monkeypatch):
    """What reads a text that people write: (its file, what is in it, the reader, what it should make of it)."""
    monkeypatch.setenv("SPARING_HOME", str(tmp_path))
    run, settings = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "settings")
    run.path.mkdir()
    settings.path.mkdir()
    return {
        "keys": (tmp_path / "keys", f"{KEY}\nanother-{KEY}\n", read_keys, (KEY, f"another-{KEY}")),
        "recipe": (tmp_path / "r.toml", "[model]\nnum_layers = 3\n", lambda path: read_recipe(path).wishes["model"], {"num_layers": 3}),
        "prices": (tmp_path / "prices.toml", '[home]\nrent = "spot"\n', lambda _: tables()["home"], {"rent": "spot"}),
        "quiz": (tmp_path / "quiz.jsonl", '{"text": "two words"}\n', lambda path: read(path)[1], [{"before": "two", "word": "words"}]),
        "config": (tmp_path / "config.json", '{"a": 1}', read_json, {"a": 1}),
        "template": (run.path / "chat_template.jinja", "A\r\nB", lambda _: template_text(run), "A\nB"),
        "settings": (settings.path / "tokenizer_config.json", '{"chat_template": "C"}', lambda _: template_text(settings), "C"),
    }


WHO = ("keys", "recipe", "prices", "quiz", "config", "template", "settings")


@pytest.mark.parametrize("who", WHO)
def test_a_byte_order_mark_is_no_part_of_the_text(readers, who):
    path, text, reader, expected = readers[who]
    for mark in (b"", MARK):
        path.write_bytes(mark + text.encode())
        assert reader(path) == expected


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize(
    ("encoding", "says"),
    [("utf-16", "is UTF-16 text; save it as UTF-8"), ("utf-32", "is UTF-32 text"), ("latin-1", "line 3 is not UTF-8 text")],
)
def test_another_encoding_is_one_line(readers, who, encoding, says):
    path, text, reader, _ = readers[who]
    path.write_bytes((f"\n\nné {text}" if encoding == "latin-1" else text).encode(encoding))
    with pytest.raises(UserError, match=f"{path.name}: {says}") as error:
        reader(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("who", ["keys", "recipe", "quiz", "config"])
def test_a_folder_is_one_line(readers, tmp_path, who):
    with pytest.raises(UserError, match="Is a directory") as error:
        readers[who][2](tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_request_may_begin_with_a_mark():
    requests = pytest.importorskip("sparing.serve.requests")
    body = json.dumps({"model": "m", "tokens": [1, 2]}).encode()
    assert requests.parse(MARK + body, requests.Detokenize)["tokens"] == [1, 2]


def test_what_is_read_is_bounded(tmp_path):
    with pytest.raises(UserError, match="is larger than 1 MiB"):
        read_text("/dev/zero", limit=1 << 20)
    with pytest.raises(UserError, match="null byte"):
        read_text("a\0b")


def test_bytes_that_are_no_text():
    assert decoded(MARK + "naïve\r\n".encode(), "the prompt") == "naïve\r\n"
    with pytest.raises(UserError, match=r"the prompt: line 2 is not UTF-8 text \(byte 0xe9\)"):
        decoded(b"one\ncaf\xe9", "the prompt")
