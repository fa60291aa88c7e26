"""The run folder: nothing half written, one writer, damage noticed, tensors streamed."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparing.base.config import UserError
from sparing.base.files import DamagedError, DiskFullError, append_durably, link_or_copy, read_lines, write_atomic
from sparing.base.run import (
    BEGUN,
    RunFolder,
    read_tensors,
    run_tensors,
    stream_tensors,
    tensors_of,
    verify_folder,
    write_folder,
    write_tensors,
)
from sparing.model.linear import Linear


def python(code: str, *arguments, **more) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], stdout=-1, stderr=-1, text=True, **more)


def test_create_and_open(tmp_path):
    run = RunFolder.create(tmp_path / "deep" / "run")
    assert run.weights.is_dir() and run.state.is_dir()
    RunFolder.create(run.path)  # died before its config was written: may begin again
    run.config_file.write_text("")
    assert RunFolder.open(run.path).config_file == run.config_file
    with pytest.raises(UserError, match="sparing resume"):
        RunFolder.create(run.path)


def test_wrong_folders_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        RunFolder.open(tmp_path / "absent")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("")
    with pytest.raises(UserError, match=r"no config.toml; did you mean .*run\?"):
        RunFolder.open(tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match=r"not empty .*thesis\.tex"):
        RunFolder.create(tmp_path / "thesis")
    with pytest.raises(UserError, match="is a file"):
        RunFolder.create(tmp_path / "thesis" / "thesis.tex")


HOLD = (
    "import sys; from sparing.base.run import RunFolder\nwith RunFolder(sys.argv[1]).lock(): print('locked', flush=True); sys.stdin.read()"
)


def test_what_was_meant_is_named(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.toml").write_text("")
    with pytest.raises(UserError, match=f"bsae: no such run folder; did you mean {tmp_path}/base"):
        RunFolder.open(tmp_path / "bsae")
    (tmp_path / "theirs").mkdir()
    for file in (tmp_path / "theirs/config.json", tmp_path / "model.gguf"):
        file.write_text("{}")
    with RunFolder.create(tmp_path / "killed").lock(), pytest.raises(UserError, match="what began it ended before"):
        RunFolder.open(tmp_path / "killed")
    for path in ("theirs", "model.gguf"):
        with pytest.raises(UserError, match=f"imported first: sparing import {tmp_path}/{path} --out RUN"):
            RunFolder.open(tmp_path / path)


@pytest.mark.parametrize("there", [False, True])
def test_what_fails_before_it_is_a_run_leaves_nothing(tmp_path, there):
    path = tmp_path / "run"
    if there:
        path.mkdir()
    with pytest.raises(KeyError), RunFolder.create(path).making():
        write_atomic(path / "weights" / "x", "half")
        write_atomic(path / "tokenizer.json", "{}")
        with pytest.raises(UserError, match="is being written"), RunFolder.create(path).making():
            pass
        assert (path / "weights" / "x").exists(), "another writer's files stay"
        raise KeyError
    assert path.exists() == there and not list(path.glob("[!.]*"))
    with pytest.raises(KeyError), RunFolder.create(path).making():
        write_atomic(path / "config.toml", "")
        raise KeyError
    assert RunFolder.open(path).weights.is_dir(), "what has a configuration can be resumed"


def test_what_a_killed_verb_left_is_taken_over(tmp_path):
    """Whatever it had written before the configuration, the same command begins again."""
    run = RunFolder.create(tmp_path / "run")
    with run.lock():
        for name in (*BEGUN[3:], "adapter/x", "weights/x", "state/use/x"):
            (run.path / name).parent.mkdir(parents=True, exist_ok=True)
            (run.path / name).write_text("half")
    again = RunFolder.create(run.path)
    (run.path / "notes").write_text("")
    with pytest.raises(UserError, match="it has notes"):
        RunFolder.create(run.path)
    (run.path / "notes").unlink()
    with pytest.raises(KeyError), again.making():
        raise KeyError
    assert not list(run.path.glob("[!.]*"))


def test_what_others_put_into_it_stays(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    with run.lock():
        (run.path / "packed").mkdir()
        (run.path / "notes").write_text("years")
        run.remove()
    assert [path.name for path in run.path.iterdir()] == ["notes"]


@pytest.mark.parametrize("name", ["data/book.txt", "weights/mine.safetensors", "state/notes", "tokenizer.json", "MODEL_CARD.md"])
def test_files_of_a_folder_that_is_no_run_are_in_no_danger(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("years")
    with pytest.raises(UserError, match=f"not empty .it has {name.partition('/')[0]}"):
        RunFolder.create(tmp_path)
    assert (tmp_path / name).read_text() == "years"


def test_second_writer_gets_one_line_and_a_dead_one_leaves_no_lock(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    holder = python(HOLD, run.path, stdin=subprocess.PIPE)
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=f"is being written by process {holder.pid}") as error, run.lock():
        pass
    assert "\n" not in str(error.value)
    holder.kill()
    holder.communicate()
    with run.lock():
        with pytest.raises(UserError, match=f"is being written by process {os.getpid()}"), run.lock():  # nor again by this one
            pass
        second = python(HOLD, run.path, stdin=subprocess.DEVNULL)
        assert "is being written by process" in second.communicate()[1]
    with run.lock():
        pass


# Windows' locking of bytes in terms of POSIX's: exclusive, from the position on, other bytes stay readable.
WINDOWS = """
import sys, types, os
import fcntl as posix
msvcrt = types.SimpleNamespace(LK_NBLCK=2)
msvcrt.locking = lambda descriptor, mode, count: posix.lockf(descriptor, posix.LOCK_EX | posix.LOCK_NB, count, 0, os.SEEK_CUR)
sys.modules |= {"fcntl": None, "msvcrt": msvcrt}
del os.O_DIRECTORY
"""


def test_without_fcntl_one_writer_too(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    command = [sys.executable, "-c", WINDOWS + HOLD, str(run.path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    second = subprocess.run(command, input="", capture_output=True, text=True)
    assert f"is being written by process {holder.pid}" in second.stderr and second.returncode == 1
    holder.kill()
    holder.wait()
    third = subprocess.run(command, input="", capture_output=True, text=True)
    assert third.stdout == "locked\n" and third.returncode == 0, third.stderr
    saving = "from sparing.base.run import write_atomic\nassert write_atomic(sys.argv[1] + '/a', 'b')['bytes'] == 1"
    subprocess.run([sys.executable, "-c", WINDOWS + saving, str(run.path)], check=True)
    assert (run.path / "a").read_text() == "b" and (run.path / ".lock").stat().st_size < 100


def test_orphaned_worker_does_not_keep_the_lock(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    code = """
        import os, sys, time
        from sparing.base.run import RunFolder
        with RunFolder(sys.argv[1]).lock():
            child = os.fork()
            if child == 0:
                time.sleep(60)
            print(child, flush=True)
            os.kill(os.getpid(), 9)
    """
    parent = python(code, run.path)
    child = int(parent.stdout.readline())
    parent.wait()
    try:
        with run.lock():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        parent.communicate()


TENSORS = {
    "a": torch.randn(3, 5),
    "b.bias": torch.randn(7).bfloat16(),
    "c": torch.arange(4),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 3),
    "f8": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "view": torch.randn(6, 4).T,
    "flags": torch.tensor([True, False]),
}


def test_weights_are_floats_whatever_they_are_stored_in(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    linear = Linear(24, 16)
    torch.nn.init.normal_(linear.weight)
    exact = linear.weight.detach().clone()
    linear.freeze("int8")
    experts = torch.randint(-127, 128, (2, 3, 8), dtype=torch.int8), torch.rand(2, 3)
    stored = {f"a.{name}": tensor for name, tensor in linear.state_dict().items()}
    stored |= {"e": experts[0], "e_scale": experts[1], "half": torch.randn(4).bfloat16(), "input_scale": torch.ones(2)}
    write_tensors(run.weights_file, stored)
    floats = dict(run_tensors(run))
    assert floats.keys() == {"a.weight", "e", "half", "input_scale"} == set(tensors_of(run)) and len(tensors_of(run)) == 4
    step = exact.abs().amax(1, keepdim=True) / 127
    assert ((floats["a.weight"] - exact).abs() <= step * 0.501).all() and (floats["a.weight"] != exact).any()
    assert torch.equal(floats["e"], experts[0].float() * experts[1][..., None])
    assert torch.equal(floats["half"], stored["half"]), "as it is"
    with pytest.raises(DamagedError, match=r"b\.weight"):
        tensors_of(run)["b.weight"]
    run.weights_file.write_bytes(run.weights_file.read_bytes()[:-1])
    with pytest.raises(DamagedError, match=r"model\.safetensors"):
        tensors_of(run)


def test_tensors_are_written_one_by_one(tmp_path):
    alive = []

    def tensors():
        for i in range(4):
            assert sum(one() is not None for one in alive) <= 1, "only the one before is there"
            tensor = torch.full((1000,), float(i))
            alive.append(weakref.ref(tensor))
            yield str(i), tensor
            del tensor

    digest = stream_tensors(tmp_path / "x.safetensors", {str(i): (torch.float32, (1000,)) for i in range(4)}, tensors())
    assert digest["bytes"] == (tmp_path / "x.safetensors").stat().st_size
    assert load_file(tmp_path / "x.safetensors")["3"][999] == 3
    with pytest.raises(AssertionError):
        stream_tensors(tmp_path / "y.safetensors", {"0": (torch.float32, (4,))}, iter([("0", torch.zeros(5))]))
    assert not (tmp_path / "y.safetensors").exists()


def test_tensors_are_plain_safetensors_both_ways(tmp_path):
    digest = write_tensors(tmp_path / "x.safetensors", TENSORS)
    theirs = load_file(tmp_path / "x.safetensors")
    assert theirs.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert theirs[name].dtype == tensor.dtype and theirs[name].shape == tensor.shape
        assert torch.equal(theirs[name].float(), tensor.float())
    assert digest["bytes"] == (tmp_path / "x.safetensors").stat().st_size
    save_file({"w": TENSORS["a"]}, tmp_path / "y.safetensors")
    assert torch.equal(dict(read_tensors(tmp_path / "y.safetensors"))["w"], TENSORS["a"])
    (tmp_path / "z.safetensors").write_bytes(b"nonsense")
    with pytest.raises(DamagedError):
        list(read_tensors(tmp_path / "z.safetensors"))


def test_weights_are_read_and_not_mapped(tmp_path):
    """Pages of a mapped file are this process's for as long as any of its tensors lives."""
    run = RunFolder.create(tmp_path / "run")
    tensors = TENSORS | {"number": torch.tensor(3.0), "nothing": torch.zeros(0, 4), "codes": torch.arange(6, dtype=torch.int16)}
    write_tensors(run.weights_file, tensors)
    found = tensors_of(run)
    assert list(found) == list(dict(read_tensors(run.weights_file)))
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape and torch.equal(found[name].float(), tensor.float())
    if Path("/proc/self/maps").exists():
        assert str(run.weights_file) not in Path("/proc/self/maps").read_text()
    with open(run.weights_file, "r+b") as file:
        file.truncate(run.weights_file.stat().st_size - 1)
    with pytest.raises(DamagedError, match="cut off"):
        dict(found.items())
    save_file({"w": torch.zeros(2, dtype=torch.uint16)}, run.weights_file)
    with pytest.raises(DamagedError, match="w has the type U16"):
        tensors_of(run)["w"]


def test_writing_tensors_makes_no_second_copy(tmp_path):
    """512 MB of weights; the process may grow by far less than that."""
    code = """
        import resource, sys, torch
        from sparing.base.run import write_tensors
        tensors = {f"w{i}": torch.full((2048, 2048), float(i)) for i in range(32)}
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        write_tensors(sys.argv[1], tensors)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    output, errors = python(code, tmp_path / "big.safetensors").communicate()
    assert int(output) < 100_000, errors  # kB


def test_folder_checksums(tmp_path):
    folder = tmp_path / "step"
    write_folder(folder, {"w.safetensors": {"w": torch.ones(10)}, "state.json": "{}"})
    verify_folder(folder)
    write_folder(folder, {"w.safetensors": {"w": torch.zeros(10)}, "state.json": "{}"})  # replaces
    verify_folder(folder)
    assert dict(read_tensors(folder / "w.safetensors"))["w"].sum() == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step"]
    data = bytearray((folder / "w.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "w.safetensors").write_bytes(data)
    with pytest.raises(DamagedError, match=r"w\.safetensors"):
        verify_folder(folder)
    for damage in ("w.safetensors", "checksums.json"):
        (folder / damage).unlink()
        with pytest.raises(DamagedError):
            verify_folder(folder)


def limited(code: str, path, limit: int) -> subprocess.CompletedProcess:
    """Run code in a process that may write no file beyond `limit` bytes: EFBIG, which is treated like a full disk."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(path)], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip


def test_full_disk_leaves_what_was_there(tmp_path):
    folder = tmp_path / "step"
    write_folder(folder, {"w.safetensors": {"w": torch.ones(10)}})
    code = """
        import sys, torch
        from pathlib import Path
        from sparing.base.files import DiskFullError, write_atomic
        from sparing.base.files import append_durably
        from sparing.base.run import write_folder
        path = Path(sys.argv[1])
        for write in (
            lambda: write_folder(path / "step", {"w.safetensors": {"w": torch.zeros(100_000)}}),
            lambda: write_atomic(path / "file", b"x" * 200_000),
            lambda: append_durably(path / "log", "x" * 200_000),
        ):
            try:
                write()
                print("no error")
            except DiskFullError as error:
                print(error)
    """
    done = limited(code, tmp_path, 100_000)
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all("no room left" in line for line in lines), done
    verify_folder(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "step"]


def test_a_really_full_device():
    """/dev/full answers ENOSPC to every write."""
    from pathlib import Path

    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    from sparing.base.files import disk_errors

    with pytest.raises(DiskFullError, match="No space left"), disk_errors("there"), open("/dev/full", "w") as file:
        file.write("x" * 100_000)


def test_atomic_write_survives_a_kill(tmp_path):
    code = """
        import sys
        from sparing.base.files import write_atomic
        print("begun", flush=True)
        for number in range(10**9):
            write_atomic(sys.argv[1] + "/file", str(number % 10) * 50_000)
    """
    for delay in (0.01, 0.05, 0.1):
        writer = python(code, tmp_path)
        writer.stdout.readline()
        signal.sigtimedwait([], delay)
        writer.kill()
        writer.communicate()
        if (tmp_path / "file").exists():
            text = (tmp_path / "file").read_text()
            assert len(text) == 50_000 and len(set(text)) == 1
    write_atomic(tmp_path / "file", "after")
    assert (tmp_path / "file").read_text() == "after"


def test_logs_survive_a_line_cut_short(tmp_path):
    log = tmp_path / "log.jsonl"
    append_durably(log, json.dumps({"a": 1}))
    with open(log, "a") as file:
        file.write('{"a": 2, "b')
    append_durably(log, json.dumps({"a": 3}))
    assert read_lines(log) == [{"a": 1}, {"a": 3}]
    assert read_lines(tmp_path / "absent") == []


def test_link_or_copy_replaces(tmp_path):
    (tmp_path / "new").write_text("new")
    (tmp_path / "old").write_text("old")
    link_or_copy(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_text() == "new"
    (tmp_path / "new").unlink()
    assert (tmp_path / "old").read_text() == "new"
