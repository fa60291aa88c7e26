"""Energy of each answer: what the machine uses while answers run, shared equally among them."""

from __future__ import annotations

from collections.abc import Sequence

from sparing.account.power import Source


class Energy:
    """Call `begin` and `end` around each request. All shares add up to the energy used while any request ran."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = sources
        self.how = "measured" if all(source.how == "measured" for source in sources) else "estimated"
        self._active, self._each, self._all, self._last = 0, 0.0, 0.0, self._joules()

    def _joules(self) -> float:
        return sum(source.joules() for source in self._sources)

    def _advance(self) -> None:
        now = self._joules()
        if self._active:
            self._each += (now - self._last) / self._active
            self._all += now - self._last
        self._last = now

    def begin(self) -> float:
        """-> a mark for `end`."""
        self._advance()
        self._active += 1
        return self._each

    def end(self, mark: float) -> float:
        """Joules of the request that began at `mark`."""
        self._advance()
        self._active -= 1
        return self._each - mark

    def total(self) -> float:
        """Joules of all requests so far."""
        self._advance()
        return self._all
