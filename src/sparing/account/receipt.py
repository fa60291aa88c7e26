"""Receipts: what a run cost and reached beside what was predicted, by stage, with its ancestors; and all that a workspace spent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparing.account.history import TRAINING, ancestors_of, bill, entries, whole
from sparing.account.ledger import Entry, workspace_file
from sparing.base.config import UserError
from sparing.base.files import from_json, read_lines
from sparing.base.origin import origin_of
from sparing.base.run import RunFolder

RAW_BITS = 8.0
"""Bits per byte of text that nobody has compressed: what a model saves of these is what it has learnt."""
COMPARED = (
    "time_s", "device_hours", "energy_kwh", "co2e_g", "cost_usd", "flops", "tokens", "tokens_per_s", "memory_bytes.total", "idle", "bpb",
    "gain",
)  # fmt: skip


def receipt(run: RunFolder) -> dict:
    """The receipt of one run, with that of the runs that it was made by.

    -> run, status, predicted (as `plan --json` gave it before the run, or None), actual (the same names, each {"value", "how", "source"}),
    difference (of a finished run: actual / predicted - 1, and whether it is in the interval), stages (of training, with predictions),
    later (evaluating, generating, ...), ancestors, published (of an open model behind it), before and after (its scores), quality (bits
    saved per byte: all, per dollar, per kWh), missing (what cannot be said), cut_short (what a limit in seconds left undone).
    Raises UserError where nothing was metered, or for a damaged ledger.
    """
    rows = whole(run)
    if not rows:
        raise UserError(f"{run}: nothing was metered (the run is older than its ledger, or was imported)")
    training = [row for row in rows if row.verb in TRAINING] or rows
    predicted = read_state(run, "prediction", dict)
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
        "published": published(run),
        **{name: (read_state(run, "summary", dict) or {}).get(name) for name in ("before", "after")},
        "quality": quality(actual),
        "rates": json.loads(training[-1].rates),
        "machine": training[-1].machine,
        "missing": missing,
        "cut_short": [str(line) for line in read_state(run, "cut_short", list) or []],
    }


def read_state(run: RunFolder, name: str, kind: type) -> dict | list | None:
    """What state/NAME.json of a run holds; None where that is missing, damaged or of another kind (dict, list)."""
    try:
        content = from_json((run.state / f"{name}.json").read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, kind) else None


def published(run: RunFolder) -> dict | None:
    """What its publisher says about the open model that a run comes from, and the operations that this makes by a rule of thumb; None
    where no open model is behind it. Nothing of it was spent here, and none of it is in any sum."""
    origin = origin_of(run)
    if origin is None:
        return None
    said = {name: value for name, value in vars(origin).items() if value and name in PUBLISHED}
    if origin.parameters and origin.tokens:
        said["flops"] = _figure(6.0 * origin.parameters * origin.tokens, "estimated", "6 x parameters x tokens, as published")
    return said


PUBLISHED = ("name", "source", "licence", "publisher", "url", "parameters", "tokens", "hardware")


def _figure(value: float | None, method: str, source: str) -> dict:
    return {"value": value, "how": method, "source": source}


def _actual(run: RunFolder, rows: list[Entry]) -> dict:
    total, source = _sum(rows), "; ".join(sorted({row.energy_source for row in rows}))
    train_s = sum(row.wall_s for row in rows if row.stage == "train")
    peak = max(rows, key=lambda row: row.gpu_memory_bytes or row.memory_bytes)
    on_gpu = peak.gpu_memory_bytes > 0
    rates = json.loads(rows[-1].rates).get("sources", {})
    actual = {
        "time_s": _figure(total["time_s"], "measured", "clock"),
        "device_hours": _figure(total["device_hours"], "measured", "clock, times devices"),
        "energy_kwh": _figure(total["energy_kwh"], total["energy_how"], source),
        "co2e_g": _figure(total["co2e_g"], "estimated", f"kWh times {rates.get('gco2e_per_kwh', 'carbon intensity')}"),
        "cost_usd": _figure(total["cost_usd"], "estimated", f"time and kWh times prices: {rates.get('usd_per_hour', '')}"),
        "flops": _figure(sum(row.flops for row in rows), "estimated", "the configuration's operations per token, times tokens"),
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
    trained = sum(row.tokens for row in rows if row.stage == "train")
    if trained and train_s:
        actual["tokens_per_s"] = _figure(trained / train_s, "measured", "train stage")
    training = [row for row in rows if row.stage == "train" and row.core_s]
    if training and not any(row.gpu_memory_bytes for row in training):
        busy = sum(row.cpu_s for row in training) / sum(row.core_s for row in training)
        actual["idle"] = _figure(max(0.0, 1.0 - busy), "measured", "of the cores' time while training, what no process of the run used")
    scored = [line for line in lines if line.get("eval_bpb") is not None]
    bits = [line["eval_bpb"] for line in scored]
    if bits:
        actual["bpb"] = _figure(bits[-1], "measured", "the run's held-out documents, last evaluation")
        if len(bits) > 1 and bits[0] and scored[0]["step"] == 0:
            actual["gain"] = _figure(1 - bits[-1] / bits[0], "measured", "the same documents, before the first step and after the last")
    summary = read_state(run, "summary", dict) or {}
    if {"parameters", "active_parameters"} <= summary.keys():
        counts = {"total": summary["parameters"], "active": summary["active_parameters"]}
        actual["parameters"] = {name: _figure(count, "measured", "counted") for name, count in counts.items()}
    return actual


def at(figures: dict | None, dotted: str) -> dict | None:
    """The figure `memory_bytes.total` of nested figures; None where it isn't one."""
    figure = figures
    for name in dotted.split("."):
        figure = figure.get(name) if isinstance(figure, dict) else None
    return figure if isinstance(figure, dict) and isinstance(figure.get("value"), int | float) else None


def difference(predicted: dict | None, actual: dict) -> dict:
    """name -> {"relative": actual / predicted - 1, "inside": was it in the predicted interval? (None without one)}."""
    differences = {}
    for name in COMPARED:
        before, after = at(predicted, name), at(actual, name)
        if before and after and before["value"]:
            low, high = before.get("low"), before.get("high")
            inside = low <= after["value"] <= high if low is not None and high is not None else None
            differences[name] = {"relative": after["value"] / before["value"] - 1, "inside": inside}
    return differences


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
    newest = _attempt(max(rows, key=lambda row: row.started))
    return min((row for row in rows if _attempt(row) == newest), key=lambda row: row.started).status


def _stages(rows: list[Entry], predicted: dict) -> list[dict]:
    return [
        {
            "stage": name,
            "verbs": sorted({row.verb for row in mine}),
            "status": mine[-1].status,
            **_sum(mine),
            **{key: sum(getattr(row, key) for row in mine) for key in ("cpu_s", "tokens", "flops")},
            **{key: max(getattr(row, key) for row in mine) for key in ("memory_bytes", "gpu_memory_bytes")},
            "predicted": predicted.get(name),
        }
        for name, mine in _groups(rows, lambda row: row.stage).items()
    ]


def _groups(rows: list[Entry], key: Callable[[Entry], Any]) -> dict[Any, list[Entry]]:
    """Rows by key, in the order in which keys first appear."""
    groups: dict[Any, list[Entry]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


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
    status = {name: min(mine, key=lambda row: row.started).status for name, mine in _groups(rows, _attempt).items()}
    runs = [
        _sum(mine)
        | {"run": mine[0].run, "status": _status(mine), "verbs": sorted({row.verb for row in mine}), "exists": Path(mine[0].run).exists()}
        for mine in _groups([row for row in rows if row.run], lambda row: (row.run_id, row.run)).values()
    ]
    return {
        "ledger": str(workspace_file()),
        "total": _sum(rows),
        "by_verb": {name: _sum(mine) for name, mine in _groups(rows, lambda row: row.verb).items()},
        "by_status": {name: _sum(mine) for name, mine in _groups(rows, lambda row: status[_attempt(row)]).items()},
        "runs": runs,
    }


def _attempt(row: Entry) -> str:
    return row.uid.split("-")[0]


def _sum(rows: list[Entry]) -> dict:
    times = {"time_s": sum(row.wall_s for row in rows), "device_hours": sum(row.device_s for row in rows) / 3600}
    return {"attempts": len(set(map(_attempt, rows)))} | times | bill(rows)
