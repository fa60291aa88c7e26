"""What a launched run costs on rented machines: on demand, and on spot machines, which are cheaper and may be taken away."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence

from sparing.account.history import TRAINING, entries
from sparing.account.ledger import Entry, workspace_file
from sparing.account.prices import Rates, rates_for
from sparing.base.config import Budget, UserError
from sparing.base.hardware import Gpu, Machine
from sparing.budget.predict import in_seconds
from sparing.budget.spot import spot_hours, young_daly
from sparing.budget.units import format_budget

FAILURES_PER_HOUR = 0.1
"""Of a spot machine, where this workspace knows none: the mildest of the three rates, 10 %, 16 % and 33 % of the machines an hour, at which
J. Thorpe et al., Bamboo (NSDI 2023), replay what they recorded on EC2. Small machines without GPUs fail far less."""
SAVE_S, RESTART_S = 5.0, 300.0
"""Assumed: writing a checkpoint; and until a new machine is there, has its packages and the run, and trains."""


def failures(rows: Sequence[Entry]) -> tuple[int, float]:
    """(how often a run on spot machines was killed and then went on, the hours that runs trained there), of a ledger's rows."""
    attempts: dict[str, dict[tuple, list[Entry]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        source = json.loads(row.rates).get("sources", {}).get("usd_per_hour", "")
        if row.verb in TRAINING and source.startswith("spot "):
            attempts[row.run_id][row.host, row.pid].append(row)
    count = 0
    for run in attempts.values():
        in_turn = sorted(run.values(), key=lambda rows: min(row.started for row in rows))
        count += sum(any(row.status == "killed" for row in rows) for rows in in_turn[:-1])
    return count, sum(row.wall_s for run in attempts.values() for rows in run.values() for row in rows) / 3600


def rate(failures_per_hour: float | None, nodes: int) -> tuple[float, str]:
    """(failures an hour of all machines together, where that is from)."""
    if failures_per_hour is not None:
        return failures_per_hour * nodes, "--failures-per-hour"
    count, hours = failures(entries(workspace_file()))
    if count:
        return count / hours, f"{count} in {hours:.3g} h of this workspace's runs on spot machines"
    return FAILURES_PER_HOUR * nodes, f"assumed: {FAILURES_PER_HOUR} a machine (Bamboo, NSDI 2023); none is known of this workspace"


def rented(gpu: str | None, count: int, nodes: int) -> tuple[Rates, Rates]:
    """(on demand, on spot): what `nodes` machines cost with `count` GPUs (gpu None: processor cores) each. Raises UserError where a price
    is not known."""
    gpus = () if gpu is None else (Gpu(gpu, 0, ""),) * count
    machine = Machine("Linux", "", count, 2 * count, 0, gpus)
    return rates_for(machine, rent="on_demand").times(nodes), rates_for(machine, rent="spot").times(nodes)


def lines(budget: Budget, demand: Rates, spot: Rates, nodes: int, failures_per_hour: float | None = None) -> list[str]:
    """What to tell: on demand against spot, for a budget on these machines; how far it goes, where it is money.

    Of a budget in tokens or FLOP, whose time is not known here: what an hour of progress costs. Raises UserError for a rate below 0."""
    if failures_per_hour is not None and not 0 <= failures_per_hour < math.inf:
        raise UserError(f"--failures-per-hour {failures_per_hour}: must be 0 or more")
    seconds = in_seconds(budget, demand)
    hours = 1.0 if seconds is None else seconds / 3600
    an_hour, why = rate(failures_per_hour, nodes)
    longer = spot_hours(hours, an_hour, SAVE_S, RESTART_S)
    of_what = "an hour of progress" if seconds is None else format_budget(budget)
    told = [f"on demand: ${hours * demand.usd_per_hour:.4g} for {of_what}: {hours:.3g} h at ${demand.usd_per_hour:.4g}"]
    if math.isinf(longer):
        return [*told, f"on spot: {an_hour:.3g} failures an hour ({why}) leave no time to train"]
    if budget.unit == "usd":
        lasts = budget.amount / spot.usd_per_hour
        told.append(f"on spot: {lasts:.3g} h at ${spot.usd_per_hour:.4g}, with the progress of {lasts * hours / longer:.3g} h on demand")
    else:
        share = longer * spot.usd_per_hour / (hours * demand.usd_per_hour)
        told.append(f"on spot: ${longer * spot.usd_per_hour:.4g}, {share:.0%} of that: {longer:.3g} h at ${spot.usd_per_hour:.4g}")
    told.append(f"  {an_hour:.3g} failures an hour ({why}); each loses half a checkpoint interval and {RESTART_S:.0f} s (assumed)")
    if an_hour:
        best = young_daly(SAVE_S, an_hour)
        told.append(f"  best checkpoint interval: {best:.0f} s, if saving takes {SAVE_S:.0f} s: --train.checkpoint-interval-s {best:.0f}")
    return [*told, f"  prices: {spot.sources['usd_per_hour']}"]
