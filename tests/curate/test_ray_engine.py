"""`--engine ray`: the same bytes from a cluster. One cluster of two processes is started for all tests."""

import importlib.util
import json
import os
import signal
import subprocess
import sys

import pyarrow as pa
import pytest
from tests.curate.test_pipeline import corpus, written  # noqa: F401  (a fixture)

from sparing.base.config import UserError
from sparing.curate import entry, parts
from sparing.data.progress import Stopped

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'sparing[ray]'")
RULES = '[duplicates]\nlines = 8\n[word_list]\nwords = "{words}"\n'


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of a process each, which $RAY_ADDRESS names. Starting them takes seconds, so there is one cluster for all."""
    from ray.cluster_utils import Cluster

    from sparing.curate.ray_engine import RayData

    before = signal.getsignal(signal.SIGTERM)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    signal.signal(signal.SIGTERM, before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", nodes.address)
        with RayData() as engine:
            assert signal.getsignal(signal.SIGTERM) is before
            yield engine
    nodes.shutdown()


def batches(texts, size=5):
    for low in range(0, len(texts), size):
        some = texts[low : low + size]
        yield pa.RecordBatch.from_pydict({"text": some, "source": ["a"] * len(some), "line": list(range(low, low + len(some)))})


@needs_ray
@pytest.mark.slow  # it starts a second cluster, and Ray gives up after 30 s where the processors are busy
def test_without_an_address_a_cluster_is_started_here_and_ended(corpus, tmp_path):  # noqa: F811
    command = [sys.executable, "-m", "sparing", "data", "dedup", str(corpus), "--engine", "ray", "--workers", "2", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([*command, "--out", str(tmp_path / "ray")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["documents"]["in"] == 55 and "ray: 2 processors of this machine" in done.stderr
    entry.data("dedup", [str(corpus)], str(tmp_path / "local"), workers=1)
    assert written(tmp_path / "ray") == written(tmp_path / "local")


@needs_ray
def test_a_cluster_of_two_processes_writes_the_same_bytes(cluster, corpus, tmp_path, monkeypatch, capsys):  # noqa: F811
    """All three stages: rules, with a list of the user's; repeated lines; signatures."""
    monkeypatch.setattr(parts, "PART_DOCUMENTS", 24)
    (tmp_path / "words.txt").write_text("harbour voice\ncandle the\nuncle forest\nriver bell\n")
    (tmp_path / "rules.toml").write_text(RULES.format(words=tmp_path / "words.txt"))
    how = {"rules": str(tmp_path / "rules.toml"), "workers": 1}
    local = entry.data("curate", [str(corpus)], str(tmp_path / "local"), **how)
    assert "ray:" not in capsys.readouterr().err
    how["workers"] = None
    on_ray = entry.data("curate", [str(corpus)], str(tmp_path / "ray"), **how, engine="ray")
    assert f"ray: 2 processors of the cluster at {cluster.address} judge and sign documents; this process" in capsys.readouterr().err
    assert written(tmp_path / "ray") == written(tmp_path / "local")
    assert on_ray["documents"] == local["documents"] and on_ray["rejected"] == local["rejected"]
    assert {"word_list: max_found", "duplicate_exact", "duplicate_near"} <= set(local["rejected"])


@needs_ray
def test_more_parts_than_a_window_and_other_processes(cluster, tmp_path, monkeypatch):
    """Each part gets its own file, whatever order the cluster finishes in, and the work is not done in this process."""
    monkeypatch.setattr(parts, "PART_DOCUMENTS", 3)

    def stage(part):
        numbers = part.column("line")
        return pa.RecordBatch.from_pydict({"line": numbers, "process": pa.array([os.getpid()] * len(numbers))}).slice(0, len(numbers) - 1)

    done = parts.write_parts(stage, "made", lambda: batches([str(at) for at in range(40)]), tmp_path, cluster)
    assert len(done) == 14 and cluster.window == 4
    processes = set()
    for number in range(14):
        with parts.open_table(tmp_path / f"made-{number:05d}.arrow") as batch:
            assert batch.column("line").to_pylist() == list(range(3 * number, min(40, 3 * number + 3) - 1))
            processes |= set(batch.column("process").to_pylist())
    assert processes and os.getpid() not in processes


@needs_ray
def test_a_mistake_of_the_user_that_a_process_finds_is_one_line(cluster, tmp_path):
    def stage(part):
        from sparing.base.config import UserError

        raise UserError("words.txt: does not exist")

    with pytest.raises(UserError) as error:
        parts.write_parts(stage, "made", lambda: batches(["a"]), tmp_path, cluster)
    assert str(error.value) == "words.txt: does not exist" and not list(tmp_path.iterdir())


@needs_ray
def test_it_stops_when_asked(cluster, tmp_path):
    asked = iter([False, False, *[True] * 100])
    with pytest.raises(Stopped):
        parts.write_parts(lambda part: part, "made", lambda: batches(["a"] * 20), tmp_path, cluster, lambda: next(asked))


@needs_ray
def test_processes_and_an_address_contradict_each_other(corpus, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    with pytest.raises(UserError, match=r"--workers 2 is for a cluster that is started here, and RAY_ADDRESS names one: 192\.0\.2\.1:6379"):
        entry.data("curate", [str(corpus)], str(tmp_path / "out"), workers=2, engine="ray")
    assert not (tmp_path / "out").exists()


def test_without_ray_one_line_names_the_extra(corpus, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(UserError, match=r"^--engine ray needs Ray Data: pip install 'sparing\[ray\]'$"):
        entry.data("dedup", [str(corpus)], str(tmp_path / "out"), engine="ray")
    assert not (tmp_path / "out").exists()
