"""Samples computed ahead in background threads, while the caller works on the last one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from vidsieve.errors import TrainingError

Sample = TypeVar("Sample")


class Prefetch(Generic[Sample]):
    """A callable like `load` that computes the next samples before they are asked for.

    Samples are those of `load`, in whatever order they become ready. An exception of sample i is raised when i is asked
    for. The next numbers follow at the distance of the last two; where the caller leaves that sequence, samples that it
    will not ask for are dropped. Use it as a context manager, or call `close`; afterwards it computes in the caller's
    thread. For one calling thread.

    Parameters
    ----------
    load : callable
        ``load(i)`` returns sample i ≥ 0, the same on every call, in whichever thread.
    workers : int
        Background threads, each with two samples ahead; 0: every sample is computed when it is asked for.

    Raises
    ------
    TrainingError
        If `workers` is negative.
    """

    def __init__(self, load: Callable[[int], Sample], workers: int = 2) -> None:
        if workers < 0:
            raise TrainingError(f"workers must be at least 0, got {workers}")
        self.load, self.ahead = load, 2 * workers
        self._step = 1
        self._last: int | None = None
        self._coming: dict[int, Future[Sample]] = {}
        self._pool = ThreadPoolExecutor(workers, "vidsieve-prefetch") if workers else None

    def __call__(self, number: int) -> Sample:
        """Return sample `number`, and begin the ones that follow it."""
        if self._pool is None:
            return self.load(number)
        if self._last is None:
            # Alone: tokenizers and codecs set themselves up on first use, in one thread.
            sample = self.load(number)
            self._last = number
            self._expect(number, self._pool)
            return sample
        if number != self._last:
            self._step = number - self._last
        self._last = number
        future = self._coming.pop(number, None)
        self._expect(number, self._pool)
        if future is None or future.cancel():  # not begun: sooner computed here than waited for
            return self.load(number)
        return future.result()

    def _expect(self, number: int, pool: ThreadPoolExecutor) -> None:
        """Begin the samples that follow `number`, and drop the others."""
        following = [number + self._step * (count + 1) for count in range(self.ahead)]
        for other in self._coming.keys() - following:
            self._coming.pop(other).cancel()
        for other in following:
            if other >= 0 and other not in self._coming:
                self._coming[other] = pool.submit(self.load, other)

    def close(self) -> None:
        """Drop all samples, and wait for the threads to end."""
        pool, self._pool = self._pool, None
        self._coming.clear()
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Prefetch[Sample]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
