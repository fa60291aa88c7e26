"""A budget becomes steps: with a simulated clock whose speed drifts, and the plan's replay."""

import random

import pytest

from sparing.train.pace import Pace, PlanLog, fixed_steps


def simulate(path, budget_s, step_at, *, guess=1.0, evals=4, eval_s=0.0, save_s=0.0, reserve_s=0.0, startup_s=0.0, seed=0):
    """Run a budget on a made-up machine: step_at(share of the budget used) -> seconds. Returns (share used, steps, last total, plans)."""
    noise, clock = random.Random(seed), startup_s
    pace = Pace(
        PlanLog(path), step=0, seconds=clock, budget_s=budget_s, step_seconds=guess, reserve_s=reserve_s, evals=evals, interval_s=60.0
    )
    step, saved = 0, clock
    while step < (total := pace.advance(step, clock)):
        if pace.eval_due(step):
            clock += eval_s
            pace.eval_took(eval_s)
        if pace.checkpoint_due(step, clock - saved):
            clock += save_s
            pace.save_took(save_s)
            saved = clock
        took = step_at(clock / budget_s) * noise.lognormvariate(0.0, 0.15)
        clock += took
        pace.step_took(took)
        step += 1
    return (clock + save_s + eval_s + reserve_s) / budget_s, step, total, pace.log.plans


MACHINES = {
    "steady": lambda share: 0.1,
    "slows down to half in the middle": lambda share: 0.1 if share < 0.5 else 0.2,
    "gets faster": lambda share: 0.25 - 0.15 * share,
    "stalls near the end": lambda share: 0.6 if 0.85 < share < 0.9 else 0.15,
    "busy neighbours": lambda share: 0.1 if int(share * 12) % 2 else 0.17,
    "slows down at the very end": lambda share: 0.1 if share < 0.95 else 0.14,
}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("budget_s", [90.0, 300.0, 1200.0])
@pytest.mark.parametrize("guess", [0.01, 1.0])
def test_time_budget_is_used_between_95_and_102_percent(tmp_path, machine, budget_s, guess):
    for seed in range(3):
        share, step, total, plans = simulate(
            tmp_path / f"plan{seed}",
            budget_s,
            MACHINES[machine],
            guess=guess,
            eval_s=0.008 * budget_s,
            save_s=0.5,
            reserve_s=2.0,
            startup_s=8.0,
            seed=seed,
        )
        assert 0.95 <= share <= 1.02, (machine, share)
        assert step == total == plans[-1]["total_steps"]  # the decay ended with the run
        assert len(plans) < 60


@pytest.mark.parametrize("step_s", [3.0, 7.0])
def test_few_long_steps(tmp_path, step_s):
    share, *_ = simulate(tmp_path / "plan", 300.0, lambda _: step_s, eval_s=2.0, save_s=1.0, reserve_s=2.0, startup_s=10.0)
    assert 0.95 <= share <= 1.02


def test_evaluations_that_would_take_too_long_are_left_out(tmp_path):
    share, *_ = simulate(tmp_path / "plan", 300.0, lambda _: 0.1, evals=8, eval_s=7.0)
    assert 0.95 <= share <= 1.02
    log = PlanLog(tmp_path / "other")
    pace = Pace(log, step=0, seconds=0.0, budget_s=300.0, step_seconds=0.1, evals=8)
    pace.eval_took(7.0)
    assert pace.evals_left() == 0  # a second one and the last would be 7 % of the budget
    pace = Pace(PlanLog(tmp_path / "third"), step=0, seconds=0.0, budget_s=300.0, step_seconds=0.1, evals=8)
    pace.eval_took(1.0)
    assert pace.evals_left() == 7


def test_evaluations_are_evenly_spread(tmp_path):
    pace = Pace(PlanLog(tmp_path / "plan"), step=0, seconds=0.0, budget_s=None, fixed=100, evals=4)
    due = []
    for step in range(100):
        if pace.eval_due(step):
            due.append(step)
            pace.eval_took(0.0)
    assert due == [20, 40, 60, 80]  # the one after step 100 is the last, made by the loop


def test_plan_is_on_disk_before_it_is_used_and_replayed_on_resume(tmp_path):
    slow = simulate(tmp_path / "plan", 300.0, MACHINES["slows down to half in the middle"])
    plans = PlanLog(tmp_path / "plan").plans
    assert plans == slow[3] and len(plans) > 3
    middle = plans[len(plans) // 2]
    log = PlanLog(tmp_path / "plan")
    pace = Pace(log, step=middle["step"], seconds=middle["seconds"], budget_s=300.0, evals=4)
    for plan, following in zip(plans[len(plans) // 2 :], plans[len(plans) // 2 + 1 :], strict=False):
        for step in (plan["step"], following["step"] - 1):
            assert pace.advance(step, plan["seconds"]) == plan["total_steps"]
            pace.step_took(0.5)  # whatever this machine does now, recorded plans come first
    assert log.plans == plans


def test_work_lost_to_a_kill_counts(tmp_path):
    *_, plans = simulate(tmp_path / "plan", 300.0, lambda _: 0.1)
    total = plans[-1]["total_steps"]
    half = total // 2
    pace = Pace(PlanLog(tmp_path / "plan"), step=half, seconds=200.0, budget_s=300.0, evals=None)  # 50 s of work were lost
    assert half + 0.85 * (100 / 0.1) < pace.total < half + 100 / 0.09 < total
    assert PlanLog(tmp_path / "plan").plans[-1]["step"] == half


def test_no_time_left_on_resume_stops_at_once(tmp_path):
    simulate(tmp_path / "plan", 300.0, lambda _: 0.1)
    pace = Pace(PlanLog(tmp_path / "plan"), step=1000, seconds=310.0, budget_s=300.0, evals=None)
    assert pace.advance(1000, 310.0) == 1000


@pytest.mark.parametrize("amount,unit,expected", [(1000, "tok", 10), (1099, "tok", 10), (1, "tok", 1), (6e5, "flop", 10)])
def test_token_and_flop_budgets_are_never_exceeded(amount, unit, expected):
    assert fixed_steps(amount, unit, tokens_per_step=100, flops_per_token=600) == expected


def test_a_fixed_total_never_moves_and_checkpoints_keep_their_steps(tmp_path):
    pace = Pace(PlanLog(tmp_path / "plan"), step=0, seconds=0.0, budget_s=None, fixed=100, step_seconds=1.0, interval_s=5.0)
    due = []
    for step in range(40):
        assert pace.advance(step, 1e6) == 100
        due += [step] if pace.checkpoint_due(step, 1e6) else []
        pace.step_took(0.5 if step < 10 else 50.0)  # slower than when the number of steps was chosen
    assert due == [10, 20, 30]
    again = Pace(PlanLog(tmp_path / "plan"), step=20, seconds=0.0, budget_s=None, fixed=100, step_seconds=1.0)
    assert again.total == 100 and again.checkpoint_due(30, 0.0) and not again.checkpoint_due(31, 1e6)


@pytest.mark.parametrize(
    ("failures", "wished", "budget_s", "interval"),
    [(0.0, None, 1e4, 60.0), (20.0, None, 1e4, 12.0), (20.0, 5.0, 1e4, 8.0), (2000.0, None, 1e4, 8.0), (20.0, None, None, 60.0)],
)
def test_checkpoints_are_as_frequent_as_failures_ask_for(tmp_path, failures, wished, budget_s, interval):
    """By Young and Daly sqrt(2 x 0.4 s x 180 s) = 12 s; never so often that saving takes more than a twentieth of the time, here 8 s."""
    fixed = 100 if budget_s is None else None
    pace = Pace(PlanLog(None), step=0, seconds=0.0, budget_s=budget_s, fixed=fixed, interval_s=wished, failures_per_hour=failures)
    pace.save_took(0.4)
    assert pace.checkpoint_interval() == pytest.approx(interval)


def test_a_larger_budget_makes_a_new_plan(tmp_path):
    Pace(PlanLog(tmp_path / "plan"), step=0, seconds=0.0, budget_s=None, fixed=100)
    again = Pace(PlanLog(tmp_path / "plan"), step=50, seconds=0.0, budget_s=None, fixed=150)
    assert again.total == 150 and [plan["total_steps"] for plan in PlanLog(tmp_path / "plan").plans] == [100, 150]


def test_it_says_when_the_machine_slows_down_and_nothing_when_it_does_not(tmp_path):
    for name, step_at in (("slow", lambda seconds: 0.1 if seconds < 150 else 0.2), ("steady", lambda seconds: 0.1)):
        said, clock, step = [], 0.0, 0
        pace = Pace(PlanLog(tmp_path / name), step=0, seconds=0.0, budget_s=300.0, step_seconds=0.1, say=said.append)
        while step < pace.advance(step, clock):
            clock += step_at(clock)
            pace.step_took(step_at(clock))
            step += 1
        if name == "steady":
            assert said == []
        else:
            assert said and said[0].startswith("planned again: ") and "times as long" in said[0]


def test_a_budget_that_shrinks_under_way_is_kept(tmp_path):
    said, clock, step = [], 0.0, 0
    pace = Pace(PlanLog(tmp_path / "plan"), step=0, seconds=0.0, budget_s=300.0, step_seconds=0.1, name=5.0, say=said.append)
    while step < (total := pace.advance(step, clock, 300.0 if clock < 100 else 200.0)):
        clock += 0.1
        pace.step_took(0.1)
        step += 1
    assert 0.97 * 200 < clock < 1.02 * 200 and step == total
    assert any("the budget lasts 200 s, not 300 s" in text for text in said)
    assert {plan["budget"] for plan in pace.log.plans} == {5.0}
    again = Pace(PlanLog(tmp_path / "plan"), step=10, seconds=1.0, budget_s=250.0, name=5.0)
    assert again.log.plans == pace.log.plans  # still the same budget: its plans are replayed
