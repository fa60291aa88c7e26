"""Joules from counters and models: wraparound, zones that would count twice, what cannot be read."""

import os
import subprocess
import sys
import time

import pytest

from sparing.account.power import PowerModel, Rapl, peak_memory, reset_peak_memory, resident_memory, sources
from sparing.account.prices import Rates
from sparing.base.hardware import Gpu, Machine

MACHINE = Machine(os="Linux", cpu="Some CPU", cores_physical=2, cores_logical=4, memory_bytes=1)
RATES = Rates(1.0, 0.1, 400.0, 1.0, 10.0, 50.0, {})


def zone(folder, name, label, energy, most=1000):
    (folder / name).mkdir(parents=True)
    (folder / name / "name").write_text(label + "\n")
    (folder / name / "energy_uj").write_text(f"{energy}\n")
    (folder / name / "max_energy_range_uj").write_text(f"{most}\n")
    return folder / name / "energy_uj"


def test_rapl_adds_packages_and_memory_once(tmp_path):
    package = zone(tmp_path, "intel-rapl:0", "package-0", 100, 10**9)
    core = zone(tmp_path, "intel-rapl:0:0", "core", 0, 10**9)
    dram = zone(tmp_path, "intel-rapl:0:1", "dram", 0, 10**9)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 5, 10**9)
    psys = zone(tmp_path, "intel-rapl:2", "psys", 0, 10**9)
    mmio = zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0, 10**9)
    rapl = Rapl(tmp_path)
    assert rapl.joules() == 0 and rapl.how == "measured"
    for file, value in ((package, 3_000_100), (core, 2_000_000), (dram, 500_000), (second, 1_000_005), (psys, 9**9), (mmio, 9**9)):
        file.write_text(str(value))
    assert rapl.joules() == pytest.approx(3 + 0.5 + 1)


def test_rapl_counters_begin_anew(tmp_path):
    file = zone(tmp_path, "intel-rapl:0", "package-0", 900_000, most=1_000_000)
    rapl = Rapl(tmp_path)
    file.write_text("100000")
    assert rapl.joules() == pytest.approx(0.2)
    file.write_text("100001")
    assert rapl.joules() == pytest.approx(0.200001)


def test_a_rank_counts_its_share_of_the_host(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    whole, quarter = Rapl(tmp_path), Rapl(tmp_path, 0.25)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("9000000")
    assert whole.joules() == 8.0 and quarter.joules() == 2.0


def test_where_rapl_is_missing_or_for_root_only_the_model_steps_in(tmp_path, monkeypatch):
    monkeypatch.setattr(Rapl.__init__, "__defaults__", (tmp_path, 1.0))
    (found,) = sources(MACHINE, RATES, RATES)
    assert (found.part, found.how) == ("cpu", "estimated")
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    (found,) = sources(MACHINE, RATES, RATES)
    assert (found.name, found.how) == ("RAPL", "measured")
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    (found,) = sources(MACHINE, RATES, RATES)
    assert found.how == "estimated"


def test_a_gpu_that_nvml_does_not_show_is_estimated_never_nothing():
    machine = Machine(os="Linux", cpu="c", cores_physical=1, cores_logical=1, memory_bytes=1, gpus=(Gpu("G", 1, "9.0"),))
    try:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU that NVML shows")
    except ImportError:
        pass
    found = {source.part: source for source in sources(machine, RATES, RATES)}
    time.sleep(0.05)
    assert found["gpu"].how == "estimated" and found["gpu"].joules() >= 0.05 * 50 * 0.9


def test_the_model_goes_from_idle_to_busy(clock):
    model = PowerModel(10.0, 50.0, cores=1)
    clock.advance(30.0)
    resting = model.joules()
    assert resting == pytest.approx(10 * 30.0, rel=0.05)
    cpu = time.process_time()
    while time.process_time() - cpu < 0.3:
        sum(range(1000))
    clock.advance(1.0)
    assert model.joules() - resting == pytest.approx(10 * 1.0 + 40 * 0.3, rel=0.1)
    model.change(0.0, 0.0, 1)
    before = model.joules()
    clock.advance(1.0)
    assert model.joules() == before > 0


def test_the_model_counts_children_that_have_ended(clock):
    model = PowerModel(0.0, 10.0, cores=1)
    clock.advance(10.0)  # more wall time than the child will use
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"], check=True)
    assert model.joules() > 10 * 0.28


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="no /proc")
def test_peak_memory_starts_anew():
    reset_peak_memory()
    before = peak_memory()[0]
    block = bytearray(64 * 2**20)
    assert peak_memory()[0] - before >= 60 * 2**20
    del block
    reset_peak_memory()
    assert peak_memory()[0] - before < 32 * 2**20
    assert 0 < resident_memory() <= peak_memory()[0]


@pytest.mark.gpu
def test_nvml_counts_what_a_gpu_draws():
    torch = pytest.importorskip("torch")
    pytest.importorskip("pynvml")
    from sparing.account.power import Nvml

    nvml, begun = Nvml(), time.monotonic()
    a = torch.randn(4096, 4096, device="cuda")
    while time.monotonic() - begun < 2:
        a = (a @ a).clamp(-1, 1)
        torch.cuda.synchronize()
    watts = nvml.joules() / (time.monotonic() - begun)
    assert nvml.how == "measured" and 20 < watts < 2000 * torch.cuda.device_count()
