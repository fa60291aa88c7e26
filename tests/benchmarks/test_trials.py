"""How another program's settings are tried: slow formats, slow settings, failures; no process is started."""

import pytest

from benchmarks import trials
from benchmarks.transformers_training import PeerSetting, all_settings
from benchmarks.trials import Task, fastest, try_settings
from sparing.base.config import UserError
from sparing.base.hardware import Machine
from sparing.bench.limit import Limit
from sparing.bench.worker import WorkerError

SLOW = Machine("Linux", "AVX2", 2, 2, 0, formats={"float32": 100e9, "bfloat16": 1.5e9})
FAST = Machine("Linux", "AMX", 2, 2, 0, formats={"float32": 100e9, "bfloat16": 900e9})


class Fake:
    """A worker whose tries take as long as it is told, by the setting built last."""

    started = 0

    def __init__(self, threads, limit):
        self.asked: list[str] = []
        Fake.started += 1

    def kill(self):
        pass


@pytest.fixture
def tried(monkeypatch):
    """A function (settings, seconds by setting, ...) -> (trials, what was asked of workers)."""
    monkeypatch.setattr(trials, "Worker", Fake)

    def function(settings, seconds, repeats=2, limit=60.0, machine=FAST):
        Fake.started, asked = 0, []

        def build(worker, setting):
            asked.append(("build", setting))
            worker.takes = seconds(setting)
            if worker.takes is None:
                raise WorkerError("does not run")

        def whole(worker, number):
            asked.append(("whole", number))
            return worker.takes

        task = Task(build, lambda worker: worker.takes, whole, tokens=100)
        return try_settings("peer", settings, task, repeats, 1, Limit(limit), machine), asked

    return function


def test_a_format_that_is_far_slower_is_skipped_and_it_says_by_how_much(tried, capsys):
    found, asked = tried(all_settings(compile=False), lambda setting: 1.0, machine=SLOW)
    timed = [trial["setting"]["precision"] for trial in found if trial["tokens_per_s"]]
    assert timed == ["float32"] * 4 and len(found) == 12
    assert {setting.precision for what, setting in asked if what == "build"} == {"float32"}
    line = "bfloat16: this processor multiplies it 66.7 times slower than float32 (measured)"
    assert {trial["error"] for trial in found if not trial["tokens_per_s"]} == {line}
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("skipped") == 1 and f"peer, 8 settings: skipped: {line}" in said


def test_a_little_slower_is_no_reason_to_skip(tried):
    machine = Machine("Linux", "", 2, 2, 0, formats={"float32": 100e9, "bfloat16": 60e9})
    found, _ = tried(all_settings(compile=False), lambda setting: 1.0 if setting.precision == "float32" else 0.5, machine=machine)
    assert fastest(found, "trains")["precision"] == "bfloat16"


def test_a_setting_far_behind_the_best_is_timed_once(tried):
    first, second = PeerSetting("eager"), PeerSetting("sdpa")
    found, asked = tried([first, second], lambda setting: 0.1 if setting == first else 0.5, repeats=4)
    assert [trial["tokens_per_s"] for trial in found] == [pytest.approx(1000), pytest.approx(200)]
    assert asked.count(("whole", 4)) == 1 and asked[-1] == ("whole", 1)


def test_what_would_not_fit_into_the_limit_is_left_out_after_a_small_part(tried):
    found, asked = tried([PeerSetting("eager"), PeerSetting("sdpa")], lambda setting: 100.0 if setting.attention == "eager" else 0.1)
    assert "about 300 s, and the limit" in found[0]["error"] and found[1]["tokens_per_s"]
    assert ("whole", 1) not in asked[: asked.index(("build", PeerSetting("sdpa")))]


def test_failures_get_a_new_process_and_the_first_is_told_where_all_fail(tried):
    settings = [PeerSetting("eager"), PeerSetting("sdpa"), PeerSetting("sdpa", "eager")]
    found, _ = tried(settings, lambda setting: None if setting.attention == "eager" else 1.0)
    assert Fake.started == 2 and found[0]["error"] == "does not run"
    found, _ = tried(settings, lambda setting: None)
    with pytest.raises(UserError, match="no setting of transformers trains here; the first one: does not run"):
        fastest(found, "trains")


def test_compiled_settings_have_processes_of_their_own(tried):
    settings = [PeerSetting("eager"), PeerSetting("sdpa"), PeerSetting("eager", compile=True), PeerSetting("sdpa", compile=True)]
    tried(settings, lambda setting: 1.0)
    assert Fake.started == 3
