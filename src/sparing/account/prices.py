"""Prices of machines and electricity, and its carbon: dated tables (`tables/*.toml`), which $SPARING_HOME/prices.toml overrides.

An owned machine costs its purchase price spread over lifetime x utilisation, and its electricity besides, by the kilowatt hour; a rented
one its hourly price, electricity included. Country: the argument, else $SPARING_COUNTRY, else [home] country of the user's file, else the
world's mean.
"""

from __future__ import annotations

import datetime
import math
import os
import re
import sys
import tomllib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from sparing.base.config import UserError
from sparing.base.config_file import nearest
from sparing.base.files import read_text
from sparing.base.hardware import Machine, home

Rent = Literal["own", "on_demand", "spot"]
STALE_DAYS = 180
YEAR_HOURS = 8766.0
FORMATS = ("bf16", "fp8", "int8", "fp32")
_MACHINE = {
    "kind": str, "match": list, **{f"peak_{name}": float for name in FORMATS}, "memory_bytes": float, "bandwidth": float, "link": float,
    "network": float, "watts_idle": float, "watts_busy": float,
}  # fmt: skip
FIELDS: dict[str, dict[str, type]] = {
    "machine": _MACHINE,
    "price": {"lifetime_years": float, "utilisation": float},
    "electricity": {"usd_per_kwh": float},
    "carbon": {"gco2e_per_kwh": float},
    "pue": {"value": float},
    "kernels": dict.fromkeys(
        (*(f"{name}_{format}" for name in ("gemm", "grouped", "bytes_per_number") for format in ("fp8", "bf16")), "wgrad_fp8", "link_share",
         *(f"{old}attention_{way}" for old in ("", "old_") for way in ("forward", "backward")), "dispatch", "combine", "node_dispatch",
         "node_combine"), float,
    ),
}  # fmt: skip
"""What a row must have, besides source and date."""
OPTIONAL: dict[str, dict[str, type]] = {
    "machine": {"cores": int, "note": str},
    "price": {"on_demand": float, "spot": float, "purchase": float},
    "electricity": {"name": str},
}
_ZERO_ALLOWED = {"peak_fp8", "peak_int8", "link", "network", "watts_idle", "usd_per_kwh", "gco2e_per_kwh", "on_demand", "spot", "purchase"}
HOME = '[home] has country = "DEU" and rent = "own", "on_demand" or "spot"'
_told: set[str] = set()


@dataclass(frozen=True)
class Device:
    """A row of the hardware table: one GPU, or one processor with all its cores."""

    name: str
    kind: Literal["cpu", "gpu"]
    cores: int
    """Of a processor; 1 for a GPU."""
    peak: dict[str, float]
    """Dense FLOP/s by format; 0: not in hardware."""
    memory_bytes: float
    bandwidth: float
    """Of its memory, bytes/s."""
    link: float
    """Bytes/s that it sends to the others of its node."""
    network: float
    """Bytes/s that it sends to other nodes."""
    watts_idle: float
    watts_busy: float
    source: str


@dataclass(frozen=True)
class Rates:
    """What an hour and a kilowatt hour of a machine cost. Money in US dollars, of 2026."""

    usd_per_hour: float
    """Of the whole machine; electricity not included where it is owned."""
    usd_per_kwh: float
    """0 where the hourly price includes electricity."""
    gco2e_per_kwh: float
    pue: float
    """Facility energy per energy of the machine."""
    watts_idle: float
    watts_busy: float
    sources: dict[str, str]
    """By field: where the figure is from, and of which day."""

    def per_hour(self) -> float:
        """US dollars of an hour at full power, electricity included."""
        return self.usd_per_hour + self.watts_busy / 1000 * self.pue * self.usd_per_kwh

    def times(self, count: int) -> Rates:
        """Of so many machines."""
        more = {name: count * getattr(self, name) for name in ("usd_per_hour", "watts_idle", "watts_busy")}
        return replace(self, **more)


def tables() -> dict[str, dict[str, dict[str, Any]]]:
    """Kind -> name -> row, the user's file laid over the package's.

    Raises:
        UserError: the user's file is not TOML, has an unknown name or a value that cannot be, or a new row that lacks a field.
    """
    file = home() / "prices.toml"
    try:
        stamp = file.stat().st_mtime_ns
    except OSError:
        return _tables(None, 0)
    return _tables(file, stamp)


@cache
def _tables(file: Path | None, _stamp: int) -> dict:
    rows: dict[str, dict[str, dict]] = {kind: {} for kind in FIELDS}
    for part in sorted((Path(__file__).parent / "tables").glob("*.toml")):
        for kind, named in tomllib.loads(part.read_text(encoding="utf-8")).items():
            rows[kind].update(named)
    if file is not None:
        _overlay(rows, file)
    return rows


def _overlay(rows: dict, file: Path) -> None:
    try:
        users = tomllib.loads(read_text(file))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{file}: {error}") from None
    day = datetime.date.fromtimestamp(file.stat().st_mtime)
    rows["home"] = users.pop("home", {})
    if not isinstance(rows["home"], dict) or set(rows["home"]) - {"country", "rent"}:
        raise UserError(f"{file}: {HOME}")
    for field, value in rows["home"].items():
        if not isinstance(value, str):
            raise UserError(f"{file}: [home] {field} = {value!r} is not text; {HOME}")
    for kind, named in users.items():
        if kind not in FIELDS or not isinstance(named, dict):
            raise UserError(f"{file}: unknown section [{kind}]; nearest: [{nearest(kind, FIELDS)}]")
        for name, fields in named.items():
            where = f"{file}: [{kind}.{name}]"
            if not isinstance(fields, dict):
                raise UserError(f"{where}: write it as a section with fields such as {next(iter(FIELDS[kind]))}")
            for field, value in fields.items():
                fields[field] = _checked(value, kind, field, where)
            rows[kind][name] = {**rows[kind].get(name, {}), "source": str(file), "date": day, **fields}
            for field in FIELDS[kind]:
                if field not in rows[kind][name]:
                    raise UserError(f"{where} is a new row and lacks {field}; it needs {', '.join(FIELDS[kind])}")


def _checked(value: Any, kind: str, field: str, where: str) -> Any:
    known = {**FIELDS[kind], **OPTIONAL.get(kind, {}), "source": str, "date": datetime.date}
    if field not in known:
        raise UserError(f"{where}: unknown field {field}; nearest: {nearest(field, known)}")
    if known[field] in (float, int) and type(value) in (int, known[field]):
        zero = field in _ZERO_ALLOWED
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            raise UserError(f"{where}: {field} = {value} must be {'0 or more' if zero else 'above 0'}")
        return known[field](value)
    if type(value) is not known[field]:
        what = {float: "number", int: "whole number", str: "text", list: "list", datetime.date: "date, as 2026-11-21"}[known[field]]
        raise UserError(f"{where}: {field} = {value!r} is not a {what}".replace("a text", "text"))
    if field == "kind" and value not in ("cpu", "gpu"):
        raise UserError(f"{where}: kind = {value!r}: choose cpu or gpu")
    return value


def _row(kind: str, name: str, what: str) -> dict[str, Any]:
    rows = tables()[kind]
    if name not in rows:
        raise UserError(f"unknown {what} {name!r}; nearest: {_nearest(name, rows)}; $SPARING_HOME/prices.toml can add [{kind}.{name}]")
    row = rows[name]
    for field in FIELDS[kind]:
        if field not in row:
            raise UserError(f"[{kind}.{name}] lacks {field}; add it in {home() / 'prices.toml'}")
    age = (datetime.date.today() - row["date"]).days
    if age > STALE_DAYS and "stale" not in _told:
        _told.add("stale")
        print(f"prices: [{kind}.{name}] is {age} days old; {home() / 'prices.toml'} can bring it up to date", file=sys.stderr)
    return row


def _nearest(name: str, rows: dict[str, dict]) -> str:
    """The row whose key, or whose name in full, is most like `name`: DEU for Germany."""
    known = {key: key for key in rows} | {row["name"]: f"{key} ({row['name']})" for key, row in rows.items() if "name" in row}
    return known[nearest(name, known)]


def _cite(row: dict[str, Any]) -> str:
    return f"{row['source']}, {row['date']}"


def device(name: str) -> Device:
    """A row of the hardware table by name. Raises UserError with the nearest name."""
    row = _row("machine", name.lower(), "machine")
    return Device(
        name=name.lower(), kind=row["kind"], cores=row.get("cores", 1), peak={kind: row[f"peak_{kind}"] for kind in FORMATS},
        **{field: row[field] for field in ("memory_bytes", "bandwidth", "link", "network", "watts_idle", "watts_busy")}, source=_cite(row),
    )  # fmt: skip


def kernels(name: str) -> dict[str, float]:
    """What kernels sustain on a device: FLOP/s and bytes/s by name (tables/kernels.toml)."""
    row = _row("kernels", name, "machine")
    return {field: row[field] for field in FIELDS["kernels"]}


def device_of(machine: Machine) -> str:
    """The hardware table's name for what this machine trains on; `cpu`, a core of an unknown processor, where it is not listed.

    Raises UserError for an unknown GPU, naming the nearest row.
    """
    described = machine.gpus[0].name if machine.gpus else machine.cpu
    matches = [
        (len(text), name)
        for name, row in tables()["machine"].items()
        for text in row["match"]
        if row["kind"] == ("gpu" if machine.gpus else "cpu") and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", described, re.IGNORECASE)
    ]
    if matches:
        return max(matches)[1]
    if machine.gpus:
        gpus = [name for name, row in tables()["machine"].items() if row["kind"] == "gpu"]
        raise UserError(
            f"{described} is in no table; nearest: {nearest(described, gpus)}; $SPARING_HOME/prices.toml can add [machine.NAME]"
        )
    return "cpu"


def units_of(machine: Machine, name: str | None = None) -> float:
    """How many devices of the hardware table the machine is: GPUs, or the share of a processor's cores; 1 of a named device."""
    if name is not None:
        return 1.0
    return float(len(machine.gpus)) if machine.gpus else machine.cores_physical / device(device_of(machine)).cores


def home_rent() -> Rent:
    """How this machine is paid for: $SPARING_RENT, else [home] rent of the user's file, else owned. Raises UserError for another word."""
    said = os.environ.get("SPARING_RENT") or tables().get("home", {}).get("rent") or "own"
    if said not in get_args(Rent):
        raise UserError(f"rent {said!r}: choose {', '.join(get_args(Rent))} (SPARING_RENT, or [home] rent in {home() / 'prices.toml'})")
    return said


def rates_for(machine: Machine, name: str | None = None, country: str | None = None, rent: Rent = "own") -> Rates:
    """What `machine` costs (its GPUs, or the cores that this process may use); with `name`, one device of the hardware table.

    Raises:
        UserError: unknown machine or country (with the nearest valid name), or a price that the tables do not have.
    """
    units = units_of(machine, name)
    chosen = device(name or device_of(machine))
    country = country or os.environ.get("SPARING_COUNTRY") or tables().get("home", {}).get("country") or "WORLD"
    country = country.upper() if country.upper() in tables()["electricity"] else country
    price = _row("price", chosen.name, "machine")
    power, carbon = _row("electricity", country, "country"), _row("carbon", country, "country")
    facility = _row("pue", "own" if rent == "own" else "cloud", "facility")
    field = "purchase" if rent == "own" else rent
    if field not in price:
        have = [row for row, values in tables()["price"].items() if field in values]
        near = nearest(chosen.name, have)
        raise UserError(f"no {field} price of {chosen.name} is known; nearest with one: {near}; or set it in {home() / 'prices.toml'}")
    hourly = price[field]
    if rent == "own":
        hourly = price["purchase"] / (price["lifetime_years"] * price["utilisation"] * YEAR_HOURS)
    return Rates(
        usd_per_hour=units * hourly,
        usd_per_kwh=power["usd_per_kwh"] if rent == "own" else 0.0,
        gco2e_per_kwh=carbon["gco2e_per_kwh"],
        pue=facility["value"],
        watts_idle=units * chosen.watts_idle,
        watts_busy=units * chosen.watts_busy,
        sources={
            "usd_per_hour": f"{field} of {chosen.name}: {_cite(price)}",
            "usd_per_kwh": f"{country}: {_cite(power)}" if rent == "own" else "in the hourly price",
            "gco2e_per_kwh": f"{country}: {_cite(carbon)}",
            "pue": _cite(facility),
            "watts": f"{chosen.name}: {chosen.source}",
        },
    )
