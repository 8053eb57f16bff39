"""Each published layout from its file to a training run; broken videos on the way are counted, listed, passed over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vidsieve.adapters.pruning import adapter_for
from vidsieve.errors import TrainingError
from vidsieve.testbed.files import LAYOUTS, write_scenes
from vidsieve.training.data.checking import check_file
from vidsieve.training.data.encodings import EncodingCache
from vidsieve.training.data.prompts import FilePrompts
from vidsieve.training.data.skipped import Skipped
from vidsieve.training.data.table import RecordTable, load_rows
from vidsieve.training.recipes import train_policy
from vidsieve.training.sources import Files

SCENES, BROKEN = 10, 0.3  # one missing, one cut short, one no video
QUICK = {"steps": 3, "prompts_per_step": 4, "workers": 2}
CHOICE, CAPTION = QUICK | {"token_rollouts": 2, "frame_rollouts": 0}, QUICK | {"rollouts": 2}


def listed(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    made = {}

    def render(layout):
        if layout not in made:
            made[layout] = tmp_path_factory.mktemp("set") / layout
            write_scenes(made[layout], world="dense", seed=5, scenes=SCENES, layout=layout, broken=BROKEN)
        folder = made[layout]
        return folder, json.loads((folder / "truth.json").read_text())

    return render


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["vidsieve", "video-r1", "llava-video", "koala-36m"])
def test_from_the_published_file_to_a_policy(testbed, rendered, tmp_path, layout):
    folder, truth = rendered(layout)
    broken = {str(folder / name) for name, how in truth["broken"].items() if how != "missing"}
    names = {Path(name).stem for name, how in truth["broken"].items() if how == "missing"}
    assert len(broken) == 2 and len(names) == 1
    for number, name in enumerate(truth["files"]):
        report = tmp_path / f"{number}.jsonl"
        found = check_file(folder / name, skipped=Skipped(report))
        assert found.videos == SCENES
        lines = listed(report)
        assert {line["where"] for line in lines if line["what"] == "broken video"} == broken
        assert {Path(line["where"]).stem for line in lines if line["what"] == "missing video"} == names
        assert found.rows - found.usable == sum(line["rows"] for line in lines) > 0
        per_scene = found.rows / SCENES
        assert abs(found.rows - found.usable - 3 * per_scene) < 2 * per_scene, "about three scenes' rows are gone"
        kinds = {group["kind"] for group in found.groups}
        method, settings = ("cacovid", CHOICE) if "multiple choice" in kinds else ("score", CAPTION)
        if kinds == {"free-form"}:
            method, settings = "cacovid", CHOICE | {"reward": "generate", "answer_tokens": 2}
        settings = settings | {"steps": 9}  # every video comes, the broken ones too
        record = train_policy(method, *testbed, tmp_path / f"{number}", settings, files=Files(folder / name))
        run = listed(tmp_path / f"{number}" / "skipped.jsonl")
        assert {Path(line["where"]).stem for line in run if line["what"] == "missing video"} == names
        assert {line["where"] for line in run if line["what"] == "broken video"} <= broken
        assert record["prompts"] == 36 and record["skipped"]["videos"]["missing"] == 1
        if "caption" in kinds:  # ten rows, 36 prompts
            assert {line["where"] for line in run if line["what"] == "broken video"} == broken
            assert record["skipped"]["videos"]["broken"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["llava-onevision", "llava-images"])
def test_from_images_to_pseudo_videos_to_a_policy(testbed, rendered, cli, tmp_path, layout):
    folder, truth = rendered(layout)
    source, out = folder / truth["files"][0], tmp_path / "pseudo.jsonl"
    said = cli("data", "pseudo", source, out, "--count", 6, "--images", "2-3", "--json", tmp_path / "made.json")
    assert "6 pseudo-videos of" in said
    made = json.loads((tmp_path / "made.json").read_text())
    assert made["images"] == SCENES - 3
    assert made["skipped"]["an answer of fewer than 10 words, no caption"] == 3
    again = tmp_path / "again" / "pseudo.jsonl"
    again.parent.mkdir()
    cli("data", "pseudo", source, again, "--count", 6, "--images", "2-3")
    if layout == "llava-onevision":
        assert out.read_bytes() == again.read_bytes(), "images are named by what they hold"
        assert len(list((tmp_path / "pseudo.images").iterdir())) == SCENES - 3
    record = train_policy("score", *testbed, tmp_path / "run", CAPTION, files=Files(out))
    assert record["prompts"] == 12 and not (tmp_path / "run" / "skipped.jsonl").exists()


def test_the_check_says_what_is_there(rendered, cli, tmp_path):
    folder, truth = rendered("video-r1")
    said = cli(
        "data", "check", folder / truth["files"][0], "--json", tmp_path / "c.json", "--list", tmp_path / "l.jsonl"
    )
    found = json.loads((tmp_path / "c.json").read_text())
    rows = truth["questions"] + SCENES
    assert (
        found["rows"] == rows
        and f"of {rows} well-formed rows can be used; 7 of 10 videos and images are readable" in said
    )
    assert "left out: 10 × image" in said and "left out: 1 missing video of" in said
    assert {group["kind"]: group["rows"] for group in found["groups"]} == {
        "multiple choice": truth["questions"],
        "free-form": SCENES,
    }
    assert len(listed(tmp_path / "l.jsonl")) == 3
    quick = cli("data", "check", folder / truth["files"][0], "--quick")
    assert "9 of 10 videos and images are there" in quick
    assert "nothing in" in cli("data", "check", folder / truth["files"][0], "--video-root", tmp_path, fails=True)


def test_a_broken_video_gives_its_place_to_the_next_row(testbed, rendered):
    """The same number gives the same prompt, whatever was asked before it; a missing video takes no part at all."""
    folder, truth = rendered("koala-36m")
    path = folder / truth["files"][0]
    adapter, processor = adapter_for(testbed[0]), testbed[1]
    forward, backward = (FilePrompts(adapter, processor, path, seed=3) for _ in range(2))
    assert len(forward.captions) == SCENES - 1
    keys = [forward.caption(number).key for number in range(SCENES - 1)]
    assert keys == [backward.caption(number).key for number in reversed(range(SCENES - 1))][::-1]
    assert len(set(keys)) == SCENES - 3 and dict(forward.skipped.videos) == {"missing": 1, "broken": 2}
    order = [forward._row(forward.captions, number, "")[0] for number in range(SCENES - 1)]
    readable = {int(key.rpartition(":")[2]) for key in keys}
    for place, key in enumerate(keys):
        wanted = next(index for index in order[place:] + order[:place] if index in readable)
        assert key.endswith(f":{wanted}")


def test_a_file_of_broken_videos_ends_with_their_number(testbed, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.mp4").write_bytes(b"nothing")
    rows = [{"video": f"{name}.mp4", "caption": "red ."} for name in "ab"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = FilePrompts(adapter_for(testbed[0]), testbed[1], tmp_path / "rows.jsonl")
    with pytest.raises(
        TrainingError, match=r"no row of .* can be used: 2 broken videos of 2 rows, first .*mp4 is not a video"
    ):
        prompts.caption(0)


def test_a_cache_plans_past_a_broken_video(testbed, rendered, tmp_path):
    folder, truth = rendered("koala-36m")
    adapter, processor = adapter_for(testbed[0]), testbed[1]
    cache = EncodingCache(tmp_path, adapter, processor, 16)
    prompts = FilePrompts(adapter, processor, folder / truth["files"][0], cache=cache)
    sources = sorted(prompts.videos_to_encode(captions=True), key=lambda pair: "0015" not in str(pair[0]))
    plan = cache.plan(sources)
    assert plan.videos in (SCENES - 1, SCENES - 2, SCENES - 3) and plan.bytes_each > 0
    prompts.finished(prompts.read_caption(0))


def test_faults_are_listed_once_however_often_they_are_met(tmp_path):
    path = tmp_path / "deep" / "skipped.jsonl"
    for _ in range(2):
        skipped = Skipped(path)
        skipped.add("malformed record", "record 3", "is not JSON", file=Path("a.json"))
        skipped.add("broken video", "b.mp4", "cut short", file=Path("a.json"), rows=4, later=True)
        skipped.add("broken video", "b.mp4", "cut short", file=Path("a.json"), rows=4, later=True)
    assert [line["where"] for line in listed(path)] == ["record 3", "b.mp4"]
    with path.open("a") as file:
        file.write('{"what": "cut of')  # a kill
    Skipped(path).add("malformed record", "record 3", "is not JSON", file=Path("a.json"))
    assert path.read_text().count("record 3") == 1
    quiet = Skipped(tmp_path / "other.jsonl", lists=False)  # the second of two processes
    quiet.add("malformed record", "record 3", "is not JSON", file=Path("a.json"))
    assert quiet.faults["malformed record"] == 1 and not (tmp_path / "other.jsonl").exists()
    quiet.add("broken video", "c.mp4", "cut short", file=Path("a.json"), later=True)
    assert [line["where"] for line in listed(tmp_path / "other.jsonl")] == ["c.mp4"]


def test_videos_that_several_processes_found_broken_count_once(tmp_path):
    one, two = (Skipped(tmp_path / "skipped.jsonl", lists=first) for first in (True, False))
    for skipped, names in ((one, ("a.mp4", "b.mp4")), (two, ("b.mp4", "c.mp4"))):
        for name in names:
            skipped.add("broken video", name, "", file=Path("rows.jsonl"), rows=2, later=True)
    one.count_others([*one.later, *two.later])
    assert one.videos["broken"] == 3 and one.faults["broken video"] == 6
    assert {json.loads(line)["where"] for line in one.path.read_text().splitlines()} == {"a.mp4", "b.mp4", "c.mp4"}


def test_rows_come_back_from_any_thread_as_they_went_in(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    table = RecordTable()
    rows = [{"video": str(tmp_path / f"{n % 7}.mp4"), "caption": "ä" * (n % 50) + str(n)} for n in range(500)]
    for row in rows:
        table.append(row)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(table.__getitem__, range(500))) == rows
    assert table[499] == rows[-1] and len(table) == 500
    with pytest.raises(IndexError):
        table[500]
    assert [(Path(shown.name).stem, shown.rows, shown.is_video) for shown in table.files.values()] == [
        (str(n), 72 if n < 3 else 71, True) for n in range(7)
    ]


def test_wanted_rows_and_wrong_ones(tmp_path):
    (tmp_path / "a.mp4").touch()
    rows = [{"video": "a.mp4", "caption": text} for text in ("one", "two", "three", "bad")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"video": "gone.mp4", "caption": "one"}])))

    def wanted(row):
        if row["caption"] == "bad":
            raise TrainingError("it is bad")
        return "a two" if row["caption"] == "two" else ""

    skipped = Skipped()
    view = load_rows(tmp_path / "rows.jsonl", wanted=wanted, skipped=skipped)
    assert [row["caption"] for row in view] == ["one", "three"]
    assert skipped.as_dict() == {
        "faults": {"question that cannot be asked": 1, "missing video": 1},
        "videos": {"missing": 1},
        "left_out": {"a two": 1},
    }
    assert "1 question that cannot be asked, first record 4: it is bad" in skipped.summary()


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_what_is_written_is_read_again_word_for_word(tmp_path, layout):
    """Every question and caption of the scenes, and which options they have."""
    from vidsieve.testbed.questions import make_caption, make_questions
    from vidsieve.testbed.world import make_cast
    from vidsieve.training.data.layouts import read_records

    write_scenes(tmp_path, world="dense", seed=5, scenes=2, layout=layout)
    truth = (
        json.loads((tmp_path / "truth.json").read_text()) if layout != "vidsieve" else {"files": ["questions.jsonl"]}
    )
    rows = [row for name in truth["files"] for record in read_records(tmp_path / name) for row in record.rows]
    casts = [make_cast("dense", 5, index) for index in range(2)]
    if layout.startswith("llava-") and layout != "llava-video":
        assert len(rows) == 2 and all(len(row["caption"].split()) >= 10 for row in rows)
        return
    captions = [row["caption"] for row in rows if "caption" in row]
    choices = [row for row in rows if "options" in row and row.get("problem_type") != "free-form"]
    asked = [question for index, cast in enumerate(casts) for question in make_questions(cast, 5, index)]
    if layout != "video-r1":
        assert captions == [make_caption(cast) for cast in casts]
    if layout != "koala-36m":
        bare = [[option.split(". ")[-1] for option in row["options"]] for row in choices]
        assert [row["question"] for row in choices] == [question.text for question in asked]
        assert bare == [list(question.options) for question in asked]
        right = [
            "ABCD".index(row["answer"]) if len(row["answer"]) == 1 else bare[n].index(row["answer"])
            for n, row in enumerate(choices)
        ]
        assert [question.options[n] for n, question in zip(right, asked, strict=True)] == [q.answer for q in asked]


def test_a_broken_image_takes_no_other_pseudo_video_with_it(testbed, tmp_path):
    """What is passed over is what was shown together: an image that two rows share stays in the one that is whole."""
    from PIL import Image

    for name in "ab":
        Image.new("RGB", (48, 48), "red").save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    pairs = [("broken", "a"), ("a", "b")]
    rows = [{"frames": [[f"{name}.png", 2] for name in pair], "caption": "red ."} for pair in pairs]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = FilePrompts(adapter_for(testbed[0]), testbed[1], tmp_path / "rows.jsonl")
    assert [prompts.caption(number).key.rpartition(":")[2] for number in (0, 1, 2, 3)] == ["1"] * 4
    assert prompts.skipped.videos["broken"] == 1
