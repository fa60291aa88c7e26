"""The loss law: recovers a law it was given, survives few and wild points, its intervals hold what they should."""

import json
import random

import pytest

from sparing.budget import scaling
from sparing.budget.scaling import Point, add_point, effective_bytes, effective_parameters, fit, kind_of, law_of


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARING_HOME", str(tmp_path))
    return tmp_path


def runs(count, seed, e=0.8, noise=0.012):
    """Points of a law that is not the prior: E 0.8, A/N0^a 0.6, B/D0^b 0.5, a 0.3, b 0.42."""
    draw = random.Random(seed)
    for _ in range(count):
        n, d = 10 ** draw.uniform(5.5, 7.5), 10 ** draw.uniform(6, 8.5)
        bpb = e + 0.6 * (n / 1e6) ** -0.3 + 0.5 * (d / 1e7) ** -0.42
        yield Point(n, n, d, bpb * (1 + draw.gauss(0, noise)))


def test_recovers_a_law_from_runs():
    law = fit(list(runs(24, 0)), kind="text", own=24)
    errors = sorted(abs(law.bpb(p.active, p.total, p.text_bytes).value / p.bpb - 1) for p in runs(200, 1, noise=0))
    assert errors[100] < 0.01 and errors[180] < 0.03


def test_intervals_hold_what_they_should():
    inside, halves = [], []
    for seed in range(40):
        law = fit(list(runs(10, seed)))
        for p in runs(10, 1000 + seed):
            predicted = law.bpb(p.active, p.total, p.text_bytes)
            inside.append(predicted.low <= p.bpb <= predicted.high)
            halves.append((predicted.high - predicted.low) / 2 / predicted.value)
    assert sum(inside) / len(inside) >= 0.8
    assert sorted(halves)[len(halves) // 2] < 0.06  # and are not simply wide


def test_one_wild_run_hardly_moves_it():
    points = list(runs(12, 3))
    wild = [*points, Point(3e6, 3e6, 3e7, 4.0)]
    before, after = fit(points).bpb(3e6, 3e6, 3e7).value, fit(wild).bpb(3e6, 3e6, 3e7).value
    assert after == pytest.approx(before, rel=0.03)


def test_no_runs_at_all_is_the_prior_and_wide():
    nothing, some = fit([]).bpb(1e6, 1e6, 1e7), fit(list(runs(12, 4))).bpb(1e6, 1e6, 1e7)
    assert nothing.value == pytest.approx(0.7 + 0.45 + 0.6, rel=1e-6)
    assert nothing.high - nothing.low > 4 * (some.high - some.low)


def test_more_text_and_larger_models_are_better():
    law = law_of("text")
    assert law.bpb(1e6, 1e6, 1e8).value < law.bpb(1e6, 1e6, 1e7).value > law.bpb(1e7, 1e7, 1e7).value
    assert law.bpb(1e6, 4e6, 1e7).value < law.bpb(1e6, 1e6, 1e7).value
    shares = law.coefficients()
    n = effective_parameters(2e6, 3e6)
    assert shares["E"] + shares["A"] / n ** shares["a"] + shares["B"] / 2e7 ** shares["b"] == pytest.approx(law.bpb(2e6, 3e6, 2e7).value)


def test_shipped_points_are_close_to_their_law():
    law = law_of("text")
    assert law.own == 0 and law.shipped >= 7
    for p in scaling.shipped_points("text", Point):
        assert law.bpb(p.active, p.total, p.text_bytes).value == pytest.approx(p.bpb, rel=0.02), p.what


def test_own_runs_are_kept_and_count_more(own_home):
    before = law_of("text").bpb(1.1e6, 2.6e6, 1.4e7)
    for _ in range(6):
        assert add_point("text", Point(1.1e6, 2.6e6, 1.4e7, 1.55, "mine"))
    kept = json.loads((own_home / "laws" / "text.json").read_text())
    assert len(kept["points"]) == 6 and set(kept["coefficients"]) == {"E", "A", "B", "a", "b"}
    after = law_of("text").bpb(1.1e6, 2.6e6, 1.4e7)
    assert "6 own runs" in after.source and abs(after.value - 1.55) < 0.5 * abs(before.value - 1.55)
    assert not add_point("text", Point(1e6, 1e6, 1e7, float("nan")))


def test_another_kind_starts_from_text_but_wider():
    text, code = law_of("text").bpb(1e6, 1e6, 1e7), law_of("code").bpb(1e6, 1e6, 1e7)
    assert code.value == text.value and code.high > text.high and "no runs on code" in code.source
    add_point("code", Point(1e6, 1e6, 1e7, 1.2))
    assert law_of("code").bpb(1e6, 1e6, 1e7).value < text.value


def test_a_damaged_file_is_not_the_end(own_home):
    (own_home / "laws").mkdir()
    (own_home / "laws" / "text.json").write_text('{"points": [{"active": ')
    assert law_of("text").own == 0
    assert add_point("text", Point(1e6, 1e6, 1e7, 1.8)) and law_of("text").own == 1


def test_repeated_text_is_worth_less():
    assert effective_bytes(5e6, 1e7) == 5e6
    assert 1.9e7 < effective_bytes(2e7, 1e7) < 2e7
    assert effective_bytes(1e10, 1e7) == pytest.approx(16e7)


def test_kind_of_a_corpus():
    assert kind_of({"py": 90, "md": 10}) == "code" and kind_of({"txt": 90, "py": 10}) == "text" and kind_of({}) == "text"
