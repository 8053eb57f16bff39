"""Captions by a teacher: a real server that is slow, fails, lies and dies, and a client that is killed."""

from __future__ import annotations

import base64
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import teacher_server
from PIL import Image
from teacher_server import FLOODS, LIES, caption_of, fails, lie_for

from vidsieve.cli.annotate import annotate
from vidsieve.errors import OutputError, TrainingError
from vidsieve.training.data.annotate import Annotation
from vidsieve.training.data.layouts import read_records
from vidsieve.training.data.teacher import Server, Teacher, judge, redact, seconds_until_repeat
from vidsieve.video.reading import write_video

KEY = "sk-secret-0123456789"
TEACHER = Teacher("tiny-teacher", frames=2)
RUN = """
import sys, typer, vidsieve.training.data.teacher as client
from rich.markup import escape
from vidsieve.cli.annotate import annotate
from vidsieve.cli.output import err
from vidsieve.errors import VidsieveError
client.FIRST_WAIT = 0.1
app = typer.Typer(pretty_exceptions_enable=False)
app.command()(annotate)
try:
    app()
except VidsieveError as error:
    err.print(f"error: {escape(str(error))}", soft_wrap=True)
    sys.exit(2)
"""


class Host:
    """The server in a process of its own, on one port for as long as the test lasts."""

    def __init__(self, folder: Path) -> None:
        self.log, self.port, self.process = folder / "requests.log", 0, None
        self.clients: list[subprocess.Popen] = []

    def start(self, *options: object) -> Host:
        command = [sys.executable, teacher_server.__file__, str(self.port), "--log", str(self.log), *map(str, options)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())
        return self

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            self.process = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def requests(self) -> list[dict]:
        lines = self.log.read_bytes().split(b"\n")[:-1] if self.log.exists() else []
        return [json.loads(line) for line in lines]

    def wait_for(self, count: int, process: subprocess.Popen) -> None:
        end = time.monotonic() + 60
        while len(self.requests()) < count:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end, "too few requests came"
            time.sleep(0.02)


@pytest.fixture
def host(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("vidsieve.training.data.teacher.FIRST_WAIT", 0.02)
    host = Host(tmp_path)
    yield host
    host.kill()
    for client in host.clients:
        client.kill()
        client.wait()
        client.stdout.close()


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
        write_video(folder / f"{number}.mp4", pixels, 8.0)
    return folder


def listed(tmp_path, videos, count, *more, first=0):
    """Return a file of so many rows with captions ``row 0`` and on, after the lines in `more`."""
    lines = list(more)
    for number in range(first, first + count):
        lines.append({"video": str(videos / f"{number % 4}.mp4"), "caption": f"row {number}", "id": number})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rewritten(source, target, url, *, teacher=TEACHER, limit=None, again=False, **settings):
    """Return the report of a run, its rows counted up."""
    report = Annotation(source, target, teacher, Server(url, **settings), again=again).run(limit)
    assert report.rows == report.rewritten + report.unchanged + report.left + sum(report.aside.values())
    return report


def begin(host, source, target, *options):
    command = [sys.executable, "-c", RUN, str(source), str(target), "--base-url", host.url, "--model", "tiny-teacher"]
    process = subprocess.Popen(
        [*command, "--frames", "2", *map(str, options)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    host.clients.append(process)
    return process


def end(process, code=0):
    text = " ".join(process.communicate(timeout=60)[0].split())
    assert process.returncode == code, text
    assert "Traceback" not in text and "sk-sec" not in text
    return text


@pytest.mark.slow
def test_no_row_is_lost_doubled_or_paid_twice_by_a_bad_server_and_kills_of_both_sides(tmp_path, videos, host):
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    question = {"video": str(videos / "0.mp4"), "question": "What?", "options": ["A. x", "B. y"], "answer": "A"}
    others = [
        question,
        {"video": "gone.mp4", "caption": "row 9001"},
        "{torn",
        {"video": "broken.mp4", "caption": "row 9002"},
    ]
    source, target = listed(tmp_path, videos, 200, *others), tmp_path / "out" / "new.jsonl"
    options = ("--slow", 0.02, "--fail", 0.3, "--lie", 0.2)
    host.start(*options)
    report = tmp_path / "report.json"
    process = begin(host, source, target, "--json", report)
    host.wait_for(60, process)
    host.kill()
    time.sleep(0.2)
    host.start(*options)
    host.wait_for(150, process)
    process.kill()  # -9
    process.communicate()
    time.sleep(0.3)  # what was under way arrives
    journal = target.with_name("new.journal.jsonl")
    events = [json.loads(line) for line in journal.read_bytes().split(b"\n")[1:-1]]
    settled = {event[kind] for event in events for kind in ("done", "aside") if kind in event}
    before = host.requests()
    assert 50 < len(settled) < 200 and not target.exists()
    text = end(begin(host, source, target, "--json", report))

    after, requests = host.requests()[len(before) :], host.requests()
    assert after and not settled & {request["key"] for request in after}, "a settled row is not asked about again"
    result = json.loads(report.read_text())
    rows = [f"row {number}" for number in range(200)]
    expected = Counter(LIES[lie] for row in rows if (lie := lie_for(row, 0.2)))
    assert len(expected) == 5, "all kinds of lies were told"
    expected.update(["missing video", "malformed record", "broken video"])
    assert result["aside"] == dict(expected)
    assert (result["rows"], result["unchanged"], result["left"]) == (204, 1, 0)
    assert result["rewritten"] == 203 - sum(expected.values())
    assert 200 <= len(requests) <= result["requests"], "every request is in the journal before it is sent"
    paid = Counter(request["row"] for request in requests if request["does"] in ("", *LIES))
    assert set(paid) == set(rows)
    assert sum(paid.values()) - 200 <= 2 * 8, "answered twice are only rows under way when one side was killed"
    keys = {request["row"]: {r["key"] for r in requests if r["row"] == request["row"]} for request in requests}
    assert all(len(some) == 1 for some in keys.values()) and len(set.union(*keys.values())) == 200

    written = lines_of(target)
    good = [row for row in rows if not lie_for(row, 0.2)]
    assert [row.get("original_caption", "") for row in written] == ["", *good], "in the input's order"
    assert [row["caption"] for row in written[1:]] == [caption_of(row) for row in good]
    for row in written[1:]:
        assert row["teacher"] == "tiny-teacher" and row["original_caption"] == f"row {row['id']}"
    assert written[0] == question | {"video": os.path.relpath(videos / "0.mp4", target.parent)}
    records = list(read_records(target))
    assert not any(record.fault for record in records) and all(Path(r.rows[0]["video"]).is_file() for r in records)
    aside = lines_of(target.with_name("new.aside.jsonl"))
    assert Counter(row["reason"] for row in aside) == expected
    assert [row["record"] for row in aside] == sorted(row["record"] for row in aside)
    assert "204 rows" in text and str(target) in text.replace(" ", "")

    rewritten(source, target, host.url)
    assert len(host.requests()) == len(requests), "a finished run sends nothing"
    assert lines_of(target) == written


@pytest.mark.parametrize(
    ("does", "extra"), [("401", ()), ("404", ()), ("403", ()), ("402", ()), ("429", ("--quota", "--retry-after", 0.01))]
)
def test_errors_that_every_row_would_meet_end_the_run_and_set_no_row_aside(tmp_path, videos, host, does, extra):
    host.start("--always", does, *extra)
    source, target = listed(tmp_path, videos, 9), tmp_path / "out.jsonl"
    with pytest.raises(
        TrainingError, match=rf"refuses all requests to tiny-teacher \(Error code: {does} - .*\[key\]"
    ) as error:
        rewritten(source, target, host.url)
    assert "sk-sec" not in str(error.value) + target.with_name("out.journal.jsonl").read_text()
    assert {request["row"] for request in host.requests()} == {"row 0"} and not target.exists()
    host.kill()
    host.start()
    report = rewritten(source, target, host.url)
    assert report.rewritten == 9 and report.tokens_in == 900 and not report.unmetered


@pytest.mark.parametrize("how", ["echo", "400", "500"])
def test_a_server_that_repeats_the_key_gets_it_into_no_file(tmp_path, videos, host, how):
    host.start("--always", how)
    source, target = listed(tmp_path, videos, 4), tmp_path / "out.jsonl"
    if how == "echo":
        assert rewritten(source, target, host.url, concurrency=2).rewritten == 4
    else:
        with pytest.raises(TrainingError, match=r"answered none of the last 3 rows .*Bearer \[key\]") as error:
            rewritten(source, target, host.url, concurrency=1, retries=1)
        assert "sk-sec" not in str(error.value)
        report = rewritten(source, target, host.url, concurrency=1, retries=1)
        assert report.aside == {"no answer" if how == "500" else "refused request": 4}
        assert len(host.requests()) == (8 if how == "500" else 4), "only a server's error is worth a repeat"
    texts = {path.name: path.read_text() for path in tmp_path.iterdir() if path.suffix == ".jsonl"}
    assert not any("sk-sec" in text for text in texts.values())
    assert "[key]" in texts["out.journal.jsonl"]


def test_rows_without_an_answer_are_set_aside_and_asked_about_again_on_request(tmp_path, videos, host):
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    others = [{"video": name, "caption": f"row 10{n}"} for n, name in enumerate(("gone.mp4", "broken.mp4"))]
    source, target = listed(tmp_path, videos, 8, *others), tmp_path / "out.jsonl"
    host.start("--refuse", "row 1", "row 5")
    report = rewritten(source, target, host.url, concurrency=2)
    aside = {"refused request": 2, "missing video": 1, "broken video": 1}
    assert report.aside == aside and report.rewritten == 6 and len(host.requests()) == 8
    details = {row["row"]["caption"]: row["detail"] for row in lines_of(target.with_name("out.aside.jsonl"))}
    assert details["row 1"].startswith("Error code: 400 - ") and details["row 100"] == "gone.mp4"
    host.kill()
    host.start()
    for name in ("gone.mp4", "broken.mp4"):
        (tmp_path / name).write_bytes((videos / "0.mp4").read_bytes())
    report = rewritten(source, target, host.url)
    assert report.aside == {"refused request": 2, "broken video": 1}, "a video that came later is not in the journal"
    assert len(host.requests()) == 9, "a row set aside is settled"
    assert rewritten(source, target, host.url, again=True).rewritten == 10
    assert not lines_of(target.with_name("out.aside.jsonl")) and len(host.requests()) == 12
    assert rewritten(source, target, host.url).rewritten == 10 and len(host.requests()) == 12


def test_a_server_that_cannot_be_reached_or_is_too_slow_ends_the_run(tmp_path, videos, host):
    host.start()
    host.kill()
    source, target = listed(tmp_path, videos, 12), tmp_path / "out.jsonl"
    with pytest.raises(TrainingError, match=r"answered none of the last 3 rows .*--again"):
        rewritten(source, target, host.url, concurrency=2, retries=1)
    host.start("--slow", 5)
    with pytest.raises(TrainingError, match=r"answered none of the last 3 rows"):
        rewritten(source, target, host.url, concurrency=2, retries=0, timeout=0.2, again=True)
    host.kill()
    host.start()
    report = rewritten(source, target, host.url, again=True)
    assert report.rewritten == 12 and report.tokens_in == 1200


def test_retry_after_is_waited_for(tmp_path, videos, host):
    host.start("--fail", 1, "--retry-after", 0.7)
    row = next(n for n in range(100) if fails(f"row {n}", 1) == "429")
    report = rewritten(listed(tmp_path, videos, 1, first=row), tmp_path / "out.jsonl", host.url)
    first, second = (request["time"] for request in host.requests())
    assert second - first >= 0.7 and report.requests == 2 and report.rewritten == 1


def test_requests_keep_to_the_rate_with_their_repeats(tmp_path, videos, host):
    host.start("--fail", 1)
    report = rewritten(listed(tmp_path, videos, 6), tmp_path / "out.jsonl", host.url, rate=300)
    times = [request["time"] for request in host.requests()]
    assert report.rewritten == 6 and len(times) > 6
    assert times[-1] - times[0] > 0.9 * 0.2 * (report.requests - 1)


@pytest.mark.slow
def test_ctrl_c_waits_for_requests_under_way(tmp_path, videos, host, ctrl_c):
    host.start("--slow", 0.5)
    source, target = listed(tmp_path, videos, 12), tmp_path / "out.jsonl"
    process = begin(host, source, target, "--concurrency", 4)
    host.wait_for(5, process)
    process.send_signal(signal.SIGINT)
    text = end(process, code=130)
    assert "7 rows are left (interrupted)" in text and "same command resumes" in text and not target.exists()
    done = [event for event in lines_of(target.with_name("out.journal.jsonl")) if "done" in event]
    assert len(done) == len(host.requests()) == 5, "requests that were sent were waited for"
    report = rewritten(source, target, host.url)
    assert report.rewritten == 12 and report.requests == 12 and not report.unmetered


def test_the_budget_is_never_exceeded_and_the_limit_stops_a_run_that_is_resumed(tmp_path, videos, host):
    host.start()
    source, target = listed(tmp_path, videos, 20), tmp_path / "out.jsonl"
    report = rewritten(source, target, host.url, limit=3)
    assert (report.rewritten, report.left, report.stopped) == (3, 17, "limit")
    prices = {"prices": (1e6, 1e6), "concurrency": 4}  # a dollar a token, 120 tokens an answer
    most = sum(TEACHER.most({"video": "", "caption": "row 10"})[1:])
    report = rewritten(source, target, host.url, budget=1000 + most, **prices)
    assert report.stopped == "budget" and not target.exists() and report.dollars == 120 * report.rewritten
    assert 1000 < report.dollars <= 1000 + most, "as much is spent as the longest answer leaves room for"
    again = rewritten(source, target, host.url, budget=1000 + most, **prices)
    assert again.requests == report.requests, "nothing is left to spend"
    journal = target.with_name("out.journal.jsonl")
    with journal.open("a") as file:  # a run killed while it asked about two rows
        for key in "ab":
            file.write(json.dumps({"sent": key, "most": [300, 50]}) + "\n")
    for _ in range(2):
        killed = rewritten(source, target, host.url, budget=1000 + most, **prices)
        assert killed.dollars == report.dollars + 700 and killed.unmetered == 2, "they may have been paid for"
    report = rewritten(source, target, host.url, budget=1e9, **prices)
    assert report.rewritten == 20 == len(host.requests()) and target.exists()
    with pytest.raises(TrainingError, match="needs the prices"):
        Server(host.url, budget=1.0)


def test_requests_under_way_count_against_the_budget_at_their_longest(tmp_path, videos, host):
    host.start("--slow", 0.3)
    most = sum(TEACHER.most({"video": "", "caption": "row 10"})[1:])
    assert most < 20 * 120, "twenty answers under way would cost more than one may"
    settings = {"prices": (1e6, 1e6), "concurrency": 20, "budget": 120 + most}
    report = rewritten(listed(tmp_path, videos, 30), tmp_path / "out.jsonl", host.url, **settings)
    assert report.stopped == "budget" and 120 < report.dollars <= 120 + most


def test_a_journal_of_an_older_version_is_resumed(tmp_path, videos, host):
    host.start()
    source, target = listed(tmp_path, videos, 4), tmp_path / "out.jsonl"
    keys = [item.key for item in Annotation(source, target, TEACHER, Server(host.url)).items()]
    answer = {"usage": [100, 20], "metered": True}
    entries = [
        {"journal": 1, "settings": vars(TEACHER) | {"input": "rows.jsonl"}},
        {"sent": keys[0], "attempt": 1, "at": 1.0},
        {"sent": keys[0], "attempt": 2, "at": 2.0},
        {"done": keys[0], "caption": "An old one.", **answer},
        {"sent": keys[1], "attempt": 1, "at": 3.0},
        {"aside": keys[1], "reason": "the instruction itself", "detail": "x", **answer},
        {"aside": keys[2], "reason": "broken video", "detail": "y", "usage": None, "metered": False},
        {"sent": keys[3], "attempt": 1, "at": 4.0},
    ]
    journal = target.with_name("out.journal.jsonl")
    journal.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"sent": "cut')
    report = rewritten(source, target, host.url)
    assert report.aside == {"the instruction itself": 1, "broken video": 1} and report.rewritten == 2
    assert report.tokens_in == 300 and report.unmetered == 1
    assert [row["caption"] for row in lines_of(target)] == ["An old one.", caption_of("row 3")]
    assert [request["row"] for request in host.requests()] == ["row 3"]


def test_the_estimate_is_exact_where_it_can_be_and_sends_nothing(tmp_path, videos, host, capsys):
    host.start()
    still = {"frames": [[str(videos / "a.png"), 3]], "caption": "two"}
    source, target = listed(tmp_path, videos, 10, still), tmp_path / "out.jsonl"
    plan = Annotation(
        source, target, Teacher("m", "x" * 30, frames=4, size=56, max_tokens=100), Server(host.url)
    ).plan()
    assert (plan["rows"], plan["requests"], plan["faulty"], plan["images"]) == (11, 10, 1, 40)
    assert (plan["tokens_in"], plan["tokens_out"]) == (40 * 4 + 10 * 10, 1000)
    annotate(source, target, base_url=host.url, model="m", frames=2, price="1,2", limit=0)
    text = capsys.readouterr().out
    assert "11 rows: 10 to ask about, 1 cannot be asked about" in text and "at most 20 images" in text and "US$" in text
    assert not host.requests() and sorted(tmp_path.glob("out*")) == []


def test_other_settings_and_damaged_journals_are_refused(tmp_path, videos, host):
    host.start()
    source, target = listed(tmp_path, videos, 3), tmp_path / "out.jsonl"
    rewritten(source, target, host.url)
    with pytest.raises(TrainingError, match="is of another run") as error:
        annotate(source, target, base_url=host.url, model="tiny-teacher", frames=3, prompt="Say more of it.")
    assert "frames: 2 there, 3 now" in str(error.value) and "max_tokens" not in str(error.value)
    source.rename(tmp_path / "moved.jsonl")
    with pytest.raises(TrainingError, match=r'input: "rows.jsonl" there, "moved.jsonl" now'):
        rewritten(tmp_path / "moved.jsonl", target, host.url)
    (tmp_path / "moved.jsonl").rename(source)
    journal = target.with_name("out.journal.jsonl")
    lines = journal.read_bytes().split(b"\n")
    journal.write_bytes(b"\n".join([lines[0], b'{"done": 3', *lines[2:]]))
    with pytest.raises(TrainingError, match=r"line 2 of .* is damaged: .*asked about again"):
        rewritten(source, target, host.url)
    journal.write_bytes(b"row\n")
    with pytest.raises(TrainingError, match="is not a journal"):
        rewritten(source, target, host.url)
    assert len(host.requests()) == 3


def test_equal_rows_are_asked_about_once_and_every_kind_of_row_is_shown(tmp_path, videos, host):
    Image.new("RGB", (600, 300)).save(tmp_path / "a.png")
    twin = {"video": str(videos / "0.mp4"), "caption": "row 500"}
    still = {"frames": [["a.png", 3], ["a.png", 1]], "caption": "row 501"}
    source = listed(tmp_path, videos, 0, twin, twin, still, {"image": "a.png", "caption": "row 502"}, twin)
    host.start()
    target = tmp_path / "deep" / "out.jsonl"
    report = rewritten(source, target, host.url)
    assert report.rewritten == 5 and report.requests == 3
    assert Counter((request["row"], request["images"]) for request in host.requests()) == Counter(
        [("row 500", 2), ("row 501", 2), ("row 502", 1)]
    )
    rows = lines_of(target)
    assert [row["caption"] for row in rows] == [caption_of(f"row {n}") for n in (500, 500, 501, 502, 500)]
    assert rows[2]["frames"] == [["../a.png", 3], ["../a.png", 1]] and rows[2]["original_caption"] == still["caption"]
    assert rows[3]["image"] == "../a.png"
    text = host.requests()[0]["text"]
    assert text.startswith("The images are frames of one video") and text.endswith(": row 500")


@pytest.mark.parametrize("lie", [*LIES, "unmetered"])
def test_every_answer_is_paid_for_and_lies_are_set_aside_for_good(tmp_path, videos, host, lie):
    host.start("--always", lie)
    source, target = listed(tmp_path, videos, 2), tmp_path / "out.jsonl"
    report = rewritten(source, target, host.url)
    assert report.aside == ({LIES[lie]: 2} if lie in LIES else {}) and report.requests == 2
    uncounted = lie == "unmetered" or LIES[lie] == "malformed answer"
    tokens = (2 * TEACHER.max_tokens, 2) if uncounted else (2 * 20, 0)
    assert (report.tokens_out, report.unmetered) == tokens and report.tokens_in > 0
    rewritten(source, target, host.url, again=True)
    assert len(host.requests()) == 2


GOOD = "A man in a red coat walks a dog along a beach, then throws a stick."


@pytest.mark.parametrize(
    ("text", "caption", "reason"),
    [
        (f" {GOOD}\n", GOOD, ""),
        (f"<think>I cannot see. I'm sorry.</think>\n{GOOD}", GOOD, ""),
        ("一个男人穿着红色外套在海滩上遛狗。", "一个男人穿着红色外套在海滩上遛狗。", ""),
        (f"Sorry about the noise, says a sign. {GOOD}", f"Sorry about the noise, says a sign. {GOOD}", ""),
        ("As an AI language model, I have no eyes to see this video with.", "", "refusal"),
        ("I cannot describe the people in this video, as that might harm them.", "", "refusal"),
        ("抱歉，我无法描述这个视频的内容。", "", "refusal"),
        ("A dog runs.", "", "too short"),
        (GOOD + " The dog runs after it and comes back again with it." * 6, "", "repetition"),
        ("no " * 50, "", "repetition"),
    ],
)
def test_captions_are_told_from_what_is_none(text, caption, reason):
    answer = judge(json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}))
    assert (answer.caption, answer.reason) == (caption, reason)


# -- attacks of the server ----------------------------------------------------------------------------------------


def test_a_redirect_is_not_followed(tmp_path, videos, host):
    other = Host(tmp_path / "other")
    (tmp_path / "other").mkdir()
    try:
        host.start("--always", "redirect", "--to", other.start().url + "/chat/completions")
        with pytest.raises(TrainingError, match=r"refuses all requests .*a redirect to http.*not followed"):
            rewritten(listed(tmp_path, videos, 9), tmp_path / "out.jsonl", host.url)
        assert len(host.requests()) == 1 and not other.requests()
    finally:
        other.kill()


def test_an_answer_that_comes_byte_by_byte_is_given_up_in_time(tmp_path, videos, host):
    host.start("--always", "drip")
    start = time.monotonic()
    with pytest.raises(TrainingError, match=r"none of the last 3 rows \(no answer within 0.5 s\)"):
        rewritten(listed(tmp_path, videos, 9), tmp_path / "out.jsonl", host.url, concurrency=1, retries=0, timeout=0.5)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("flood", [*FLOODS, "reset"])
def test_an_answer_without_an_end_of_its_head_is_given_up(tmp_path, videos, host, flood):
    host.start("--always", flood)
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = rewritten(
        listed(tmp_path, videos, 1), tmp_path / "out.jsonl", host.url, concurrency=1, retries=1, timeout=1
    )
    assert time.monotonic() - start < 10 and report.aside == {"no answer": 1}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 2**17  # KiB
    assert lines_of(tmp_path / "out.aside.jsonl")[0]["detail"], "says why"


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [
        ("3", 3),
        ("0.25", 0.25),
        ("99999999", 120),
        ("1e400", 120),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 120),
        *((text, None) for text in ("", "nan", "-5", "soon", "٣ ثوان", "Fri, 31 Dec 1999 23:59:59 GMT", "1, 2")),
        ("Fri, 99 Dec 99999999999999999999 23:59:59 GMT", None),
    ],
)
def test_waits_before_repeats_are_capped(asked, seconds):
    for repeats in (0, 3, 200):
        wait = seconds_until_repeat(asked, repeats)
        assert wait == seconds if seconds else 0.3 < wait <= 8


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--always", "429", "--retry-after", "99999999"), ()])
def test_ctrl_c_ends_waits_at_once(tmp_path, videos, host, ctrl_c, options):
    """A wait that the server asks for is announced; the other one is for the rate."""
    host.start(*options)
    process = begin(host, listed(tmp_path, videos, 9), tmp_path / "out.jsonl", "--rate", "60" if options else "1")
    host.wait_for(1, process)
    time.sleep(1)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    text = end(process, code=130)
    assert time.monotonic() - start < 5 and len(host.requests()) == 1
    assert not options or ("429 - {" in text and "asking again in 120 s; Ctrl-C stops" in text)


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ("null", None),
        ("{}", None),
        ('{"prompt_tokens": 7}', None),
        ('{"prompt_tokens": 7, "completion_tokens": 0, "x": [[]]}', (7, 0)),
        *(
            (text, "malformed")
            for text in ("5", '"many"', "[]", "NaN", "1e400", '{"prompt_tokens": -1, "completion_tokens": 1}')
        ),
        *(
            (f'{{"prompt_tokens": {value}, "completion_tokens": 1}}', "malformed")
            for value in ('"7"', "NaN", "-0.5", "1e400", "9" * 30, "9" * 5000, "true", '{"a": 1}', "[" * 9999)
        ),
    ],
)
def test_malformed_usage_is_a_bad_row(usage, counted):
    answer = judge(f'{{"choices": [{{"message": {{"content": "{GOOD}"}}}}], "usage": {usage}}}')
    expected = (None, "malformed answer") if counted == "malformed" else (counted, "")
    assert (answer.usage, answer.reason) == expected


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"x {KEY} sk-se***89", "x [key] [key]"),
        ("Incorrect API key provided: sk-sec***6789.", "Incorrect API key provided: [key]"),
        (f'{{"Authorization":"Bearer {KEY}"}}', '{"Authorization":"Bearer [key]"}'),
        ("the key that ends in 6789", "the key that ends in [key]"),
        (f"{KEY[:9].upper()} and {KEY[9:]}", "[key] and [key]"),
        ("no key: error 678, or sk-", "no key: error 678, or sk-"),
    ],
)
def test_keys_are_not_printed_also_in_part(text, shown):
    assert redact(text, KEY) == shown


@pytest.mark.parametrize("letters", [1, 8, 2**21])
def test_long_answers_are_searched_for_long_keys_in_no_time(letters):
    """Nothing else happens meanwhile: no other answer comes, no limit holds."""
    text = " ".join("abcdefgh"[:letters] * -(-letters // 8) for _ in range(2**21 // (letters + 1) + 1))
    start = time.monotonic()
    assert redact(text, "sk-" + "0123456789" * 16, 8) == text
    assert time.monotonic() - start < 5


def test_proxies_that_cannot_be_used_are_an_error(tmp_path, videos, host, monkeypatch):
    for proxy in ("foo://me:secret@x", "socks9://x"):
        monkeypatch.setenv("HTTP_PROXY", proxy)
        with pytest.raises(TrainingError, match="the proxy that the environment names cannot be used") as error:
            rewritten(listed(tmp_path, videos, 1), tmp_path / "out.jsonl", "http://203.0.113.7/v1")
        assert "secret" not in str(error.value)


def test_small_parts():
    assert judge("null").reason == judge("[" * 100_000).reason == "malformed answer"
    assert "missing required field `choices`" in judge('{"error": {"message": "too many images"}}').detail
    assert redact("a none b", "none") == "a none b"


def test_frames_are_sent_as_small_jpegs(tmp_path):
    Image.new("RGB", (400, 100)).save(tmp_path / "a.png")
    (url,) = Teacher("m", size=200).images({"image": str(tmp_path / "a.png")})
    kind, data = url.split(",")
    assert kind == "data:image/jpeg;base64" and Image.open(io.BytesIO(base64.b64decode(data))).size == (200, 50)


def test_commands_that_cannot_work_are_refused_before_anything_is_sent(tmp_path, videos, host, monkeypatch):
    host.start()
    source, target = listed(tmp_path, videos, 2), tmp_path / "out.jsonl"
    where = {"base_url": host.url, "model": "tiny-teacher"}
    with pytest.raises(OutputError, match="would overwrite the file that is read"):
        annotate(source, source, **where)
    (tmp_path / "empty.txt").write_text(" \n")
    for options, text in (
        ({"budget": 1.0}, "needs the prices"),
        ({"price": "1"}, "two numbers"),
        ({"price": "1,nan"}, "0 or more"),
        ({"prompt": f"@{tmp_path / 'no.txt'}"}, "cannot read"),
        ({"prompt": f"@{tmp_path / 'empty.txt'}"}, "the prompt is empty"),
    ):
        with pytest.raises(TrainingError, match=text):
            annotate(source, target, **where, **options)
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY} \ttoo")
    with pytest.raises(TrainingError, match="holds blanks or characters") as error:
        annotate(source, target, **where)
    assert "sk-sec" not in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with (
        Annotation(source, target, TEACHER, Server(host.url)).journal,
        pytest.raises(TrainingError, match="another process is writing"),
    ):
        rewritten(source, target, host.url)
    for url in (
        "localhost:8000",
        "ftp://x/v1",
        f"http://me:{KEY}@x/v1",
        f"http://x/v1?key={KEY}",
        "http:///v1",
        "http://x:99999/v1",
        "http://[::1/v1",
    ):
        with pytest.raises(TrainingError, match="the server's address must") as error:
            Server(url)
        assert KEY not in str(error.value)
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(TrainingError, match=r"pip install 'vidsieve\[teacher\]'"):
        rewritten(source, target, host.url)
    assert not host.requests()
