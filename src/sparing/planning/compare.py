"""`sparing plan --compare`: alternatives for one budget side by side, and which of them to buy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sparing.account.prices import rates_for, tables
from sparing.base.config import Budget, UserError
from sparing.base.config_file import Wishes
from sparing.budget.predict import Corpus, check, predict
from sparing.budget.units import format_budget
from sparing.planning.places import Place, elsewhere, resolve_run

TIE = 0.003
"""Options whose bits per byte are closer than this share count as equal; the cheaper one is recommended."""
OTHERS = ("4090", "l40s", "a100", "h100", "h200", "b200", "mi300x")


def alternatives(
    wishes: Wishes, budget: Budget, corpus: Corpus, place: Place, starts: Sequence[tuple[Wishes, dict[str, Any]]] = ()
) -> dict[str, Any]:
    """{"alternatives": [...], "buy": the one that the budget should buy, "why"}; options that cannot work say why not. starts: wishes of
    runs that go on from a model, each with that one's score (`planning.start.scored`)."""
    base, _ = resolve_run(wishes, budget, corpus, place)
    dense = {"model": {"num_dense_layers": base.config.model.num_layers, "num_layers": base.config.model.num_layers}}
    mixture = {"model": {"num_dense_layers": 1, "n_routed_experts": 16}}
    options: list[tuple[str, dict, Place]] = [
        ("as resolved", {}, place),
        ("dense", dense, place),
        ("mixture of experts", mixture, place),
        ("with MTP", {"model": {"mtp_depth": 1}}, place),
        ("8-bit storage", {"precision": {"weights": "bfloat16", "moments": "int8", "activations": "int8"}}, place),
    ]
    if place.name is None:
        options += [
            (f"this machine, if it were rented {rent.replace('_', '-')}", {}, replace(place, rent=rent)) for rent in ("on_demand", "spot")
        ]
    for name in OTHERS:
        options += [(f"{name} {rent.replace('_', '-')}", {}, (name, rent)) for rent in ("on_demand", "spot", "own")]
    rows = [_row(label, Wishes.of(wishes, more), budget, corpus, where) for label, more, where in options]
    for begun, score in starts:
        row = _row(f"from an open model: {score['name']}", begun, budget, corpus, place, score["bpb"])
        rows.append(row | {"from": score["run"], "before": score["bpb"]})
    return {"alternatives": rows, **_advice(rows, budget)}


def _row(label: str, wishes: Wishes, budget: Budget, corpus: Corpus, where: Place | tuple, before: float | None = None) -> dict[str, Any]:
    try:
        place = where if isinstance(where, Place) else elsewhere(where[0], where[1])
        run, _ = resolve_run(wishes, budget, corpus, place, before)
        check(run)
        numbers = predict(run)
    except UserError as error:
        return {"name": label, "problem": str(error)}
    note = {}
    if label == "with MTP":
        note = {"note": "the law counts what MTP costs, not what it may gain"}
    if label == "8-bit storage":
        note = {"note": "the law knows no precision: docs/precision.md has what it costs in loss and time"}
    if place.name and place.rent == "own":
        hours = _pays_after(place)
        note = {"note": f"buying pays after {hours:,.0f} hours of use", "pays_after_hours": hours}
    if "gain" in numbers:
        note = {"gain": numbers["gain"], "note": f"{before:.3f} before, measured; gain {numbers['gain']['value']:.1%}"}
    keys = ("bpb", "tokens", "time_s", "cost_usd", "energy_kwh", "co2e_g")
    return {"name": label, **{key: numbers[key] for key in keys}, "memory_bytes": numbers["memory_bytes"]["total"], **note}


def _pays_after(place: Place) -> float:
    """Hours of use after which a bought device has cost less than the same one rented on demand."""
    price = tables()["price"][place.name]
    own, rented = (rates_for(place.machine, place.name, place.country, rent) for rent in ("own", "on_demand"))
    saved = rented.per_hour() - (own.per_hour() - own.usd_per_hour)
    return price["purchase"] / saved if saved > 0 else math.inf


def _advice(rows: list[dict], budget: Budget) -> dict[str, str]:
    """The lowest bits per byte; the cheaper of those that are as good. A purchase counts only where this run alone pays for it."""
    able = [row for row in rows if "problem" not in row and "if it were" not in row["name"]]
    able = [row for row in able if row.get("pays_after_hours", 0) <= row["time_s"]["value"] / 3600]
    if not able:
        return {"buy": "nothing", "why": "no option works"}
    best = min(row["bpb"]["value"] for row in able)
    good = [row for row in able if row["bpb"]["value"] <= best * (1 + TIE)]
    choice = min(good, key=lambda row: row["cost_usd"]["value"])
    cost, bpb = choice["cost_usd"]["value"], choice["bpb"]
    first = rows[0]
    why = f"{bpb['value']:.3f} bits per byte ({bpb['low']:.3f}-{bpb['high']:.3f}) for ${cost:.2g} with {format_budget(budget)}"
    if "problem" not in first and first is not choice:
        why += f"; {first['name']}: {first['bpb']['value']:.3f} for ${first['cost_usd']['value']:.2g}"
    return {"buy": choice["name"], "why": why}
