"""Ctrl-C and SIGTERM as a request to stop once the work in hand is done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class StopFlag:
    """`stop` is True once a stop was requested."""

    stop: bool = False


@contextmanager
def stop_on_signal(note: Callable[[], object] | None = None, *, patient: bool = False) -> Iterator[StopFlag]:
    """Set a flag on Ctrl-C or SIGTERM during the block; a second signal interrupts at once.

    Signals that the process ignores, as background jobs ignore Ctrl-C, stay ignored. Outside the main thread, where
    Python delivers no signals, the flag is never set.

    Parameters
    ----------
    note : callable, optional
        Called by the first signal, in the main thread, between any two instructions of the block.
    patient : bool
        Later signals only set the flag again.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    caught = (s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) not in (signal.SIG_IGN, None))
    before: dict[int, Any] = {number: signal.getsignal(number) for number in caught}

    def request(number: int, frame: object) -> None:
        first, flag.stop = not flag.stop, True
        if not patient:
            restore()
        if first and note is not None:
            note()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, request)
    try:
        yield flag
    finally:
        restore()
