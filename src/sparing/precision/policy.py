"""Dynamic precision: moves each direction of each linear between 8 bits, 8 bits in finer blocks, and 16 bits, by its measured error.

A linear has three products, called directions: forward, and the gradients of input and weight. Every `measure_every` steps each of them is
also computed in 16 bits, on the current batch, and the relative error is compared with the error budget:

- A direction over the budget goes up one level.
- A direction goes down one level if its error there is less than half the budget. The gap keeps an error near the budget from moving a
  direction back and forth.
- A fault moves a direction to 16 bits at once, for PENALTY measurements. A fault is an infinity or NaN in a block, or a block whose numbers
  all became zero. Infinities and NaNs spread through the network, so only the first linear that met one is moved.

Moves depend only on the batches, so a resumed run repeats them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sparing.base.config import Config, PrecisionConfig, UserError
from sparing.precision.eight_bit import COARSE, DIRECTIONS, LEVELS, SIXTEEN, EightBit, install

DOWN = 0.5
"""A direction goes down one level if its error there is below this share of the budget."""
PENALTY = 10
"""Measurements for which a direction stays in 16 bits after a fault."""


@dataclass(frozen=True)
class Move:
    """A change of one direction's level."""

    name: str
    """The linear."""
    direction: str
    before: int
    """Level, an index into LEVELS."""
    after: int
    why: str

    def __str__(self) -> str:
        return f"{self.name} {self.direction}: {LEVELS[self.before]} -> {LEVELS[self.after]}, {self.why}"


class Policy:
    """Sets the levels of a model's `EightBit` linears. Call `begin` before a step's forward pass and `end` after its backward pass."""

    def __init__(self, sites: list[EightBit], config: PrecisionConfig):
        self.sites, self.config = sites, config
        self.held: dict[str, int] = {}
        """"linear direction" -> for how many more measurements a fault keeps it in 16 bits."""
        self.errors: dict[str, dict[str, float]] = {}
        """Last measurement: linear -> direction -> relative error at the current level."""
        self.measured = False

    @classmethod
    def of(cls, model: nn.Module, config: Config, device: torch.device | None = None) -> Policy:
        """Install the 8-bit linears that `config.precision` asks for in `model`, and make their policy. device: where the model will be,
        None: where it is. Raises UserError for `auto`."""
        kind = config.precision.linear
        if kind == "auto":
            raise UserError("precision.linear = auto is for `sparing train`, which measures; here say none, int8, fp8 or fp8_row")
        return cls(install(model, None if kind == "none" else kind, device), config.precision)

    def begin(self, step: int) -> None:
        """Decide whether this step measures errors. step: steps done."""
        every = self.config.measure_every
        self.measured = bool(self.sites) and every > 0 and step % every == 0
        for site in self.sites:
            site.errors = {} if self.measured else None

    def end(self) -> list[Move]:
        """Compare errors and faults with the budget and set new levels; -> the moves. Also called after a batch that the guard drops."""
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
        """Move directions with faults to 16 bits."""
        counts = [twin.faults[direction] for site in self.sites for twin in site.copies for direction in DIRECTIONS]
        if not counts or not torch.stack(counts).any():  # the usual case, found by one check instead of hundreds
            return []
        faults = {(site, direction): site.take_faults(direction) for direction in DIRECTIONS for site in self.sites}
        broken = [key for key, (overflow, _) in faults.items() if overflow]
        # In a forward pass the first linear of the model met it first; in a backward pass the last one did.
        origin = next((site for site, direction in broken if direction == "forward"), broken[-1][0] if broken else None)
        moves = []
        for (site, direction), (overflow, dead) in faults.items():
            if dead or (overflow and site is origin):
                self.held[f"{site.name} {direction}"] = PENALTY
                what = f"{overflow} blocks with an infinity or NaN" if overflow else f"{dead} blocks too small to scale"
                if site.levels[direction] != SIXTEEN:
                    moves.append(Move(site.name, direction, site.levels[direction], SIXTEEN, what))
                    site.levels[direction] = SIXTEEN
        return moves

    def _error(self, site: EightBit, direction: str, level: int, relative: dict[tuple[str, int], float]) -> Move | None:
        """The move that a measurement asks for. relative: (direction, level) -> relative error."""
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
        """Direction -> share of the linears' multiplications that run in 8 bits."""
        total = sum(site.size for site in self.sites) or 1
        return {d: sum(site.size for site in self.sites if site.levels[d] != SIXTEEN) / total for d in DIRECTIONS}

    def values(self) -> dict[str, float]:
        """Metrics of a step that measured errors: share in 8 bits and largest error by direction. Other steps: empty."""
        if not self.measured:
            return {}
        worst = {d: max((errors[d] for errors in self.errors.values() if d in errors), default=0.0) for d in DIRECTIONS}
        return {f"eight_bit_{d}": share for d, share in self.shares().items()} | {f"error_{d}": e for d, e in worst.items()}

    def state(self) -> dict:
        """State for a checkpoint: levels that differ from the first one, and penalties."""
        levels = {f"{s.name} {d}": s.levels[d] for s in self.sites for d in DIRECTIONS if s.levels[d] != COARSE}
        return {"levels": levels, "held": dict(self.held)}

    def load(self, state: dict) -> None:
        """Restore `state` from a checkpoint."""
        for site in self.sites:
            for direction in DIRECTIONS:
                site.levels[direction] = state.get("levels", {}).get(f"{site.name} {direction}", COARSE)
                site.take_faults(direction)
            site.errors = None
        self.held = dict(state.get("held", {}))
