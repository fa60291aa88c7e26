"""Exports ledgers with the columns of CodeCarbon's emissions.csv, for the tools that read those.

Columns and units: github.com/mlco2/codecarbon, codecarbon/output_methods/emissions_data.py, release 3.3.2: seconds, kg CO2e, kg/s, W, kWh;
its PUE multiplies power and energy, and so it does here. What is not measured (memory's power, water) is 0; longitude and the like, empty.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import platform
from pathlib import Path

from sparing.account.ledger import Entry
from sparing.base.files import write_atomic

COLUMNS = (
    "timestamp project_name run_id experiment_id duration emissions emissions_rate cpu_power gpu_power ram_power cpu_energy gpu_energy "
    "ram_energy energy_consumed water_consumed country_name country_iso_code region cloud_provider cloud_region os python_version "
    "codecarbon_version cpu_count cpu_model gpu_count gpu_model longitude latitude ram_total_size tracking_mode cpu_utilization_percent "
    "gpu_utilization_percent ram_utilization_percent ram_used_gb on_cloud pue wue"
).split()
UNMEASURED = ("ram_power", "ram_energy", "water_consumed", "gpu_utilization_percent", "ram_utilization_percent", "wue")


def write_csv(path: str | Path, rows: list[Entry]) -> None:
    """One line per attempt at a run, oldest first; a file that is there is replaced. Raises OSError, DiskFullError."""
    attempts: dict[str, list[Entry]] = {}
    for row in rows:
        attempts.setdefault(row.uid.split("-")[0], []).append(row)
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for mine in attempts.values():
        writer.writerow(_line(mine))
    write_atomic(path, out.getvalue())


def _line(rows: list[Entry]) -> dict:
    rates = json.loads(rows[-1].rates)
    pue = rates.get("pue", 1.0)
    seconds = sum(row.wall_s for row in rows)
    cpu, gpu = pue * sum(row.kwh_cpu for row in rows), pue * sum(row.kwh_gpu for row in rows)
    kg = sum(row.co2e_g for row in rows) / 1000
    country = rates.get("sources", {}).get("gco2e_per_kwh", "").partition(":")[0]
    gpus, _, cpus = rows[-1].machine.rpartition(", ")
    cores, _, model = cpus.partition(" cores of ")
    cpu_s = sum(row.cpu_s for row in rows)
    return dict.fromkeys(UNMEASURED, 0.0) | {
        "timestamp": datetime.datetime.fromtimestamp(max(row.updated for row in rows)).isoformat(timespec="seconds"),
        "project_name": Path(rows[-1].run).name or "sparing",
        "run_id": rows[-1].uid.split("-")[0],
        "experiment_id": rows[-1].run_id,
        "duration": seconds,
        "emissions": kg,
        "emissions_rate": kg / seconds if seconds else 0.0,
        "cpu_power": cpu * 3.6e6 / seconds if seconds else 0.0,
        "gpu_power": gpu * 3.6e6 / seconds if seconds else 0.0,
        "cpu_energy": cpu,
        "gpu_energy": gpu,
        "energy_consumed": cpu + gpu,
        "country_name": country,
        "country_iso_code": country if len(country) == 3 else "",
        "os": platform.platform(),
        "python_version": platform.python_version(),
        "cpu_count": cores,
        "cpu_model": model,
        "gpu_count": gpus.partition(" x ")[0] or 0,
        "gpu_model": gpus.partition(" x ")[2],
        "tracking_mode": "process" if "model of the processor" in rows[-1].energy_source else "machine",
        "cpu_utilization_percent": min(100.0, 100 * cpu_s / seconds / int(cores)) if seconds and cores.isdigit() else 0.0,
        "ram_used_gb": max(row.memory_bytes for row in rows) / 1e9,
        "on_cloud": "N",
        "pue": pue,
    }
