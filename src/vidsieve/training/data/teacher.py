"""A teacher behind an OpenAI-compatible server: what it is asked, over HTTP, and which of its answers are captions.

The server is not trusted: redirects are not followed, compressed answers not unpacked, and the size of an answer, the
time of a request and the wait before a repeat are limited.
"""

from __future__ import annotations

import asyncio
import base64
import io
import math
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

import msgspec
from PIL import Image

from vidsieve.errors import TrainingError
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
        low = word[0].lower()
        return "[key]" if any(low[start : start + part] in parts for start in range(len(low) - part + 1)) else word[0]

    return re.sub(rf"[^\s\"'`<>(){{}}\[\],;]{{{part},}}", shown, text)  # as fast for a long key as for a short one


def is_passing(status: int) -> bool:
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


class HaltedError(asyncio.CancelledError):
    """Raised in place of a request that `Client.halt` prevents."""


class Client:
    """Requests to a teacher, at its pace and repeated; enter it to send any.

    Parameters
    ----------
    server : Server
    key : str
    note : callable
        Called with a text for a person.

    Raises
    ------
    TrainingError
        On entering: a package is missing, or the environment's proxy cannot be used.
    """

    def __init__(self, server: Server, key: str, note: Callable[[str], object]) -> None:
        self.server, self._key, self._note = server, key, note
        self._halted, self._announced, self._waiting = False, 0.0, set[asyncio.Task[Any]]()

    async def __aenter__(self) -> Self:
        try:
            import aiolimiter
            import httpx2
        except ImportError:
            raise TrainingError("annotating needs httpx2 and aiolimiter: pip install 'vidsieve[teacher]'") from None
        self._pace = aiolimiter.AsyncLimiter(1, 60 / self.server.rate) if self.server.rate else None
        headers = {"Authorization": f"Bearer {self._key}", "Accept-Encoding": "identity"}
        try:
            self._http = httpx2.AsyncClient(headers=headers, timeout=None, limits=httpx2.Limits())
        except (ValueError, ImportError, httpx2.InvalidURL) as error:
            raise TrainingError(f"the proxy that the environment names cannot be used ({error}): see to it") from None
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._http.__aexit__(*error)

    async def ask(
        self, request: bytes, name: str, sent: Callable[[], object], failed: Callable[[], object]
    ) -> tuple[int, str]:
        """Return the last status, 0 for none, and what it came with: the body, or what went wrong.

        Parameters
        ----------
        request : bytes
        name : str
            The same for the same request: a server that knows it bills it once.
        sent, failed : callable
            Called before each request; after one that cost nothing, before its repeat.

        Raises
        ------
        HaltedError
        """
        from httpx2 import HTTPError

        for repeats in range(self.server.retries + 1):
            if self._pace is not None:
                with self._idle():
                    await self._pace.acquire()
            if self._halted:
                raise HaltedError
            sent()
            status, retry_after = 0, ""
            try:
                status, text, retry_after = await self._send(request, name)
                if not 200 <= status < 300:
                    text = f"Error code: {status} - {text}"
            except TimeoutError:
                text = f"no answer within {self.server.timeout:g} s"
            except HTTPError as error:
                text = str(error) or type(error).__name__
            if not is_passing(status):
                break
            if repeats < self.server.retries:
                if status:  # a server that says so has not worked for money
                    failed()
                await self._wait(seconds_until_repeat(retry_after, repeats), text)
        return status, text

    def halt(self) -> None:
        """Prevent requests; those under way go on, and waits for others end."""
        self._halted = True
        for task in self._waiting:
            task.cancel()

    def shown(self, text: str) -> str:
        """Return the beginning of a text in one line, without the key."""
        return _short(redact(text[:10_000], self._key))

    def redact(self, text: str) -> str:
        """Return a text of which most is known, without the key."""
        return redact(text, self._key, 8)

    @contextmanager
    def _idle(self) -> Iterator[None]:
        """Wait inside, without a request under way: `halt` ends the wait."""
        task = asyncio.current_task()
        assert task is not None
        self._waiting.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if self._halted:
                raise HaltedError from None
            raise
        finally:
            self._waiting.discard(task)

    async def _send(self, request: bytes, name: str) -> tuple[int, str, str]:
        """Send one request and return status, body and ``Retry-After`` of the answer."""
        url = f"{self.server.url}/chat/completions"
        headers = {"Content-Type": "application/json", "Idempotency-Key": name}
        async with (
            asyncio.timeout(self.server.timeout),
            self._http.stream("POST", url, content=request, headers=headers) as response,
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

    async def _wait(self, seconds: float, why: str) -> None:
        """Wait before a repeat, and say so, unless a wait as long was announced."""
        end = time.monotonic() + seconds
        if seconds >= 2 and end > self._announced + 1:
            self._announced = end
            text = (
                f"{self.server.url} did not answer ({self.shown(why)}): asking again in {seconds:.0f} s; Ctrl-C stops"
            )
            self._note(self.redact(text))
        with self._idle():
            await asyncio.sleep(seconds)
