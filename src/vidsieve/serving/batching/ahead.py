"""Videos decoded in threads ahead of the model, a bounded number of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import groupby

from vidsieve.serving.batching.rows import BatchRow, Outcome, Settled
from vidsieve.serving.batching.settings import Frames


def settle(
    rows: Iterable[tuple[int, BatchRow]],
    answer: Callable[[Iterable[tuple[BatchRow, Frames]]], list[Outcome]],
    read: Callable[[BatchRow], Frames],
    readers: int,
) -> Settled:
    """Yield what becomes of the rows of each group, their videos read ahead."""
    with closing(read_ahead(rows, read, readers)) as coming:
        for group, part in groupby(coming, key=lambda one: one[0]):
            yield group, answer((row, video) for _, row, video in part)


def read_ahead(
    rows: Iterable[tuple[int, BatchRow]], read: Callable[[BatchRow], Frames], readers: int
) -> Generator[tuple[int, BatchRow, Frames], None, None]:
    """Yield rows with their videos, decoded in threads: at most 2 × `readers` wait or are under way.

    Rows of one video that follow each other share what is read.
    """
    waiting: deque[tuple[int, BatchRow, Future[Frames]]] = deque()
    pool = ThreadPoolExecutor(readers, "vidsieve-batch")
    try:
        for group, row in rows:
            last = waiting[-1] if waiting else None
            same = last is not None and not row.fault and not last[1].fault and row.video == last[1].video
            waiting.append((group, row, last[2] if same and last is not None else pool.submit(read, row)))
            if len(waiting) > 2 * readers:
                yield _first(waiting)
        while waiting:
            yield _first(waiting)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _first(waiting: deque[tuple[int, BatchRow, Future[Frames]]]) -> tuple[int, BatchRow, Frames]:
    group, row, coming = waiting.popleft()
    return group, row, coming.result()
