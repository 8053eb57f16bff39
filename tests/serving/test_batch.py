"""Many videos: every row once, in order, with the same answer, however often the run is stopped, killed or spread."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch

from vidsieve import answering
from vidsieve.adapters.encoded import stacked
from vidsieve.adapters.pruning import adapter_for
from vidsieve.cli.main import main
from vidsieve.errors import OutputError, VidsieveError
from vidsieve.evaluation.conditions import method_for
from vidsieve.io.journal import Journal
from vidsieve.io.texts import json_line
from vidsieve.serving import batch, batch_groups
from vidsieve.serving.batch import DoneRows, answer_file, side_files
from vidsieve.serving.batch_groups import (
    Answerer,
    BatchError,
    BatchRow,
    BatchSettings,
    Rows,
    read_ahead,
    read_row,
)
from vidsieve.testbed.files import write_scenes
from vidsieve.testing.tiny_models import FAMILIES, default_grid, inputs_for
from vidsieve.types import Tokens

QUICK = {"frames": 4, "max_new_tokens": 3}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, rows):
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json_line(row).encode() for row in rows))
    return path


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Questions on three scenes, and rows with a fault each between them."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, world="dense", seed=5, scenes=3)
    asked = [row for row in lines(folder / "questions.jsonl") if "question" in row]
    asked = [row | {"id": n} for n, row in enumerate(asked[::5])]
    (folder / "broken.mp4").write_bytes(b"nothing")
    faults = [{"video": "gone.mp4", "question": "what ?"}, b"{\n", {"video": "broken.mp4", "question": "what ?"}]
    write(folder / "in.jsonl", [*asked[:3], faults[0], *asked[3:8], faults[1], b"\n", *asked[8:], faults[2]])
    return folder


class Fake:
    """Answers by the row's line; `die` names a line at which it raises, `wait` how long a group takes."""

    die, error, wait, asked = None, KeyboardInterrupt, 0.0, []

    def __init__(self, settings):
        pass

    def __call__(self, read):
        outcomes = []
        for row, video in read:
            Fake.asked.append(row.line)
            if row.line == Fake.die:
                raise Fake.error(f"at line {row.line}")
            outcomes.append(row.outcome(reason=video) if video else row.outcome(answer=f"line {row.line}"))
        time.sleep(Fake.wait)
        return outcomes


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(batch_groups, "Answerer", Fake)
    monkeypatch.setattr(BatchSettings, "read", lambda self, row: row.fault or ("gone" if "gone" in row.video else ""))
    Fake.die, Fake.error, Fake.wait, Fake.asked = None, KeyboardInterrupt, 0.0, []
    return Fake


def made(folder, count=23):
    names = ("gone" if n % 5 == 3 else "v" for n in range(count))
    rows = [{"video": f"{name}{n}.mp4", "question": "what ?", "n": n} for n, name in enumerate(names)]
    return write(folder / "in.jsonl", rows)


def check_whole(target, count=23):
    """Assert that every row is in one of the outputs, once, and in order."""
    failed = [n for n in range(count) if n % 5 == 3]
    assert [row["n"] for row in lines(target)] == [n for n in range(count) if n not in failed]
    assert [row["n"] for row in lines(side_files(target)[0])] == failed
    assert all(row["answer"] == f"line {row['n'] + 1}" for row in lines(target))
    assert {path.name for path in target.parent.iterdir()} <= {
        "in.jsonl",
        *(path.name for path in (target, *side_files(target))),
    }


def test_answers_are_those_of_one_question_asked_alone(testbed, scenes, tmp_path):
    report = answer_file(scenes / "in.jsonl", tmp_path / "out.jsonl", BatchSettings(**QUICK))
    rows, failed = lines(tmp_path / "out.jsonl"), lines(tmp_path / "out.failed.jsonl")
    assert (report.rows, report.answered, report.failed) == (len(rows) + 3, len(rows), 3) and report.written
    assert [row["id"] for row in rows] == list(range(len(rows)))
    assert [sorted(row) for row in failed] == [
        ["question", "reason", "video"],
        ["line", "reason"],
        ["question", "reason", "video"],
    ]
    assert (
        "does not exist" in failed[0]["reason"]
        and failed[1]["line"] == 10
        and "not a JSON object" in failed[1]["reason"]
    )
    for row in rows[::4]:
        video = answering.read(scenes / row["video"], answering.Clock(), frames=4, fps=None, max_frames=None)
        method = method_for("divprune", "testbed", retention=0.25)
        alone = answering.answer(*testbed, video, row["question"], method, max_new_tokens=3)
        said = {
            "answer": alone.text,
            "kept": alone.traces[0].kept,
            "total": alone.traces[0].total,
            "prompt_tokens": alone.prompt_tokens[1],
            "frames": 4,
        }
        assert said.items() <= row.items() and row["given"].keys() == {"answer"}


@pytest.mark.parametrize(
    ("method", "retention"),
    [
        ("full", 0.25),
        ("random", 0.1),
        ("cacovid", Tokens(9)),
        ("fastv", 0.6),
        ("dycoke", 0.5),
    ],
)
def test_neither_batch_nor_readers_change_an_answer(scenes, tmp_path, method, retention):
    found = []
    for size, readers in ((1, 1), (4, 3)):
        target = tmp_path / str(size) / "out.jsonl"
        settings = BatchSettings(**QUICK, method=method, retention=retention, batch=size)
        answer_file(scenes / "in.jsonl", target, settings, readers=readers)
        found.append((target.read_bytes(), side_files(target)[0].read_bytes()))
    assert found[0] == found[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_encoded_one_by_one_make_a_batch(family):
    """Every family: the ragged batch says what each of its prompts says alone."""
    model, grid = FAMILIES[family](), default_grid(family)
    adapter = adapter_for(model)
    with torch.no_grad():
        alone = [adapter.encode(inputs_for(family, [[grid]], words=[count], seed=count)) for count in (3, 9, 5)]
        everything = [adapter.build(one, one.per_row(one.everything())) for one in alone]
        together = stacked(alone)
        built = adapter.build(together, together.per_row(together.everything()))

        def said(pruned):
            out = model.generate(**pruned.inputs, max_new_tokens=5, do_sample=False)
            return out[:, pruned.kept_positions.shape[1] :]

        assert torch.equal(said(built), torch.cat([said(one) for one in everything]))


def test_a_prompt_past_the_models_window_fails_alone(scenes, monkeypatch):
    answerer = Answerer(BatchSettings(**QUICK))
    row = BatchRow(1, {"n": 1}, str(scenes / "scene-0000.mp4"), "what ?")
    video = answerer.settings.read(row)
    assert answerer([(row, video)])[0][0]
    answerer.window = 100
    ((answered, said),) = answerer([(row, video)])
    assert not answered and "the model knows 100: take fewer frames" in said["reason"]


def test_positions_that_turn_nothing_count_for_no_window(scenes, monkeypatch):
    """Qwen's plain count of a long video's tokens is far above the positions that its model sees."""
    answerer = Answerer(BatchSettings(**QUICK))
    row = BatchRow(1, {"n": 1}, str(scenes / "scene-0000.mp4"), "what ?")
    video, kind = answerer.settings.read(row), type(answerer.adapter)
    original = kind.encode_for

    def counted(self, *arguments):
        encoded = original(self, *arguments)
        return replace(encoded, positions=torch.cat([encoded.positions, encoded.positions + 10**6]))

    monkeypatch.setattr(kind, "encode_for", counted)
    monkeypatch.setattr(kind, "position_rows", slice(0, 1))
    answerer.window = 5000
    assert answerer([(row, video)])[0][0]
    monkeypatch.setattr(kind, "position_rows", slice(1, 2))
    assert not answerer([(row, video)])[0][0]


def test_one_poisoned_prompt_does_not_take_its_batch_along(scenes, monkeypatch):
    answerer = Answerer(BatchSettings(**QUICK, batch=3))
    rows = [BatchRow(n, {"n": n}, str(scenes / "scene-0000.mp4"), "what ?") for n in (1, 2, 3)]
    video = answerer.settings.read(rows[0])
    real = type(answerer)._generate

    def said(self, ready):
        if any(one.row.line == 2 for one in ready):
            raise RuntimeError("no such\nshape")
        return real(self, ready)

    monkeypatch.setattr(type(answerer), "_generate", said)
    outcomes = answerer([(row, video) for row in rows])
    assert [answered for answered, _ in outcomes] == [True, False, True]
    assert outcomes[1][1] == {"n": 2, "reason": "no such shape"}


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: lost"), MemoryError()]
)
def test_a_device_that_fails_ends_the_run(scenes, monkeypatch, error):
    answerer = Answerer(BatchSettings(**QUICK))
    row = BatchRow(1, {}, str(scenes / "scene-0000.mp4"), "what ?")
    video = answerer.settings.read(row)

    def fail(ready):
        raise error

    monkeypatch.setattr(answerer, "_generate", fail)
    with pytest.raises(BatchError, match="what was answered is in the journal"):
        answerer([(row, video)])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"[]", "line 7 is not a JSON object: Expected `object`, got `array`"),
        (b"\xff", "line 7 is not a JSON object: JSON is malformed"),
        (b'{"a": "\xff"}', "not a JSON object: 'utf-8' codec"),
        (b'{"a": NaN}', "not a JSON object: JSON is malformed"),
        (b"[" * 9999, "not a JSON object: maximum recursion depth"),
        (b"{}", "it has no video"),
        (b'{"video": " ", "question": "a"}', "it has no video"),
        (b'{"video": "a"}', "it has no question"),
        (b'{"video": "a", "question": 3}', "Expected `str`, got `int` - at `$.question`"),
        (b'{"video": "a", "question": "b", "options": "c"}', "Expected `array | null`, got `str` - at `$.options`"),
        (b'{"video": "a", "question": "b", "options": ["c"]}', "options must be a list of two or more"),
    ],
)
def test_rows_that_cannot_be_asked(text, reason):
    row = read_row(text, 7, Path())
    answered, fields = row.outcome(reason=row.fault)
    assert not answered and reason in fields["reason"] and json.loads(json_line(fields)) == fields
    assert ("line" in fields) == (row.fields is None)


def test_fields_are_copied_and_options_listed():
    row = read_row(
        b'\xef\xbb\xbf{"video": "a.mp4", "question": "b?", "options": ["A. x", "B. y"], "n": [1.5, null],'
        b'"answer": "B", "given": 1}',
        1,
        Path("/r"),
    )
    assert row.video == "/r/a.mp4" and row.prompt.startswith("b?\nA. x\nB. y\n")
    said = row.outcome(answer="A", frames=2)[1]
    assert said["n"] == [1.5, None] and said["given"] == {"answer": "B", "given": 1} and said["answer"] == "A"
    assert read_row(b'{"video": "a", "question": "b?", "options": ["x", "y"]}', 1, Path()).prompt == "b?"


@pytest.mark.parametrize("size", [1, 4])
def test_a_kill_at_any_byte_of_the_journal_loses_and_doubles_nothing(fake, tmp_path, size):
    source, target, settings = made(tmp_path), tmp_path / "out.jsonl", BatchSettings(batch=size)
    journal = side_files(target)[1]
    fake.die = 23
    with pytest.raises(KeyboardInterrupt):
        answer_file(source, target, settings)
    whole, ends = journal.read_bytes(), [0]
    for line in whole.splitlines(keepends=True):
        ends.append(ends[-1] + len(line))
    fake.die = None
    for cut in {*range(0, len(whole), 13), *ends, *(end - 1 for end in ends[1:])}:
        journal.write_bytes(whole[:cut])
        fake.asked.clear()
        assert answer_file(source, target, settings).written
        check_whole(target)
        settled = max(0, sum(end <= cut for end in ends[1:]) - 1) * size
        assert fake.asked == list(range(settled + 1, 24)), "what is settled is not asked again"
        for path in (target, side_files(target)[0], journal):
            path.unlink()


def test_a_kill_between_any_two_writes_loses_and_doubles_nothing(fake, tmp_path, monkeypatch):
    """Every fsync and every rename fails once, before and after it is done."""
    source, settings = made(tmp_path, 9), BatchSettings(batch=4)
    calls, moment = [0], [0, False]

    def dying(real):
        def call(*arguments):
            calls[0] += 1
            if calls[0] == moment[0] and not moment[1]:
                raise KeyboardInterrupt
            real(*arguments)
            if calls[0] == moment[0]:
                raise KeyboardInterrupt

        return call

    monkeypatch.setattr(os, "fsync", dying(os.fsync))
    monkeypatch.setattr(os, "replace", dying(os.replace))
    target, died = tmp_path / "out.jsonl", True
    while died:
        for after in (False, True):
            calls[0], moment[:] = 0, [moment[0] + (not after), after]
            try:
                answer_file(source, target, settings)
                died = False
            except KeyboardInterrupt:
                calls[0] = -100
                answer_file(source, target, settings)
            check_whole(target, 9)
            for path in (target, *side_files(target)):
                path.unlink()
    renames = 3 * 3  # of two outputs and the journal, each with its file and its folder
    assert moment[0] - 1 == 1 + 4 + renames, "the journal's folder; the settings and three groups; renames"


def test_decoding_waits_for_the_model(fake, tmp_path):
    """However slow the model, at most twice as many videos are decoded ahead as there are readers."""
    lock, decoded, taken, most = threading.Lock(), 0, 0, 0

    def read(row):
        nonlocal decoded, most
        with lock:
            decoded += 1
            most = max(most, decoded - taken)
        return "video"

    for readers in (1, 3):
        decoded = taken = most = 0
        rows = ((n, BatchRow(n, {}, f"{n}.mp4", "")) for n in range(40))
        for number, (group, _, _) in enumerate(read_ahead(rows, read, readers)):
            assert group == number, "in order"
            with lock:
                taken += 1
            time.sleep(0.003)
        assert decoded == 40 and readers < most <= 2 * readers + 1, "one is in hand"


def test_rows_of_one_video_share_its_decoding():
    decoded = []
    rows = [(0, BatchRow(n, {}, f"{n // 4}.mp4", "")) for n in range(12)]
    found = list(read_ahead(rows, lambda row: decoded.append(row.video) or row.video, 2))
    assert [video for _, _, video in found] == [row.video for _, row in rows] and len(decoded) == 3


def test_a_finished_run_is_left_alone(fake, tmp_path):
    source, target = made(tmp_path), tmp_path / "out.jsonl"
    assert answer_file(source, target, BatchSettings()).written
    assert len(lines(side_files(target)[1])) == 1
    fake.asked.clear()
    again = answer_file(source, target, BatchSettings())
    assert (again.written, again.before, again.answered) == (False, 23, 19) and not fake.asked
    target.unlink()
    with pytest.raises(OutputError, match=r"is gone, and its run had finished: remove .*out.journal.jsonl"):
        answer_file(source, target, BatchSettings())
    side_files(target)[1].unlink()
    with pytest.raises(OutputError, match=r"exists, and no out.journal.jsonl says which run wrote it: name another"):
        answer_file(source, target, BatchSettings())


def test_a_journal_of_the_first_format_is_resumed(fake, tmp_path):
    """`{"batch": 1, "settings": …}`, then `{"group": …, "rows": …}` in the order in which workers finished."""
    source, target = made(tmp_path), tmp_path / "out.jsonl"
    rows = Rows(source, tmp_path, 4)
    told = {"input_digest": rows.digest, "rows": 23, "video_root": str(tmp_path)} | BatchSettings(batch=4).described()
    groups = [
        {"group": group, "rows": [[True, row.fields | {"answer": f"line {row.line}"}] for row in rows.group(group)]}
        for group in (0, 4)
    ]
    for group in groups:
        for row in group["rows"]:
            if row[1]["n"] % 5 == 3:
                row[:] = [False, {**row[1], "reason": "gone"}]
                del row[1]["answer"]
    write(side_files(target)[1], [{"batch": 1, "settings": told}, *reversed(groups)])
    assert answer_file(source, target, BatchSettings(batch=4)).before == 8
    check_whole(target)
    assert fake.asked == [*range(5, 17), 21, 22, 23]


def test_another_run_is_refused_by_what_differs(fake, tmp_path):
    source, target = made(tmp_path), tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        fake.die = 1
        answer_file(source, target, BatchSettings(seed=1))
    fake.die = 2
    with pytest.raises(KeyboardInterrupt):  # nothing was settled: begun anew
        answer_file(source, target, BatchSettings())
    with pytest.raises(BatchError, match=r"another run \(frames: 16 there, 8 now; seed: 0 there, 3 now\): give"):
        answer_file(source, target, BatchSettings(frames=8, seed=3))
    with pytest.raises(BatchError, match=r'method: "divprune .* there, "full" now'):
        answer_file(source, target, BatchSettings(method="full"))
    with pytest.raises(BatchError, match="video_root"):
        answer_file(source, target, BatchSettings(), root=tmp_path / "other")
    made(tmp_path, 24)
    with pytest.raises(BatchError, match=r"input_digest.*rows: 23 there, 24 now"):
        answer_file(source, target, BatchSettings())
    made(tmp_path)
    with (
        Journal(tmp_path / "held.journal.jsonl"),
        pytest.raises(BatchError, match="another process is writing"),
    ):
        answer_file(source, tmp_path / "held.jsonl", BatchSettings())
    side_files(target)[1].write_text("something else\n")
    with pytest.raises(BatchError, match="is not a journal of this command"):
        answer_file(source, target, BatchSettings())


def test_a_damaged_line_is_named(fake, tmp_path):
    source, target = made(tmp_path), tmp_path / "out.jsonl"
    fake.die = 9
    with pytest.raises(KeyboardInterrupt):
        answer_file(source, target, BatchSettings())
    journal = side_files(target)[1]
    text = journal.read_text().splitlines(keepends=True)
    for number, wrong in ((3, "}\n"), (4, text[2])):  # the second: a group twice
        journal.write_text("".join([*text[: number - 1], wrong, *text[number:]]))
        with pytest.raises(BatchError, match=f"line {number} of .* is damaged: remove that line"):
            answer_file(source, target, BatchSettings())
    journal.write_text("".join([*text[:2], *text[3:]]))
    fake.die = None
    assert answer_file(source, target, BatchSettings()).written
    check_whole(target)


def test_a_group_that_a_worker_sends_twice_is_written_once(tmp_path):
    with Journal(tmp_path / "j.jsonl", {"settings": {}}) as journal:
        done = DoneRows(journal, 2)
        for answer in ("first", "second"):
            done.add(1, [BatchRow(2, {}).outcome(answer=answer)])
        assert list(done.pending()) == [0] and done.answered == 1
        done.add(0, [BatchRow(1, {}).outcome(reason="gone")])
        assert list(done.rows(True)) == [{"answer": "first"}] and list(done.rows(False)) == [{"reason": "gone"}]
        assert done.reason == "gone" and len(done) == 2 == len(DoneRows(journal, 2))


def test_an_input_that_changes_during_the_run(fake, tmp_path):
    source, target = made(tmp_path), tmp_path / "out.jsonl"
    for rows in (9, 23):
        with pytest.raises(BatchError, match="has changed during the run: restore it, or name another output"):
            answer_file(
                source,
                target,
                BatchSettings(),
                progress=lambda done, _, rows=rows: os.utime(source, (0, 0)) if done == rows else None,
            )
        assert not target.exists()
        made(tmp_path)
    assert answer_file(source, target, BatchSettings()).before == 23
    check_whole(target)
    with pytest.raises(BatchError, match="holds no rows"):
        answer_file(write(tmp_path / "empty.jsonl", [b"\n"]), tmp_path / "e.jsonl", BatchSettings())
    with pytest.raises(BatchError, match=r"cannot read .*none.jsonl: No such file"):
        answer_file(tmp_path / "none.jsonl", tmp_path / "e.jsonl", BatchSettings())


def test_fifty_rows_without_an_answer_are_enough(fake, tmp_path):
    target = tmp_path / "out.jsonl"
    source = write(tmp_path / "in.jsonl", [{"video": "gone.mp4", "question": "what ?"}] * 120)
    with pytest.raises(BatchError, match=r"none of the first 52 rows .* because: gone; nothing is kept\. Is --vid"):
        answer_file(source, target, BatchSettings(batch=4))
    assert len(fake.asked) == 52 and [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    write(source, [{"video": "v.mp4", "question": "what ?"}, *[{"video": "gone.mp4", "question": "what ?"}] * 60])
    assert answer_file(source, target, BatchSettings()).failed == 60, "one answer: it is not all of them"


def test_a_run_that_failed_throughout_and_was_killed_ends_when_resumed(fake, tmp_path, monkeypatch):
    target = tmp_path / "out.jsonl"
    source = write(tmp_path / "in.jsonl", [{"video": "gone.mp4", "question": "what ?"}] * 3)
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(batch, "_check_first", lambda done, rows: len(done) < 3 or {}["killed"])
        answer_file(source, target, BatchSettings())
    with pytest.raises(BatchError, match="none of the 3 rows could be answered"):
        answer_file(source, target, BatchSettings())
    assert not target.exists()


def test_rows_that_workers_do_not_return_are_missed(fake, tmp_path):
    def answer(rows, groups, settings, readers):
        yield from batch_groups.answer_groups(rows, list(groups)[:-1], settings, readers)

    source, target = made(tmp_path), tmp_path / "out.jsonl"
    with pytest.raises(BatchError, match="1 rows have no outcome: run the same command again"):
        answer_file(source, target, BatchSettings(), answer=answer)
    assert not target.exists() and answer_file(source, target, BatchSettings()).before == 22
    check_whole(target)


def test_memory_holds_two_numbers_a_group(tmp_path):
    source = write(tmp_path / "in.jsonl", ({"video": "v.mp4", "question": "x" * 99, "n": n} for n in range(20_000)))
    rows = Rows(source, tmp_path, 8)
    assert (rows.count, rows.groups) == (20_000, 2500)
    assert rows._starts.itemsize * len(rows._starts) == 20_000
    assert [row.fields["n"] for row in rows.group(2499)] == list(range(19_992, 20_000))


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["vidsieve", "batch", "--model", "testbed", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def test_ctrl_c_ends_the_call_and_keeps_what_is_answered(fake, ctrl_c, tmp_path, monkeypatch, capsys):
    source, target = made(tmp_path), tmp_path / "out.jsonl"
    said = Fake.__call__

    def press(self, read):
        outcomes = said(self, read)
        if len(Fake.asked) == 8:
            signal.raise_signal(signal.SIGINT)
        return outcomes

    monkeypatch.setattr(Fake, "__call__", press)
    assert run(monkeypatch, source, target, "--batch", 4) == 130
    printed = capsys.readouterr()
    assert (
        "Ctrl-C again stops at once" in printed.err
        and "stopped: 7 of 23 rows answered, 1 failed; they are in" in printed.out
    )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and not target.exists()
    assert run(monkeypatch, source, target, "--batch", 4) == 1, "some rows failed"
    out = " ".join(capsys.readouterr().out.split())
    assert f"19 of 23 rows answered, 4 failed (8 of them by earlier runs): {target}; the reasons are in" in out
    assert run(monkeypatch, source, target, "--batch", 4) == 1
    assert "is finished already: 19 of 23 rows answered, 4 failed; nothing was done" in " ".join(
        capsys.readouterr().out.split()
    )

    def twice(self, read):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Fake, "__call__", twice)
    assert run(monkeypatch, source, tmp_path / "other.jsonl") == 130
    assert "other.journal.jsonl: the same command resumes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["out.json"], "its name must end in .jsonl"),
        (["in.jsonl"], "would overwrite the file that is read"),
        (["out.jsonl", "--ray", "2", "--device", "cuda:1"], "Ray gives each worker its GPU"),
        (["out.jsonl", "--method", "evz"], "'evs'"),
        (["out.jsonl", "--fps", "0"], "--fps must be a finite number above 0, got 0"),
        (["out.jsonl", "--policy", "testbed"], "divprune is not trained and takes no policy"),
        (["out.jsonl", "--model", "nothing"], "no folder nothing"),
        (["out.jsonl", "--retention", "2"], "retention"),
    ],
)
def test_mistakes_are_told(cli, tmp_path, given, said):
    source = made(tmp_path)
    assert said in cli("batch", source, tmp_path / given[0], "--model", "testbed", *given[1:], fails=True)


def test_not_one_answer_is_a_failure(fake, tmp_path, monkeypatch, capsys):
    source = write(tmp_path / "in.jsonl", [{"video": "gone.mp4", "question": "what ?"}] * 3)
    assert run(monkeypatch, source, tmp_path / "out.jsonl") == 2
    assert "none of the 3 rows could be answered, the first because: gone; nothing is kept" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"], "the next command has nothing in its way"


def test_ray_that_is_not_there(cli, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    said = cli("batch", made(tmp_path), tmp_path / "out.jsonl", "--model", "testbed", "--ray", 1, fails=True)
    assert "pip install 'vidsieve[ray]'" in said and not (tmp_path / "out.journal.jsonl").exists()


@pytest.mark.slow
def test_killed_for_real(scenes, tmp_path):
    """The command as a user runs it, kill -9 when some rows are settled, and once more."""
    command = [
        sys.executable,
        "-m",
        "vidsieve",
        "batch",
        scenes / "in.jsonl",
        tmp_path / "out.jsonl",
        "--model",
        "testbed",
        "--frames",
        "4",
        "--max-new-tokens",
        "3",
        "--threads",
        "1",
    ]
    journal = tmp_path / "out.journal.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 4):
        time.sleep(0.005)
    process.kill()
    process.wait()
    settled = journal.read_bytes().count(b"\n") - 1
    assert settled >= 4 and not (tmp_path / "out.jsonl").exists()
    report = answer_file(scenes / "in.jsonl", tmp_path / "out.jsonl", BatchSettings(**QUICK, device="auto"))
    assert report.before == settled and report.written
    answer_file(scenes / "in.jsonl", tmp_path / "straight.jsonl", BatchSettings(**QUICK))
    for name in ("", ".failed"):
        assert (tmp_path / f"out{name}.jsonl").read_bytes() == (tmp_path / f"straight{name}.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_gives_the_same_files_and_goes_on(scenes, tmp_path):
    ray = pytest.importorskip("ray")
    from vidsieve.serving.ray_batch import answer_on_ray

    on_ray = partial(answer_on_ray, workers=1)

    source, target, settings = scenes / "in.jsonl", tmp_path / "ray.jsonl", BatchSettings(**QUICK, batch=2)
    answer_file(source, tmp_path / "here.jsonl", settings)
    rows = Rows(source, scenes.resolve(), 2)
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=300 * 2**20, log_to_driver=False)
    try:
        groups = count(1)
        first = answer_file(source, target, settings, answer=on_ray, stop=lambda: next(groups) == 3)
        assert first.stopped and first.answered + first.failed == 6
        second = answer_file(source, target, settings)  # a start of Ray's workers takes longer than all else here
        assert second.written and second.before == 6
        with pytest.raises(BatchError, match="3 workers need a CPU each, and Ray has 2"):
            next(answer_on_ray(rows, [0], settings, 2, workers=3))
        with pytest.raises(VidsieveError, match="no folder nothing"):
            next(on_ray(rows, [0], BatchSettings(model="nothing", batch=2), 2))
    finally:
        ray.shutdown()
    for name in ("", ".failed"):
        assert (tmp_path / f"ray{name}.jsonl").read_bytes() == (tmp_path / f"here{name}.jsonl").read_bytes()
