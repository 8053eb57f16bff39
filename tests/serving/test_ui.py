"""The server of `vidsieve ui` under attack: other sites, other visitors, large, slow and malformed requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path

import pytest

gradio = pytest.importorskip("gradio")
httpx = pytest.importorskip("httpx2")

pytestmark = pytest.mark.slow
JSON = {"Content-Type": "application/json"}
NOT_YOURS = "the video is not among your uploads, or no more: upload it, and keep the cookie"
QUESTION = "what colour is the old mark ?"
RUN = """
import sys
from vidsieve.serving import visitors
visitors.IDLE, visitors.MOST_BYTES = 3.0, 2**20
from vidsieve.cli.main import main
sys.argv = ["vidsieve", "ui", "--methods", "uniform", *sys.argv[1:]]
main()
"""


class Page:
    """A server in a process of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uploads, self.log = folder / "temporary", folder / "log.txt"
        self.uploads.mkdir()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", RUN, "--port", str(self.port), *options],
                env=os.environ | {"TMPDIR": str(self.uploads)},
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.address = f"http://127.0.0.1:{self.port}"
        end = time.monotonic() + 120
        while True:
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            try:
                if httpx.get(f"{self.address}/config").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def files(self) -> list[Path]:
        return [path for path in self.uploads.glob("vidsieve-ui-*/*/*") if path.is_file()]


class Visitor:
    """A browser, as far as this page needs one."""

    def __init__(self, page: Page, cookies: bool = True) -> None:
        self.page, self.session = page, os.urandom(6).hex()
        self.client = httpx.Client(base_url=page.address, timeout=60)
        if cookies:
            assert self.client.get("/").status_code == 200

    def upload(self, data: bytes, name: str = "clip.mp4") -> str:
        reply = self.client.post("/gradio_api/upload", files={"files": (name, data)})
        assert reply.status_code == 200, reply.text
        return reply.json()[0]

    def ask(self, *data: object, session: str = "") -> tuple[bool, str]:
        """Return whether a question was answered, and the answer or the error."""
        session = session or os.urandom(6).hex()
        body = {"data": data, "fn_index": 0, "session_hash": session}
        reply = self.client.post("/gradio_api/queue/join", content=json.dumps(body), headers=JSON)
        if reply.status_code != 200:
            return False, reply.json()["detail"]
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    output = message["output"]
                    return message["success"], output["data"][0] if message["success"] else str(output.get("error"))
        raise AssertionError("the stream ended")


@pytest.fixture
def visitor():
    """Return a function that lets a visitor in."""
    visitors = []

    def enter(page: Page, cookies: bool = True) -> Visitor:
        visitors.append(Visitor(page, cookies))
        return visitors[-1]

    yield enter
    for one in visitors:
        one.client.close()


def file(path: str) -> dict:
    sent = {"path": path, "meta": {"_type": "gradio.FileData"}}
    return {"video": sent} if gradio.__version__ < "6" else sent


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from vidsieve.testbed.files import write_scene

    path = tmp_path_factory.mktemp("clip") / "0.mp4"
    write_scene(path, world="dense", seed=9, index=0)
    return path.read_bytes()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    page = Page(tmp_path_factory.mktemp("page"))
    yield page
    page.stop()
    assert "Traceback" not in page.log.read_text(), page.log.read_text()


def test_an_upload_is_asked_about_and_seen_by_its_visitor_only(page, visitor, clip):
    ann, bob, robot = visitor(page), visitor(page), visitor(page, cookies=False)
    path = ann.upload(clip, "../../hélo <b>.mp4")
    assert Path(path).name == "hélo__b_.mp4" and str(page.uploads) in path
    assert stat.S_IMODE(Path(path).parents[1].stat().st_mode) == 0o700
    assert bob.upload(clip) != path, "equal files have different paths"
    done, answer = ann.ask(file(path), QUESTION, "uniform", 0.5)
    assert done and answer
    assert ann.client.get(f"/gradio_api/file={path}").content == clip
    assert [str(copy) for copy in page.files() if copy.name == Path(path).name] == [path], "gradio copies nothing"
    for other in (bob, robot):
        for sent in (file(path), {"video": file(path)}):
            assert other.ask(sent, QUESTION, "uniform", 0.5) == (False, NOT_YOURS)
        assert other.client.get(f"/gradio_api/file={path}").status_code == 404
    done, _ = ann.ask(file(path), QUESTION, "uniform", 0.5, session="annes")
    assert done and bob.client.get("/gradio_api/queue/data?session_hash=annes").status_code == 404
    assert bob.client.get("/gradio_api/queue/data?session_hash=x&session_hash=annes").status_code == 404
    assert bob.client.get("/gradio_api/queue/data?session_hash=&session_hash=annes").status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "{clip}/../../../etc/passwd",
        "file://{clip}",
        "http://127.0.0.1:1/x",
        "\0",
        "a" * 9999,
    ],
)
def test_paths_that_are_no_uploads(page, visitor, clip, path):
    ann = visitor(page)
    path = path.format(clip=ann.upload(clip))
    assert not ann.ask(file(path), QUESTION, "uniform", 0.5)[0]
    assert ann.client.get(f"/gradio_api/file={path}".replace("\0", "%00")).status_code == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/proxy=http://169.254.169.254/"),
        ("GET", "/gradio_api/file/etc/passwd"),
        ("GET", "/gradio_api/deep_link?session_hash=a"),
        ("GET", "/monitoring"),
        ("GET", "/gradio_api/runs"),
        ("GET", "/docs"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/vibe-edit"),
        ("GET", "/gradio_api/stream/a/0/0/playlist.m3u8"),
        ("GET", "/gradio_api/dev/reload"),
    ],
)
def test_what_the_page_does_not_need_is_not_there(page, visitor, method, path):
    assert visitor(page).client.request(method, path, follow_redirects=False).status_code in (404, 405)


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "localhost.evil.example"},
        {"Host": "evil.example:{port}"},
        {"Host": "127.0.0.1@evil.example"},
        {"Host": "[::1"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "null"},
        {"Host": "192.168.0.1"},
    ],
)
def test_other_sites_are_kept_out(page, visitor, clip, headers):
    ann = visitor(page)
    headers = {name: value.format(port=page.port) for name, value in headers.items()}
    for call in (
        lambda: ann.client.get("/", headers=headers),
        lambda: ann.client.post("/gradio_api/upload", files={"files": ("a.mp4", clip)}, headers=headers),
        lambda: ann.client.post("/gradio_api/queue/join", content="{}", headers=JSON | headers),
        lambda: ann.client.get("/gradio_api/queue/data?session_hash=a", headers=headers),
    ):
        assert call().status_code in (400, 403)
    for good in (page.address, f"http://localhost:{page.port}"):
        headers = {"Host": good.removeprefix("http://"), "Origin": good}
        assert ann.client.get("/config", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({1: "a" * 4001}, "4,001 letters"),
        ({1: " "}, "the question is empty"),
        ({1: 5}, "the question is empty"),
        ({1: ["a"]}, "the question is empty"),
        ({2: "nothing"}, "unknown method 'nothing'"),
        ({2: ["uniform"]}, "unknown method"),
        ({2: None}, "unknown method"),
        *(({3: value}, "retention") for value in (float("nan"), float("inf"), "0.5", [1], None, 0, -1, 10**400)),
        ({0: None}, "Choose a video"),
        ({0: [1]}, "Expected `object | null`, got `array`"),
        ({0: {}}, "Expected a file with its `path`"),
        ({0: {"path": {"path": [1]}}}, "Expected `str`, got `object`"),
    ],
)
def test_malformed_questions_have_one_line_answers(page, visitor, clip, change, said):
    ann = visitor(page)
    data = [file(ann.upload(clip)), QUESTION, "uniform", 0.5]
    for place, value in change.items():
        data[place] = value
    done, text = ann.ask(*data)
    assert not done and said in text and "\n" not in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *(({"fn_index": value}, "$.fn_index") for value in (1, 2, -1, 10**30, True, "0", None, [0])),
        *(({"data": value}, "$.data") for value in ([], [None] * 3, [None] * 5, "text", {}, None)),
        *(({"session_hash": value}, "$.session_hash") for value in ("", 5, [])),
        ({"session_hash": None}, "Session hash not found"),
        ({"session_hash": "a/b"}, "not found"),
        ({"event_id": 5}, "$.event_id"),
        *((value, "no request of this page") for value in ("text", [], 5, None)),
    ],
)
def test_malformed_requests_reach_no_function(page, visitor, change, said):
    whole = {"data": [None] * 4, "fn_index": 0, "session_hash": "mallory"}
    sent = whole | change if isinstance(change, dict) else change
    for path in ("queue/join", "call/ask", "cancel", "reset"):
        reply = visitor(page).client.post(f"/gradio_api/{path}", content=json.dumps(sent), headers=JSON)
        refused = 400 <= reply.status_code < 500 and "\n" not in reply.text
        assert refused or (path != "queue/join" and reply.status_code == 200)
        assert path != "queue/join" or said in reply.text


@pytest.mark.parametrize(
    "more", [{"meta": 5}, {"meta": {"_type": 5}}, {"size": "much"}, {"url": "http://127.0.0.1:1"}, {"x": [{"path": 1}]}]
)
def test_only_the_path_of_a_file_reaches_gradio(page, visitor, clip, more):
    ann = visitor(page)
    path = ann.upload(clip)
    for sent in ({"path": path} | more, {"video": {"path": path} | more}):
        assert ann.ask(sent, QUESTION, "uniform", 0.5)[0]


def test_streams_of_sessions_that_are_none_end(page, visitor):
    ann = visitor(page)
    for path in ("queue/data?session_hash=none", "call/ask/none"):
        assert "Not Found" in ann.client.get(f"/gradio_api/{path}").text


def test_half_surrogates_and_control_characters_are_asked_with(page, visitor, clip):
    ann = visitor(page)
    assert ann.ask(file(ann.upload(clip)), "what \ud83d \x1b[31m\0 ?", "uniform", 0.5)[0]


def test_requests_have_a_largest_size(page, visitor, clip):
    ann = visitor(page)
    assert ann.client.post("/gradio_api/upload", files={"files": ("a.mp4", bytes(2**22))}).status_code == 413
    for path in ("/gradio_api/upload", "/gradio_api/queue/join"):
        kind = {"Content-Type": "multipart/form-data; boundary=x" if "upload" in path else "application/json"}
        head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
        endless = (part for part in [head, *[bytes(2**16)] * 200])
        with contextlib.suppress(httpx.TransportError):  # the server closes while more comes
            assert ann.client.post(path, content=endless, headers=kind).status_code in (400, 413)
    files = [("files", ("a.mp4", clip))] * 2
    assert ann.client.post("/gradio_api/upload", files=files).status_code == 400, "one at a time"
    assert ann.client.post("/gradio_api/upload", content=b"x").status_code == 400
    paths = [ann.upload(clip) for _ in range(6)]
    assert [os.path.exists(path) for path in paths] == [False] * 2 + [True] * 4


def test_uploads_go_with_their_visitor(page, visitor, clip):
    ann, bob = visitor(page), visitor(page)
    path, other = ann.upload(clip), bob.upload(clip)
    with bob.client.stream("GET", "/gradio_api/heartbeat/bob") as bobs:
        first = bobs.iter_raw()
        next(first)
        with ann.client.stream("GET", "/gradio_api/heartbeat/ann") as anns:
            second = anns.iter_raw()
            next(second)
            time.sleep(5)
            assert os.path.exists(path), "a heartbeat keeps a visitor"
        end = time.monotonic() + 20
        while os.path.exists(path):
            assert time.monotonic() < end
            time.sleep(0.1)
        assert os.path.exists(other)
    lone = visitor(page).upload(clip)
    time.sleep(5)
    assert not os.path.exists(lone), "without a heartbeat, a while after the last request"


def test_many_visitors_leave_in_no_time(tmp_path, monkeypatch):
    """Who keeps no cookies is a new visitor each time; the server answers nobody while it deletes."""
    from vidsieve.serving import visitors

    monkeypatch.setattr(visitors, "IDLE", 0.1)
    gate = visitors.Visitors(tmp_path, {"localhost"}, lambda path: None)
    for number in range(20_000):
        gate._sessions[f"session {number}"] = who = f"visitor {number}"
        gate._uploads[str(tmp_path / str(number) / "clip.mp4")], gate._seen[who] = (who, 1), 0.0
    gate._uploads["kept"], gate._seen["here"] = ("here", 1), time.monotonic() + 60

    async def sweep():
        task = asyncio.create_task(gate._sweep())
        await asyncio.sleep(0.1)
        task.cancel()

    start = time.monotonic()
    asyncio.run(sweep())
    assert time.monotonic() - start < 10
    assert set(gate._uploads) == {"kept"} and not gate._sessions and set(gate._seen) == {"here"}


def test_a_client_without_cookies_keeps_what_it_asked_about(page, visitor, clip):
    robot, other = visitor(page, cookies=False), visitor(page)
    robot.client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    path = robot.upload(clip)
    assert not other.ask(file(path), QUESTION, "uniform", 0.5)[0]
    assert robot.ask(file(path), QUESTION, "uniform", 0.5, session="r")[0] and not robot.client.cookies
    assert not robot.ask(file(path), QUESTION, "uniform", 0.5, session="s")[0]
    assert robot.ask(file(path), QUESTION, "uniform", 0.25, session="r")[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_when_the_server_ends(tmp_path, visitor, clip, ctrl_c, number):
    page = Page(tmp_path)
    visitor(page).upload(clip)
    assert page.files()
    assert page.stop(number) == (143 if number == signal.SIGTERM else 0)
    assert not list(page.uploads.glob("vidsieve-ui-*")) and set(tmp_path.iterdir()) == {page.uploads, page.log}


def test_a_slow_video_keeps_nobody_waiting(clip, tmp_path, monkeypatch, testbed):
    """Reading is outside the model's lock, each video is read once, and what fails is tried again."""
    from vidsieve.errors import VideoError
    from vidsieve.serving import page as module
    from vidsieve.serving.page import Desk

    slow, fast, reads, go = tmp_path / "slow.mp4", tmp_path / "fast.mp4", [], threading.Event()
    slow.write_bytes(clip)
    fast.write_bytes(clip)
    real = module.read_video

    def read(path, **more):
        reads.append(path.name)
        if path.name == "slow.mp4" and not go.wait(60):
            raise VideoError("too slow")
        if len(reads) == 1:
            raise VideoError("once")
        return real(path, **more)

    monkeypatch.setattr(module, "read_video", read)
    desk = Desk(*testbed, {"full": None})
    with pytest.raises(VideoError, match="once"):
        desk.ask(fast, QUESTION, "full", 1.0)
    texts = []
    threads = [
        threading.Thread(target=lambda: texts.append(desk.ask(slow, QUESTION, "full", 1)[0].text)) for _ in "abc"
    ]
    for thread in threads:
        thread.start()
    assert desk.ask(fast, QUESTION, "full", 1.0)[0].text
    assert not texts
    go.set()
    for thread in threads:
        thread.join(60)
    assert len(texts) == 3 and reads.count("slow.mp4") == 1 and reads.count("fast.mp4") == 2
    desk.forget(fast)
    desk.ask(fast, QUESTION, "full", 1.0)
    assert reads.count("fast.mp4") == 3
