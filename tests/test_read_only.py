"""A run folder that may only be read serves every verb that reads, and stays as it was; so does a home that cannot be written."""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

import sparing
from sparing.cli.main import main
from sparing.kernels import native

OPTIONS = (
    "--budget 4ktok --samples 0 --model.hidden-size 32 --model.num-layers 1 --model.num-heads 2 --model.vocab-size 320 --train.seq-len 32"
    " --train.batch-size 8 --train.micro-batch-size 8 --train.threads 1 --train.compile false --train.replicas 1 --data.workers 1"
).split()
DROP, OVERRIDE, READ_SEARCH = 24, 1, 2  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH of Linux

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the superuser's rights are given up as Linux has them")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a text, a home and a finished run, which may only be read."""
    root = tmp_path_factory.mktemp("read-only")
    (root / "text.txt").write_text("\n".join(f"Line {line} of the text says what lines say." for line in range(800)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARING_HOME", str(root / "home"))
        assert main(["train", "--data", str(root / "text.txt"), "--out", str(root / "run"), *OPTIONS]) == 0
    paths = [root / "run", *(root / "run").rglob("*")]
    modes = {path: path.stat().st_mode for path in paths}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    yield root
    for path, mode in modes.items():
        path.chmod(mode)


def as_a_user() -> None:
    """The superuser may write where permissions say otherwise: not this process."""
    if os.geteuid() == 0:
        for capability in (OVERRIDE, READ_SEARCH):
            ctypes.CDLL(None).prctl(DROP, capability, 0, 0, 0)


@contextlib.contextmanager
def untouched(folder):
    def state():
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}

    before = state()
    yield
    assert state() == before


def start(work, *arguments, home="home") -> subprocess.Popen:
    command = [sys.executable, "-m", "sparing", *map(str, arguments)]
    source = str(Path(sparing.__file__).parent.parent)
    environment = os.environ | {"SPARING_HOME": str(work / home), "OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    environment["SPARING_NATIVE"] = ""  # under the home, as everywhere but in tests
    return subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True, preexec_fn=as_a_user, cwd=work)


def told(work, *arguments, status=0, home="home") -> tuple[str, str]:
    process = start(work, *arguments, home=home)
    out, err = process.communicate(timeout=240)
    assert process.returncode == status and "Traceback" not in err, err
    return out, err


def test_the_verbs_that_read(work):
    with untouched(work / "run"):
        assert json.loads(told(work, "eval", "run", "--data", "text.txt", "--json")[0])["bpb"] > 0
        assert json.loads(told(work, "generate", "run", "--prompt", "Line", "--max-tokens", 3, "--json")[0])["tokens"] == 3
        told(work, "export", "run", "--out", "hf")
        later = {row["stage"] for row in json.loads(told(work, "receipt", "run", "--csv", "bill.csv", "--json")[0])["later"]}
        assert later == {"evaluate", "generate"}
        assert (work / "hf/model.safetensors").exists() and (work / "bill.csv").stat().st_size


def test_pages(work):
    pytest.importorskip("plotly")
    with untouched(work / "run"):
        told(work, "report", "run", "--out", "page.html")
        refused = told(work, "report", "run", status=2)[1]
        assert refused == "sparing: --out run/report.html: its folder cannot be written; choose another --out\n"


def test_the_server(work):
    pytest.importorskip("uvicorn")
    with untouched(work / "run"):
        process = start(work, "serve", "run", "--port", 0, "--threads", 1)
        line = next(line for line in process.stderr if "http://" in line)
        body = json.dumps({"model": "run", "prompt": "Line", "max_tokens": 2}).encode()
        url = line.split()[-1] + "/v1/completions"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            assert json.load(response)["usage"]["completion_tokens"] == 2
        process.send_signal(signal.SIGTERM)
        assert "Traceback" not in process.communicate(timeout=60)[1] and process.returncode == 0


@pytest.mark.skipif(native.passes() is None, reason="no C compiler here")
def test_a_home_that_cannot_be_written_is_no_missing_compiler(work):
    (work / "closed").mkdir()
    (work / "closed").chmod(0o555)
    with untouched(work / "run"), untouched(work / "closed"):
        out, said = told(work, "eval", "run", "--data", "text.txt", "--json", home="closed/home")
        assert json.loads(out)["bpb"] > 0
        assert "closed/home/native cannot be written: our C is compiled at every start" in said and "no C compiler" not in said
        refused = told(work, "serve", "run", "--port", 0, status=2, home="closed/home")[1]
        assert "SPARING_HOME" in refused and "audit.jsonl: Permission denied" in refused and refused.count("\n") == 1
