import json
import os
from dataclasses import replace

import pytest

from sparing.base import hardware
from sparing.base.hardware import Gpu, Machine, load_calibration, machine, machine_key, save_calibration

SMALL = Machine("Linux 6", "a cpu", 2, 4, 8 * 10**9)


def test_this_machine():
    here = machine(with_gpus=False)
    assert 1 <= here.cores_physical <= here.cores_logical <= (os.cpu_count() or 1)
    assert here.memory_bytes > 10**8
    assert here.cpu and here.os
    assert machine(with_gpus=True).gpus == hardware.gpus()


def test_affinity_counts():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert machine(with_gpus=False).cores_logical == 1
    finally:
        os.sched_setaffinity(0, before)


def cgroup(tmp_path, monkeypatch, proc, files):
    """A cgroup tree of our own: the kernel's needs root to make."""
    (tmp_path / "proc").write_text(proc)
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    real = hardware._cgroup_folders
    monkeypatch.setattr(hardware, "_cgroup_folders", lambda controller: real(controller, str(tmp_path / "proc"), str(tmp_path / "fs")))


def test_limits_of_cgroups_version_2_anywhere_above(tmp_path, monkeypatch):
    files = {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000", "a/b/memory.max": "max", "a/memory.max": "123456789"}
    cgroup(tmp_path, monkeypatch, "0::/a/b\n", files)
    assert hardware._cpu_quota() == 1.5
    here = machine(with_gpus=False)
    assert here.cores_logical == here.cores_physical == 1
    assert here.memory_bytes == 123456789


def test_limits_of_cgroups_version_1(tmp_path, monkeypatch):
    files = {
        "cpu/j/cpu.cfs_quota_us": "50000",
        "cpu/j/cpu.cfs_period_us": "100000",
        "cpu/cpu.cfs_quota_us": "-1",
        "memory/j/memory.limit_in_bytes": "200000000",
    }
    cgroup(tmp_path, monkeypatch, "5:cpu,cpuacct:/j\n4:memory:/j\n0::/\n", files)
    assert hardware._cpu_quota() == 0.5
    assert machine(with_gpus=False).cores_logical == 1
    assert machine(with_gpus=False).memory_bytes == 200000000


def test_no_limit_at_all(tmp_path, monkeypatch):
    cgroup(tmp_path, monkeypatch, "4:memory:/\n", {"memory/memory.limit_in_bytes": str(2**63 - 4096)})
    assert hardware._cpu_quota() is None
    assert 10**8 < machine(with_gpus=False).memory_bytes < 2**50


def test_calibration_belongs_to_one_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARING_HOME", str(tmp_path / "home"))
    assert load_calibration(SMALL) == {}
    assert save_calibration(SMALL, {"bf16_flops": 7e11})
    assert save_calibration(SMALL, {"threads": 2})
    assert load_calibration(SMALL) == {"bf16_flops": 7e11, "threads": 2}
    for other in (replace(SMALL, cores_logical=2), replace(SMALL, gpus=(Gpu("H", 10**11, "9.0"),)), replace(SMALL, cpu="b")):
        assert load_calibration(other) == {}
    assert machine_key(replace(SMALL, os="Linux 7")) == machine_key(SMALL), "a kernel update keeps the measurements"


def test_a_damaged_calibration_counts_as_none(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARING_HOME", str(tmp_path))
    save_calibration(SMALL, {"a": 1})
    path = tmp_path / "calibration" / f"{machine_key(SMALL)}.json"
    for text in ("", "{", "[]", json.dumps({"values": 3})):
        path.write_text(text)
        assert load_calibration(SMALL) == {}
    assert save_calibration(SMALL, {"a": 2}) and load_calibration(SMALL) == {"a": 2}


def test_a_home_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARING_HOME", str(tmp_path / "file" / "home"))
    assert save_calibration(SMALL, {"a": 1}) is False
    assert load_calibration(SMALL) == {}


def test_home(monkeypatch):
    monkeypatch.setenv("SPARING_HOME", "~/here")
    assert str(hardware.home()) == os.path.expanduser("~/here")
    monkeypatch.delenv("SPARING_HOME")
    assert str(hardware.home()) == os.path.expanduser("~/.local/share/sparing")


@pytest.mark.parametrize("version", [1, 2])
def test_memory_that_a_cgroup_still_grants(tmp_path, monkeypatch, version):
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, amount in zip(names, (50_000, 45_000), strict=True):
        (tmp_path / name).write_text(f"{amount}\n")
    (tmp_path / "memory.stat").write_text("anon 30000\ninactive_file 7000\n" + "total_inactive_file 7000\n" * (version == 1))
    monkeypatch.setattr(hardware, "_cgroup_folders", lambda controller: [tmp_path])
    assert hardware.free_memory() == 12_000
    (tmp_path / names[0]).write_text("max\n")
    assert hardware.free_memory() > 1_000_000
