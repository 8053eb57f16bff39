"""A teacher behind an OpenAI-compatible server: what it is asked, what it says, and what that costs.

An answer with status 200 was paid for, whatever it holds; anything else was not. No text from here holds the key.
"""

from __future__ import annotations

import asyncio
import base64
import io
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from vidsieve.errors import TrainingError
from vidsieve.training.data.teaching.judging import TeacherAnswer, error_in, judge, parse, shorten
from vidsieve.video.decoding import Pixels

PROMPT = (
    "The images are frames of one video, in the order of time. Describe the video in one paragraph, for someone who "
    "cannot see it: who and what is there and how it looks, where it is, what happens and in which order, what "
    "changes, what can be read, and how the camera moves. Say only what can be seen, guess nothing, do not speak of "
    "frames or images, and begin with the description itself.\n"
    "This is an older caption of the video. It may be wrong, and it leaves much out; where it does not agree with what "
    "you see, trust what you see: {caption}"
)
"""What the teacher is asked; ``{caption}`` becomes the row's caption."""

PATCH = 28
"""Side of the pixels that Qwen2.5-VL makes one token of; Qwen3-VL takes 32, so that its tokens are fewer."""
LONGEST_WAIT = 3600.0
"""Seconds that a server is left alone at most, whatever it asks for."""
LEAST_KEY = 8
"""Shorter keys, as ``none`` or ``EMPTY`` of local servers, are no secret, and may be words of a caption."""


@dataclass(frozen=True)
class Teacher:
    """What captions depend on: model, what it is asked, what it is shown, and what is taken for a caption.

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
        Longest answer; one that is cut off there is no caption.
    temperature : float
    min_words : int
        Answers of fewer words are no caption.
    """

    model: str
    prompt: str = PROMPT
    frames: int = 16
    size: int = 448
    max_tokens: int = 1024
    temperature: float = 0.2
    min_words: int = 8

    def instruction(self, caption: str) -> str:
        """Return what is asked about a row with this caption."""
        # No server takes half of a surrogate pair, which JSON can hold.
        return self.prompt.replace("{caption}", caption).encode("utf-8", "replace").decode()

    def most_tokens(self, images: int, instruction: str) -> tuple[int, int]:
        """Return how many tokens a request has at most, in and out; text is taken to have one for three bytes."""
        return images * math.ceil(self.size / PATCH) ** 2 + math.ceil(len(instruction.encode()) / 3), self.max_tokens


@dataclass(frozen=True)
class Prices:
    """US$ for a million tokens."""

    tokens_in: float
    tokens_out: float

    def dollars(self, tokens_in: int, tokens_out: int) -> float:
        """Return what so many tokens cost."""
        return (self.tokens_in * tokens_in + self.tokens_out * tokens_out) / 1e6


@dataclass(frozen=True)
class RequestFailure:
    """A request that brought no answer, and so cost nothing.

    Parameters
    ----------
    status : int
        0 where there was no reply at all.
    said : str
        What the server said, or what went wrong on the way.
    wait : float
        For how many seconds the server wants to be left alone.
    code : str
        The server's own name of the error.
    """

    status: int
    said: str
    wait: float = 0.0
    code: str = ""

    @property
    def again(self) -> bool:
        """Whether the same request may be answered later."""
        return self.status in (0, 408, 409, 429) or self.status >= 500

    def __str__(self) -> str:
        return ": ".join(word for word in (str(self.status or ""), self.said) if word)


def fatal(failure: RequestFailure, url: str, model: str, first: bool) -> str:
    """Return what to do about an error that every other request would meet, too; empty where it is none of these.

    `first` says that the server has answered nothing yet.
    """
    status = failure.status
    if status == 401:
        return f"{url} does not take the key ({failure}): set OPENAI_API_KEY to one that it knows"
    if status == 402 or (status == 429 and failure.code == "insufficient_quota"):
        return f"{url} wants to be paid first ({failure}): top up the account"
    if status == 403 and first:
        return f"{url} does not let this key use {model} ({failure}): ask for access, or name another model"
    if status == 404 and first:
        return (
            f"{url} has no {model}, or is not the address of an OpenAI-compatible server ({failure}): most addresses "
            "end in /v1, and `GET /models` there names the models"
        )
    return ""


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


def check_url(url: str) -> str:
    """Return an address without a slash at its end.

    Raises
    ------
    TrainingError
        If it is none, or holds a secret: addresses are printed.
    """
    if set("@?#") & set(url):
        raise TrainingError(
            "the server's address must hold no password and no query: the key is read from OPENAI_API_KEY"
        )
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        good = False
    if not good:
        raise TrainingError(f"the server's address must be as http://localhost:8000/v1, got {url!r}")
    return url.rstrip("/")


def redact(text: str, key: str, error: bool = False) -> str:
    """Return a text without the key; of an error, without anything that begins like it, as ``sk-ab***yz``, too."""
    if len(key) < LEAST_KEY:
        return text
    clean = text.replace(key, "[key]")
    return re.sub(re.escape(key[:5]) + r"[\w*.+/=…-]*", "[key]", clean) if error else clean


def data_urls(pixels: Pixels, size: int) -> list[str]:
    """Return frames (T, H, W, 3) uint8 as JPEG in data URLs, none longer than `size`."""
    made = []
    for frame in pixels:
        image = Image.fromarray(frame)
        image.thumbnail((size, size))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=85)
        made.append(f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}")
    return made


class Client:
    """Sends single requests, as an async context manager; nothing is repeated in here.

    Parameters
    ----------
    url, key : str
    timeout : float
        Seconds after which a request is given up.

    Raises
    ------
    TrainingError
        If the `openai` package is not installed.
    """

    def __init__(self, url: str, key: str, timeout: float) -> None:
        try:
            import openai
        except ImportError:
            raise TrainingError("annotating needs the openai package: pip install 'vidsieve[teacher]'") from None
        self._openai = openai
        self._key, self._timeout = key, timeout
        self._client = openai.AsyncOpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=0)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.close()

    async def ask(
        self, teacher: Teacher, images: Sequence[str], instruction: str, row: str
    ) -> TeacherAnswer | RequestFailure:
        """Return what a server says of images (data URLs); `row` is the idempotency key, the same for the same row."""
        content: list[Any] = [{"type": "image_url", "image_url": {"url": image}} for image in images]
        content.append({"type": "text", "text": instruction})
        try:
            async with asyncio.timeout(self._timeout):  # the client's own is for each piece that comes
                raw = await self._client.chat.completions.with_raw_response.create(
                    model=teacher.model,
                    messages=[{"role": "user", "content": content}],
                    max_tokens=teacher.max_tokens,
                    temperature=teacher.temperature,
                    extra_headers={"Idempotency-Key": row},
                )
        except self._openai.APIStatusError as error:
            body = redact(error.response.text, self._key)
            said, code = error_in(parse(body) or body)
            wait = retry_after(error.response.headers)
            return RequestFailure(error.status_code, redact(said, self._key, error=True), wait, code)
        except (self._openai.APITimeoutError, TimeoutError):
            return RequestFailure(0, f"no answer in {self._timeout:g} s")
        except self._openai.APIConnectionError as error:
            cause = error.__cause__ or error
            return RequestFailure(0, redact(shorten(str(cause)) or type(cause).__name__, self._key, error=True))
        answer = judge(redact(raw.text, self._key), instruction, min_words=teacher.min_words)
        # Once more: JSON can spell a key in other letters.
        clean = redact(answer.caption, self._key), redact(answer.detail, self._key, error=True)
        return replace(answer, caption=clean[0], detail=clean[1])


def retry_after(headers: Mapping[str, str]) -> float:
    """Return for how many seconds a server wants to be left alone: a number or a date; at most an hour."""
    told = headers.get("retry-after", "")
    try:
        wait = float(told)
    except ValueError:
        try:
            wait = parsedate_to_datetime(told).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(wait, 0.0), LONGEST_WAIT) if wait == wait else 0.0
