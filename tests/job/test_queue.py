"""`sparing launch --queue`: what a file may say, what is refused before anything starts, and real jobs, one of which fails."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.queue import Queue
from sparing.base import hardware
from sparing.base.hardware import Gpu, Machine
from sparing.cli.launch_verb import SHARED
from sparing.cli.main import main
from sparing.cli.queued import command_of
from sparing.cli.verbs import VERBS
from sparing.data.files import find_files
from sparing.job.queue_file import all_needs, dependencies, job_of, read_queue, room_of
from sparing.planning.needs import needs

MACHINE = Machine("Linux", "", 4, 4, int(8e9))
TINY = [
    "--train.seq-len",
    "32",
    "--train.batch-size",
    "4",
    "--model.vocab-size",
    "512",
    "--model.hidden-size",
    "32",
    "--model.num-layers",
    "2",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARING_HOME", str(tmp_path / "home"))
    dice = random.Random(0)
    words = ["".join(dice.choices("abcdefghij", k=dice.randint(2, 6))) for _ in range(200)]
    (tmp_path / "books").mkdir()
    for name in range(12):
        (tmp_path / "books" / f"{name}.txt").write_text(" ".join(dice.choices(words, k=1500)))
    return tmp_path


def command(words):
    return command_of(words, VERBS, SHARED)


def written(*tables, **top):
    """A file of these jobs, each a command or a table."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in top.items()]
    for table in tables:
        table = table if isinstance(table, dict) else {"command": table}
        lines += [
            "[[job]]",
            *(f"{key} = {value if key == 'raw' else json.dumps(value)}".replace("raw = ", "") for key, value in table.items()),
        ]
    Path("jobs.toml").write_text("\n".join(lines))
    return "jobs.toml"


def refusal(capsys, *tables, **top):
    assert main(["launch", "--queue", written(*tables, **top)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert not Path("jobs.toml.queue/state.json").exists()
    return told[-1]


TRAIN = "train --data books --budget 60s --out runs/a"


@pytest.mark.parametrize(
    "tables, says",
    [
        ([{"command": TRAIN, "prioriti": 1}], "jobs.toml: job 1: unknown key prioriti; nearest: priority"),
        ([{"command": TRAIN, "priority": "high"}], "jobs.toml: job 1: priority = 'high': expected a whole number"),
        ([{"command": TRAIN, "deadline": "soon"}], "jobs.toml: job 1: deadline 'soon': is no time; write \"30m\", \"2h\" or \"1d\""),
        ([{"name": "x"}], "jobs.toml: job 1: needs command, text or a list of words"),
        (["train --data 'books"], "jobs.toml: job 1: command: no closing quotation"),
        ([TRAIN, "trian --out b"], "jobs.toml: job 2: unknown verb 'trian'; nearest: train"),
        ([TRAIN + " --bugdet 5m"], "jobs.toml: job 1: train: unknown option --bugdet; nearest: --budget"),
        (["train --data books --out runs/a"], "jobs.toml: job 1: train needs --budget"),
        (["train --data books --budget 5 --out runs/a"], "jobs.toml: job 1: budget '5' has no unit"),
        (["sft runs/none --data books --budget 1m --out runs/b --method best"], "jobs.toml: job 1: --method best: not available"),
        (["sft runs/none --data books --budget 1m --out runs/b"], "jobs.toml: job 1 (b): runs/none: no such run folder"),
        (["train --data boks --budget 60s --out runs/a"], "jobs.toml: job 1 (a): "),
        ([TRAIN, "train --data books --budget 90s --out ./runs/a"], "jobs.toml: job 2 (a): writes "),
        (["serve runs/a"], "jobs.toml: job 1: serve waits for people, and never ends"),
        (["launch --nodes 2 " + TRAIN], "jobs.toml: job 1: launch --nodes is no job of a queue"),
        (["launch -n 2 eval runs/a --data books"], "jobs.toml: job 1: launch: eval is not divided among ranks"),
        ([{"command": "eval runs/a --data books", "preemptible": True}], "jobs.toml: job 1 (eval-1): `eval` loses all when it is stopped"),
        ([{"command": TRAIN, "cores": 500}], "jobs.toml: job 1 (a): needs 500 cores; "),
        ([{"command": TRAIN, "memory": "9TB"}], "jobs.toml: job 1 (a): needs 9000.0 GB of memory (memory of the file; "),
        ([TRAIN + " --from runs/b", TRAIN.replace("/a", "/b") + " --from runs/a"], "jobs.toml: jobs a, b wait for each other"),
    ],
)  # fmt: skip
def test_a_file_is_checked_as_a_whole_before_anything_starts(folder, capsys, tables, says):
    assert says in refusal(capsys, *tables)


def test_what_does_not_go_with_a_queue(folder, capsys):
    for words, says in [
        (["--queue", "none.toml"], "none.toml: No such file"),
        (["--queue", "jobs.toml", "-n", "2"], "launch: --queue runs the jobs of its file alone: n does not go with it"),
        (["--plan", "train"], "launch: --plan goes with --queue FILE"),
        (["--json", "train"], "launch: --json goes with --queue FILE"),
    ]:
        assert main(["launch", *words]) == 2
        assert says in capsys.readouterr().err
    assert refusal(capsys, {"command": TRAIN}, least_rum=1).startswith(
        "sparing: --queue jobs.toml: unknown key least_rum; nearest: least_run"
    )
    assert "no jobs" in refusal(capsys)
    (folder / "runs/a").mkdir(parents=True)
    (folder / "runs/a/config.toml").write_text("")
    assert "job 1 (a): runs/a already holds a run: continue it with `sparing resume runs/a`" in refusal(capsys, TRAIN)


def test_a_file_in_full(folder):
    (folder / "chats.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    launched = ["sparing", "launch", "-n", "2", *TRAIN.split()[:-1], "b"]
    curated = {"command": "data curate books --out clean --workers 2", "memory": "2GB", "time": "30s"}
    file = written(
        {"command": TRAIN, "deadline": "2h", "preemptible": True},
        {"command": launched},
        {"command": "sft runs/a --data chats.jsonl --budget 60s --out runs/c", "name": "taught", "priority": 3},
        {"command": "eval runs/c --data books"},
        {"command": "resume runs/a --budget +60s"},
        "eval runs/a --data books",
        curated | {"raw": "deadline = 2027-01-31T18:00:00Z"},
        {"command": "train --data clean --budget 60s --out runs/d", "cores": 3},
        least_run="10s",
    )
    queue = read_queue(file, command)
    assert queue.least_run_s == 10
    assert [entry.name for entry in queue.entries] == ["a", "b", "taught", "eval-4", "resume-5", "eval-6", "clean", "d"]
    after = dependencies(queue.entries)
    assert after == {
        "a": (), "b": (), "taught": ("a",), "eval-4": ("taught",), "resume-5": ("a",), "eval-6": ("a", "resume-5"), "clean": (),
        "d": ("clean",),
    }  # fmt: skip
    found = all_needs(queue, after, MACHINE)
    assert {name: sorted(needs.by_cores) for name, needs in found.items()} == {
        "a": [1, 2, 4], "b": [2, 4], "taught": [1, 2, 4], "eval-4": [1, 2, 4], "resume-5": [1, 2, 4], "eval-6": [1, 2, 4], "clean": [1, 2],
        "d": [3],
    }  # fmt: skip
    assert {need.seconds for name in ("a", "b", "taught", "resume-5", "d") for need in found[name].by_cores.values()} == {60.0}
    assert found["clean"].by_cores[1] == (30.0, 2e9) and "memory and time of the file" in found["clean"].source
    assert found["b"].by_cores[2].memory > 1.5 * found["a"].by_cores[1].memory > 6e8
    entry = {entry.name: entry for entry in queue.entries}
    assert job_of(entry["a"], found["a"], (), room_of(MACHINE), 1000.0).deadline == 1000 + 7200
    assert job_of(entry["clean"], found["clean"], (), room_of(MACHINE), 1000.0).deadline == 1801418400


def test_the_benchmark_has_twelve_jobs_that_can_run(folder):
    Path("jobs.toml").write_text(Queue("books", "books", "out")._text())
    queue = read_queue("jobs.toml", command)
    after = dependencies(queue.entries)
    assert len(after) == 12 and sum(entry.preemptible for entry in queue.entries) == 2
    assert {name: waits for name, waits in after.items() if waits} == {
        "further": ("base",), "taught": ("chats", "base"), "score": ("base",), "curated": ("clean", "base"), "due": ("base",),
    }  # fmt: skip
    assert len(all_needs(queue, after, MACHINE)) == 12


def test_a_budget_in_tokens_is_faster_on_more_cores_and_a_model_too_large_is_refused(folder, monkeypatch):
    tokens = needs(command(["train", "--data", "books", "--budget", "10Mtok", "--out", "a"]), MACHINE, {}).by_cores
    assert tokens[1].seconds > 1.5 * tokens[4].seconds > 0
    large = command(
        ["train", "--data", "books", "--budget", "10Mtok", "--out", "a", "--model.hidden-size", "8192", "--model.num-layers", "40"]
    )
    with pytest.raises(Exception, match=r"training needs .* GB, 7\.6 GB are there; what fits"):
        needs(large, MACHINE, {})
    gpus = Machine("Linux", "", 16, 16, int(64e9), (Gpu("NVIDIA H100", int(80e9), "9.0"),) * 4)
    on_gpus = needs(command(["launch", "-n", "2", *TRAIN.split()]), gpus, {})
    assert on_gpus.gpus == 2 and list(on_gpus.by_cores) == [8]
    assert needs(command([*TRAIN.split(), "--train.device", "cpu"]), gpus, {}).gpus == 0


def test_cores_of_a_machine_are_whole_ones(monkeypatch):
    siblings = {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}
    monkeypatch.setattr(hardware, "_read", lambda path: siblings.get(int("".join(filter(str.isdigit, str(path))) or -1), "") + "\n")
    assert hardware._by_core([0, 1, 2, 3]) == [(0, 2), (1, 3)]


def result(capsys, status):
    try:
        assert main(["launch", "--queue", "jobs.toml", "--json"]) == 0 == status
    except SystemExit as left:
        assert left.code == status
    out = capsys.readouterr()
    assert "Traceback" not in out.err
    return json.loads(out.out), out.err


def test_jobs_run_and_one_fails_and_what_is_done_is_not_done_again(folder, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent.parent / "src"))
    written(
        "plan deepseek-v3 --json",
        {"command": "report none --out page.html", "name": "page"},
        {"command": "receipt page.html", "deadline": "1h"},
    )
    summary, said = result(capsys, 1)
    assert [row["status"] for row in summary["jobs"]] == ["done", "failed", "skipped"] and summary["failed"] == 2
    assert "page: FAILED after" in said and "status 2: sparing: none: no such run folder" in said
    assert "receipt-3: not started, because it needs page" in said
    first, page, last = summary["jobs"]
    assert first["exit"] == 0 and page["exit"] == 2 and first["core_s"] == pytest.approx(first["seconds"]) and first["cpu_s"] > 0
    assert last["start"] is None and last["deadline_met"] is False and summary["missed"] == ["receipt-3"]
    assert "sparing plan deepseek-v3 --json" in Path(first["log"]).read_text()
    assert not [file for file in find_files(["."]) if ".queue" in file.path]  # the folder may lie among texts
    again, said = result(capsys, 1)
    assert again["jobs"][0] == first and "plan-1: starts" not in said and "page: starts again" in said
    assert main(["launch", "--queue", "jobs.toml", "--plan"]) == 0
    planned = capsys.readouterr().out
    assert "due at" in planned and "in time" in planned and "after page" in planned


def started(*words):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent / "src")}
    return subprocess.Popen([sys.executable, "-m", "sparing", *words], stderr=subprocess.PIPE, text=True, env=environment)


def until(process, words):
    """Wait until the queue says so."""
    said = ""
    for line in process.stderr:
        said += line
        if words in line:
            return said
    raise AssertionError(f"it never said {words!r}:\n{said}")


@pytest.mark.slow
@pytest.mark.skipif(len(hardware.cpus_of_cores()) < 2, reason="needs two cores that processes can be bound to")
def test_a_run_makes_place_for_another_and_goes_on_and_a_queue_that_was_killed_goes_on(folder, capsys):
    tiny = " ".join(["--samples 0", *TINY])
    cores = len(hardware.cpus_of_cores())
    written(
        {"command": f"train --data books --budget 80s --out filler {tiny}", "preemptible": True, "cores": 1},
        {"command": "data curate books --out clean", "cores": cores - 1},
        {"command": f"train --data books clean/card.html --budget 20ktok --out first {tiny}", "priority": 1, "cores": cores},
        least_run="5s",
    )
    process = started("launch", "--queue", "jobs.toml")
    until(process, "filler: starts")
    time.sleep(1)
    process.kill()
    for _ in range(600):
        if not (folder / "filler").exists() or not _held(folder / "filler"):
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the job did not end with its queue")
    process = started("launch", "--queue", "jobs.toml")
    until(process, "filler: stops, and is saved, because first needs its place")
    until(process, "first: done")
    until(process, "filler: starts again")
    while process.poll() is None and "\nstep " not in (folder / "jobs.toml.queue/filler.log").read_text():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert "go on with: sparing launch --queue jobs.toml" in process.communicate()[1] and process.returncode == 130
    summary, _ = result(capsys, 0)
    rows = {row["name"]: row for row in summary["jobs"]}
    assert {row["status"] for row in rows.values()} == {"done"} and rows["filler"]["preemptions"] == 1
    assert "sparing resume filler" in (folder / "jobs.toml.queue/filler.log").read_text()
    assert json.loads((folder / "filler/state/summary.json").read_text())["tokens"] > 0


def _held(run):
    from sparing.base.config import UserError
    from sparing.base.lock import folder_lock

    try:
        with folder_lock(run):
            return False
    except UserError:
        return True
