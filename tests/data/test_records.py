"""Records of published files: the rows of each layout, parts that are left out, and messages about wrong ones."""

from __future__ import annotations

import csv
import io
import json
import math
import tracemalloc
from pathlib import Path
from unittest import mock

import pytest
from file_rows import rows_of
from hypothesis import given
from hypothesis import strategies as st

from vidsieve.errors import TrainingError
from vidsieve.io import bounded
from vidsieve.training.data import reading
from vidsieve.training.data.layouts import IMAGE_BYTES, LAYOUTS, files_of, layout_of, read_records
from vidsieve.training.data.skipped import Skipped
from vidsieve.training.data.table import load_rows


def turns(*said):
    return [{"from": who, "value": text} for who, text in zip(("human", "gpt") * len(said), said, strict=False)]


CHOICE = "What is it?\nA. a dog\nB. a cat\nPlease answer with the option's letter."
VIDEO = {"id": "x", "data_source": "0_30_s_academic", "video": "academic/x.mp4"}


@pytest.fixture
def write(tmp_path):
    def written(*records, name="rows.json"):
        path = tmp_path / name
        text = "\n".join(map(json.dumps, records)) if name.endswith("l") else json.dumps(list(records))
        path.write_text(text, encoding="utf-8")
        return path

    return written


def test_a_conversation_gives_a_row_for_each_pair(write, tmp_path):
    """Options and letter out of the turns, the placeholder and the instruction left out, the rest free-form."""
    path = write(VIDEO | {"conversations": turns(f"<image>\n{CHOICE}", "B. a cat", "What does it do?", "It sleeps.")})
    assert layout_of(path).name == "llava"
    video = {"source": "0_30_s_academic", "video": str(tmp_path / "academic/x.mp4")}
    assert rows_of(path) == [
        video
        | {
            "question": "What is it?",
            "options": ["A. a dog", "B. a cat"],
            "answer": "B",
            "problem_type": "multiple choice",
        },
        video | {"question": "What does it do?", "answer": "It sleeps.", "problem_type": "free-form"},
    ]
    assert rows_of(path, tmp_path / "root")[0]["video"] == str(tmp_path / "root" / "academic/x.mp4")


@pytest.mark.parametrize(
    ("name", "asked", "answer", "caption"),
    [
        ("rows.json", "<image>\nPlease describe the video in detail.", "A dog runs.", True),
        ("rows.json", "<video>Give a summary of it.", "A dog runs.", True),
        ("rows.json", "What runs?", "A dog runs.", False),
        ("0_30_s_academic_v0_1_cap_processed.json", "What runs?", "A dog runs.", True),
    ],
)
def test_what_is_a_caption(write, name, asked, answer, caption):
    (row,) = rows_of(write(VIDEO | {"conversations": turns(asked, answer)}, name=name))
    assert ("caption" in row) is caption and row.get("caption", row.get("answer")) == answer
    assert (row["prompt"] if caption else row["question"]) == asked.replace("<image>\n", "").replace("<video>", "")


def test_a_description_among_other_turns_is_a_question(write):
    rows = rows_of(write(VIDEO | {"conversations": turns("Describe the video.", "A dog.", "Why?", "Nobody knows.")}))
    assert [row["problem_type"] for row in rows] == ["free-form", "free-form"]


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        (turns(CHOICE, "D. a fox"), "is none of the options"),
        (turns("only a question"), "conversations: expected array of length >= 2"),
        (turns(CHOICE, "A", "and"), "one after the other"),
        (turns("what ?", "  "), "conversations: an answer is empty"),
        (turns("<image>", "It sleeps."), "conversations: a question is empty"),
        (
            [{"from": "human", "value": 3}, {"from": "gpt", "value": "x"}],
            "conversations[0].value: expected str, got int",
        ),
        ("x", "conversations: expected array, got str"),
    ],
)
def test_wrong_conversations_are_named_and_the_others_read(write, said, fault):
    good = VIDEO | {"conversations": turns(CHOICE, "A")}
    records = list(read_records(write(good, VIDEO | {"conversations": said}, good)))
    assert [len(record.rows) for record in records] == [1, 0, 1]
    assert records[1].number == 2 and fault in records[1].fault


def test_images_with_captions_and_what_is_none(write, tmp_path):
    image = {"id": "1", "image": "a.png", "conversations": turns("<image>\nWhat is this?", "word " * 10)}
    short = image | {"conversations": turns("<image>\nWhat is this?", "word " * 9)}
    text, many = {"conversations": turns("a", "b")}, image | {"image": ["a.png", "b.png"]}
    records = list(read_records(write(image, short, text, many)))
    assert records[0].rows == ({"image": str(tmp_path / "a.png"), "caption": ("word " * 10).strip()},)
    assert [record.left_out for record in records[1:]] == [
        {"an answer of fewer than 10 words, no caption": 1},
        {"neither a video nor an image": 1},
        {"several images": 1},
    ]


def test_fields_of_a_users_own_change_nothing(write, tmp_path):
    """Whatever their names: a size in bytes does not make a row an image, and its missing video is noticed."""
    (tmp_path / "a.mp4").touch()
    rows = [{"video": name, "caption": "a dog", "bytes": 123, "inside": True} for name in ("a.mp4", "gone.mp4")]
    path, skipped = write(*rows, name="rows.jsonl"), Skipped()
    assert list(load_rows(path, skipped=skipped)) == [rows[0] | {"video": str(tmp_path / "a.mp4")}]
    assert skipped.videos["missing"] == 1


def test_parquet_has_its_images_inside(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        {
            "id": str(n),
            "image": {"bytes": bytes([n]) if n else b"", "path": None},
            "data_source": "coco",
            "conversations": turns("<image>\nDescribe.", "word " * 12),
        }
        for n in range(150)
    ]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    records = list(read_records(tmp_path / "train.parquet"))
    assert records[0].fault == "image.bytes: expected bytes of length >= 1" and len(records) == 150
    assert [record.rows[0][IMAGE_BYTES] for record in records[1:]] == [bytes([n]) for n in range(1, 150)]
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "train.parquet").read_bytes()[:-10])
    with pytest.raises(TrainingError, match=r"cannot read .*cut\.parquet"):
        list(read_records(tmp_path / "cut.parquet"))


def test_clips_are_found_by_their_name(tmp_path):
    with (tmp_path / "Koala_36M_1.csv").open("w", newline="") as file:
        made = csv.writer(file)
        made.writerow(["videoID", "url", "timestamp", "caption", "clarity_score"])
        for name, caption in (("a_0", "A dog,\nrunning."), ("b_1", "x"), ("gone_2", "y"), ("c_3", " "), ("", "z")):
            made.writerow([name, "https://example.org", "['0:00:01.0', '0:00:04.0']", caption, "1.0"])
    root = tmp_path / "clips"
    (root / "part").mkdir(parents=True)
    (root / "a_0.mp4").touch()
    (root / "part" / "b_1.mkv").touch()
    records = list(read_records(tmp_path / "Koala_36M_1.csv", root))
    assert [record.rows[0]["video"] for record in records[:3]] == [
        str(root / "a_0.mp4"),
        str(root / "part" / "b_1.mkv"),
        str(root / "gone_2.mp4"),
    ]
    assert records[0].rows[0]["caption"] == "A dog,\nrunning."
    assert [record.fault for record in records[3:]] == [
        "caption: expected a text that is not empty",
        "videoID: expected a text that is not empty",
    ]


def test_lines_that_are_no_json_are_faults_and_a_list_that_breaks_off_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf\n{"video": "a.mp4", "caption": "c"}\n{"video":\n\xff\n{"video": "b.mp4", "caption": "d"}'
    )
    records = list(read_records(path))
    assert [(record.number, len(record.rows)) for record in records] == [(2, 1), (3, 0), (4, 0), (5, 1)]
    assert "is not JSON" in records[1].fault and "is not UTF-8" in records[2].fault
    path = tmp_path / "rows.json"
    path.write_text('[{"video": "a.mp4", "caption": "c"}, {"video": "b')
    with pytest.raises(TrainingError, match=r"breaks off after record 1: fetch it again"):
        list(read_records(path))
    path.write_text('[{"video": "a.mp4", "caption": "c"}, ')
    with pytest.raises(TrainingError, match=r"breaks off after record 1: fetch it again"):
        list(read_records(path))


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(JSON, max_size=6), st.integers(1, 9), st.sampled_from([None, 1]))
def test_a_json_list_is_read_as_the_json_module_reads_it(values, chunk, indent):
    text = json.dumps(values, indent=indent, ensure_ascii=False)
    with mock.patch.object(bounded, "CHUNK", chunk):
        assert [value for _, value in reading._list(Path("x.json"), io.BytesIO(text.encode()))] == json.loads(text)


def test_nan_is_read_in_a_list_as_it_is_in_lines(write, tmp_path):
    row = {"video": "a.mp4", "caption": "c", "duration": math.nan, "score": -math.inf}
    for name, text in {"rows.jsonl": json.dumps(row), "rows.json": json.dumps([row, row])}.items():
        (tmp_path / name).write_text(text)
        records = list(read_records(tmp_path / name))
        assert records and all(record.rows[0]["caption"] == "c" and not record.fault for record in records)


def test_memory_does_not_grow_with_a_list(tmp_path):
    peaks = []
    for count in (500, 2_000, 20_000):
        path = tmp_path / f"{count}.json"
        path.write_text(json.dumps([{"video": "a.mp4", "caption": "word " * 50}] * count))
        tracemalloc.start()
        assert sum(1 for _ in reading.raw_records(path)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert path.stat().st_size > 5e6
    assert peaks[2] < peaks[1] + 1e5  # the first one imports what it needs


def test_a_file_of_no_known_layout_says_what_it_has_and_what_is_known(write, tmp_path):
    with pytest.raises(TrainingError, match=r"its first record has clip, text\. Known: Koala-36M, LLaVA.*Video-R1"):
        layout_of(write({"clip": "a.mp4", "text": "x"}))
    with pytest.raises(TrainingError, match="holds no records"):
        layout_of(write())
    with pytest.raises(TrainingError, match=r"cannot read .*No such file"):
        layout_of(tmp_path / "gone.json")


def test_every_layout_has_its_name():
    from importlib import import_module

    layouts = {name: import_module(module).LAYOUT for name, module in LAYOUTS.items()}
    assert all(layout.name == name and layout.title for name, layout in layouts.items())


def test_paths_of_all_that_a_row_shows(write, tmp_path):
    (row,) = rows_of(write({"frames": [["a.png", 3], ["deep/b.png", 4]], "caption": "c"}, name="rows.jsonl"))
    assert files_of(row) == [str(tmp_path / "a.png"), str(tmp_path / "deep/b.png")]
