"""Samples computed ahead in background threads, while the caller works on the last one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from vidsieve.errors import TrainingError

Sample = TypeVar("Sample")


class Prefetch(Generic[Sample]):
    """A callable like `load` that has the next samples computed by the time they are asked for.

    Samples are what `load` gives, whatever order they become ready in. An exception of sample i is raised when i is
    asked for. Where the caller leaves the expected sequence, samples that it will not ask for are dropped. Use it as a
    context manager, or call `close`; afterwards it computes in the caller's thread. For one calling thread.

    Parameters
    ----------
    load : callable
        ``load(i)`` returns sample i ≥ 0, the same on every call, in whichever thread.
    workers : int
        Background threads; 0: every sample is computed when it is asked for.
    ahead : int, optional
        Most samples held or under way beside the caller's; default: two a worker.
    stride : int, optional
        Distance of the numbers that follow each other; default: that of the last two, 1 at the start.

    Raises
    ------
    TrainingError
        If `workers`, `ahead` or `stride` is out of range.
    """

    def __init__(
        self, load: Callable[[int], Sample], workers: int = 2, ahead: int | None = None, stride: int | None = None
    ) -> None:
        if workers < 0 or stride == 0 or (ahead is not None and ahead < 1):
            raise TrainingError(
                f"workers must be at least 0, ahead at least 1 and stride not 0; got {workers}, {ahead}, {stride}"
            )
        self.load, self.ahead, self.stride = load, 2 * workers if ahead is None else ahead, stride
        self._step = stride or 1
        self._last: int | None = None
        self._coming: dict[int, Future[Sample]] = {}
        self._pool = ThreadPoolExecutor(workers, "vidsieve-prefetch") if workers else None

    def __call__(self, number: int) -> Sample:
        """Return sample `number`, and have the ones that follow it computed."""
        if self._pool is None:
            return self.load(number)
        if self._last is None:
            # Alone: what tokenizers and codecs set up on first use is set up by one thread.
            sample = self.load(number)
            self._last = number
            self._expect(number)
            return sample
        if self.stride is None and number != self._last:
            self._step = number - self._last
        self._last = number
        future = self._coming.pop(number, None)
        self._expect(number)
        if future is None or future.cancel():  # not begun: sooner done here than waited for
            return self.load(number)
        return future.result()

    def _expect(self, number: int) -> None:
        """Begin what follows `number`, and drop what does not."""
        if self._pool is None:
            return
        following = [number + self._step * (count + 1) for count in range(self.ahead)]
        for other in self._coming.keys() - following:
            self._coming.pop(other).cancel()
        for other in following:
            if other >= 0 and other not in self._coming:
                self._coming[other] = self._pool.submit(self.load, other)

    def close(self) -> None:
        """Drop what is not asked for, and wait for the threads to end."""
        pool, self._pool = self._pool, None
        self._coming.clear()
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Prefetch[Sample]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
