"""Rows of training prompts: which option an answer means, what a row may hold, which videos can be held out."""

from __future__ import annotations

import json

import pytest

from vidsieve.errors import TrainingError
from vidsieve.training.data.filtering import filter_file
from vidsieve.training.data.layouts import read_all
from vidsieve.training.data.prompts import FilePrompts
from vidsieve.training.data.table import held_out, keys_of, load_rows


def rows_file(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


ASKED = {"video": "a.mp4", "question": "?", "options": ["red", "blue"], "answer": "red"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"video": "a.mp4", "caption": "c", "question": "?"}, "question, options and answer"),
        ({"video": 5, "caption": "c"}, "video must be a path, got 5"),
        ({"video": "a.mp4", "caption": None}, "caption must be a text that is not empty, got None"),
        ({"video": "a.mp4", "caption": "  "}, "caption must be a text"),
        ({"video": "a.mp4"}, "a row needs"),
        (["a"], "a row needs"),
        ({"caption": "c"}, "a row needs"),
        (ASKED | {"options": ["red"]}, "two or more"),
        ({"frames": [["a.png", 0]], "caption": "c"}, "frames must be"),
    ],
)
def test_malformed_rows_are_named_by_line(tmp_path, row, said):
    with pytest.raises(TrainingError, match=f"1 of 2 records in .* are malformed.*: record 2: .*{said}"):
        read_all(rows_file(tmp_path, ASKED, row))


def test_a_wrong_answer_is_told_before_training(testbed, tmp_path):
    from vidsieve.adapters.pruning import adapter_for

    (tmp_path / "a.mp4").touch()
    model, processor = testbed
    path = rows_file(tmp_path, ASKED, ASKED | {"answer": "green"})
    prompts = FilePrompts(adapter_for(model), processor, path)
    assert len(prompts.choices) == 1
    assert "record 2: the answer 'green' is none of its options" in prompts.skipped.summary()


def test_images_that_rows_share_are_held_out_together(tmp_path):
    rows = [
        {"frames": [[f"{group}{i}.png", 3], [f"{group}{i + 1}.png", 3]], "caption": "c"}
        for group in "abcdefgh"
        for i in range(3)
    ]
    path = rows_file(tmp_path, *rows)
    for share in (0.05, 0.25, 0.5):
        view = load_rows(path, present=False)
        held = held_out(view, share, path)
        sides = [bool(keys_of(row) & held) for row in view]
        assert all(keys_of(row) <= held for row, side in zip(view, sides, strict=True) if side)
        assert 0 < sum(sides) / len(rows) <= share + 0.13 and not all(sides)
    with pytest.raises(TrainingError, match="hang together"):
        held_out(load_rows(rows_file(tmp_path, *rows[:3]), present=False), 0.5, path)


def test_a_filter_keeps_other_kinds_of_question(testbed, tmp_path):
    counted = {"video": "a.mp4", "question": "how many ?", "answer": "3", "problem_type": "numerical"}
    lines = [
        ASKED | {"question": f"what colour is the {name} ?", "answer": right}
        for name in ("home", "disc", "wedge")
        for right in ("red", "blue")
    ]
    path = rows_file(tmp_path, *lines, counted, {"video": "a.mp4", "caption": "c"})
    found = filter_file(path, tmp_path / "out.jsonl", [testbed])
    assert (found.questions, found.captions, found.others) == (6, 1, 1)
    left = read_all(tmp_path / "out.jsonl")
    assert [row["question"] for row in left if "problem_type" in row] == ["how many ?"]
    assert len(left) == found.kept + 2
