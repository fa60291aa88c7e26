"""`sparing chat` in a process of its own: pipes, JSON, commands, signals; and at a pseudo-terminal."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import sparing
from sparing import api
from sparing.cli.terminal import harmless, messages

SMALL = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 512, "num_dense_layers": 2}
TRAIN = {"seq_len": 256, "batch_size": 4, "threads": 1, "replicas": 1, "compile": False, "micro_batch_size": 4, "evals": 0}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    (root / "text").mkdir()
    for i in range(20):
        (root / "text" / f"{i}.txt").write_text("".join(f"The cat number {j} of book {i} went to the sea.\n" for j in range(60)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARING_HOME", str(root / "home"))
        api.train([str(root / "text")], "8ktok", str(root / "run"), {"model": SMALL, "train": TRAIN}, samples=0)
        yield root


def start(workplace, *more, **options):
    environment = os.environ | {"PYTHONPATH": str(Path(sparing.__file__).parent.parent), "SPARING_HOME": str(workplace / "home")}
    words = [sys.executable, "-m", "sparing", "chat", str(workplace / "run"), "--weights", "float32", "--temperature", "0", *more]
    return subprocess.Popen(words, env=environment, **options)


def talk(workplace, text, *more):
    process = start(workplace, *more, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(text if isinstance(text, bytes) else text.encode(), timeout=120)
    return process.returncode, out.decode(), err.decode()


def test_a_line_in_is_an_answer_out(workplace):
    status, out, err = talk(workplace, "Hello\n\n/reset\nHello\n/sytsem x\n//what\n/quit\nnever asked\n", "--max-tokens", "5", "--json")
    turns = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [turn["message"] for turn in turns] == ["Hello", "Hello", "/what"], err
    assert turns[0]["answer"] == turns[1]["answer"] and turns[2]["prompt_tokens"] > turns[1]["prompt_tokens"]
    assert turns[0]["completion_tokens"] <= 5 and turns[0]["seconds"] > 0
    assert "/sytsem: no such command; nearest: /system" in err
    rows = [row for row in api.receipt(str(workplace / "run"))["later"] if row["stage"] == "chat"]
    assert rows and rows[0]["tokens"] > 0 and rows[0]["status"] == "done"


def test_the_same_as_text(workplace):
    _, told, _ = talk(workplace, "Hello\n", "--max-tokens", "5", "--json")
    status, out, _ = talk(workplace, "Hello\n", "--max-tokens", "5")  # standard input ends without /quit
    assert status == 0 and out.strip() == harmless(json.loads(told)["answer"]).strip()


@pytest.mark.parametrize(
    ("text", "more", "says"),
    [(b"\xff\n", (), "line 1 of standard input is not UTF-8"), ("a\n", ("--weights", "int7"), "--weights int7: not available"),
     ("a\n", ("--max-tokens", "0"), "max_tokens 0: must be 1 or more"),
     ("a\n", ("--base", "/nowhere"), "/nowhere: no such run folder")],
)  # fmt: skip
def test_mistakes_are_one_line(workplace, text, more, says):
    status, out, err = talk(workplace, text, *more)
    assert status == 2 and out == "" and err.count("\n") == 1 and says in err


def interrupted_at_a_terminal(workplace) -> int:
    """Ask, press ctrl-c as soon as the answer has begun, and ctrl-d at the next prompt; -> the exit status."""
    ours, theirs = pty.openpty()
    process = start(workplace, "--max-tokens", "240", stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    seen = b""

    def until(mark: bytes) -> None:
        nonlocal seen
        while mark not in seen:
            assert select.select([ours], [], [], 60)[0], seen
            seen += os.read(ours, 4096)

    until(b"> ")
    os.write(ours, b"Tell me\r")
    until(b"Tell me\r\n")
    seen = seen.partition(b"Tell me\r\n")[2]
    until(b" ")
    process.send_signal(signal.SIGINT)
    until(b"\n> ")
    os.write(ours, b"\x04")
    status = process.wait(timeout=60)
    os.close(ours)
    return status


def test_at_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves(workplace):
    """On a busy machine the answer may be over before the key is pressed: at the prompt ctrl-c leaves, with 130, and it is tried again."""
    statuses = (interrupted_at_a_terminal(workplace) for _ in range(5))
    assert next(status for status in statuses if status != 130) == 0


def test_a_line_that_is_not_utf8_does_not_end_a_conversation_at_a_terminal(monkeypatch, capsys):
    """Python decodes it with or without an error, as the locale wants it."""
    lines = iter([UnicodeDecodeError("utf-8", b"\xe4", 0, 1, "invalid"), "\udce4", "ähm", EOFError()])

    def typed(_prompt):
        if isinstance(line := next(lines), Exception):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    assert list(messages(interactive=True)) == ["ähm"]
    assert capsys.readouterr().err.count("this line is not UTF-8 text") == 2


def test_a_terminal_obeys_nothing_that_a_model_writes():
    assert harmless("a\x1b[31mred\x9b2J\x07\ttab\nline\rback") == "a\\x1b[31mred\\x9b2J\\x07\ttab\nline\\rback"
    assert harmless("\u202egnp.exe \u2066") == "\\u202egnp.exe \\u2066"
    assert harmless("häuser 日本 👩\u200d🚀") == "häuser 日本 👩\u200d🚀"
