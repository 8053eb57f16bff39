"""When requests may start, and how long to wait before one is repeated."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable

FIRST_WAIT, MOST_WAIT = 1.0, 60.0
"""Seconds before the first repeat of a request, and before any; each is twice the last, less up to half by chance."""
WINDOW = 61.0
"""Seconds in which no more requests start than a minute allows: one is counted a little before it goes out."""


class Pace:
    """When requests may start: no more than `rate` in any minute, and none while the server wants to be left alone.

    Times are seconds of one clock that does not go back. `ages` says how long ago requests of an earlier run were.
    """

    def __init__(self, rate: int | None, ages: Iterable[float] = (), now: float = 0.0) -> None:
        self.rate, self._rest = rate, now
        self._starts = deque(sorted(now - age for age in ages), maxlen=rate)

    def start(self, now: float) -> float:
        """Return 0 and count a request that starts now; or for how many seconds it must wait, and ask again."""
        wait = self._rest - now
        if self.rate is not None and len(self._starts) == self.rate:
            wait = max(wait, self._starts[0] + WINDOW - now)
        if wait > 0:
            return wait
        if self.rate is not None:
            self._starts.append(now)
        return 0.0

    def rest(self, until: float) -> None:
        """Let nothing start before a time."""
        self._rest = max(self._rest, until)


def backoff(repeat: int, chance: random.Random) -> float:
    """Return for how many seconds to wait before the repeat of this number, from 1."""
    most = min(MOST_WAIT, FIRST_WAIT * 2.0 ** min(repeat - 1, 16))
    return most * chance.uniform(0.5, 1.0)
