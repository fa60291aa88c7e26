"""SIGTERM and SIGINT: an answer at once, whatever is running, and nothing lost that was on disk."""

import signal
import threading
import time

import pytest
from test_resume import logged

from sparing.base.preempt import Interrupted, Preempt
from sparing.base.run import RunFolder, verify_folder

LONG = 600
"""Seconds that what is interrupted would take."""
WITHIN_S = 60.0
"""Two seconds, and what a machine adds that is busy with other tests: much less than LONG."""


def stop(process, run, number=signal.SIGTERM) -> float:
    """Send the signal; returns seconds until the process has gone, after checking how it went."""
    sent = time.monotonic()
    process.kill(number)
    assert process.wait() == 130, process.output()
    assert f"sparing resume {run}" in process.output().splitlines()[-1]
    assert "Traceback" not in process.output()
    verify_folder(max(RunFolder(run).state.glob("step-*")))
    return time.monotonic() - sent


# A busy machine may need longer than the grace that a signal gives: where something has to be saved, there is more of it.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_in_a_step_the_finished_steps_are_saved(start, tmp_path, number):
    run = tmp_path / "run"
    process = start(run, "--steps", 1000, "--interval", 1000, "--slow-step", 0.05, "--grace", LONG)
    process.until(lambda: logged(run) >= 5)
    stop(process, run, number)
    assert max(run.glob("state/step-*")).name == f"step-{logged(run):08d}" < "step-00001000"


def test_in_a_slow_step_it_does_not_wait_for_the_end(start, tmp_path):
    process = start(tmp_path / "run", "--steps", 100, "--slow-step", LONG)
    process.until_says("batch 0")
    assert stop(process, tmp_path / "run") < WITHIN_S


def test_in_evaluation(start, tmp_path):
    process = start(tmp_path / "run", "--steps", 40, "--slow-eval", LONG, "--grace", LONG)
    process.until_says("evaluating")
    assert stop(process, tmp_path / "run") < WITHIN_S
    assert max(tmp_path.glob("run/state/step-*")).name == f"step-{logged(tmp_path / 'run'):08d}"


def test_in_code_that_cannot_be_interrupted_the_last_checkpoint_stands(start, tmp_path):
    process = start(tmp_path / "run", "--steps", 100, "--stuck")
    process.until_says("batch 3")
    assert stop(process, tmp_path / "run") < WITHIN_S


def test_second_signal_leaves_at_once(start, tmp_path):
    process = start(tmp_path / "run", "--steps", 100, "--stuck", "--grace", LONG)
    process.until_says("batch 3")
    process.kill(signal.SIGTERM)  # two of one number could arrive as one
    assert stop(process, tmp_path / "run", signal.SIGINT) < WITHIN_S


@pytest.mark.slow
def test_in_compilation(start, tmp_path):
    process = start(tmp_path / "run", "--steps", 100, "--compile")
    process.until_says("batch 0")
    time.sleep(2.0)
    assert stop(process, tmp_path / "run") < WITHIN_S


def test_a_rank_is_not_hurried_by_a_second_signal(monkeypatch):
    """What stops all processes of a job reaches a rank directly and through its launcher."""
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("RANK", 1), ("WORLD_SIZE", 2), ("LOCAL_RANK", 1), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    with Preempt("go on") as preempt:
        with preempt.finishing("saving"):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)  # would end this process, either here or in the thread that watches
            time.sleep(0.3)
        with pytest.raises(Interrupted, match="go on"):
            preempt.check()


def test_within_one_process():
    before = signal.getsignal(signal.SIGTERM)
    with Preempt("go on") as preempt:
        with pytest.raises(Interrupted, match="go on"), preempt.interruptible():
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("unreachable")
        assert preempt.requested
        with pytest.raises(Interrupted):
            preempt.check()
        with pytest.raises(Interrupted), preempt.interruptible():
            pytest.fail("a signal that came before is not forgotten")
    assert signal.getsignal(signal.SIGTERM) is before

    with Preempt("go on") as preempt:
        signal.raise_signal(signal.SIGTERM)  # outside `interruptible`: only noted
        assert preempt.requested


def test_outside_the_main_thread_signals_are_left_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with Preempt("x") as preempt, preempt.interruptible():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
