"""Ctrl-C and SIGTERM as a wish to stop in good order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Stopper:
    """Whether a stop is wanted."""

    stop: bool = False


@contextmanager
def stoppable(patient: bool = False) -> Iterator[Stopper]:
    """Catch Ctrl-C and SIGTERM for the block; a second one ends the process at once, unless `patient`."""
    stopper = Stopper()
    if threading.current_thread() is not threading.main_thread():  # signals can be caught there only
        yield stopper
        return
    # A job in the background ignores Ctrl-C, and shall.
    caught = (s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) not in (signal.SIG_IGN, None))
    before: dict[int, Any] = {number: signal.getsignal(number) for number in caught}

    def stop(number: int, frame: object) -> None:
        stopper.stop = True
        if not patient:
            signal.signal(number, before[number])

    for number in before:
        signal.signal(number, stop)
    try:
        yield stopper
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
