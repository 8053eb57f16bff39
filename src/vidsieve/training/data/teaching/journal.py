"""What was asked of a teacher, and what it answered, one line an event, on the disk before anything depends on it.

The first line holds the settings. Then, of each row by its key: ``sent`` before every request, and, once, ``done`` with
the caption or ``aside`` with the reason why there is none. A run that was killed at any moment goes on from there.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from vidsieve.errors import OutputError, TrainingError
from vidsieve.io.files import append
from vidsieve.training.data.teaching.pacing import WINDOW


class AnnotationJournal:
    """The journal of a run; entered as a context manager it is this process's alone, and can be added to.

    Parameters
    ----------
    path : Path
    settings : dict
        What answers depend on, as values for JSON. A journal that was begun with others is refused.
    again : bool
        Take rows that were set aside without an answer as not asked yet.

    Attributes
    ----------
    places : dict
        Key: where in the file the line is that settles the row.
    requests, retries : int
        Sent in all, and those that were not the first for their row.
    answers, unmetered : int
        That were paid for, and those of them that told no number of tokens: theirs are counted at most.
    tokens_in, tokens_out : int
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], again: bool = False) -> None:
        self.path, self.settings, self.again = path, json.loads(json.dumps(settings)), again
        self._file: IO[bytes] | None = None
        self._forget()

    def _forget(self) -> None:
        self.places: dict[str, int] = {}
        self.requests = self.retries = self.answers = self.unmetered = self.tokens_in = self.tokens_out = 0
        self._attempts: dict[str, int] = {}
        self._recent: deque[float] = deque()
        self._end = 0

    def __enter__(self) -> AnnotationJournal:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._close()
            raise TrainingError(
                f"another process is writing {self.path}: wait for it, or name another output"
            ) from None
        except OSError as error:
            self._close()
            raise OutputError(f"cannot write {self.path}: {error.strerror}") from None
        try:
            self.read()
            self._file.truncate(self._end)  # drops what a kill cut short
            self._file.seek(self._end)
            if not self._end:
                self._add({"journal": 1, "settings": self.settings})
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def read(self) -> None:
        """Read what is there, which may be nothing.

        Raises
        ------
        TrainingError
            If it was begun with other settings, or is damaged.
        """
        self._forget()
        if not os.path.exists(self.path):
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break  # a process was killed, or is, while it writes
                try:
                    event = json.loads(line)
                    self._begin(event) if number == 1 else self._take(event, self._end, self.again)
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise TrainingError(
                        f"line {number} of {self.path} is damaged: remove that line, and its row is asked about again"
                        if number > 1
                        else f"{self.path} is no journal of captions: name another output, or move it away"
                    ) from None
                self._end += len(line)

    def _begin(self, event: Any) -> None:
        there = event["settings"]
        changed = [name for name in {**there, **self.settings} if there.get(name) != self.settings.get(name)]
        if changed:
            said = "; ".join(f"{name}: {_between(there.get(name), self.settings.get(name))}" for name in changed)
            raise TrainingError(
                f"{self.path} was begun with other settings ({said}): give the same ones, or name another output"
            )

    def _take(self, event: Any, place: int, again: bool) -> None:
        """Count an event that lies at a place of the file; where `again`, one without an answer settles nothing."""
        if "sent" in event:
            self.requests += 1
            self.retries += event["attempt"] > 1
            self._attempts[event["sent"]] = event["attempt"]
            self._recent.append(event["at"])
            while self._recent[0] < event["at"] - WINDOW:
                self._recent.popleft()
            return
        key = event["done"] if "done" in event else event["aside"]
        paid = event["usage"] is not None
        if paid:
            self.answers += 1
            self.unmetered += not event["metered"]
            self.tokens_in += event["usage"][0]
            self.tokens_out += event["usage"][1]
        if paid or not again:
            self.places[key] = place
            self._attempts.pop(key, None)

    def recent(self) -> list[float]:
        """Return how many seconds ago each request of the last minute was sent."""
        now = time.time()
        return [now - at for at in self._recent if 0 <= now - at < WINDOW]

    def attempts(self, key: str) -> int:
        """Return how often a row that is not settled was asked about."""
        return self._attempts.get(key, 0)

    def sent(self, key: str) -> None:
        """Note that a request is about to be sent."""
        self._add({"sent": key, "attempt": self.attempts(key) + 1, "at": round(time.time(), 3)})

    def done(self, key: str, caption: str, usage: tuple[int, int], metered: bool) -> None:
        """Note a caption."""
        self._add({"done": key, "caption": caption, "usage": usage, "metered": metered})

    def aside(
        self, key: str, reason: str, detail: str, usage: tuple[int, int] | None = None, metered: bool = False
    ) -> None:
        """Note why there is no caption; tokens where there was an answer."""
        self._add({"aside": key, "reason": reason, "detail": detail, "usage": usage, "metered": metered})

    def _add(self, event: dict[str, Any]) -> None:
        """Append an event; it is on the disk when this returns."""
        if self._file is None:
            raise RuntimeError("enter the journal before adding to it")
        line = json.dumps(event).encode() + b"\n"  # ASCII, as captions may hold what UTF-8 does not
        append(self._file, line, self.path)
        if "journal" not in event:
            self._take(event, self._end, again=False)
        self._end += len(line)

    def outcome(self, key: str, file: IO[bytes]) -> dict[str, Any] | None:
        """Return the line that settles a row, from the journal opened for reading; None where there is none yet."""
        place = self.places.get(key)
        if place is None:
            return None
        file.seek(place)
        found: dict[str, Any] = json.loads(file.readline())
        return found


def _between(there: object, now: object) -> str:
    """Return how two values differ; of long texts the part where they begin to."""
    said = [json.dumps(value, ensure_ascii=False) for value in (there, now)]
    same = next((n for n, (a, b) in enumerate(zip(*said, strict=False)) if a != b), min(map(len, said)))
    start = max(0, same - 20) if max(map(len, said)) > 60 else 0
    short = [f"{'…' * (start > 0)}{text[start : start + 60]}{'…' * (len(text) > start + 60)}" for text in said]
    return f"{short[0]} there, {short[1]} now"
