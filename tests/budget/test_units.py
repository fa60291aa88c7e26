import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparing.base.config import Budget, UserError
from sparing.budget.units import format_budget, parse_budget, parse_extension, parse_size


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("90s", 90, "s"),
        ("20m", 1200, "s"),
        ("20 min", 1200, "s"),
        ("2h", 7200, "s"),
        ("1.5h", 5400, "s"),
        ("1h30m", 5400, "s"),
        ("1d 2h 3m 4s", 93784, "s"),
        ("1.5e2S", 150, "s"),
        ("$5", 5, "usd"),
        ("$0.50", 0.5, "usd"),
        ("5usd", 5, "usd"),
        ("5 USD", 5, "usd"),
        ("5$", 5, "usd"),
        ("0.2kWh", 0.2, "kwh"),
        ("200Wh", 0.2, "kwh"),
        ("1 MWh", 1000, "kwh"),
        ("50Mtok", 5e7, "tok"),
        ("1_000tok", 1000, "tok"),
        ("1.5B tokens", 1.5e9, "tok"),
        ("3ktok", 3000, "tok"),
        ("3e17flop", 3e17, "flop"),
        ("1Pflop", 1e15, "flop"),
        ("1Eflop", 1e18, "flop"),
        ("100 TFLOPs", 1e14, "flop"),
    ],
)
def test_what_people_write(text, amount, unit):
    budget = parse_budget(text)
    assert budget.unit == unit
    assert math.isclose(budget.amount, amount, rel_tol=1e-12)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "number with a unit"),
        ("m", "number with a unit"),
        ("abc", "number with a unit"),
        ("20", "no unit; write 20s, 20m"),
        ("20x", "unknown unit 'x'; write one of 90s 20m"),
        ("5tokk", "unknown unit"),
        ("5EUR", "unknown unit 'EUR'"),
        ("-5m", "must be positive"),
        ("+5m", "sparing resume"),
        ("0m", "is zero"),
        ("$0", "is zero"),
        ("nan", "not a finite number"),
        ("nanm", "not a finite number"),
        ("inf h", "not a finite number"),
        ("1e999h", "not a finite number"),
        ("0.1s", "out of range; allowed: 1 second to 10 years"),
        ("99999d", "out of range"),
        ("1e30tok", "out of range"),
        ("1h$5", "only times have several parts"),
        ("1h30", "only times have several parts"),
        ("1,5h", "write one of"),
        ("1.2.3h", "write one of"),
        ("20m!", "unknown unit"),
        ("$5m", "unknown unit"),
        ("½h", "number with a unit"),
        ("1_000_", "no unit"),
    ],
)
def test_what_is_no_budget(text, says):
    with pytest.raises(UserError) as caught:
        parse_budget(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=12) | st.from_regex(r"[\$+-]?[0-9._e]{0,6}[a-zA-Z$]{0,4}[0-9]{0,2}[a-z]?", fullmatch=True))
def test_any_text_is_a_budget_or_a_user_error(text):
    try:
        budget = parse_budget(text)
    except UserError:
        return
    assert budget.amount > 0 and math.isfinite(budget.amount)


@given(st.sampled_from(["s", "tok", "flop", "usd", "kwh"]), st.floats(1e6, 3e8) | st.integers(1_000_000, 3 * 10**8).map(float))
def test_format_and_parse_are_inverse(unit, amount):
    assert parse_budget(format_budget(Budget(amount, unit))) == Budget(amount, unit)


@pytest.mark.parametrize("text", ["1h30m", "20m", "90.5s", "50Mtok", "$5", "$0.5", "0.2kWh", "300Pflop", "2Gtok", "1h5s"])
def test_the_short_form_is_kept(text):
    assert format_budget(parse_budget(text)) == text


def test_extension():
    assert parse_extension("+20m") == Budget(1200.0, "s")
    for bad in ("20m", "", "++20m", "+-3m", "+"):
        with pytest.raises(UserError):
            parse_extension(bad)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * 10**9),
        ("8GiB", 8 * 2**30),
        ("512 mb", 512 * 10**6),
        ("1.5TB", 15 * 10**11),
        ("1000", 1000),
        ("1000B", 1000),
        ("2G", 2 * 10**9),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0GB", "nan", "8XB", "8GBB", "1e30GB", "8 G B C"])
def test_what_is_no_size(text):
    with pytest.raises(UserError) as caught:
        parse_size(text)
    assert "\n" not in str(caught.value)
