"""Budget seconds over several attempts."""

import json

import pytest
from tiny import new_run

from sparing.train.pace import Clock


def test_attempts_add_up_and_one_attempt_counts_once(tmp_path, clock):
    run, now = new_run(tmp_path / "run"), clock.now
    first = Clock(run, now - 10.0)
    assert first.seconds() == pytest.approx(10.0)
    first.record()
    again = Clock(run, now - 10.0)  # the same attempt, a stage later: what it recorded itself is not added
    assert again.seconds() == pytest.approx(10.0)
    again.record()
    second = Clock(run, now - 5.0)
    assert second.seconds() == pytest.approx(15.0)
    second.at_least(3.0)
    assert second.seconds() == pytest.approx(15.0)
    second.at_least(30.0)  # a checkpoint that knows better
    assert second.seconds() == pytest.approx(35.0)


def test_the_last_line_of_the_metrics_counts(tmp_path, clock):
    run = new_run(tmp_path / "run")
    run.metrics_file.write_text("".join(json.dumps({"step": step, "seconds": 2.0 * step}) + "\n" for step in range(5)) + '{"step": 5, "sec')
    assert Clock(run, clock.now).seconds() == pytest.approx(8.0)
