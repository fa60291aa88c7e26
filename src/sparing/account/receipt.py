"""The receipt: what a run cost and reached, beside what was predicted, stage by stage, with its ancestors; and the whole workspace's."""

from __future__ import annotations

import json
from pathlib import Path

from sparing.account.history import ADDS_UP, TRAINING, ancestors_of, entries, entries_of, how
from sparing.account.ledger import Entry, workspace_file
from sparing.base.config import UserError
from sparing.base.files import read_lines
from sparing.base.run import RunFolder

RAW_BITS = 8.0
"""Bits per byte of text that nobody has compressed: what a model saves of these is what it has learnt."""
COMPARED = ("time_s", "device_hours", "energy_kwh", "co2e_g", "cost_usd", "flops", "tokens", "tokens_per_s", "memory_bytes.total", "bpb")
_COUNTED = "the configuration's operations per token, times tokens"


def receipt(run: RunFolder) -> dict:
    """The receipt of one run.

    -> run, status, predicted (as `plan --json` gave it before the run, or None), actual (the same names, each {"value", "how", "source"}),
    difference (of a finished run: actual / predicted - 1, and whether it is in the interval), stages (of training, with predictions),
    later (evaluating, generating, ...), ancestors, quality (bits saved per byte: all, per dollar, per kWh), missing (what cannot be said),
    cut_short (what a limit in seconds left unmeasured or unwritten).
    Raises UserError where nothing was metered, or for a damaged ledger.
    """
    rows = entries_of(run)
    if not rows:
        raise UserError(f"{run}: nothing was metered (the run is older than its ledger, or was imported)")
    training = [row for row in rows if row.verb in TRAINING] or rows
    predicted = _prediction(run)
    actual = _actual(run, training)
    status, missing = _status(training), []
    if predicted is None:
        missing.append("no prediction was kept with this run: predicted and difference are empty")
    elif status != "done":
        missing.append(f"the run is {status}: what was predicted is of the whole, so no difference is given")
    ancestors = [vars(row) | {"energy_kwh": row.kwh, "cost_usd": row.usd} for row in ancestors_of(run)]
    _shares(ancestors, actual)
    return {
        "run": str(run),
        "status": status,
        "predicted": predicted,
        "actual": actual,
        "difference": difference(predicted, actual) if status == "done" else {},
        "stages": _stages(training, (predicted or {}).get("stages") or {}),
        "later": _stages([row for row in rows if row not in training], {}),
        "ancestors": ancestors,
        "quality": quality(actual),
        "rates": json.loads(training[-1].rates),
        "machine": training[-1].machine,
        "missing": missing,
        "cut_short": _cut_short(run),
    }


def _cut_short(run: RunFolder) -> list[str]:
    try:
        found = json.loads((run.state / "cut_short.json").read_text())
    except (OSError, ValueError):
        return []
    return [str(line) for line in found] if isinstance(found, list) else []


def _prediction(run: RunFolder) -> dict | None:
    try:
        found = json.loads((run.state / "prediction.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _figure(value: float | None, method: str, source: str) -> dict:
    return {"value": value, "how": method, "source": source}


def _actual(run: RunFolder, rows: list[Entry]) -> dict:
    total = {name: sum(getattr(row, name) for row in rows) for name in ADDS_UP}
    energy, source = how(rows), "; ".join(sorted({row.energy_source for row in rows}))
    train_s = sum(row.wall_s for row in rows if row.stage == "train")
    peak = max(rows, key=lambda row: row.gpu_memory_bytes or row.memory_bytes)
    on_gpu = peak.gpu_memory_bytes > 0
    rates = json.loads(rows[-1].rates).get("sources", {})
    actual = {
        "time_s": _figure(total["wall_s"], "measured", "clock"),
        "device_hours": _figure(total["device_s"] / 3600, "measured", "clock, times devices"),
        "energy_kwh": _figure(total["kwh"], energy, source),
        "co2e_g": _figure(total["co2e_g"], "estimated", f"kWh times {rates.get('gco2e_per_kwh', 'carbon intensity')}"),
        "cost_usd": _figure(total["usd"], "estimated", f"time and kWh times prices: {rates.get('usd_per_hour', '')}"),
        "flops": _figure(total["flops"], "estimated", _COUNTED),
        "memory_bytes": {
            "total": _figure(
                peak.gpu_memory_bytes or peak.memory_bytes, "measured", "CUDA's allocator" if on_gpu else "resident, its highest (VmHWM)"
            )
        },
    }
    lines = read_lines(run.metrics_file)
    tokens = max((line.get("tokens", 0) for line in lines if "loss" in line), default=0)
    if tokens:
        actual["tokens"] = _figure(tokens, "measured", "steps that are in the model")
    if total["tokens"] and train_s:
        actual["tokens_per_s"] = _figure(sum(row.tokens for row in rows if row.stage == "train") / train_s, "measured", "train stage")
    bits = [line["eval_bpb"] for line in lines if line.get("eval_bpb") is not None]
    if bits:
        actual["bpb"] = _figure(bits[-1], "measured", "the run's held-out documents, last evaluation")
    try:
        summary = json.loads((run.state / "summary.json").read_text())
        counts = {
            name: _figure(summary[key], "measured", "counted") for name, key in (("total", "parameters"), ("active", "active_parameters"))
        }
        actual["parameters"] = counts
    except (OSError, ValueError, KeyError):
        pass
    return actual


def at(figures: dict | None, dotted: str) -> dict | None:
    """The figure `memory_bytes.total` of nested figures; None where it isn't one."""
    found = figures
    for name in dotted.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    if isinstance(found, int | float):
        found = {"value": found}
    return found if isinstance(found, dict) and isinstance(found.get("value"), int | float) else None


def difference(predicted: dict | None, actual: dict) -> dict:
    """name -> {"relative": actual / predicted - 1, "inside": was it in the predicted interval? (None without one)}."""
    found = {}
    for name in COMPARED:
        before, after = at(predicted, name), at(actual, name)
        if before and after and before["value"]:
            low, high = before.get("low"), before.get("high")
            inside = low <= after["value"] <= high if low is not None and high is not None else None
            found[name] = {"relative": after["value"] / before["value"] - 1, "inside": inside}
    return found


def quality(actual: dict) -> dict:
    """What the money and the energy bought: bits saved per byte of held-out text (8 - bpb), per dollar and per kWh."""
    bits, usd, kwh = at(actual, "bpb"), at(actual, "cost_usd"), at(actual, "energy_kwh")
    if bits is None:
        return {}
    saved = RAW_BITS - bits["value"]
    each = {"bits_saved_per_byte": saved}
    if usd and usd["value"]:
        each["per_usd"] = saved / usd["value"]
    if kwh and kwh["value"]:
        each["per_kwh"] = saved / kwh["value"]
    return each | {"how": at(actual, "energy_kwh").get("how", "estimated")}


def _status(rows: list[Entry]) -> str:
    """How the newest attempt ended: that of its outermost stage."""
    newest = max(rows, key=lambda row: row.started).uid.split("-")[0]
    mine = [row for row in rows if row.uid.startswith(newest)]
    return min(mine, key=lambda row: row.started).status


def _stages(rows: list[Entry], predicted: dict) -> list[dict]:
    stages = []
    for name in dict.fromkeys(row.stage for row in rows):
        mine = [row for row in rows if row.stage == name]
        total = {key: sum(getattr(row, key) for row in mine) for key in ADDS_UP}
        stages.append(
            {
                "stage": name,
                "verbs": sorted({row.verb for row in mine}),
                "attempts": len(mine),
                "status": mine[-1].status,
                "time_s": total["wall_s"],
                "device_hours": total["device_s"] / 3600,
                "cpu_s": sum(row.cpu_s for row in mine),
                "tokens": total["tokens"],
                "flops": total["flops"],
                "memory_bytes": max(row.memory_bytes for row in mine),
                "gpu_memory_bytes": max(row.gpu_memory_bytes for row in mine),
                "energy_kwh": total["kwh"],
                "energy_how": how(mine),
                "co2e_g": total["co2e_g"],
                "cost_usd": total["usd"],
                "predicted": predicted.get(name),
            }
        )
    return stages


def _shares(ancestors: list[dict], actual: dict) -> None:
    """Each ancestor's part of the cost of the whole line, this run included; by money, or by time where nothing cost any."""
    key = "usd" if sum(row["usd"] for row in ancestors) else "wall_s"
    own = actual["cost_usd" if key == "usd" else "time_s"]["value"]
    whole = own + sum(row[key] for row in ancestors)
    for row in ancestors:
        row["share"] = row[key] / whole if whole else 0.0


def workspace() -> dict:
    """Everything that was metered in this workspace ($SPARING_HOME), failed, tuning and benchmark runs included.

    -> ledger, total, by_verb, by_status (each: runs or attempts, time_s, device_hours, energy_kwh, energy_how, co2e_g, cost_usd) and runs.
    Raises UserError where there is nothing, or for a damaged ledger.
    """
    rows = entries(workspace_file())
    if not rows:
        raise UserError(f"{workspace_file()}: nothing was metered yet")
    attempts: dict[str, list[Entry]] = {}
    for row in rows:
        attempts.setdefault(row.uid.split("-")[0], []).append(row)
    status = {name: min(mine, key=lambda row: row.started).status for name, mine in attempts.items()}

    def sums(key) -> dict[str, dict]:
        groups: dict[str, list[Entry]] = {}
        for row in rows:
            groups.setdefault(key(row), []).append(row)
        return {name: _sum(mine) for name, mine in groups.items()}

    runs = [
        _sum(mine)
        | {"run": mine[0].run, "status": _status(mine), "verbs": sorted({row.verb for row in mine}), "exists": Path(mine[0].run).exists()}
        for mine in _by_run(rows).values()
    ]
    return {
        "ledger": str(workspace_file()),
        "total": _sum(rows),
        "by_verb": sums(lambda row: row.verb),
        "by_status": sums(lambda row: status[row.uid.split("-")[0]]),
        "runs": runs,
    }


def _by_run(rows: list[Entry]) -> dict[tuple[str, str], list[Entry]]:
    groups: dict[tuple[str, str], list[Entry]] = {}
    for row in rows:
        if row.run:
            groups.setdefault((row.run_id, row.run), []).append(row)
    return groups


def _sum(rows: list[Entry]) -> dict:
    return {
        "attempts": len({row.uid.split("-")[0] for row in rows}),
        "time_s": sum(row.wall_s for row in rows),
        "device_hours": sum(row.device_s for row in rows) / 3600,
        "energy_kwh": sum(row.kwh for row in rows),
        "energy_how": how(rows),
        "co2e_g": sum(row.co2e_g for row in rows),
        "cost_usd": sum(row.usd for row in rows),
    }
