"""The price tables: complete, dated, overridable; every mistake is one line that names what would do."""

import datetime
import re

import pytest

from sparing.account import prices
from sparing.account.prices import FIELDS, YEAR_HOURS, device, device_of, rates_for, tables
from sparing.base.config import UserError
from sparing.base.hardware import Gpu, Machine

VM = Machine("Linux 6", "AMD EPYC", 2, 4, 8 * 10**9)
NODE = Machine("Linux 6", "AMD EPYC 9654 96-Core Processor", 96, 192, 10**12, (Gpu("NVIDIA H200", 141 * 10**9, "9.0"),) * 8)


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARING_HOME", str(tmp_path))
    monkeypatch.delenv("SPARING_COUNTRY", raising=False)
    monkeypatch.setattr(prices, "_told", set())
    return tmp_path


def test_every_row_is_complete_dated_and_has_a_source():
    for kind, rows in tables().items():
        assert rows
        for name, row in rows.items():
            assert set(FIELDS[kind]) <= set(row), (kind, name)
            assert row["source"] and datetime.date(2026, 1, 1) <= row["date"] <= datetime.date.today(), (kind, name)
            assert all(value >= 0 for value in row.values() if isinstance(value, float))
    assert {"h100", "h800", "h200", "a100", "b200", "4090", "3090", "l4", "l40s", "mi300x", "cpu"} <= tables()["machine"].keys()
    assert tables()["electricity"].keys() == tables()["carbon"].keys()
    # Dense figures: the sparse ones of the data sheets are twice as much.
    assert device("h100").peak["bf16"] == pytest.approx(989e12) and device("4090").peak["bf16"] < 170e12


def test_machines_are_recognised():
    assert device_of(VM) == "cpu" and device_of(NODE) == "h200"
    assert device_of(Machine("", "AMD EPYC 9654 96-Core Processor", 96, 192, 0)) == "epyc-9654"
    assert device_of(Machine("", "x", 1, 1, 0, (Gpu("NVIDIA L4", 1, "8.9"),))) == "l4"
    assert device_of(Machine("", "x", 1, 1, 0, (Gpu("NVIDIA L40S", 1, "8.9"),))) == "l40s"
    with pytest.raises(UserError, match=r"Tesla K80.*nearest"):
        device_of(Machine("", "x", 1, 1, 0, (Gpu("Tesla K80", 1, "3.7"),)))


def test_owned_and_rented():
    own, rented, spot = (rates_for(NODE, rent=rent) for rent in ("own", "on_demand", "spot"))
    row = tables()["price"]["h200"]
    assert own.usd_per_hour == pytest.approx(8 * row["purchase"] / (row["lifetime_years"] * row["utilisation"] * YEAR_HOURS))
    assert rented.usd_per_hour == pytest.approx(8 * row["on_demand"]) and spot.usd_per_hour == pytest.approx(8 * row["spot"])
    assert own.usd_per_kwh > 0 and rented.usd_per_kwh == 0 and rented.pue > own.pue == 1
    assert own.watts_busy == 8 * 700
    assert own.per_hour() == pytest.approx(own.usd_per_hour + 5.6 * own.usd_per_kwh)
    assert set(own.sources) == {"usd_per_hour", "usd_per_kwh", "gco2e_per_kwh", "pue", "watts"}
    assert rates_for(VM).watts_busy == 2 * device("cpu").watts_busy
    assert rates_for(VM, "h100").watts_busy == 700


def test_country(own_home, monkeypatch):
    assert rates_for(VM).gco2e_per_kwh == tables()["carbon"]["WORLD"]["gco2e_per_kwh"]
    (own_home / "prices.toml").write_text('[home]\ncountry = "swe"\n')
    assert rates_for(VM).gco2e_per_kwh == pytest.approx(40.7)
    monkeypatch.setenv("SPARING_COUNTRY", "NOR")
    assert rates_for(VM).gco2e_per_kwh == pytest.approx(30.1)
    assert rates_for(VM, country="FRA").gco2e_per_kwh == pytest.approx(56.0)


@pytest.mark.parametrize(
    "said, meant", [("Germany", "DEU"), ("germany", "DEU"), ("Schweden", "SWE"), ("United States", "USA"), ("DEUT", "DEU")]
)
def test_a_country_in_words_is_answered_with_its_code(monkeypatch, said, meant):
    monkeypatch.setenv("SPARING_COUNTRY", said)
    with pytest.raises(UserError, match=f"unknown country '{said}'; nearest: {meant}"):
        rates_for(VM)


def test_the_users_file_wins_field_by_field(own_home):
    before = rates_for(VM, "h100", rent="spot").usd_per_hour
    (own_home / "prices.toml").write_text("[price.h100]\non_demand = 1.5\n[electricity.DEU]\nusd_per_kwh = 0.2\n")
    assert rates_for(VM, "h100", rent="on_demand").usd_per_hour == 1.5
    assert "prices.toml" in rates_for(VM, "h100", rent="on_demand").sources["usd_per_hour"]
    assert rates_for(VM, "h100", rent="spot").usd_per_hour == before
    assert rates_for(VM, country="DEU").usd_per_kwh == 0.2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[prise.h100]\nspot = 1.0", r"unknown section \[prise\]; nearest: \[price\]"),
        ("[price.h100]\nspott = 1.0", "unknown field spott; nearest: spot"),
        ("[price.h100]\nspot = -1.0", "spot = -1.0 must be 0 or more"),
        ("[price.h100]\nutilisation = 0", "utilisation = 0 must be above 0"),
        ('[price.h100]\nspot = "cheap"', "spot = 'cheap' is not a number"),
        ('[machine.h100]\nkind = "tpu"', "kind = 'tpu': choose cpu or gpu"),
        ("[machine.h100]\npeak_bf16 = 0", "peak_bf16 = 0 must be above 0"),
        ('[price.h100]\ndate = "yesterday"', "is not a date"),
        ("[machine.cpu]\ncores = 1.5", "cores = 1.5 is not a whole number"),
        ("[price.mine]\nspot = 1.0", "price.mine.* lacks lifetime_years"),
        ("[electricity.ATL]\nsource = 'a letter'", "lacks usd_per_kwh"),
        ("[price.h100\n", "prices.toml: "),
        ("[home]\ntown = 'Ulm'", "has country"),
        ("[home]\ncountry = 49", r"\[home\] country = 49 is not text; .*DEU"),
        ("[home]\nrent = true", r"\[home\] rent = True is not text"),
        ("[home]\ncountry = 'Germany'", r"unknown country 'Germany'; nearest: DEU \(Germany\)"),
        ("price = 3", r"unknown section \[price\]"),
    ],
)
def test_a_bad_file_is_one_clear_line(own_home, text, says):
    (own_home / "prices.toml").write_text(text)
    with pytest.raises(UserError, match=says) as error:
        rates_for(VM)
    assert "\n" not in str(error.value)


def test_unknown_names_and_missing_prices():
    with pytest.raises(UserError, match="unknown machine 'h1000'; nearest: h100"):
        rates_for(VM, "h1000")
    with pytest.raises(UserError, match="unknown country 'GER'; nearest: "):
        rates_for(VM, country="GER")
    with pytest.raises(UserError, match="no purchase price of l4 is known; nearest with one: l40s"):
        rates_for(VM, "l4")


def test_old_rows_warn_once(own_home, capsys):
    old = datetime.date.today() - datetime.timedelta(days=prices.STALE_DAYS + 1)
    (own_home / "prices.toml").write_text(f"[price.h100]\ndate = {old}\n[carbon.FRA]\ndate = {old}\n")
    rates_for(VM, "h100", "FRA")
    rates_for(VM, "h100", "FRA")
    said = capsys.readouterr().err
    assert len(re.findall("days old", said)) == 1 and "price.h100" in said
    (own_home / "prices.toml").write_text(f"[price.h100]\ndate = {datetime.date.today()}\n")
    prices._told.clear()
    rates_for(VM, "h100", "FRA")
    assert capsys.readouterr().err == ""
