"""Captions by a teacher: a real server that is slow, fails, lies and dies, and a client that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import openai
import pytest
import teacher_server
from teacher_server import LIES, caption_of, fails, lie_for

from vidsieve.cli.annotate import annotate
from vidsieve.errors import OutputError, TrainingError
from vidsieve.training.data.layouts import read_records
from vidsieve.training.data.teaching import pacing
from vidsieve.training.data.teaching.annotating import annotate_file, plan_file
from vidsieve.training.data.teaching.asking import Server
from vidsieve.training.data.teaching.captions import Captions
from vidsieve.training.data.teaching.judging import judge, repeats
from vidsieve.training.data.teaching.pacing import Pace
from vidsieve.training.data.teaching.teacher import Prices, RequestFailure, Teacher, data_urls, redact, retry_after
from vidsieve.video.reading import write_video

KEY = "sk-secret-0123456789"
TEACHER = Teacher("tiny-teacher", frames=2)
RUN = """
import sys, typer
from rich.markup import escape
from vidsieve.cli.annotate import annotate
from vidsieve.cli.shared import err
from vidsieve.training.data.teaching import pacing
from vidsieve.errors import VidsieveError
pacing.FIRST_WAIT = 0.05
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

    def wait_for(self, count: int, process: subprocess.Popen | None = None) -> None:
        end = time.monotonic() + 30
        while len(self.requests()) < count:
            assert process is None or process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end, "too few requests came"
            time.sleep(0.02)


@pytest.fixture
def host(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(pacing, "FIRST_WAIT", 0.02)
    made = Host(tmp_path)
    yield made
    made.kill()
    for client in made.clients:
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


def begin(host, source, target, *options, key=KEY):
    command = [sys.executable, "-c", RUN, str(source), str(target), "--base-url", host.url, "--model", "tiny-teacher"]
    process = subprocess.Popen(
        [*command, "--frames", "2", *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OPENAI_API_KEY": key},
    )
    host.clients.append(process)
    return process


def end(process, code=0):
    said = " ".join(process.communicate(timeout=60)[0].split())
    assert process.returncode == code, said
    assert "Traceback" not in said and "sk-sec" not in said
    return said


def balanced(report):
    return report.rows == report.rewritten + report.unchanged + report.left + sum(report.aside.values())


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
    arguments = (host, source, target, "--retries", 12, "--concurrency", 8, "--json", report)
    process = begin(*arguments)
    host.wait_for(60, process)
    host.kill()
    time.sleep(0.2)
    host.start(*options)
    host.wait_for(150, process)
    process.kill()  # -9
    process.communicate()
    time.sleep(0.3)  # what was on its way arrives
    journal = target.with_name("new.jsonl.journal.jsonl")
    events = [json.loads(line) for line in journal.read_bytes().split(b"\n")[1:-1]]
    settled = {event[kind] for event in events for kind in ("done", "aside") if kind in event}
    before = host.requests()
    assert 50 < len(settled) < 200 and not target.exists()
    said = end(begin(*arguments))

    after, requests = host.requests()[len(before) :], host.requests()
    assert after and not settled & {request["key"] for request in after}, "what was settled is not asked about again"
    found = json.loads(report.read_text())
    rows = [f"row {number}" for number in range(200)]
    expected = Counter(LIES[lie] for row in rows if (lie := lie_for(row, 0.2)))
    assert len(expected) >= 7, "most lies were told"
    expected.update(["missing video", "malformed record", "broken video"])
    assert found["aside"] == dict(expected)
    assert (found["rows"], found["unchanged"], found["left"]) == (204, 1, 0)
    assert found["rewritten"] == 203 - sum(expected.values())
    assert found["requests"] == 200 + found["retries"], "each row has one first request"
    assert 200 <= len(requests) <= 200 + found["retries"], "requests the server had, and those that we reported"
    assert found["retries"] >= sum(bool(fails(row, 0.3)) for row in rows)
    paid = Counter(request["row"] for request in requests if request["does"] in ("", *LIES))
    assert set(paid) == set(rows)
    assert sum(paid.values()) - 200 <= 2 * 8, "answers twice only of rows that were under way when one side was killed"
    keys = {request["row"]: {r["key"] for r in requests if r["row"] == request["row"]} for request in requests}
    assert all(len(found) == 1 for found in keys.values()) and len(set.union(*keys.values())) == 200

    written = lines_of(target)
    good = [row for row in rows if not lie_for(row, 0.2)]
    assert [row.get("original_caption", "") for row in written] == ["", *good], "in the input's order"
    assert [row["caption"] for row in written[1:]] == [caption_of(row) for row in good]
    for row in written[1:]:
        assert row["teacher"] == "tiny-teacher" and row["original_caption"] == f"row {row['id']}"
    assert written[0] == question | {"video": os.path.relpath(videos / "0.mp4", target.parent)}
    read = list(read_records(target))
    assert not any(record.fault for record in read) and all(Path(r.rows[0]["video"]).is_file() for r in read)
    aside = lines_of(target.with_name("new.jsonl.aside.jsonl"))
    assert Counter(row["reason"] for row in aside) == expected
    assert [row["record"] for row in aside] == sorted(row["record"] for row in aside)
    assert all(row["row"]["caption"].startswith("row ") for row in aside if row["reason"] != "malformed record")
    assert "204 rows" in said and str(target) in said.replace(" ", "")

    annotate_file(source, target, TEACHER, Server(host.url))
    assert len(host.requests()) == len(requests), "a finished run sends nothing"
    assert lines_of(target) == written


def test_the_official_client_is_answered(host):
    host.start("--key", KEY)
    with openai.OpenAI(base_url=host.url, api_key=KEY, max_retries=0) as client:
        answer = client.chat.completions.create(
            model="tiny-teacher", messages=[{"role": "user", "content": "what of row 3?"}]
        )
        assert answer.choices[0].message.content == caption_of("row 3") and answer.usage.total_tokens == 120
        assert [model.id for model in client.models.list()] == ["tiny-teacher"]
    with (
        openai.OpenAI(base_url=host.url, api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.chat.completions.create(model="tiny-teacher", messages=[{"role": "user", "content": "row 3"}])


def test_a_key_that_is_refused_ends_the_run_after_one_request_and_is_told_nowhere(tmp_path, videos, host):
    host.start("--key", "another")
    target = tmp_path / "out.jsonl"
    said = end(begin(host, listed(tmp_path, videos, 20), target), code=2)
    assert "does not take the key (401: no: Bearer [key] ([key])): set OPENAI_API_KEY" in said
    assert len(host.requests()) == 1 and not target.exists()
    assert "sk-sec" not in target.with_name("out.jsonl.journal.jsonl").read_text()
    host.kill()
    host.start()
    assert "20 of 20 rows rewritten" in end(begin(host, tmp_path / "rows.jsonl", target)), (
        "and goes on with a better one"
    )


@pytest.mark.parametrize("how", ["echo", "escaped", "400", "500"])
def test_a_server_that_says_the_key_back_gets_it_into_no_file(tmp_path, videos, host, how):
    host.start("--always", how)
    source, target = listed(tmp_path, videos, 4), tmp_path / "out.jsonl"

    def run():
        return annotate_file(source, target, TEACHER, Server(host.url, concurrency=2, retries=1))

    if how.isdigit():
        with pytest.raises(TrainingError, match=r"answered none.*Bearer \[key\]") as error:
            run()
        assert "sk-sec" not in str(error.value)
        for _ in range(2):
            with suppress(TrainingError):
                run()
        assert run().aside == {"no answer" if how == "500" else "refused request": 4}, "none had an answer in two runs"
    else:
        assert run().rewritten == 4
    texts = {path.name: path.read_text() for path in tmp_path.iterdir() if path.suffix == ".jsonl"}
    assert not any("sk-sec" in text or "sk\\u002dsec" in text for text in texts.values())
    assert "[key]" in texts["out.jsonl.journal.jsonl"]


@pytest.mark.parametrize(
    "does, extra, said",
    [
        ("404", (), "has no tiny-teacher, or is not the address"),
        ("403", (), "does not let this key use tiny-teach"),
        ("402", (), "wants to be paid first"),
        ("429", ("--quota",), "wants to be paid first"),
    ],
)
def test_errors_that_every_row_would_meet_end_the_run_at_once(tmp_path, videos, host, does, extra, said):
    host.start("--always", does, *extra)
    source, target = listed(tmp_path, videos, 9), tmp_path / "out.jsonl"
    with pytest.raises(TrainingError, match=said):
        annotate_file(source, target, TEACHER, Server(host.url))
    assert len(host.requests()) == 1 and not target.exists()


def test_a_refused_request_sets_its_row_aside_unless_all_are_refused(tmp_path, videos, host):
    host.start("--refuse", "row 1", "row 5")
    source, target = listed(tmp_path, videos, 8), tmp_path / "out.jsonl"
    report = annotate_file(source, target, TEACHER, Server(host.url, concurrency=2))
    assert report.aside == {"refused request": 2} and report.rewritten == 6 and balanced(report)
    assert len(host.requests()) == 8, "no such request is repeated"
    aside = lines_of(target.with_name("out.jsonl.aside.jsonl"))
    assert [row["row"]["id"] for row in aside] == [1, 5] and all(row["detail"].startswith("400: no: ") for row in aside)
    host.kill()
    host.start()
    assert annotate_file(source, target, TEACHER, Server(host.url)).requests == 8, "set aside is settled"
    report = annotate_file(source, target, TEACHER, Server(host.url), again=True)
    assert report.rewritten == 8 and not report.aside and (report.requests, report.retries) == (10, 2)
    host.kill()

    host.start("--always", "400")
    other = tmp_path / "other.jsonl"
    with pytest.raises(TrainingError, match=r"answered none of the last \d rows \(400: no"):
        annotate_file(source, other, TEACHER, Server(host.url, concurrency=2))
    host.kill()
    host.start()
    assert annotate_file(source, other, TEACHER, Server(host.url)).rewritten == 8, "all were left for later"


def test_rows_are_left_while_the_server_is_down_and_set_aside_where_only_they_get_no_answer(tmp_path, videos, host):
    host.start()
    host.kill()
    source, target, server = listed(tmp_path, videos, 12), tmp_path / "out.jsonl", Server(host.url, 2, retries=1)
    with pytest.raises(TrainingError, match=r"answered none of the last \d rows"):
        annotate_file(source, target, TEACHER, server)
    host.start()
    report = annotate_file(source, target, TEACHER, server)
    assert report.rewritten == 12 and report.requests == 12 + report.retries and report.retries >= 3
    host.kill()
    host.start("--always", "drip")  # always something new, and never an end
    other = tmp_path / "other.jsonl"
    with pytest.raises(TrainingError, match=r"no answer in 0.3 s"):
        annotate_file(source, other, TEACHER, Server(host.url, 2, retries=0, timeout=0.3))


def test_rows_that_get_no_answer_do_not_end_a_run_in_which_others_do(tmp_path, videos, host):
    mute = [f"row {n}" for n in (1, 3, 5, 7, 9)]
    host.start("--refuse", *mute, "--refuse-with", "500")
    source, target = listed(tmp_path, videos, 10), tmp_path / "out.jsonl"
    report = annotate_file(source, target, TEACHER, Server(host.url, concurrency=1, retries=1))
    assert report.aside == {"no answer": 5} and report.rewritten == 5 and (report.requests, report.retries) == (15, 5)


def test_no_more_requests_start_than_the_rate_allows_in_any_minute():
    """Against a made-up clock, by callers that wait as long as they are told, or less."""
    now, starts, chance = 0.0, [], np.random.default_rng(0)
    pace = Pace(7, ages=[5.0, 1.0], now=now)
    while len(starts) < 60:
        wait = pace.start(now)
        if not wait:
            starts.append(now)
        now += min(wait, 40.0) if wait else chance.exponential(2.0)
    history = [-5.0, -1.0, *starts]
    for at in history:
        assert sum(at <= other < at + 60 for other in history) <= 7
    assert starts[-1] < 60 / 7 * 61 + 61, "and no fewer than it must"
    pace.rest(now + 1000)
    assert pace.start(now + 1) == pytest.approx(999)
    free = Pace(None)
    assert not any(free.start(0.0) for _ in range(1000))


@pytest.mark.slow
def test_ctrl_c_waits_for_requests_under_way_and_the_rate_holds_over_a_restart(tmp_path, videos, host, ctrl_c):
    host.start("--slow", 0.3)
    source, target = listed(tmp_path, videos, 12), tmp_path / "out.jsonl"
    process = begin(host, source, target, "--rate", 5, "--concurrency", 4)
    host.wait_for(5, process)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = end(process, code=130)
    assert "7 rows are left (stopped)" in said and "the same command goes on" in said and not target.exists()
    done = [event for event in lines_of(target.with_name("out.jsonl.journal.jsonl")) if "done" in event]
    assert len(done) == len(host.requests()) == 5, "what was sent was waited for"
    process = begin(host, source, target, "--rate", 5)
    while "at most" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    end(process, code=130)
    assert len(host.requests()) == 5, "the minute is not over"
    assert annotate_file(source, target, TEACHER, Server(host.url)).rewritten == 12


def test_retry_after_is_waited_for(tmp_path, videos, host):
    host.start("--fail", 1, "--retry-after", 0.7)
    row = next(n for n in range(100) if fails(f"row {n}", 1) == "429")
    source = listed(tmp_path, videos, 1, first=row)
    report = annotate_file(source, tmp_path / "out.jsonl", TEACHER, Server(host.url))
    first, second = (request["time"] for request in host.requests())
    assert second - first >= 0.7 and report.retries == 1 and report.rewritten == 1


def test_the_estimate_is_exact_where_it_can_be_and_sends_nothing(tmp_path, videos, host, capsys):
    host.start()
    still = {"frames": [[str(videos / "a.png"), 3]], "caption": "two"}
    source, target = listed(tmp_path, videos, 10, still), tmp_path / "out.jsonl"
    teacher = Teacher("m", "x" * 30, frames=4, size=56, max_tokens=100)
    plan = plan_file(source, target, teacher, prices=Prices(2.0, 30.0))
    assert (plan.rows, plan.requests, plan.faulty, plan.images) == (11, 10, 1, 40)
    assert (plan.tokens_in, plan.tokens_out) == (40 * 4 + 10 * 10, 1000)
    assert plan.dollars == pytest.approx(260 * 2e-6 + 1000 * 30e-6)
    annotate(source, target, base_url=host.url, model="m", frames=2, price_in=1, price_out=2, estimate=True)
    said = capsys.readouterr().out
    assert "11 rows: 10 to ask about, 1 cannot be asked about" in said and "at most 20 images" in said and "US$" in said
    assert not host.requests() and sorted(tmp_path.glob("out*")) == []


def test_other_settings_are_refused_and_named(tmp_path, videos, host):
    host.start()
    source, target = listed(tmp_path, videos, 3), tmp_path / "out.jsonl"
    annotate_file(source, target, TEACHER, Server(host.url))
    other = {"base_url": host.url, "model": "tiny-teacher", "frames": 2}
    with pytest.raises(TrainingError, match="begun with other settings") as error:
        annotate(source, target, **other, temperature=0.9, prompt="Say more of it.")
    said = str(error.value)
    assert "temperature: 0.2 there, 0.9 now" in said
    assert 'prompt: "The images are frames' in said and "max_tokens" not in said
    assert len(host.requests()) == 3
    source.rename(tmp_path / "moved.jsonl")
    with pytest.raises(TrainingError, match=r'input: "rows.jsonl" there, "moved.jsonl" now'):
        annotate_file(tmp_path / "moved.jsonl", target, TEACHER, Server(host.url))


def test_the_budget_and_the_limit_stop_a_run_that_later_goes_on(tmp_path, videos, host):
    host.start()
    source, target = listed(tmp_path, videos, 20), tmp_path / "out.jsonl"
    report = annotate_file(source, target, TEACHER, Server(host.url, 2), limit=3)
    assert (report.rewritten, report.left, report.stopped) == (3, 17, "limit") and balanced(report)
    # 120 tokens an answer at a million dollars for a million of them
    server = Server(host.url, 2, prices=Prices(1e6, 1e6), budget=1000.0)
    report = annotate_file(source, target, TEACHER, server)
    assert report.stopped == "budget" and not target.exists() and balanced(report)
    assert 1000 <= report.dollars <= 1000 + 2 * 120 and report.dollars == 120 * report.rewritten
    assert annotate_file(source, target, TEACHER, server).requests == report.requests, "nothing is left to spend"
    report = annotate_file(source, target, TEACHER, Server(host.url, 2, prices=Prices(1e6, 1e6), budget=1e9))
    assert report.rewritten == 20 and report.requests == 20 == len(host.requests()) and target.exists()
    with pytest.raises(TrainingError, match="needs the prices"):
        annotate_file(source, target, TEACHER, Server(host.url, budget=1.0))


def test_answers_without_numbers_of_tokens_are_counted_at_most(tmp_path, videos, host):
    host.start("--always", "unmetered")
    report = annotate_file(listed(tmp_path, videos, 5), tmp_path / "out.jsonl", TEACHER, Server(host.url))
    assert report.unmetered == 5 and report.tokens_out == 5 * TEACHER.max_tokens and report.tokens_in > 5 * 2 * 256


def test_a_journal_that_a_kill_cut_short_loses_only_its_last_line(tmp_path, videos, host):
    host.start()
    source, target = listed(tmp_path, videos, 6), tmp_path / "out.jsonl"
    annotate_file(source, target, TEACHER, Server(host.url, 1))
    journal = target.with_name("out.jsonl.journal.jsonl")
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-10])
    report = annotate_file(source, target, TEACHER, Server(host.url, 1))
    assert report.rewritten == 6 and (report.requests, report.retries) == (7, 1) and len(host.requests()) == 7
    lines = whole.split(b"\n")
    journal.write_bytes(b"\n".join([lines[0], b'{"done": 3', *lines[2:]]))
    with pytest.raises(TrainingError, match=r"line 2 of .* is damaged"):
        annotate_file(source, target, TEACHER, Server(host.url))
    journal.write_bytes(b"row\n")
    with pytest.raises(TrainingError, match="is no journal"):
        annotate_file(source, target, TEACHER, Server(host.url))


def test_equal_rows_are_asked_about_once_and_every_kind_of_row_is_shown(tmp_path, videos, host):
    from PIL import Image

    Image.new("RGB", (600, 300)).save(tmp_path / "a.png")
    twin = {"video": str(videos / "0.mp4"), "caption": "row 500"}
    still = {"frames": [["a.png", 3], ["a.png", 1]], "caption": "row 501 \ud83d"}
    source = listed(tmp_path, videos, 0, twin, twin, still, {"image": "a.png", "caption": "row 502"}, twin)
    host.start()
    target = tmp_path / "deep" / "out.jsonl"
    report = annotate_file(source, target, TEACHER, Server(host.url))
    assert report.rewritten == 5 and report.requests == 3
    assert Counter((request["row"], request["images"]) for request in host.requests()) == Counter(
        [("row 500", 2), ("row 501", 2), ("row 502", 1)]
    )
    rows = lines_of(target)
    assert [row["caption"] for row in rows] == [caption_of(f"row {n}") for n in (500, 500, 501, 502, 500)]
    assert rows[2]["frames"] == [["../a.png", 3], ["../a.png", 1]] and rows[2]["original_caption"] == still["caption"]
    assert rows[3]["image"] == "../a.png"
    asked = host.requests()[0]["text"]
    assert asked.startswith("The images are frames of one video") and asked.endswith(": row 500")


def test_a_video_that_came_later_is_asked_about(tmp_path, videos, host):
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    rows = [{"video": name, "caption": f"row {n}"} for n, name in enumerate(("gone.mp4", "broken.mp4"))]
    source, target = listed(tmp_path, videos, 0, *rows), tmp_path / "out.jsonl"
    host.start()
    report = annotate_file(source, target, TEACHER, Server(host.url))
    assert report.aside == {"missing video": 1, "broken video": 1} and not report.requests
    for name in ("gone.mp4", "broken.mp4"):
        (tmp_path / name).write_bytes((videos / "0.mp4").read_bytes())
    assert annotate_file(source, target, TEACHER, Server(host.url)).aside == {"broken video": 1}
    assert annotate_file(source, target, TEACHER, Server(host.url), again=True).rewritten == 2
    assert [row["caption"] for row in lines_of(target)] == [caption_of("row 0"), caption_of("row 1")]
    assert not lines_of(target.with_name("out.jsonl.aside.jsonl"))


@pytest.mark.parametrize("lie", LIES)
def test_every_lie_is_set_aside_for_what_it_is_and_not_asked_about_again(tmp_path, videos, host, lie):
    host.start("--always", lie)
    source, target = listed(tmp_path, videos, 2), tmp_path / "out.jsonl"
    report = annotate_file(source, target, TEACHER, Server(host.url))
    assert report.aside == {LIES[lie]: 2} and report.requests == 2 == len(host.requests())
    assert report.tokens_in == (200 if lie != "not-json" else report.tokens_in) > 0, "they were paid for"


def body(text):
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})


GOOD = "A man in a red coat walks a dog along a beach, then throws a stick."


@pytest.mark.parametrize(
    "text, caption, reason",
    [
        (f" {GOOD}\n", GOOD, ""),
        (f"<think>I cannot see. I'm sorry.</think>\n{GOOD}", GOOD, ""),
        ("一个男人穿着红色外套在海滩上遛狗。", "一个男人穿着红色外套在海滩上遛狗。", ""),
        (f"Sorry about the noise, says a sign. {GOOD}", f"Sorry about the noise, says a sign. {GOOD}", ""),
        ("As an AI language model, I have no eyes to see this video with.", "", "refusal"),
        ("I cannot describe the people in this video, as that might harm them.", "", "refusal"),
        ("抱歉，我无法描述这个视频的内容。", "", "refusal"),
        ("Describe it, PLEASE, in one paragraph of many words!", "", "the instruction itself"),
        ("A dog runs.", "", "too short"),
        (GOOD + " The dog runs after it and comes back again with it." * 6, "", "repetition"),
        ("no " * 50, "", "repetition"),
    ],
)
def test_captions_are_told_from_what_is_none(text, caption, reason):
    answer = judge(body(text), "Describe it, please, in one paragraph of many words.")
    assert (answer.caption, answer.reason) == (caption, reason)


def test_small_parts():
    assert not repeats(GOOD.split()) and repeats(["a", "b", "c"] * 10)
    assert judge("null", "").reason == judge("[" * 100_000, "").reason == "not JSON"
    assert judge('{"error": {"message": "too many images"}}', "").detail == "too many images"
    assert retry_after({"retry-after": "7"}) == 7 and retry_after({"retry-after": "1e9"}) == 3600
    assert retry_after({"retry-after": "nan"}) == retry_after({"retry-after": "soon"}) == retry_after({}) == 0
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 25 < retry_after({"retry-after": date}) <= 30
    assert redact("a none b", "none") == "a none b" and redact(f"x{KEY}x", KEY) == "x[key]x"
    assert [RequestFailure(status, "").again for status in (0, 400, 408, 409, 422, 429, 500, 503)] == [
        True,
        False,
        True,
        True,
        False,
        True,
        True,
        True,
    ]
    import base64
    import io

    from PIL import Image

    url = data_urls(np.zeros((1, 100, 400, 3), np.uint8), 200)[0]
    kind, data = url.split(",")
    assert kind == "data:image/jpeg;base64" and Image.open(io.BytesIO(base64.b64decode(data))).size == (200, 50)


def test_commands_that_cannot_be_meant_are_refused_before_anything_is_sent(tmp_path, videos, host, monkeypatch):
    host.start()
    source, target = listed(tmp_path, videos, 2), tmp_path / "out.jsonl"
    where = {"base_url": host.url, "model": "tiny-teacher"}
    with pytest.raises(OutputError, match="would overwrite the file that is read"):
        annotate(source, source, **where)
    (tmp_path / "empty.txt").write_text(" \n")
    for options, said in (
        ({"budget": 1.0}, "--budget needs --price-in"),
        ({"price_in": 1.0}, "go together"),
        ({"prompt": "a", "prompt_file": source}, "one of"),
        ({"prompt_file": tmp_path / "no.txt"}, "cannot read"),
        ({"prompt_file": tmp_path / "empty.txt"}, "the prompt is empty"),
    ):
        with pytest.raises(TrainingError, match=said):
            annotate(source, target, **where, **options)
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY} \ttoo")
    with pytest.raises(TrainingError, match="holds blanks or characters") as error:
        annotate(source, target, **where)
    assert "sk-sec" not in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    journal = Captions(source, target, TEACHER).journal
    with journal(), pytest.raises(TrainingError, match="another process is writing"):
        annotate_file(source, target, TEACHER, Server(host.url))
    for url in (
        "localhost:8000",
        "ftp://x/v1",
        "http://x:y/v1",
        "http://[::1/v1",
        f"http://me:{KEY}@x/v1",
        f"http://x/v1?key={KEY}",
    ):
        with pytest.raises(TrainingError, match="the server's address must") as error:
            annotate_file(source, target, TEACHER, Server(url))
        assert KEY not in str(error.value)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(TrainingError, match=r"pip install 'vidsieve\[teacher\]'"):
        annotate_file(source, target, TEACHER, Server(host.url))
    assert not host.requests()
