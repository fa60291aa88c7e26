"""What machines that may vanish cost in time: work that is lost and done again, and how often to save so that it is least.

To first order in (saving + restart) / time between failures: J. W. Young, A first order approximation to the optimum checkpoint interval,
Communications of the ACM 17 (1974); J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, Future
Generation Computer Systems 22 (2006), equation 5 and section 2.
"""

from __future__ import annotations

import math

HOUR_S = 3600.0
INTERVAL_S = 60.0
"""Between two checkpoints, where no failures are known."""


def young_daly(save_s: float, failures_per_hour: float) -> float:
    """Seconds between two checkpoints that lose the least: sqrt(2 x saving x time between failures); infinite without failures."""
    return math.sqrt(2 * save_s * HOUR_S / failures_per_hour) if failures_per_hour else math.inf


def spot_hours(hours: float, failures_per_hour: float, save_s: float, restart_s: float) -> float:
    """Hours on machines that fail, of which any takes the run down, for what takes `hours` without a failure and without saving.

    Saving comes at the best interval. A failure loses half of one, and `restart_s` seconds until training goes on. Infinite where more is
    lost in an hour than an hour."""
    interval = young_daly(save_s, failures_per_hour)
    saving = save_s / interval if interval else 0.0
    lost = failures_per_hour * (interval / 2 + restart_s) / HOUR_S if failures_per_hour else 0.0
    return hours * (1 + saving) / (1 - lost) if lost < 1 else math.inf
