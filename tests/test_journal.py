"""Results in a folder: whole lines only, nothing twice, nothing of another run."""

from __future__ import annotations

import json
import random

import pytest

from vidsieve.errors import EvaluationError, OutputError, TrainingError
from vidsieve.io.journal import Journal, Store, measure_all

CONFIG = {"task": "t", "versions": {"vidsieve": "1"}}


def test_a_line_that_was_being_written_is_measured_again(tmp_path):
    with Store(tmp_path, CONFIG) as store:
        store.add("a", {"x": 1})
        store.add("b", {"x": "ü\u2028"})
    path = tmp_path / "units-1-of-1.jsonl"
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with Store(tmp_path, CONFIG) as store:
            asked = []
            found = measure_all(store, ["a", "b"], lambda unit, asked=asked: asked.append(unit) or {"x": unit})
        assert list(found) == ["a", "b"] and len(asked) == 2 - whole[:cut].count(b"\n")
        assert [json.loads(line)["unit"] for line in path.read_text().split("\n")[:-1]] == ["a", "b"]


def test_shares_measure_every_unit_once_whatever_their_number(tmp_path):
    units, asked = [f"video {n}" for n in range(11)], []

    def measure(unit):
        asked.append(unit)
        return {"length": len(unit)}

    for share in ((0, 3), (1, 3)):
        with Store(tmp_path, CONFIG, share) as store:
            found = measure_all(store, units, measure)
    assert len(found) == 8
    for share in ((0, 2), (1, 2)):  # the third process never came; two others go on
        with Store(tmp_path, CONFIG, share) as store:
            found = measure_all(store, units, measure)
    assert list(found) == units and sorted(asked) == sorted(units)


def test_another_runs_folder_is_refused_and_says_what_differs(tmp_path):
    with Store(tmp_path, CONFIG) as store:
        store.add("a", {})
    with pytest.raises(EvaluationError, match=r'versions: \{"vidsieve": "1"\} there, \{"vidsieve": "2"\} now'):
        Store(tmp_path, CONFIG | {"versions": {"vidsieve": "2"}})
    with pytest.raises(EvaluationError, match="seed: null there, 1 now"):
        Store(tmp_path, CONFIG | {"seed": 1})


def test_two_processes_with_one_share_and_damaged_lines_are_refused(tmp_path):
    with Store(tmp_path, CONFIG) as store:
        with pytest.raises(EvaluationError, match="another process is writing"):
            Store(tmp_path, CONFIG)
        store.add("a", {})
    (tmp_path / "units-1-of-1.jsonl").write_text('{"unit": "a"}\n{"unit": \n')
    with Store(tmp_path, CONFIG) as store, pytest.raises(EvaluationError, match=r"line 2 of .* is damaged"):
        store.records()
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(EvaluationError, match=r"run\.json is damaged"):
        Store(tmp_path, CONFIG)


def test_without_a_folder_everything_is_measured_in_memory():
    seen = []
    found = measure_all(None, ["a", "b"], lambda unit: {"x": unit}, lambda *done: seen.append(done))
    assert [record["x"] for record in found.values()] == ["a", "b"] and seen == [(1, 2), (2, 2)]


def test_of_long_settings_what_differs_is_told(tmp_path):
    many = {f"condition number {n}": {"kept": n} for n in range(9)}
    with Store(tmp_path, {"conditions": many, "rows": list(range(99))}):
        pass
    other = {**many, "divprune": {"kept": 1}}
    with pytest.raises(EvaluationError, match=r"conditions: only now divprune\)"):
        Store(tmp_path, {"conditions": other, "rows": list(range(99))})
    with pytest.raises(EvaluationError, match=r"rows: only now -1\)"):
        Store(tmp_path, {"conditions": many, "rows": [*range(99), -1]})
    changed = {**many, "condition number 3": {"kept": 5}}
    with pytest.raises(
        EvaluationError, match=r'conditions: \(condition number 3: \{"kept": 3\} there, \{"kept": 5\} now\)'
    ):
        Store(tmp_path, {"conditions": changed, "rows": list(range(99))})


HEADER = {"batch": 1, "settings": {"seed": 1, "prompt": "x" * 90 + "a"}}


def entries(journal):
    found = []
    journal.load(lambda entry, place: found.append((place, entry)))
    return found


def test_a_journal_survives_being_cut_at_any_byte(tmp_path):
    path = tmp_path / "run.jsonl"
    with Journal(path, HEADER) as journal:
        places = [journal.add({"row": row}) for row in ("a", "\udcff")]
        assert list(journal.read(places[::-1])) == [{"row": "\udcff"}, {"row": "a"}]
    whole = path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["run.jsonl"]  # the lock is gone
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with Journal(path, HEADER) as journal:
            kept = [entry["row"] for _, entry in entries(journal)]
            assert len(kept) == max(0, whole[:cut].count(b"\n") - 1)
            for row in ("a", "\udcff")[len(kept) :]:
                journal.add({"row": row})
        assert path.read_bytes() == whole


def test_a_journal_of_another_run_is_refused_once_it_has_entries(tmp_path):
    path, other = tmp_path / "run.jsonl", {"batch": 1, "settings": {"seed": 1, "prompt": "x" * 90 + "b"}}
    with Journal(path, HEADER):
        pass
    with Journal(path, other) as journal:  # nothing in it yet: it becomes this run's
        journal.add({})
    with (
        pytest.raises(TrainingError, match=r'prompt: …x{20}b" there, …x{20}a" now'),
        Journal(path, HEADER, error=TrainingError),
    ):
        pass
    with (
        pytest.raises(EvaluationError, match="not a journal of this command"),
        Journal(path, {"annotation": 1, "settings": other["settings"]}),
    ):
        pass


def test_a_journal_is_locked_finished_and_discarded(tmp_path):
    path = tmp_path / "run.jsonl"
    with Journal(path, HEADER) as journal:
        with (
            pytest.raises(TrainingError, match="another process is writing"),
            Journal(path, HEADER, error=TrainingError),
        ):
            pass
        journal.add({"row": 1})
        journal.replace({**HEADER, "finished": {"rows": 1}})
    with Journal(path, HEADER) as journal:
        assert journal.header["finished"] == {"rows": 1} and entries(journal) == []
        journal.discard()
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="enter the journal"):
        journal.add({})
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"), Journal(tmp_path / "file" / "run.jsonl"):
        pass


def test_a_changed_byte_of_a_journal_never_gives_another_entry(tmp_path):
    """Any byte of any line: the entries are the written ones, or those before a line that is cut off, or an error."""
    path = tmp_path / "run.jsonl"
    with Journal(path, HEADER) as journal:
        for row in range(4):
            journal.add({"row": row, "text": "ü" * row})
        places = [place for place, _ in entries(journal)]
        written = list(journal.read(places))
    whole = path.read_bytes()
    chance = random.Random(1)
    for place in range(len(whole)):
        broken = bytearray(whole)
        broken[place] ^= 1 << chance.randrange(8)
        path.write_bytes(broken)
        try:
            with Journal(path, HEADER) as journal:
                found = [entry for _, entry in entries(journal)]
        except EvaluationError as error:
            assert str(path) in str(error)
            continue
        # Only the last line may be gone, and only where its end was hit; or the name of a line's checksum was.
        assert len(found) == 4 or place == len(whole) - 1
        assert [{key: entry[key] for key in ("row", "text")} for entry in found] == written[: len(found)]
    path.write_bytes(whole[: places[1]] + bytes(places[2] - places[1]) + whole[places[2] :])
    with Journal(path, HEADER) as journal:
        with pytest.raises(EvaluationError, match=r"line 3 of .*run.jsonl is damaged: remove that line, and"):
            entries(journal)
        with pytest.raises(EvaluationError, match=r"run\.jsonl was damaged meanwhile: run the same command again"):
            list(journal.read(places))


@pytest.mark.parametrize("line", ["[" * 100_000, '{"row": ' + "9" * 10_000 + "}", "\0" * 50, "[]"])
def test_a_line_that_is_no_entry_is_named(tmp_path, line):
    path = tmp_path / "run.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(EvaluationError, match=r"line 1 of .*run\.jsonl is damaged"):
        Journal(path).load(lambda entry, place: entry["row"])
    with pytest.raises(EvaluationError, match="is not a journal of this command, or its first line is damaged"):
        Journal(path, HEADER).check()


def test_a_journal_of_an_older_version_goes_on(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (HEADER, {"row": 1})))
    with Journal(path, HEADER) as journal:
        journal.add({"row": 2})
        assert [entry for _, entry in entries(journal)] == [{"row": 1}, {"row": 2}]
