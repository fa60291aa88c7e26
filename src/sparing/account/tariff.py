"""The rates in force for one machine, read again when the user's price file changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sparing.account.prices import Rates, home_rent, rates_for
from sparing.base.config import UserError
from sparing.base.hardware import Machine, home


class Tariff:
    """`rates` of what the machine trains on; `processor`: of its processor alone, whose watts count beside a GPU's."""

    def __init__(self, machine: Machine, say: Callable[[str], None]):
        """Raises UserError for a price file that cannot be used. A GPU that no table has is said, and costs nothing."""
        self.machine = machine
        self._stamp = _stamp()
        self.rates, self.processor = self._read(say)

    def reload(self, say: Callable[[str], None]) -> bool:
        """Take up a changed file; -> whether that changed any rate. A file that cannot be used (being edited) changes nothing."""
        if _stamp() == self._stamp:
            return False
        self._stamp = _stamp()
        try:
            now = self._read(say)
        except UserError as error:
            say(f"the changed prices are not used: {error}")
            return False
        before = (self.rates, self.processor)
        self.rates, self.processor = now
        return now != before

    def _read(self, say: Callable[[str], None]) -> tuple[Rates, Rates]:
        rent = home_rent()  # looked at again with the prices
        processor = rates_for(replace(self.machine, gpus=()))
        if not self.machine.gpus:
            return rates_for(self.machine, rent=rent), processor
        try:
            return rates_for(self.machine, rent=rent), processor
        except UserError as error:
            say(f"{error}; until then only the processor costs anything")
            return processor, processor


def _stamp() -> int:
    """When the price file was last changed; 0 where there is none."""
    try:
        return (home() / "prices.toml").stat().st_mtime_ns
    except OSError:
        return 0
