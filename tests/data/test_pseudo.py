"""Pseudo-videos: what is drawn, what is left out, and that a model is trained on them."""

from __future__ import annotations

import json
import os
from collections import Counter

import numpy as np
import pytest
import torch
from file_rows import rows_of
from PIL import Image

from vidsieve.adapters.pruning import adapter_for
from vidsieve.errors import TrainingError, VideoError
from vidsieve.testbed.files import write_scenes
from vidsieve.training.data.filtering import filter_file
from vidsieve.training.data.prompts import FilePrompts
from vidsieve.training.data.pseudo import pseudo_file
from vidsieve.training.recipes import train_policy
from vidsieve.training.rollouts import Rollouts
from vidsieve.training.sources import Files
from vidsieve.video.reading import read_frames


def paint(path, colour, size=(40, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


def listed(folder, count=12):
    """Return a file of so many images of different colours in a folder beside it, each with its caption."""
    lines = []
    for number in range(count):
        paint(folder / "images" / f"{number}.png", (20 * number, 0, 0), (40 + number, 30))
        lines.append({"image": f"images/{number}.png", "caption": f"  red\n{number} . "})
    path = folder / "images.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_videos_are_what_was_asked_for_and_what_the_file_says(tmp_path):
    made = pseudo_file(listed(tmp_path), tmp_path / "deep" / "out.jsonl", count=60, seed=3)
    rows = [json.loads(line) for line in (tmp_path / "deep" / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 60 == len(made.videos)
    for row in rows:
        names = [name for name, _ in row["frames"]]
        assert len(set(names)) == len(names) and all(name.startswith("../images/") for name in names)
        numbers = [name.split("/")[-1].removesuffix(".png") for name in names]
        assert row["caption"] == " ".join(f"red {number} ." for number in numbers), "captions in order, blanks tidied"
    assert {len(row["frames"]) for row in rows} == {2, 3, 4}
    assert {times for row in rows for _, times in row["frames"]} == {3, 4, 5, 6}


def test_every_image_comes_before_any_comes_again(tmp_path):
    """Never the same image twice in one video, across reshuffles too; then every count is the same or one more."""
    made = pseudo_file(listed(tmp_path, 5), tmp_path / "out.jsonl", count=200, images=(2, 4))
    drawn = [part.image for video in made.videos for part, _ in video.parts]
    for video in made.videos:
        assert len({part.image for part, _ in video.parts}) == len(video.parts)
    counts = Counter(drawn).values()
    assert max(counts) - min(counts) <= 1
    assert set(drawn[:5]) == set(drawn), "the first five draws are the five images"


def test_an_image_with_two_captions_is_one_image(tmp_path):
    source = listed(tmp_path, 2)
    with source.open("a") as file:
        file.write(json.dumps({"image": "images/../images/0.png", "caption": "again"}) + "\n")
    made = pseudo_file(source, tmp_path / "out.jsonl", count=50, images=(2, 2))
    assert all(len({path for path, _ in video.frames}) == 2 for video in made.videos)
    with pytest.raises(TrainingError, match="has 2 usable images, and a video needs up to 3"):
        pseudo_file(source, tmp_path / "out.jsonl", images=(2, 3))


def test_the_seed_decides(tmp_path):
    source, texts = listed(tmp_path), []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pseudo_file(source, tmp_path / name, seed=seed)
        texts.append((tmp_path / name).read_bytes())
    assert texts[0] == texts[1] != texts[2]


def test_the_usual_number_shows_each_image_about_once(tmp_path):
    source = listed(tmp_path, 12)
    assert len(pseudo_file(source, tmp_path / "out.jsonl").videos) == 4
    assert len(pseudo_file(source, tmp_path / "out.jsonl", images=(2, 2)).videos) == 6


def test_bad_rows_are_left_out_with_reasons_and_each_image_is_opened_once(tmp_path, monkeypatch):
    source = listed(tmp_path, 4)
    whole = (tmp_path / "images" / "0.png").read_bytes()
    (tmp_path / "images" / "cut.png").write_bytes(whole[:50])
    (tmp_path / "images" / "text.png").write_text("no image")
    bad = [
        '{"image": "images/gone.png", "caption": "x"}',
        '{"image": "images/cut.png", "caption": "x"}',
        '{"image": "images/text.png", "caption": "x"}',
        '{"image": "images/0.png", "caption": " \\n"}',
        '{"image": "images/0.png"}',
        '{"caption": "x"}',
        "[1]",
        "{",
        '{"image": "images/text.png", "caption": "y"}',
    ]
    with source.open("a") as file:
        file.write("\n".join(bad))
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or real(path))
    made = pseudo_file(source, tmp_path / "out.jsonl")
    assert made.images == 4 and max(Counter(opened).values()) == 1
    needs = "a row needs video, and caption or question and options; or frames or image, and caption"
    assert [(row.record, row.reason) for row in made.left_out[:-2]] == [
        (5, "missing image"),
        (6, "unreadable image"),
        (7, "unreadable image"),
        (8, "caption: expected a text that is not empty"),
        (9, needs),
        (10, needs),
        (11, needs),
    ]
    assert made.left_out[-2].reason.startswith("is not JSON") and made.left_out[-1].reason == "unreadable image"
    assert made.as_dict()["skipped"]["unreadable image"] == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": (0, 2)}, "images must be from 1 up"),
        ({"frames": (4, 3)}, "frames must be .*the least first"),
        ({"count": 0}, "count must be at least 1"),
        ({"images": (2, 5)}, "has 4 usable images, and a video needs up to 5"),
    ],
)
def test_what_cannot_be_is_refused_before_a_file_is_written(tmp_path, settings, message):
    with pytest.raises(TrainingError, match=message):
        pseudo_file(listed(tmp_path, 4), tmp_path / "out.jsonl", **settings)
    assert not (tmp_path / "out.jsonl").exists()


# -- reading them ---------------------------------------------------------------------------------------------


def test_images_become_the_frames_of_a_video(tmp_path):
    paint(tmp_path / "a.png", (200, 0, 0), (40, 30))
    paint(tmp_path / "b.png", (0, 0, 200), (90, 90), mode="P")
    Image.new("RGBA", (40, 30), (0, 200, 0, 255)).save(tmp_path / "c.png")
    video = read_frames([(tmp_path / "a.png", 3), (tmp_path / "b.png", 1), (tmp_path / "c.png", 2)])
    assert video.pixels.shape == (6, 30, 40, 3) and video.pixels.dtype == np.uint8
    assert [int(frame[0, 0].argmax()) for frame in video.pixels] == [0, 0, 0, 2, 1, 1]
    assert video.timestamps.tolist() == [0, 1, 2, 3, 4, 5] and (video.fps, video.duration) == (1, 6)
    assert video.num_frames == 6 and video.size == (30, 40)


def test_only_a_video_longer_than_asked_is_thinned_out(tmp_path):
    for number, name in enumerate("abcd"):
        paint(tmp_path / f"{name}.png", (50 * number, 0, 0))
    images = [(tmp_path / f"{name}.png", 6) for name in "abcd"]
    assert len(read_frames(images[:2], frames=16).pixels) == 12
    video = read_frames(images, frames=16)
    assert len(video.pixels) == 16 and video.timestamps[0] == 0 and video.timestamps[-1] == 23
    assert [int(frame[0, 0, 0]) // 50 for frame in video.pixels] == [int(t) // 6 for t in video.timestamps]


def test_an_image_lies_as_its_camera_says(tmp_path):
    turned = Image.new("RGB", (40, 20))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a.jpg", exif=exif)
    assert read_frames([(tmp_path / "a.jpg", 1)]).size == (40, 20), "height 40 where the file has 20"


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "a.png").write_text("no")
    with pytest.raises(VideoError, match=r"a\.png cannot be read as an image"):
        read_frames([(tmp_path / "a.png", 1)])
    with pytest.raises(VideoError, match="at least one image"):
        read_frames([])


def test_a_model_reads_short_and_long_ones(testbed, tmp_path):
    """6 to 24 frames reach the model as they are, as far as the prompts' own limit."""
    model, processor = testbed
    source = listed(tmp_path)
    path = tmp_path / "rows.jsonl"
    images = [f"images/{number}.png" for number in range(4)]
    lengths = [[3, 3], [6, 6], [6, 6, 6, 6]]
    path.write_text(
        "".join(
            json.dumps({"frames": [list(pair) for pair in zip(images, some, strict=False)], "caption": "red ."}) + "\n"
            for some in lengths
        )
    )
    adapter = adapter_for(model)
    for limit, expected in ((16, [6, 12, 16]), (24, [6, 12, 24])):
        prompts = FilePrompts(adapter, processor, path, frames=limit)
        samples = [prompts.caption(number) for number in range(3)]
        found = [Rollouts(adapter, sample.inputs).encoded.videos[0].features.grid.frames for sample in samples]
        assert sorted(found) == expected
    path.write_text(json.dumps({"frames": [["images/gone.png", 3]], "caption": "x"}))
    with pytest.raises(TrainingError, match=r"can be used: 1 missing image of 1 row, first .*images/gone\.png"):
        FilePrompts(adapter, processor, path)
    assert source.exists()


def test_rows_of_both_kinds_in_one_file_and_line_ends_in_captions(testbed, tmp_path):
    """A caption may hold U+2028, which is no end of a row; filtering keeps pseudo-videos, with paths from its file."""
    write_scenes(tmp_path, world="dense", seed=1, scenes=1)
    listed(tmp_path)
    path = tmp_path / "questions.jsonl"
    row = {"frames": [["images/0.png", 3], ["images/1.png", 4]], "caption": "red \u2028 blue ."}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    (tmp_path / "deep").mkdir()
    filter_file(path, tmp_path / "deep" / "left.jsonl", [testbed])
    assert len(rows_of(tmp_path / "deep" / "left.jsonl")) > 2
    lines = (tmp_path / "deep" / "left.jsonl").read_text(encoding="utf-8").split("\n")
    (kept,) = [json.loads(line) for line in lines if '"frames"' in line]
    assert kept["frames"] == [["../images/0.png", 3], ["../images/1.png", 4]] and kept["caption"] == row["caption"]


# -- the command ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_and_training_on_what_it_makes(cli, testbed, tmp_path):
    source = listed(tmp_path)
    with source.open("a") as file:
        file.write('{"image": "images/gone.png", "caption": "x"}\n')
    out = tmp_path / "pseudo.jsonl"
    said = cli(
        "data",
        "pseudo",
        source,
        out,
        "--count",
        5,
        "--images",
        "2-3",
        "--frames",
        3,
        "--seed",
        7,
        "--preview",
        tmp_path / "sheet.png",
        "--json",
        tmp_path / "made.json",
    )
    assert (
        "5 pseudo-videos of" in said and f"left out: 1 × missing image: record 13 ({tmp_path}/images/gone.png)" in said
    )
    made = json.loads((tmp_path / "made.json").read_text())
    assert made["videos"] == 5 and made["images"] == 12 and made["seed"] == 7
    assert made["left_out"] == [{"record": 13, "image": f"{tmp_path}/images/gone.png", "reason": "missing image"}]
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    model, processor = testbed
    record = train_policy(
        "score",
        model,
        processor,
        tmp_path / "run",
        {"steps": 2, "prompts_per_step": 2},
        files=Files(out),
        model_name="testbed",
    )
    assert record["prompts"] == 4 and torch.isfinite(torch.tensor(record["last_metrics"]["loss"]))


def test_the_command_refuses_what_it_cannot_do(cli, tmp_path):
    source = listed(tmp_path, 3)
    out = tmp_path / "out.jsonl"
    assert "images must be two numbers, as 2-4" in cli("data", "pseudo", source, out, "--images", "x", fails=True)
    assert "would overwrite" in cli("data", "pseudo", source, source, fails=True)
    source.write_text('{"image": "gone.png", "caption": "x"}')
    assert "has 0 usable images" in cli("data", "pseudo", source, out, fails=True)
    faulty = ['{"caption": "x"}', '{"image": 1, "caption": "x"}', '{"image": "a.png"}', "[]", "x"]
    source.write_text("\n".join(['{"image": "gone.png", "caption": "x"}', *faulty]))
    said = cli("data", "pseudo", source, out, fails=True)
    assert said.count(" × ") == 3 and "for other reasons" in said and "--image-root" in said, said
    assert not out.exists() and os.listdir(tmp_path / "images")
