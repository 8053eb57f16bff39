"""Captions rewritten by a teacher, a model behind an OpenAI-compatible server.

Requests and answers are in a journal beside the output, on the disk before anything depends on them: the same call
resumes a run that was stopped or killed. The output is written when every row is accounted for: rewritten, set aside
with a reason, or unchanged as it has no caption. An answer with status 200 is paid for, whatever it holds; requests
that a kill cut off count as if they were, at most. No file, log or error holds the key.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vidsieve.errors import TrainingError, VideoError
from vidsieve.io.files import beside, relative, writing
from vidsieve.io.journal import Journal
from vidsieve.io.texts import json_line
from vidsieve.training.data.layouts import IMAGE_BYTES, confined_records, files_of, moved, path_from
from vidsieve.training.data.teacher import Client, HaltedError, Server, Teacher, api_key, is_passing, judge


class CaptionItem(NamedTuple):
    """A row of the input.

    `row` has paths from the output, `shown` absolute ones. `key` is the same for the same row and settings, and empty
    where nothing is to be asked: `reason` says why not, unless the row has no caption.
    """

    record: int
    row: dict[str, Any]
    shown: dict[str, Any]
    key: str = ""
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class AnnotationReport:
    """Outcome of all runs: ``rows == rewritten + unchanged + left + sum(aside.values())``.

    `aside` counts rows by reason, `left_out` parts of records that are no rows. The output is written where no rows
    are `left`; `stopped` is "interrupted", "budget" or "limit" where some are. `requests` includes repeats. Tokens are
    those paid for: of `unmetered` answers, without numbers or cut off by a kill, at most.
    """

    rows: int
    rewritten: int
    unchanged: int
    aside: dict[str, int]
    left: int
    requests: int
    tokens_in: int
    tokens_out: int
    unmetered: int
    dollars: float | None
    stopped: str
    left_out: dict[str, int]


class Annotation:
    """A file of rows whose captions a teacher rewrites.

    Parameters
    ----------
    source, root : Path
        As `confined_records` takes them.
    target : Path
        JSON lines with paths from its folder, which also holds ``out.journal.jsonl`` and ``out.aside.jsonl``
        of ``out.jsonl``.
    teacher : Teacher
    server : Server
    again : bool
        Ask once more about rows that were set aside without an answer, such as broken videos and refused requests.
    """

    def __init__(
        self,
        source: Path,
        target: Path,
        teacher: Teacher,
        server: Server,
        root: Path | None = None,
        again: bool = False,
    ) -> None:
        self.source, self.target, self.teacher, self.server = source, target, teacher, server
        self.root, self.again, self._key = root, again, api_key()
        header = {"journal": 1, "settings": vars(teacher) | {"input": relative(source, target)}}
        damaged = "its row is asked about again"
        self.journal = Journal(self.sidecar("journal"), header, error=TrainingError, damaged=damaged)

    def sidecar(self, kind: str) -> Path:
        """Return the path of the "journal" or the "aside" of the output."""
        return beside(self.target, f"{kind}.jsonl")

    def items(self, left_out: Counter[str] | None = None) -> Iterator[CaptionItem]:
        """Yield every row, one record in memory at a time; parts that are no rows are counted in `left_out`."""
        settings = json.dumps(vars(self.teacher), sort_keys=True)
        for record in confined_records(self.source, self.root):
            if left_out is not None:
                left_out.update(record.left_out)
            if record.fault:
                yield CaptionItem(record.number, {}, {}, reason="malformed record", detail=record.fault)
            for shown in record.rows:
                if IMAGE_BYTES in shown:  # of Parquet: JSON lines cannot hold it
                    yield CaptionItem(record.number, {}, {}, reason="image inside the file", detail=shown["image"])
                    continue
                row = shown | moved(shown, self.target)
                missing = next((name for name in files_of(shown) if not os.path.isfile(name)), "")
                key = reason = detail = ""
                if missing and "caption" in row:  # not in the journal: it may come later
                    reason, detail = "missing video", path_from(missing, self.target)
                elif "caption" in row:
                    text = settings + json.dumps(row, sort_keys=True, default=str)
                    key = hashlib.sha256(text.encode()).hexdigest()[:32]
                yield CaptionItem(record.number, row, shown, key, reason, detail)

    def plan(self) -> dict[str, int]:
        """Return the number of rows, and the requests that `run` would send at most; nothing is sent or written.

        Keys: rows, and those of them that are unchanged, settled, faulty, or need requests; images, tokens_in,
        tokens_out.

        Raises
        ------
        TrainingError
            If the input is unreadable, or the journal was begun with other settings.
        """
        self.journal.check()
        self._load()
        names = ("rows", "unchanged", "settled", "faulty", "requests", "images", "tokens_in", "tokens_out")
        count = Counter(dict.fromkeys(names, 0))
        for item in self.items():
            kind = "faulty" if item.reason else "settled" if item.key in self.places else "requests"
            count.update({"rows": 1, kind if item.key or item.reason else "unchanged": 1})
            if item.key and kind == "requests":
                count.update(dict(zip(names[5:], self.teacher.most(item.row), strict=True)))
        return dict(count)

    def run(
        self,
        limit: int | None = None,
        progress: Callable[[int], None] | None = None,
        note: Callable[[str], object] = lambda text: None,
    ) -> AnnotationReport:
        """Ask about rows that are not settled, and write the output once all are.

        Parameters
        ----------
        limit : int, optional
            Rows to ask about in this run at most.
        progress : callable, optional
            Called with the number of rows settled so far in this run.
        note : callable, optional
            Called with a text for a person.

        Raises
        ------
        TrainingError
            If the input is unreadable, the journal was begun with other settings, or the server answers nobody.
        OutputError
            If a file cannot be written.
        """
        self._progress, self._note, self._client = progress, note, Client(self.server, self._key, note)
        with self.journal:
            self._load()
            if self.open:  # cut off by a kill, and perhaps paid for
                self._record({"lost": [sum(tokens) for tokens in zip(*self.open.values(), strict=True)]})
            asyncio.run(self._ask_all(limit))
            report = self._report()
            if not report.left:
                self._write()
        return report

    # -- journal ------------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        self.places: dict[str, int] = {}
        self.open: dict[str, list[int]] = {}
        self.requests = self.answers = self.unmetered = self.tokens_in = self.tokens_out = 0
        self.journal.load(self._take)

    def _record(self, entry: dict[str, Any]) -> None:
        self._take(entry, self.journal.add(entry))

    def _take(self, entry: dict[str, Any], place: int) -> None:
        """Count an entry: a request ``sent``, ``failed`` or ``lost``, or a row ``done`` or set ``aside``."""
        if "sent" in entry:
            self.requests += 1
            self.open[entry["sent"]] = entry.get("most", [0, self.teacher.max_tokens])  # older journals have none
        elif "failed" in entry:
            self.open.pop(entry["failed"])
        elif "lost" in entry:
            self._pay(entry["lost"], len(self.open))
            self.open.clear()
        else:
            key = entry["done"] if "done" in entry else entry["aside"]
            self.open.pop(key, None)
            if entry["usage"] is not None:
                self.answers += 1
                self._pay(entry["usage"], not entry["metered"])
            if entry["usage"] is not None or not self.again:
                self.places[key] = place

    def _pay(self, usage: list[int], unmetered: int) -> None:
        self.tokens_in, self.tokens_out = self.tokens_in + usage[0], self.tokens_out + usage[1]
        self.unmetered += unmetered

    def _settled(self, entry: dict[str, Any]) -> None:
        self._record(entry)
        self.count += 1
        if self._progress is not None:
            self._progress(self.count)

    # -- output -------------------------------------------------------------------------------------------------------

    def _outcomes(self, left_out: Counter[str] | None = None) -> Iterator[tuple[CaptionItem, dict[str, Any]]]:
        """Yield every row with the entry that settled it: ``done``, ``aside``, ``unchanged`` or ``left``."""
        for item in self.items(left_out):
            if item.key in self.places:
                yield item, next(self.journal.read([self.places[item.key]]))
            elif item.reason:
                yield item, {"aside": "", "reason": item.reason, "detail": item.detail}
            else:
                yield item, {"left" if item.key else "unchanged": ""}

    def _report(self) -> AnnotationReport:
        count, aside, left_out = Counter[str](), Counter[str](), Counter[str]()
        for _, entry in self._outcomes(left_out):
            count[next(iter(entry))] += 1
            if "aside" in entry:
                aside[entry["reason"]] += 1
        dollars, stopped = self.server.dollars(self.tokens_in, self.tokens_out), self.stopped if count["left"] else ""
        paid = self.requests, self.tokens_in, self.tokens_out, self.unmetered, dollars
        rows = count.total(), count["done"], count["unchanged"], dict(aside), count["left"]
        return AnnotationReport(*rows, *paid, stopped, dict(left_out))

    def _write(self) -> None:
        """Write the rows, and those that were set aside, in the order of the input."""
        with (
            writing(self.sidecar("aside")) as aside_path,
            aside_path.open("w", encoding="utf-8") as aside,
            writing(self.target) as path,
            path.open("w", encoding="utf-8") as file,
        ):
            for item, entry in self._outcomes():
                if "left" in entry:
                    raise TrainingError(f"{self.source} or its videos changed meanwhile: run the same command again")
                if "aside" in entry:
                    why = {"record": item.record, "reason": entry["reason"], "detail": entry["detail"]}
                    aside.write(json_line(why | {"row": item.row}))
                elif "done" in entry:
                    new = {"caption": entry["caption"], "original_caption": item.row["caption"]}
                    file.write(json_line(item.row | new | {"teacher": self.teacher.model}))
                else:
                    file.write(json_line(item.row))

    # -- requests -----------------------------------------------------------------------------------------------------

    async def _ask_all(self, limit: int | None) -> None:
        server, tasks, seen = self.server, set[asyncio.Task[None]](), set[str]()
        self.stopped, self.error, self.replied, self.count, self.silent = "", "", False, 0, 0
        self._reserved: dict[str, tuple[int, int]] = {}
        async with self._client:
            # Not where another thread listens for Ctrl-C, nor where it is ignored, as in background jobs.
            if (
                threading.current_thread() is threading.main_thread()
                and signal.getsignal(signal.SIGINT) != signal.SIG_IGN
            ):
                asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._interrupt)
            for item in self.items():
                await asyncio.sleep(0)  # replies come meanwhile
                if not item.key or item.key in self.places or item.key in seen:
                    continue
                # The first request goes alone: a wrong key or address costs one.
                while tasks and (len(tasks) >= (server.concurrency if self.replied else 1) or not self._affords(item)):
                    done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    await asyncio.gather(*done)
                if not self.stopped and (len(seen) == limit or not self._affords(item)):
                    self.stopped = "limit" if len(seen) == limit else "budget"
                if self.stopped:
                    break
                seen.add(item.key)
                self._reserved[item.key] = self.teacher.most(item.row)[1:]
                tasks.add(asyncio.create_task(self._settle(item)))
            await asyncio.gather(*tasks)
        if self.error:
            raise TrainingError(self.error)

    def _affords(self, item: CaptionItem) -> bool:
        """Return True if the budget holds for a row and the requests under way, however long their answers are."""
        most = zip(self.teacher.most(item.row)[1:], *self._reserved.values(), strict=True)
        tokens_in, tokens_out = (sum(tokens) for tokens in most)
        dollars = self.server.dollars(self.tokens_in + tokens_in, self.tokens_out + tokens_out) or 0.0
        return self.server.budget is None or dollars <= self.server.budget

    async def _settle(self, item: CaptionItem) -> None:
        """Ask about a row, and record the outcome."""
        teacher, aside = self.teacher, {"aside": item.key, "usage": None, "metered": False}
        try:
            urls = await asyncio.to_thread(teacher.images, item.shown)
            content: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
            content.append({"type": "text", "text": teacher.instruction(item.row)})
            request = {
                "model": teacher.model,
                "messages": [{"role": "user", "content": content}],
                "max_tokens": teacher.max_tokens,
                "temperature": teacher.temperature,
            }
            most = self._reserved[item.key]
            status, text = await self._client.ask(
                json.dumps(request).encode(),
                item.key,
                sent=lambda: self._record({"sent": item.key, "most": most}),
                failed=lambda: self._record({"failed": item.key}),
            )
            self.replied = self.replied or status > 0
            if 200 <= status < 300:
                answer = judge(text, teacher.min_words)
                self.silent = 0
                paid = {"usage": answer.usage or teacher.most(item.row)[1:], "metered": answer.usage is not None}
                if answer.reason:
                    self._settled({"aside": item.key, **self._why(answer.reason, answer.detail), **paid})
                else:
                    self._settled({"done": item.key, "caption": self._client.redact(answer.caption), **paid})
                return
            why = self._why("no answer" if is_passing(status) else "refused request", text)
            hopeless = status in (401, 402) or '"insufficient_quota"' in text
            if hopeless or ((300 <= status < 400 or status in (403, 404)) and not self.answers):
                self._record({"failed": item.key})
                self._fail(
                    f"{self.server.url} refuses all requests to {self.teacher.model} ({why['detail']}): see to "
                    "OPENAI_API_KEY, the account, the model's name and the address, which mostly ends in /v1; then run "
                    "the same command again"
                )
            else:
                self._unanswered(aside | why)
        except VideoError as error:
            self._settled(aside | self._why("broken video", str(error)))
        except HaltedError:
            if item.key in self.open:  # its request failed before
                self._record({"failed": item.key})
        finally:
            self._reserved.pop(item.key)

    def _why(self, reason: str, detail: str) -> dict[str, Any]:
        return {"reason": reason, "detail": self._client.shown(detail)}

    def _unanswered(self, entry: dict[str, Any]) -> None:
        """Set a row aside without an answer, and stop the run where several in succession had none."""
        self._settled(entry)
        self.silent += 1
        if self.silent >= max(3, self.server.concurrency):
            self._fail(
                f"{self.server.url} has answered none of the last {self.silent} rows ({entry['detail']}): see to the "
                "server, or to the options that it refuses; then run the same command with --again"
            )

    def _fail(self, error: str) -> None:
        self.error = self.error or self._client.redact(error)
        self._stop("error")

    def _stop(self, why: str) -> None:
        self.stopped = why
        self._client.halt()

    def _interrupt(self) -> None:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)  # the next one interrupts as ever
        self._stop("interrupted")
        under_way = f"{len(self.open)} request{'s' * (len(self.open) != 1)}"
        self._note(f"stopping after {under_way} under way; Ctrl-C again drops them")
