"""Code that a model wrote cannot do anything but compute; where that is not sure, it is not run."""

from __future__ import annotations

import os
import socket
import sys

import pytest

from sparing.adapt.rewards import load_task, verify
from sparing.base.config import UserError
from sparing.evals import contained
from sparing.evals.contained import Limits, run
from sparing.evals.verifiers import Problem

SHORT = Limits(cpu_s=1, asleep_s=0.5, memory=256 << 20)
linux = pytest.mark.skipif(sys.platform != "linux", reason="code is contained on Linux only")


@pytest.fixture(autouse=True, scope="module")
def _contained():
    if sys.platform == "linux" and (reason := contained.uncontained()):
        pytest.skip(reason)  # an old kernel, or a sandbox without Landlock


@linux
@pytest.mark.parametrize(
    "program, test, reason",
    [
        ("def f(x): return 2 * x", "assert f(2) == 4", "passed"),
        ("def f(x): return 2 * x", "assert f(2) == 5", "failed"),
        ("import json, math, re, decimal, hashlib, random", "assert math.sqrt(4) == 2", "passed"),
        ("def f(", "f()", "failed"),
        ("def f(): f()\nf()", "1", "failed"),
        ("while True: pass", "1", "time"),
        ("import time; time.sleep(999)", "1", "time"),
        ("import threading; threading.Event().wait()", "1", "time"),
        ("import time; time.sleep(0.15)", "1", "passed"),
        ("x = []\nwhile True: x.append(bytearray(1 << 24))", "1", "memory"),
        ("while True: print('x' * 10_000)", "1", "output"),
        ("import sys; sys.exit(0)", "assert False", "failed"),
        ("import os; os._exit(0)", "assert False", "ended"),
        ("import os; os.write(3, b'passed'); os._exit(0)", "assert False", "ended"),
        ("import ctypes; ctypes.string_at(0)", "1", "ended"),
        ("import threading, time\nfor _ in range(10_000): threading.Thread(target=time.sleep, args=(9,)).start()", "1", "failed"),
    ],
)
def test_what_becomes_of_a_program(program, test, reason):
    assert run(program, [test], limits=SHORT).reason == reason


@linux
@pytest.mark.parametrize(
    "attempt",
    [
        "import os; os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.execv('/bin/sh', ['sh'])",
        "import socket; socket.socket()",
        "import socket; socket.socketpair()",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.kill(-1, 9)",
        "import os; open(f'/proc/{os.getppid()}/mem', 'rb').read(1)",
        "import os; open(f'/proc/{os.getppid()}/environ', 'rb').read(1)",
        "open('/etc/passwd').read()",
        "open('/dev/shm/mine', 'w')",
        "open('/tmp/mine', 'x')",
        "open('/dev/null', 'w')",
        "import os; os.truncate('/etc/passwd', 0)",
        "import os; os.mkdir('/tmp/mine')",
        "import os; os.symlink('/etc', '/tmp/mine')",
        "import os; os.memfd_create('mine')",
        "import os; os.open('/tmp', os.O_TMPFILE | os.O_RDWR)",
        "import os; os.listdir('/')",
        "import os; os.setpriority(0, 0, 5)",
        "import fcntl, os; fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())",
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (10, 10))",
    ],
)
def test_what_no_program_can_do(attempt):
    outcome = run(f"try:\n    {attempt}\nexcept (OSError, ValueError):\n    refused = True", ["assert refused"], limits=SHORT)
    assert outcome.passed, outcome


@linux
def test_raw_calls_of_the_system_are_refused_too():
    """What Python has no function for: the parent's memory, tracing, shared memory that no limit counts, other address families."""
    calls = {"process_vm_readv": 310, "ptrace": 101, "shmget": 29, "unshare": 272, "mount": 165, "io_uring_setup": 425, "bpf": 321}
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers are those of x86-64")
    program = (
        "import ctypes, errno\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"found = {{name: (libc.syscall(number, 0, 0, 0, 0, 0, 0), ctypes.get_errno()) for name, number in {calls}.items()}}"
    )
    outcome = run(program, ["assert all(answer == (-1, errno.EPERM) for answer in found.values()), found"], limits=SHORT)
    assert outcome.passed, outcome


@linux
def test_a_program_sees_nothing_of_ours(monkeypatch):
    monkeypatch.setenv("SECRET", "here")
    with socket.socketpair()[0] as mine:
        os.set_inheritable(mine.fileno(), True)
        names = f"import os\ntry:\n    os.fstat({mine.fileno()})\n    seen = True\nexcept OSError:\n    seen = False"
        assert run(names, ["assert not seen and 'SECRET' not in os.environ"]).passed


@linux
def test_an_answer_is_judged_by_its_tests(tmp_path):
    tests = ["assert double(3) == 6", {"input": "4", "output": "8"}]
    lines = [f'{{"prompt": "Double {n}", "verifier": "code", "tests": {tests[:1]!r}}}'.replace("'", '"') for n in range(2)]
    (tmp_path / "task.jsonl").write_text("\n".join(lines))
    problem = load_task(str(tmp_path / "task.jsonl")).problems[0]
    good = "def double(x):\n    return 2 * x\n"
    assert verify(problem, f"Here you are:\n```python\n{good}```\nIt doubles.") == (1, "right")
    assert verify(problem, "```python\ndef double(x): return 9\n```") == (0, "a test failed")
    assert verify(problem, "I cannot.") == (0, "the code failed")
    both = Problem("", "", "code", ('{"input": "4", "output": "8"}',))
    assert verify(both, "```\nprint(2 * int(input()))\n```") == (1, "right")
    assert verify(both, "```\nprint(7)\n```") == (0, "another output")


def test_nothing_is_run_where_it_cannot_be_contained(monkeypatch, tmp_path):
    monkeypatch.setattr(contained, "_run", lambda *_: contained.Outcome(False, "failed", "test 1: AssertionError"))
    contained.uncontained.cache_clear()
    try:
        with pytest.raises(contained.Uncontained, match="cannot be contained"):
            run("print(1)")
        (tmp_path / "task.jsonl").write_text('{"prompt": "x", "verifier": "code", "tests": "assert True"}\n')
        with pytest.raises(UserError, match="cannot be contained on this machine"):
            load_task(str(tmp_path / "task.jsonl"))
    finally:
        contained.uncontained.cache_clear()
