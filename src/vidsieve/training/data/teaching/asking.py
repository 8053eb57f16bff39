"""Asking a teacher about many rows at once: its pace, its failures, and when to stop.

Each row is settled in the journal by one answer, or by the reason why there is none. Rows that are not settled when a
run stops are left for the next one.
"""

from __future__ import annotations

import asyncio
import functools
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from vidsieve.errors import TrainingError, VideoError
from vidsieve.io.stopping import stop_on_signal
from vidsieve.training.data.teaching.journal import AnnotationJournal
from vidsieve.training.data.teaching.judging import TeacherAnswer
from vidsieve.training.data.teaching.pacing import Pace, backoff
from vidsieve.training.data.teaching.teacher import Client, Prices, RequestFailure, Teacher, api_key, data_urls, fatal
from vidsieve.video.reading import read_frames, read_image, read_video

DECODERS = 2
LEAST_UNANSWERED = 3
"""Rows in succession without an answer that end a run; more where more are in work at a time."""


@dataclass(frozen=True)
class Server:
    """Where the teacher is, and how much is asked of it.

    Parameters
    ----------
    url : str
    concurrency : int
        Rows in work at a time.
    rate : int, optional
        Requests started in any minute.
    retries : int
        Repeats of a request that brought no answer.
    timeout : float
        Seconds after which a request is given up.
    prices : Prices, optional
    budget : float, optional
        US$; nothing is sent once the answers of all runs have cost this much. Needs prices.
    """

    url: str
    concurrency: int = 8
    rate: int | None = None
    retries: int = 5
    timeout: float = 120.0
    prices: Prices | None = None
    budget: float | None = None


def images_of(row: dict[str, Any], teacher: Teacher) -> list[str]:
    """Return the frames of a row that the teacher is shown, as data URLs.

    Raises
    ------
    VideoError
        If they cannot be read.
    """
    if "frames" in row:
        pixels = read_frames(row["frames"], frames=teacher.frames).pixels
    elif "video" in row:
        pixels = read_video(row["video"], frames=teacher.frames).pixels
    else:
        pixels = read_image(row["image"])[None]
    return data_urls(pixels, teacher.size)


class TeacherSettings:
    """One run over rows that are not settled.

    Parameters
    ----------
    teacher : Teacher
    server : Server
    journal : Journal
        Entered.
    rows : iterator of (key, row) or None
        Rows have absolute paths. Taken from as places become free, so that few are in memory; None, for a row that is
        passed over, lets the replies be heard that came meanwhile.
    progress : callable, optional
        Called with the number of rows settled so far.
    note : callable, optional
        Called with what a person should know at once.

    Attributes
    ----------
    stopped : str
        Why rows were left: "interrupted" or "budget"; empty where the rows ended.
    """

    def __init__(
        self,
        teacher: Teacher,
        server: Server,
        journal: AnnotationJournal,
        rows: Iterator[tuple[str, dict[str, Any]] | None],
        progress: Callable[[int], None] | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self.teacher, self.server, self.journal, self.rows = teacher, server, journal, rows
        self.progress, self.note = progress, note
        self.stopped, self.settled, self.answered = "", 0, False
        self._unanswered: list[tuple[str, RequestFailure]] = []
        self._pace = Pace(server.rate, journal.recent(), time.monotonic())

    def run(self) -> None:
        """Ask until the rows end, the budget is spent, or Ctrl-C.

        Raises
        ------
        TrainingError
            If the server would answer nobody, or has answered nothing for several rows.
        """
        asyncio.run(self._run())

    async def _run(self) -> None:
        self._stop, self._open, self._flying = asyncio.Event(), asyncio.Event(), 0
        loop = asyncio.get_running_loop()
        wake = functools.partial(loop.call_soon_threadsafe, self._interrupt)  # a loop that waits notices nothing else
        with stop_on_signal(wake), ThreadPoolExecutor(DECODERS, "vidsieve-frames") as self._pool:
            async with Client(self.server.url, api_key(), self.server.timeout) as self._client:
                workers = [self._work(number) for number in range(self.server.concurrency)]
                for result in await asyncio.gather(*workers, return_exceptions=True):
                    if isinstance(result, BaseException):
                        raise result
        if self._unanswered and not self.stopped:
            if not self.answered:
                raise self._silence()
            self._set_aside()

    def _interrupt(self) -> None:
        self._halt("interrupted")
        if self.note is not None:
            self.note(f"stopping after {self._flying} requests that are under way; Ctrl-C again drops them")

    def _halt(self, why: str) -> None:
        self.stopped = self.stopped or why
        self._stop.set()
        self._open.set()

    async def _work(self, number: int) -> None:
        """Take rows until there are none; the first worker alone until the server has said anything."""
        try:
            if number:
                await self._open.wait()
            for taken in self.rows:  # shared by the workers
                if taken is None:
                    await asyncio.sleep(0)
                else:
                    await self._settle(*taken)
                    if self.progress is not None:
                        self.progress(self.settled)
                if self._stop.is_set():
                    break
        except BaseException:
            self._halt("error")
            raise
        finally:
            self._open.set()

    async def _settle(self, key: str, row: dict[str, Any]) -> None:
        """Settle a row, or leave it where the run stops."""
        try:
            images = await asyncio.get_running_loop().run_in_executor(self._pool, images_of, row, self.teacher)
        except VideoError as error:
            self._aside(key, "broken video", str(error))
            return
        instruction = self.teacher.instruction(row["caption"])
        before, chance = self.journal.attempts(key), random.Random(key)
        for repeat in range(1, self.server.retries + 2):
            if not await self._may_start():
                return
            self.journal.sent(key)
            self._flying += 1
            try:
                said = await self._client.ask(self.teacher, images, instruction, key)
            finally:
                self._flying -= 1
            if isinstance(said, TeacherAnswer):
                self._take(key, said, self.teacher.most_tokens(len(images), instruction))
                return
            failure = said
            wrong = fatal(failure, self.server.url, self.teacher.model, not self.answered)
            if wrong:
                raise TrainingError(f"{wrong}. Then the same command goes on")
            self._open.set()
            if not failure.again:
                break
            self._pace.rest(time.monotonic() + failure.wait)
            if repeat <= self.server.retries:
                await self._pause(backoff(repeat, chance))
        self._give_up(key, failure, known=before >= repeat)

    def _take(self, key: str, answer: TeacherAnswer, most: tuple[int, int]) -> None:
        self.answered = True
        self._open.set()
        usage, metered = answer.usage or most, answer.usage is not None
        self.settled += 1
        if answer.reason:
            self.journal.aside(key, answer.reason, answer.detail, usage, metered)
        else:
            self.journal.done(key, answer.caption, usage, metered)
        self._set_aside()  # the server does answer: the others' silence is their own

    def _give_up(self, key: str, failure: RequestFailure, known: bool) -> None:
        """Set a row aside that gets no answer, once it is clear that others do, or that an earlier run got none."""
        if known or (self.journal.answers and not failure.again):
            self._aside(key, *_why(failure))
            return
        self._unanswered.append((key, failure))
        if len(self._unanswered) >= max(LEAST_UNANSWERED, self.server.concurrency):
            raise self._silence()

    def _silence(self) -> TrainingError:
        count, (_, failure) = len(self._unanswered), self._unanswered[-1]
        return TrainingError(
            f"{self.server.url} has answered none of the last {count} rows ({failure}): they are left for later. See "
            "to the server, or to the options that it refuses; then the same command goes on"
        )

    def _set_aside(self) -> None:
        while self._unanswered:
            key, failure = self._unanswered.pop()
            self._aside(key, *_why(failure))

    def _aside(self, key: str, reason: str, detail: str) -> None:
        self.settled += 1
        self.journal.aside(key, reason, detail)

    async def _may_start(self) -> bool:
        """Wait for the pace; return whether the run goes on."""
        while not self._stop.is_set():
            wait = self._pace.start(time.monotonic())
            if not wait:
                return self._affordable()
            await self._pause(wait)
        return False

    def _affordable(self) -> bool:
        prices, budget, journal = self.server.prices, self.server.budget, self.journal
        if prices is None or budget is None or prices.dollars(journal.tokens_in, journal.tokens_out) < budget:
            return True
        self._halt("budget")
        return False

    async def _pause(self, seconds: float) -> None:
        """Wait, less long where the run stops."""
        try:
            await asyncio.wait_for(self._stop.wait(), seconds)
        except TimeoutError:
            return


def _why(failure: RequestFailure) -> tuple[str, str]:
    return ("no answer" if failure.again else "refused request"), str(failure)
