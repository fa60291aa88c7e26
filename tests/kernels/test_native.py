"""The shared libraries: which are built when, and what becomes of old builds."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from sparing.account.power import resident_memory
from sparing.kernels import native, products

pytestmark = pytest.mark.skipif(native.passes() is None, reason="no C compiler here")
STEP = """
from sparing.base.config import Config, ModelConfig, TrainConfig
from sparing.train.practice import practise, trainer_of
model = ModelConfig(vocab_size=256, hidden_size=64, num_layers=2)
practise(trainer_of(Config(model=model, train=TrainConfig(batch_size=2, seq_len=32, replicas=2, device="cpu"))))
"""


def test_full_precision_builds_nothing_for_few_bits(tmp_path):
    subprocess.run([sys.executable, "-c", STEP], check=True, env=dict(os.environ, SPARING_HOME=str(tmp_path), SPARING_NATIVE=""))
    assert [path.name.split("-")[0] for path in (tmp_path / "native").glob("*.so")] == ["passes"]


def test_builds_that_nobody_uses_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARING_HOME", str(tmp_path))
    monkeypatch.delenv("SPARING_NATIVE")
    folder, days = tmp_path / "native", 86400.0
    folder.mkdir()
    for name, age in (("pool-old", 40), ("pool-used", 20), ("decode-old", 40)):
        (folder / f"{name}.so").touch()
        os.utime(folder / f"{name}.so", (time.time() - age * days,) * 2)
    made = native.build("pool", native.SOURCES["pool"], ("-O0", "-fPIC", "-shared"))
    assert {path.name for path in folder.glob("*.so")} == {"pool-used.so", "decode-old.so", made.name}
    os.utime(made, (time.time() - 40 * days,) * 2)
    assert native.build("pool", native.SOURCES["pool"], ("-O0", "-fPIC", "-shared")) == made
    assert time.time() - made.stat().st_mtime < days  # used


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_threads_work_space_is_freed_with_it(dtype):
    """A replica's threads come and go; what they packed weights into is 64 MiB here, or 32."""

    def work() -> None:
        with native.path("vectors"):
            products.nt(torch.zeros(64, 2048, dtype=dtype), torch.zeros(8192, 2048))

    if not native.can("vectors", dtype):
        pytest.skip("no such kernels here")
    work()
    before = resident_memory()
    for _ in range(8):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    native.trim_heap()
    assert resident_memory() - before < 128 << 20
