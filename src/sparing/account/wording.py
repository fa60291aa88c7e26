"""Receipts for people: numbers in units that fit, and tables of plain text."""

from __future__ import annotations

import math

from sparing.account.receipt import COMPARED, at

LABEL = {
    "time_s": "time", "device_hours": "device hours", "energy_kwh": "energy", "co2e_g": "CO2e", "cost_usd": "cost", "flops": "operations",
    "tokens": "tokens", "tokens_per_s": "speed", "memory_bytes.total": "peak memory", "idle": "idle cores", "bpb": "bits per byte",
    "gain": "gain over its start",
}  # fmt: skip


def amount(name: str, value: float | None) -> str:
    """A figure by its name in the receipt: seconds as 5m03s, bytes as 1.2 GB, ..."""
    if value is None:
        return "–"
    match name.partition(".")[0]:
        case "time_s":
            return duration(value)
        case "device_hours":
            return f"{digits(value)} h"
        case "energy_kwh":
            return scaled(1000 * value, "Wh")
        case "co2e_g":
            return f"{digits(value / 1e6)} t" if value >= 1e6 else scaled(value, "g")
        case "cost_usd":
            return f"${value:,.2f}" if value >= 1 else f"${digits(value)}" if value >= 0.01 or not value else _cents(value)
        case "flops":
            return scaled(value, "FLOP")
        case "tokens":
            return f"{value:,.0f}"
        case "tokens_per_s":
            return f"{value:,.0f} tokens/s"
        case "memory_bytes":
            return scaled(value, "B")
        case "bpb":
            return f"{value:.3f}"
        case "idle":
            return f"{100 * value:.1f} %"
        case "gain":
            return f"{100 * value:.2f} %"
    return digits(value)


def _cents(usd: float) -> str:
    """Less than a cent, to two digits that count and no finer than a millionth of a dollar."""
    return "<$0.000001" if usd < 1e-6 else f"${usd:.{min(6, 1 - math.floor(math.log10(usd)))}f}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}s"
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours:,}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def digits(value: float) -> str:
    """Three that count, without an exponent: 34,310, 5.13, 0.000175."""
    if value == 0 or not abs(value) < 999.5:  # not-a-number too
        return f"{value:,.0f}"
    value = float(f"{value:.3g}")
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def scaled(value: float, unit: str) -> str:
    """1.23 GB, 4.5 TFLOP, 35.0 mWh."""
    for thousands, prefix in enumerate(("µ", "m", "", "k", "M", "G", "T", "P", "E", "Z", "Y"), -2):
        if 0 < abs(value) < 999.5 * 1000.0**thousands:
            return f"{digits(value / 1000.0**thousands)} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def percent(difference: dict | None) -> str:
    if difference is None:
        return ""
    outside = " (outside)" if difference["inside"] is False else ""
    return f"{100 * difference['relative']:+.1f} %{outside}"


def span(name: str, figure: dict | None) -> str:
    """5m00s (4m40s – 5m20s), 310 GFLOP (294 – 326 GFLOP)."""
    if figure is None:
        return "–"
    low, high = figure.get("low"), figure.get("high")
    if low is None or high is None or low == high:
        return amount(name, figure["value"])
    first, last = amount(name, low), amount(name, high)
    number, _, unit = first.rpartition(" ")
    return f"{amount(name, figure['value'])} ({number if number and last.endswith(' ' + unit) else first} – {last})"


def compared(receipt: dict) -> list[tuple[str, str, str, str]]:
    """(what, predicted, actual and how that is known, difference) of each figure."""
    rows = []
    for name in COMPARED:
        before, after = at(receipt["predicted"], name), at(receipt["actual"], name)
        if after:
            is_ = f"{amount(name, after['value'])} {after['how']}"
            rows.append((LABEL[name], span(name, before), is_, percent(receipt["difference"].get(name))))
    return rows


def staged(stages: list[dict]) -> list[tuple[str, ...]]:
    """(stage, time, predicted time, energy, cost, CO2e, peak memory, tokens, status) of each stage."""
    return [
        (
            row["stage"],
            duration(row["time_s"]),
            span("time_s", at({"t": row["predicted"]}, "t") or at(row["predicted"], "time_s")),
            amount("energy_kwh", row["energy_kwh"]),
            amount("cost_usd", row["cost_usd"]),
            amount("co2e_g", row["co2e_g"]),
            amount("memory_bytes", row["gpu_memory_bytes"] or row["memory_bytes"]),
            f"{row['tokens']:,}" if row["tokens"] else "",
            row["status"] + (f", {row['attempts']} attempts" if row["attempts"] > 1 else ""),
        )
        for row in stages
    ]


def ancestry(ancestors: list[dict]) -> list[tuple[str, ...]]:
    """(run, as what, time, cost, share of the whole line) of each ancestor."""
    return [
        (row["name"], row["relation"], amount("time_s", row["wall_s"]), amount("cost_usd", row["usd"]), f"{100 * row['share']:.0f} %")
        for row in ancestors
    ]


STAGE_HEAD = ("stage", "time", "predicted", "energy", "cost", "CO2e", "memory", "tokens", "status")
COMPARED_HEAD = ("", "predicted", "actual", "difference")


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Columns of plain text; those that are empty throughout are left out."""
    keep = [i for i in range(len(head)) if i == 0 or any(row[i] not in ("", "–") for row in rows)]
    widths = [max(len(line[i]) for line in [head, *rows]) for i in keep]
    lines = [
        "  ".join(line[i].ljust(width) if i == 0 else line[i].rjust(width) for i, width in zip(keep, widths)) for line in [head, *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)


def receipt_text(receipt: dict) -> str:
    """A run's receipt for a terminal."""
    parts = [f"{receipt['run']}: {receipt['status']}; {receipt['machine']}", table(COMPARED_HEAD, compared(receipt))]
    parts.append(table(STAGE_HEAD, staged(receipt["stages"])))
    if receipt["later"]:
        parts.append("since then (not in the figures above):\n" + table(STAGE_HEAD, staged(receipt["later"])))
    if receipt["ancestors"]:
        parts.append(table(("derived from", "as", "time", "cost", "share"), ancestry(receipt["ancestors"])))
    if receipt["published"]:
        parts.append(published_text(receipt["published"]))
    if bought := quality_text(receipt["quality"]):
        parts.append(bought)
    energy = receipt["actual"]["energy_kwh"]
    parts.append(f"energy {energy['how']}: {energy['source']}")
    parts += receipt["missing"]
    parts += [f"cut short: {line}" for line in receipt["cut_short"]]
    return "\n\n".join(parts)


def published_text(said: dict) -> str:
    """What is published about the open model behind a run, and what follows from it."""
    who = "".join([said.get("name", "an open model"), f" by {said['publisher']}" if "publisher" in said else ""])
    facts = [f"{scaled(said['tokens'], 'tokens')}" if "tokens" in said else "", said.get("hardware", "")]
    line = f"Begun by others as {who}, licence {said.get('licence', 'not stated')}"
    if any(facts):
        line += f"; published: {', '.join(fact for fact in facts if fact)}"
    if "flops" in said:
        line += f"; estimated from that: {amount('flops', said['flops']['value'])} (6 x parameters x tokens)"
    return f"{line}; none of it is in the figures above"


def quality_text(quality: dict) -> str:
    if not quality:
        return ""
    each = [f"{digits(quality[key])} {unit}" for key, unit in (("per_usd", "a dollar"), ("per_kwh", "a kWh")) if key in quality]
    return f"{quality['bits_saved_per_byte']:.3f} bits saved per byte of text" + (f": {', '.join(each)}" if each else "")


def workspace_text(workspace: dict) -> str:
    """`receipt --all` for a terminal."""
    head = ("", "attempts", "time", "energy", "cost", "CO2e")

    def row(name: str, sums: dict) -> tuple[str, ...]:
        return (
            name, f"{sums['attempts']:,}", duration(sums["time_s"]), amount("energy_kwh", sums["energy_kwh"]),
            amount("cost_usd", sums["cost_usd"]), amount("co2e_g", sums["co2e_g"]),
        )  # fmt: skip

    runs = [row(f"{item['run']}{'' if item['exists'] else ' (gone)'}: {item['status']}", item) for item in workspace["runs"]]
    return "\n\n".join(
        [
            workspace["ledger"],
            table(("run", *head[1:]), runs),
            table(("verb", *head[1:]), [row(name, sums) for name, sums in workspace["by_verb"].items()]),
            table(("how it ended", *head[1:]), [row(name, sums) for name, sums in workspace["by_status"].items()]),
            table(head, [row("all", workspace["total"])]) + f"\nenergy {workspace['total']['energy_how']}",
        ]
    )
