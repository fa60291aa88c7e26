"""The verbs `receipt`, `report` and `compare`. None of them loads torch."""

from __future__ import annotations

from sparing.account.codecarbon import write_csv
from sparing.account.history import entries, stages_of, whole
from sparing.account.ledger import workspace_file
from sparing.account.receipt import receipt as of_run
from sparing.account.receipt import workspace
from sparing.account.report.page import write_page
from sparing.base.files import output_file
from sparing.base.run import RunFolder


def receipt(run: str | None = None, csv: str | None = None) -> dict:
    """A run's receipt (`account.receipt`), or, without one, the workspace's. csv: also write CodeCarbon's columns to this file."""
    folder = None if run is None else RunFolder.open(run)
    file = None if csv is None else output_file(csv, "--csv")
    result = of_run(folder) if folder else workspace()
    if file:
        write_csv(file, whole(folder) if folder else entries(workspace_file()))
    return result


def report(run: str, out: str | None = None) -> dict:
    """Write the run's page (`account.report`), by default to RUN/report.html. -> {"report", "bytes"}. Of a run that was made by stages, its
    stages are shown side by side, as far as they have come."""
    folder = RunFolder.open(run)
    stages = [stage for stage in stages_of(folder) if stage.metrics_file.exists()]
    return write_page(stages or [folder], folder.report_file if out is None else out)


def compare(runs: list[str], out: str = "compare.html") -> dict:
    """Write a page about several runs. -> {"report", "bytes"}."""
    return write_page([RunFolder.open(run) for run in runs], out)
