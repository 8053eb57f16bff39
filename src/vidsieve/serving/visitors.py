"""Visitors of a page that gradio serves: whose uploads are whose, and which requests come through."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection
from http.cookies import CookieError, SimpleCookie
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs, urlsplit

import gradio
import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_UPLOADS, MOST_BYTES, MOST_BYTES_OF_ALL = 4, 200 * 2**20, 4 * 2**30
"""Uploads that a visitor has, bytes of one, and bytes of all visitors' uploads."""
MOST_JSON = 2**20
"""Bytes of any other request."""
IDLE = 300.0
"""Seconds without a request after which a visitor without a heartbeat is gone."""

_PAGE = re.compile(
    r"/(|config/?|theme\.css|favicon\.ico|manifest\.json|robots\.txt|(assets|static|svelte)/.*|pwa_icon(/\d+)?)"
    r"|/gradio_api/(info/?|startup-events|app_id/?|theme\.css|upload|queue/(join|data|status)|reset/?|cancel"
    r"|heartbeat/[^/]+|call/ask(/[^/]+)?|file=.*)"
)
"""What the page needs of gradio: its proxies, deep links, monitoring and editors are not among it."""


_SESSION = re.compile(r"[\w-]{0,64}", re.ASCII)


class _SentVideo(msgspec.Struct):
    path: str = ""
    video: _SentVideo | None = None  # in older releases, the file

    def __post_init__(self) -> None:
        self.path = self.video.path if self.video else self.path
        if not self.path:
            raise ValueError("Expected a file with its `path`")


class _EventRequest(msgspec.Struct, omit_defaults=True):
    fn_index: Literal[0] = 0
    event_id: str = ""
    session_hash: Annotated[str, msgspec.Meta(min_length=1)] | None = None

    def fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = msgspec.to_builtins(self)
        return fields | {"fn_index": 0}


class _AskRequest(_EventRequest, kw_only=True):
    data: tuple[_SentVideo | None, Any, Any, Any]

    def fields(self) -> dict[str, Any]:
        video, *others = self.data
        file = video and {"path": video.path, "meta": {"_type": "gradio.FileData"}}
        wrapped = "video" in gradio.Video.data_model.model_fields
        return super().fields() | {"data": [{"video": file} if file and wrapped else file, *others]}


_POSTS: dict[str, type[_EventRequest]] = {
    "/gradio_api/queue/join": _AskRequest,
    "/gradio_api/call/ask": _AskRequest,
    "/gradio_api/cancel": _EventRequest,
    "/gradio_api/reset": _EventRequest,
}
"""Requests with JSON; nothing else of them reaches gradio than their `fields`."""


class Visitors:
    """ASGI middleware that keeps other sites out, and the files of visitors apart.

    A visitor is a cookie. Uploads go into folders with random names, and only their visitor can ask about them or see
    them. They are deleted when the visitor's last heartbeat ends, or after `IDLE` seconds without a request. An upload
    of a client that keeps no cookies belongs to the first session of gradio that asks about it.

    Parameters
    ----------
    folder : Path
        Of uploads.
    hosts : collection of str
        Names in the Host header, in small letters; "*" stands for every IP address.
    gone : callable
        Called with the path of every upload that is deleted.
    """

    def __init__(self, folder: Path, hosts: Collection[str], gone: Callable[[Path], object]) -> None:
        self._folder, self._hosts, self._gone = folder, hosts, gone
        self._uploads: dict[str, tuple[str, int]] = {}  # path: visitor, bytes
        self._unclaimed = set[str]()
        self._sessions: dict[str, str] = {}  # session of gradio: visitor
        self._seen: dict[str, float] = {}
        self._requests, self._heartbeats = Counter[str](), Counter[str]()
        self._arriving = 0
        self._sweeper: asyncio.Task[None] | None = None

    def around(self, app: ASGIApp) -> Visitors:
        """Return this middleware with the application inside."""
        self._app = app
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers, path = MutableHeaders(scope=scope), scope["path"]
        if scope["type"] != "http" or not self._is_let_in(headers):
            text = "open the page by the address that vidsieve ui prints, or by the machine's IP address"
            await PlainTextResponse(text, 403)(scope, receive, send)
            return
        self._sweeper = self._sweeper or asyncio.create_task(self._sweep())
        cookie = f"vidsieve-{(scope.get('server') or ('', 0))[1]}"
        token, issued = _cookie(headers.get("cookie", ""), cookie), secrets.token_urlsafe(24)

        async def reply(message: Message) -> None:
            if not token and message["type"] == "http.response.start":
                more = MutableHeaders(scope=message)
                more.append("Set-Cookie", f"{cookie}={issued}; Path=/; HttpOnly; SameSite=Lax")
            await send(message)

        app: ASGIApp = self._app
        body, sent, session = _Limited(receive, MOST_JSON), None, ""
        if path.startswith("/gradio_api/heartbeat/"):
            session = path.rpartition("/")[2]
        elif path == "/gradio_api/queue/data":
            given = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True).get("session_hash", [""])
            session = given[0] if len(given) == 1 else " "  # readers differ in which of several they take
        elif path == "/gradio_api/upload":
            body = _Limited(receive, MOST_BYTES + MOST_JSON, self._has_room)
        elif scope["method"] == "POST" and path.rstrip("/") in _POSTS:
            try:
                sent = await body.json(headers, _POSTS[path.rstrip("/")])
                session = sent.session_hash or ""
            except (ValueError, RecursionError, _TooLargeError) as error:
                app = _refusal(400, f"no request of this page: {error}")
        if not _SESSION.fullmatch(session) or any(len(part) > 255 for part in path.split("/")):
            app, session = _refusal(404, "not found"), ""
        session = session and _digest(f"session {session}")
        visitor = _digest(token) if token else session
        if not _PAGE.fullmatch(path) or (session and self._sessions.setdefault(session, visitor) != visitor):
            app = _refusal(404, "not found")
        elif path.startswith("/gradio_api/file=") and self._uploads.get(path.partition("=")[2], (None,))[0] != visitor:
            app = _refusal(404, "not among your uploads")
        elif isinstance(sent, _AskRequest) and not self._may_ask(visitor, sent.data[0], bool(token)):
            app = _refusal(403, "the video is not among your uploads, or no more: upload it, and keep the cookie")
        heart = self._heartbeats if path.startswith("/gradio_api/heartbeat/") else Counter[str]()
        self._requests[visitor] += 1
        heart[visitor] += 1
        try:
            if path == "/gradio_api/upload" and app is self._app:
                app = await self._upload(scope, body, visitor or _digest(issued), bool(token))
            await app(scope, body.receive, reply)
        except RuntimeError as error:  # gradio notices after the head of a stream that its session is none
            if "response already started" not in str(error):
                raise
            await send({"type": "http.response.body", "body": b""})
        finally:
            for count in (self._requests, heart):
                count[visitor] -= 1
                if not count[visitor]:
                    del count[visitor]
            if visitor:
                self._seen[visitor] = time.monotonic()
            if heart is self._heartbeats and not heart[visitor]:
                self._leave({visitor})

    def _is_let_in(self, headers: MutableHeaders) -> bool:
        """Return True unless another site sent the request, or resolves to this machine (DNS rebinding)."""
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
                return False
            return name in self._hosts or ("*" in self._hosts and bool(ip_address(name)))
        except ValueError:
            return False

    def _may_ask(self, visitor: str, video: _SentVideo | None, known: bool) -> bool:
        """Return True if a question is about no file, or an upload of its visitor."""
        if video is None:
            return True
        whose, size = self._uploads.get(video.path, (None, 0))
        if video.path in self._unclaimed and visitor and not known:
            self._uploads[video.path] = (whose := visitor), size
        if whose == visitor:
            self._unclaimed.discard(video.path)
        return whose == visitor

    async def _upload(self, scope: Scope, limited: _Limited, visitor: str, claimed: bool) -> Response:
        """Return the answer to an upload of one file: a list with its path, as gradio's own."""
        place = self._folder / secrets.token_urlsafe(16)
        try:
            async with (
                asyncio.timeout(2 * IDLE),
                Request(scope, limited.receive).form(max_files=1, max_fields=9) as form,
            ):
                file = form.get("files")
                if not isinstance(file, UploadFile):
                    return PlainTextResponse("no file in the field `files`", 400)
                place.mkdir(mode=0o700)
                name = re.sub(r"[^\w.-]", "_", Path(file.filename or "").name.lstrip("."))[-60:] or "video"
                with (place / name).open("wb") as target:
                    await run_in_threadpool(shutil.copyfileobj, file.file, target, 2**20)
        except (HTTPException, _TooLargeError, ClientDisconnect, TimeoutError, OSError) as error:
            shutil.rmtree(place, ignore_errors=True)
            status = 413 if isinstance(error, _TooLargeError) else 400
            why = error.strerror if isinstance(error, OSError) else str(error)
            return PlainTextResponse(why or "no whole upload came", status)
        finally:
            self._arriving -= limited.taken
        path = str(place / name)
        self._uploads[path] = visitor, (place / name).stat().st_size
        if not claimed:
            self._unclaimed.add(path)
        self._seen[visitor] = time.monotonic()
        for old in [path for path, (whose, _) in self._uploads.items() if whose == visitor][:-MOST_UPLOADS]:
            self._delete(old)
        return JSONResponse([path])

    def _has_room(self, size: int) -> bool:
        self._arriving += size
        return self._arriving + sum(size for _, size in self._uploads.values()) <= MOST_BYTES_OF_ALL

    def _delete(self, path: str) -> None:
        del self._uploads[path]
        self._unclaimed.discard(path)
        shutil.rmtree(Path(path).parent, ignore_errors=True)
        self._gone(Path(path))

    def _leave(self, visitors: Collection[str]) -> None:
        """Delete everything of visitors, in a time that does not depend on their number squared."""
        for path in [path for path, (whose, _) in self._uploads.items() if whose in visitors]:
            self._delete(path)
        for session in [session for session, whose in self._sessions.items() if whose in visitors]:
            del self._sessions[session]
        for visitor in visitors:
            self._seen.pop(visitor, None)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(IDLE / 10)
            before = time.monotonic() - IDLE
            self._leave({who for who, seen in self._seen.items() if seen < before and not self._requests[who]})


class _TooLargeError(Exception):
    pass


class _Limited:
    """A request's body of limited size; `taken` bytes came so far."""

    def __init__(self, receive: Receive, most: int, has_room: Callable[[int], bool] | None = None) -> None:
        self._receive, self._most, self._has_room, self.taken = receive, most, has_room, 0
        self._again: list[Message] = []

    async def receive(self) -> Message:
        """Return the next message.

        Raises
        ------
        _TooLargeError
        """
        if self._again:
            return self._again.pop()
        message = await self._receive()
        size = len(message.get("body", b""))
        self.taken += size
        has_room = self._has_room is None or self._has_room(size)
        if self.taken > self._most or not has_room:
            raise _TooLargeError("the request is too large, or the server has no room for more")
        return message

    async def json(self, headers: MutableHeaders, kind: type[_EventRequest]) -> _EventRequest:
        """Return the body, and write it anew for the next reader, who then cannot understand it differently.

        Raises
        ------
        ValueError, RecursionError, _TooLargeError
        """
        body, more = bytearray(), True
        while more:
            message = await self.receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        value = msgspec.convert(json.loads(body), kind)
        again = json.dumps(value.fields()).encode()
        headers["content-length"] = str(len(again))
        self._again = [{"type": "http.request", "body": again, "more_body": False}]
        return value


def _refusal(status: int, text: str) -> Response:
    return JSONResponse({"detail": text}, status)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:32]


def _cookie(header: str, name: str) -> str:
    """Return the value of a cookie if it is one that `Visitors` issues."""
    try:
        morsel = SimpleCookie(header).get(name)
    except CookieError:
        return ""
    return morsel.value if morsel is not None and re.fullmatch(r"[\w-]{32}", morsel.value, re.ASCII) else ""
