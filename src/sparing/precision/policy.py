"""Dynamic precision: each linear's directions move between 8 bits, finer blocks and 16 bits by the error they are measured to make.

Every `measure_every` steps each product is also computed in 16 bits, on the batch at hand. A direction over the budget goes up one level;
one that a lower level would serve with less than half the budget goes down one (hysteresis: an error near the budget moves nothing to
and fro). A fault (an infinity or NaN in a block, a block whose numbers are all lost) moves a direction to 16 bits at once, for
`PENALTY` measurements; of infinities and NaNs, which spread, only the first linear that met one. Moves depend on nothing but the batches,
so a resumed run repeats them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sparing.base.config import Config, PrecisionConfig, UserError
from sparing.precision.eight_bit import COARSE, DIRECTIONS, LEVELS, SIXTEEN, EightBit, install

DOWN = 0.5
"""Share of the budget that the lower level must stay under to be gone back to."""
PENALTY = 10


@dataclass(frozen=True)
class Move:
    name: str
    direction: str
    before: int
    after: int
    why: str

    def __str__(self) -> str:
        return f"{self.name} {self.direction}: {LEVELS[self.before]} -> {LEVELS[self.after]}, {self.why}"


class Policy:
    """Over the model's `EightBit`s; `begin` before a step's forward pass, `end` after its backward pass."""

    def __init__(self, sites: list[EightBit], config: PrecisionConfig):
        self.sites, self.config = sites, config
        self.held: dict[str, int] = {}
        """"site direction" -> measurements that it still stays in 16 bits, after a fault."""
        self.errors: dict[str, dict[str, float]] = {}
        """Of the last measurement: site -> direction -> relative error at the level in use."""
        self.measured = False

    @classmethod
    def of(cls, model: nn.Module, config: Config) -> Policy:
        """Over a model whose linears are made what `config.precision` says. Raises UserError where that cannot be."""
        kind = config.precision.linear
        if kind == "auto":
            raise UserError("precision.linear = auto is for `sparing train`, which measures; here say none, int8, fp8 or fp8_row")
        return cls(install(model, None if kind == "none" else kind), config.precision)

    def begin(self, step: int) -> None:
        every = self.config.measure_every
        self.measured = bool(self.sites) and every > 0 and step % every == 0
        for site in self.sites:
            site.errors = {} if self.measured else None

    def end(self) -> list[Move]:
        """Moves made after this step, whether its batch is learnt from or not."""
        moves, measured = self._faults(), {}
        for site in self.sites:
            relative = {key: (error / norm) ** 0.5 if norm > 0 else 0.0 for key, (error, norm) in (site.errors or {}).items()}
            for direction, level in site.levels.items():
                if (direction, level) in relative:
                    measured.setdefault(site.name, {})[direction] = relative[direction, level]
                move = self._error(site, direction, level, relative)
                if move:
                    site.levels[direction] = move.after
                    moves.append(move)
            site.errors = None
        self.errors = measured or self.errors
        return moves

    def _faults(self) -> list[Move]:
        counts = [twin.faults[direction] for site in self.sites for twin in site.copies for direction in DIRECTIONS]
        if not counts or not torch.stack(counts).any():  # nearly always; one look instead of hundreds
            return []
        found = {(site, direction): site.take_faults(direction) for direction in DIRECTIONS for site in self.sites}
        broken = [key for key, (overflow, _) in found.items() if overflow]
        # Forward the first in the model's order met it first; where the forward pass was sound, the last one did.
        origin = next((site for site, direction in broken if direction == "forward"), broken[-1][0] if broken else None)
        moves = []
        for (site, direction), (overflow, dead) in found.items():
            if dead or (overflow and site is origin):
                self.held[f"{site.name} {direction}"] = PENALTY
                what = f"{overflow} blocks with an infinity or NaN" if overflow else f"{dead} blocks too small to scale"
                if site.levels[direction] != SIXTEEN:
                    moves.append(Move(site.name, direction, site.levels[direction], SIXTEEN, what))
                    site.levels[direction] = SIXTEEN
        return moves

    def _error(self, site: EightBit, direction: str, level: int, relative: dict[tuple[str, int], float]) -> Move | None:
        key, budget = f"{site.name} {direction}", self.config.error_budget
        now, lower = relative.get((direction, level)), relative.get((direction, level - 1))
        if key in self.held and relative:
            self.held[key] -= 1
            if not self.held[key]:
                del self.held[key]
        if now is not None and not now <= budget:  # NaN is over it too
            return Move(site.name, direction, level, level + 1, f"error {now:.3f}, budget {budget:g}")
        if lower is not None and level > COARSE and key not in self.held and lower < DOWN * budget:
            return Move(site.name, direction, level, level - 1, f"error there {lower:.3f}, budget {budget:g}")
        return None

    def shares(self) -> dict[str, float]:
        """Direction -> share of the linears' multiplications that are made in 8 bits."""
        total = sum(site.size for site in self.sites) or 1
        return {d: sum(site.size for site in self.sites if site.levels[d] != SIXTEEN) / total for d in DIRECTIONS}

    def values(self) -> dict[str, float]:
        """For the metrics of a step that measured: shares in 8 bits, and the largest error there, by direction; otherwise nothing."""
        if not self.measured:
            return {}
        worst = {d: max((errors[d] for errors in self.errors.values() if d in errors), default=0.0) for d in DIRECTIONS}
        return {f"eight_bit_{d}": share for d, share in self.shares().items()} | {f"error_{d}": e for d, e in worst.items()}

    def state(self) -> dict:
        """For a checkpoint: what is not as it was at the start."""
        levels = {f"{s.name} {d}": s.levels[d] for s in self.sites for d in DIRECTIONS if s.levels[d] != COARSE}
        return {"levels": levels, "held": dict(self.held)}

    def load(self, state: dict) -> None:
        for site in self.sites:
            for direction in DIRECTIONS:
                site.levels[direction] = state.get("levels", {}).get(f"{site.name} {direction}", COARSE)
                site.take_faults(direction)
            site.errors = None
        self.held = dict(state.get("held", {}))
