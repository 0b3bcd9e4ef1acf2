"""The work in a queue, added up by when it is due."""

from __future__ import annotations


class QueuedWork:
    """Seconds of engine time, in slots of `slot_s`."""

    def __init__(self, slot_s: float) -> None:
        self._slot_s = slot_s
        self._slots: dict[int, float] = {}
        self._total = 0.0
        self._last = 0

    def add(self, due: float, seconds: float) -> None:
        slot = int(due / self._slot_s)
        self._total += seconds
        if (left := self._slots.get(slot, 0.0) + seconds) > 1e-9:
            self._slots[slot] = left
            self._last = max(self._last, slot)
        else:
            self._slots.pop(slot, None)

    def before(self, due: float) -> float:
        """Seconds that are due by `due`, to within a slot."""
        slot = int(due / self._slot_s)
        if slot >= self._last:  # the case for most jobs when they arrive
            return max(0.0, self._total)
        return sum(seconds for at, seconds in self._slots.items() if at <= slot)

    def clear(self) -> None:
        self._slots.clear()
        self._total, self._last = 0.0, 0
