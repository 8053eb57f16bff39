"""Captions rewritten by a teacher, a model behind an OpenAI-compatible server.

Requests and answers are in a journal beside the output, on the disk before anything depends on them: the same call
resumes a run that was stopped or killed. The output is written when every row is accounted for: rewritten, set aside
with a reason, or unchanged as it has no caption. An answer with status 200 is paid for, whatever it holds; requests
that a kill cut off count as if they were, at most. No file, log or error holds the key.

The server is not trusted: redirects are not followed, compressed answers not unpacked, and the size of an answer, the
time of a request and the wait before a repeat are limited.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import math
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlsplit

import msgspec
from PIL import Image

from vidsieve.errors import TrainingError, VideoError
from vidsieve.io.files import relative, writing
from vidsieve.io.journal import Journal
from vidsieve.training.data.layouts import confined_records, files_of, moved, path_from
from vidsieve.video.reading import read_frames, read_image, read_video

PROMPT = (
    "The images are frames of one video, in the order of time. Describe the video in one paragraph, for someone who "
    "cannot see it: who and what is there and how it looks, where it is, what happens and in which order, what "
    "changes, what can be read, and how the camera moves. Say only what can be seen, guess nothing, do not speak of "
    "frames or images, and begin with the description itself.\n"
    "This is an older caption of the video. It may be wrong, and it leaves much out; where it does not agree with what "
    "you see, trust what you see: {caption}"
)
"""The instruction to the teacher; ``{caption}`` becomes the row's caption."""
PATCH = 28
"""Side in pixels of one token of Qwen2.5-VL; Qwen3-VL takes 32, so that its tokens are fewer."""
MOST_BYTES = 2 * 2**20
"""Size of the longest answer that is read."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 120.0
"""Seconds before the first repeat of a request, and before any, whatever ``Retry-After`` asks for."""
_REFUSAL = re.compile(
    r"\W*(?:i(?:['’]m| am)(?: so| very| really)? sorry|sorry,|i apologi[sz]e|as an ai\b|unfortunately, i\b"
    r"|i (?:can['’]?t|cannot|can not|am unable|am not able)\b|i['’]m (?:unable|not able)\b"
    r"|抱歉|对不起|很抱歉|我无法|我不能)",
    re.IGNORECASE,
)
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
"""A word; of Chinese and Japanese, a character."""


@dataclass(frozen=True)
class Teacher:
    """Settings that captions depend on; a run is resumed only with the same ones.

    Parameters
    ----------
    model : str
    prompt : str
        ``{caption}`` in it becomes the row's caption.
    frames : int
        Frames shown, uniformly over the video.
    size : int
        Longest side of a frame in pixels; smaller ones are not enlarged.
    max_tokens : int
        Longest answer; one that is cut off there is set aside.
    temperature : float
    min_words : int
        Shorter answers are set aside.
    """

    model: str
    prompt: str = PROMPT
    frames: int = 16
    size: int = 448
    max_tokens: int = 1024
    temperature: float = 0.2
    min_words: int = 8

    def instruction(self, row: dict[str, Any]) -> str:
        """Return the text of the request about a row; no server takes half of a surrogate pair, which JSON can hold."""
        return self.prompt.replace("{caption}", row["caption"]).encode("utf-8", "replace").decode()

    def most(self, row: dict[str, Any]) -> tuple[int, int, int]:
        """Return the images of a request and its tokens in and out, at most; three bytes of text are a token."""
        images = self.frames if "video" in row else 1
        if "frames" in row:
            images = min(self.frames, sum(times for _, times in row["frames"]))
        text = math.ceil(len(self.instruction(row).encode()) / 3)
        return images, images * math.ceil(self.size / PATCH) ** 2 + text, self.max_tokens

    def images(self, row: dict[str, Any]) -> list[str]:
        """Return the frames of a row as JPEG in data URLs.

        Raises
        ------
        VideoError
            If they cannot be read.
        """
        if "frames" in row:
            pixels = read_frames(row["frames"], frames=self.frames).pixels
        elif "video" in row:
            pixels = read_video(row["video"], frames=self.frames).pixels
        else:
            pixels = read_image(row["image"])[None]
        urls = []
        for frame in pixels:
            image, file = Image.fromarray(frame), io.BytesIO()
            image.thumbnail((self.size, self.size))
            image.save(file, "JPEG", quality=85)
            urls.append(f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}")
        return urls


@dataclass(frozen=True)
class Server:
    """Address of the teacher, and limits of a run.

    Parameters
    ----------
    url : str
    concurrency : int
        Rows in work at a time.
    rate : int, optional
        Requests in a minute, evenly spaced.
    retries : int
        Repeats of a request after no connection, a timeout, 408, 409, 429 or 5xx.
    timeout : float
        Seconds after which a request is given up.
    prices : (float, float), optional
        US$ for a million tokens in, and out.
    budget : float, optional
        US$ that all runs together may cost at most. Needs prices.
    """

    url: str
    concurrency: int = 8
    rate: int | None = None
    retries: int = 5
    timeout: float = 120.0
    prices: tuple[float, float] | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        form = r"https?://[^/@?#\s]*[^/@?#\s:][^@?#\s]*"
        if not re.fullmatch(form, self.url) or not _is_address(self.url):  # not printed: it may hold a secret
            raise TrainingError(
                "the server's address must be like http://localhost:8000/v1, without a password and a query: the key "
                "is read from OPENAI_API_KEY"
            )
        if self.budget is not None and self.prices is None:
            raise TrainingError("a budget needs the prices of a million tokens, in and out")

    def dollars(self, tokens_in: int, tokens_out: int) -> float | None:
        """Return the price of tokens in US$; None without prices."""
        return None if self.prices is None else (self.prices[0] * tokens_in + self.prices[1] * tokens_out) / 1e6


def _is_address(url: str) -> bool:
    try:
        return urlsplit(url).port != 0
    except ValueError:  # a port beyond 65535, or half of an IPv6 address
        return False


def api_key() -> str:
    """Return the key from the environment; ``none`` where there is none, as local servers take.

    Raises
    ------
    TrainingError
        If it could not be sent.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"
    if not (key.isascii() and key.isprintable() and " " not in key):  # else the error of the HTTP library would show it
        raise TrainingError("OPENAI_API_KEY holds blanks or characters that no key has: set it anew")
    return key


class _Message(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None


class _Reply(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


_Count = Annotated[int, msgspec.Meta(ge=0, le=10**9)] | None


class _Usage(msgspec.Struct):
    prompt_tokens: _Count = None
    completion_tokens: _Count = None


class _Completion(msgspec.Struct):
    choices: Annotated[list[_Reply], msgspec.Meta(min_length=1)]
    usage: _Usage | None = None


@dataclass(frozen=True)
class TeacherAnswer:
    """A caption, or the reason why an answer is none; tokens in and out where the server counts them."""

    caption: str = ""
    reason: str = ""
    detail: str = ""
    usage: tuple[int, int] | None = None


def judge(body: str, min_words: int = 8) -> TeacherAnswer:
    """Return the contents of an answer with status 200: nothing in it is trusted.

    SCORE's reward is the likelihood of the caption: a refusal, half a caption or a text that goes round in circles
    would teach a policy to keep tokens that have nothing to do with it.
    """
    try:
        completion = msgspec.json.decode(body, type=_Completion)
    except (msgspec.MsgspecError, RecursionError, UnicodeEncodeError) as error:
        return TeacherAnswer(reason="malformed answer", detail=f"{error}: {_short(body)}")
    counted, usage = completion.usage or _Usage(), None
    if counted.prompt_tokens is not None and counted.completion_tokens is not None:
        usage = counted.prompt_tokens, counted.completion_tokens
    reply = completion.choices[0]
    # Models that think aloud put their thoughts first, and some servers leave them there.
    caption = (reply.message.content or "").rpartition("</think>")[2].strip()
    words = _WORD.findall(caption.casefold())
    runs = list(zip(*(words[start:] for start in range(5)), strict=False))
    reason = ""
    if reply.message.refusal or reply.finish_reason == "content_filter" or _REFUSAL.match(caption):
        reason = "refusal"
    elif reply.finish_reason == "length":
        reason = "cut off"
    elif len(words) < min_words:
        reason = "too short"
    elif runs and len(set(runs)) < 2 / 3 * len(runs):  # a third of the runs of five words came before
        reason = "repetition"
    if reason:
        return TeacherAnswer(reason=reason, detail=_short(reply.message.refusal or caption), usage=usage)
    return TeacherAnswer(caption, usage=usage)


def redact(text: str, key: str, part: int = 4) -> str:
    """Return a text without the words that hold `part` successive characters of the key, such as ``sk-ab***yz``."""
    if len(key) < 8:  # ``none`` or ``EMPTY`` of local servers are no secret, and may be words of a caption
        return text
    key = key.lower()
    parts = {key[start : start + part] for start in range(len(key) - part + 1)}

    def shown(word: re.Match[str]) -> str:
        return "[key]" if any(part in word[0].lower() for part in parts) else word[0]

    return re.sub(r"[^\s\"'`<>(){}\[\],;]+", shown, text)


def _is_passing(status: int) -> bool:
    """Return True if the same request may have an answer later; 0 stands for none."""
    return status in (0, 408, 409, 429) or status >= 500


def seconds_until_repeat(retry_after: str, repeats: int) -> float:
    """Return the wait before a repeat: what the server asks for, up to `LONGEST_WAIT`, else longer each time.

    Parameters
    ----------
    retry_after : str
        Seconds or a date; anything else counts as absent.
    repeats : int
        Earlier repeats of the request.
    """
    try:
        asked = float(retry_after)
    except ValueError:
        try:
            asked = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, TypeError, IndexError, OverflowError, OSError):
            asked = 0.0
    return min(asked, LONGEST_WAIT) if asked > 0 else min(8.0, FIRST_WAIT * 2**repeats) * random.uniform(0.75, 1)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else f"{line[:200]}…"


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


class _HaltedError(asyncio.CancelledError):
    """Raised in place of a request where the run stops."""


class Annotation:
    """A file of rows whose captions a teacher rewrites.

    Parameters
    ----------
    source, root : Path
        As `confined_records` takes them.
    target : Path
        JSON lines with paths from its folder, which also holds ``<target>.journal.jsonl`` and ``<target>.aside.jsonl``.
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
        self.root, self.again, self.key = root, again, api_key()
        header = {"journal": 1, "settings": vars(teacher) | {"input": relative(source, target)}}
        damaged = "its row is asked about again"
        self.journal = Journal(self.sidecar("journal"), header, error=TrainingError, damaged=damaged)

    def sidecar(self, kind: str) -> Path:
        """Return the path of the "journal" or the "aside" of the output."""
        return self.target.with_name(f"{self.target.name}.{kind}.jsonl")

    def items(self, left_out: Counter[str] | None = None) -> Iterator[CaptionItem]:
        """Yield every row, one record in memory at a time; parts that are no rows are counted in `left_out`."""
        settings = json.dumps(vars(self.teacher), sort_keys=True)
        for record in confined_records(self.source, self.root):
            if left_out is not None:
                left_out.update(record.left_out)
            if record.fault:
                yield CaptionItem(record.number, {}, {}, reason="malformed record", detail=record.fault)
            for shown in record.rows:
                if "bytes" in shown:  # of Parquet: JSON lines cannot hold it
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
        note: Callable[[str], None] | None = None,
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
        self._progress, self._note = progress, note
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
                    aside.write(_line(why | {"row": item.row}))
                elif "done" in entry:
                    new = {"caption": entry["caption"], "original_caption": item.row["caption"]}
                    file.write(_line(item.row | new | {"teacher": self.teacher.model}))
                else:
                    file.write(_line(item.row))

    # -- requests -----------------------------------------------------------------------------------------------------

    async def _ask_all(self, limit: int | None) -> None:
        try:
            import aiolimiter
            import httpx2
        except ImportError:
            raise TrainingError("annotating needs httpx2 and aiolimiter: pip install 'vidsieve[teacher]'") from None
        server, tasks, seen = self.server, set[asyncio.Task[None]](), set[str]()
        self.stopped, self.error, self.replied, self.count, self.silent = "", "", False, 0, 0
        self._reserved: dict[str, tuple[int, int]] = {}
        self._pace = aiolimiter.AsyncLimiter(1, 60 / server.rate) if server.rate else None
        self._waiting, self._announced = set[asyncio.Task[Any]](), 0.0
        headers = {"Authorization": f"Bearer {self.key}", "Accept-Encoding": "identity"}
        try:
            http = httpx2.AsyncClient(headers=headers, timeout=None, limits=httpx2.Limits())
        except (ValueError, ImportError, httpx2.InvalidURL) as error:
            raise TrainingError(f"the proxy that the environment names cannot be used ({error}): see to it") from None
        async with http as client:
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
                tasks.add(asyncio.create_task(self._settle(client, item)))
            await asyncio.gather(*tasks)
        if self.error:
            raise TrainingError(self.error)

    def _affords(self, item: CaptionItem) -> bool:
        """Return True if the budget holds for a row and the requests under way, however long their answers are."""
        most = zip(self.teacher.most(item.row)[1:], *self._reserved.values(), strict=True)
        tokens_in, tokens_out = (sum(tokens) for tokens in most)
        dollars = self.server.dollars(self.tokens_in + tokens_in, self.tokens_out + tokens_out) or 0.0
        return self.server.budget is None or dollars <= self.server.budget

    @contextmanager
    def _idle(self) -> Iterator[None]:
        """Wait inside, without a request under way: the end of the run ends the wait."""
        task = asyncio.current_task()
        assert task is not None
        self._waiting.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if self.stopped in ("interrupted", "error"):
                raise _HaltedError from None
            raise
        finally:
            self._waiting.discard(task)

    async def _start(self, item: CaptionItem) -> None:
        """Wait for the turn of a request, the first about its row or a repeat, and record it."""
        if self._pace is not None:
            with self._idle():
                await self._pace.acquire()
        if self.stopped in ("interrupted", "error"):
            raise _HaltedError
        self._record({"sent": item.key, "most": self._reserved[item.key]})

    async def _send(self, client: Any, item: CaptionItem, request: bytes) -> tuple[int, str, str]:
        """Send one request and return status, body and ``Retry-After`` of the answer."""
        url = f"{self.server.url}/chat/completions"
        headers = {"Content-Type": "application/json", "Idempotency-Key": item.key}  # one who knows it bills it once
        async with (
            asyncio.timeout(self.server.timeout),
            client.stream("POST", url, content=request, headers=headers) as response,
        ):
            known, body = response.headers, bytearray()
            if response.has_redirect_location:
                body += f"a redirect to {known['Location'][:200]}, which is not followed".encode()
            elif known.get("Content-Encoding", "identity") != "identity":
                body += b"a compressed answer, though none was asked for"
            else:
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > MOST_BYTES:
                        body[:] = f"an answer of more than {MOST_BYTES:,} bytes".encode()
                        break
            return response.status_code, body.decode("utf-8", "replace"), known.get("Retry-After", "")

    async def _answer(self, client: Any, item: CaptionItem, request: bytes) -> tuple[int, str]:
        """Return the last status, 0 for none, and what it came with: the body, or what went wrong."""
        from httpx2 import HTTPError

        for repeats in range(self.server.retries + 1):
            await self._start(item)
            status, retry_after = 0, ""
            try:
                status, text, retry_after = await self._send(client, item, request)
                if not 200 <= status < 300:
                    text = f"Error code: {status} - {text}"
            except TimeoutError:
                text = f"no answer within {self.server.timeout:g} s"
            except HTTPError as error:
                text = f"{error or type(error).__name__}"
            if not _is_passing(status):
                break
            if repeats < self.server.retries:
                if status:  # a server that says so has not worked for money
                    self._record({"failed": item.key})
                await self._wait(seconds_until_repeat(retry_after, repeats), text)
        return status, text

    async def _wait(self, seconds: float, why: str) -> None:
        """Wait before a repeat, and say so, unless a wait as long was announced."""
        end = time.monotonic() + seconds
        if seconds >= 2 and end > self._announced + 1 and self._note is not None:
            self._announced = end
            why = self._why("", why)["detail"]
            text = f"{self.server.url} did not answer ({why}): asking again in {seconds:.0f} s; Ctrl-C stops"
            self._note(redact(text, self.key, 8))
        with self._idle():
            await asyncio.sleep(seconds)

    async def _settle(self, client: Any, item: CaptionItem) -> None:
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
            status, text = await self._answer(client, item, json.dumps(request).encode())
            self.replied = self.replied or status > 0
            if 200 <= status < 300:
                answer = judge(text, teacher.min_words)
                self.silent = 0
                paid = {"usage": answer.usage or teacher.most(item.row)[1:], "metered": answer.usage is not None}
                if answer.reason:
                    self._settled({"aside": item.key, **self._why(answer.reason, answer.detail), **paid})
                else:
                    self._settled({"done": item.key, "caption": redact(answer.caption, self.key, 8), **paid})
                return
            why = self._why("no answer" if _is_passing(status) else "refused request", text)
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
        except _HaltedError:
            if item.key in self.open:  # its request failed before
                self._record({"failed": item.key})
        finally:
            self._reserved.pop(item.key)

    def _why(self, reason: str, detail: str) -> dict[str, Any]:
        return {"reason": reason, "detail": _short(redact(detail[:10_000], self.key))}

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
        self.error = self.error or redact(error, self.key, 8)
        self._stop("error")

    def _stop(self, why: str) -> None:
        self.stopped = why
        for task in self._waiting:
            task.cancel()

    def _interrupt(self) -> None:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)  # the next one interrupts as ever
        self._stop("interrupted")
        if self._note is not None:
            self._note(f"stopping after {len(self.open)} requests that are under way; Ctrl-C again drops them")


def _line(value: dict[str, Any]) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)  # columns of Parquet may be dates
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # JSON can hold half of a pair, UTF-8 cannot
        text = json.dumps(value, default=str)
    return text + "\n"
