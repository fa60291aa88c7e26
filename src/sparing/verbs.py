"""The verbs that count: bench, receipt, report, compare. Belongs to cli.py, which has the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from sparing.config import UserError

if TYPE_CHECKING:
    import tyro  # `arguments.parse` imports it for the chosen verb; until then the annotations below stay text

    from sparing.arguments import Call


@dataclass
class Receipt:
    """What a run cost and reached, stage by stage, beside what was predicted; with --all, everything metered in this workspace."""

    run: tyro.conf.Positional[str | None] = None
    all: bool = False
    """Every run, failed, tuning and benchmark runs included."""
    csv: str | None = None
    """Also write CodeCarbon's emissions.csv to this file: one line per attempt."""
    json: bool = False

    def __call__(self, call: Call) -> dict | None:
        if self.all and self.run:
            raise UserError(f"receipt: either {self.run} or --all")
        if not self.all:
            call.need(RUN=self.run)
        result = call.api.receipt(None if self.all else self.run, self.csv)
        if self.json:
            return result
        from sparing.account.wording import receipt_text, workspace_text

        print(workspace_text(result) if self.all else receipt_text(result))
        return None


@dataclass
class Report:
    """One self-contained HTML page about a run: curves, experts' balance, predicted against actual, samples, the receipt."""

    run: tyro.conf.Positional[str | None] = None
    out: str | None = None
    """The file to write; default: RUN/report.html."""
    json: bool = False

    def __call__(self, call: Call) -> dict:
        call.need(RUN=self.run)
        return call.api.report(self.run, self.out)


@dataclass
class Compare:
    """Several runs on one self-contained HTML page."""

    runs: tyro.conf.Positional[list[str]] = field(default_factory=list)
    out: str = "compare.html"
    """The file to write."""
    json: bool = False

    def __call__(self, call: Call) -> dict:
        call.need(RUN=self.runs)
        return call.api.compare(self.runs, self.out)


@dataclass
class Bench:
    """Measure this code against its peers in one run. Further options belong to the figure: --rounds 3; a wrong one lists them."""

    takes: ClassVar[str] = "anything"
    name: tyro.conf.Positional[str | None] = None
    """train"""
    figure: tyro.conf.Positional[str | None] = None
    """Which figure; default: throughput."""
    json: bool = False

    def __call__(self, call: Call) -> dict | None:
        call.need(NAME=self.name)
        call.choice("bench", self.name, ("train",))
        from sparing.bench.train import run
        from sparing.pipeline import metered

        with metered("bench", first=f"{self.name} {self.figure or 'throughput'}"):
            result = run(self.figure or "throughput", json=self.json, **call.overrides)
        return result if self.json else None  # the figure has drawn its table
