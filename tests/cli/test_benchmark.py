"""`vidsieve eval` on files: tables, mistakes with their advice, and a folder that is gone on with."""

from __future__ import annotations

import json

import pytest

from vidsieve.cli.output import command_line
from vidsieve.testbed.files import write_scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, world="dense", seed=5, scenes=2)
    return folder / "questions.jsonl"


def test_a_table_with_its_baselines_and_what_could_not_run(cli, scenes, tmp_path):
    made = [
        "eval",
        "questions",
        str(scenes),
        "--model",
        "testbed",
        "--methods",
        "score,fastv",
        "--retention",
        "0.2,64t",
        "--frames",
        "8,16",
        "--subset",
        "5",
        "--max-new-tokens",
        "2",
        "--out",
        str(tmp_path / "run"),
    ]
    out = cli(*made, "--json", str(tmp_path / "r.json"))
    assert "5 questions about 2 videos" in out and "fastv (variant ours, retention 0.2)" in out
    result = json.loads((tmp_path / "r.json").read_text())
    rows = {(row["method"], row["frames"], row["retention"]) for row in result["rows"]}
    names = ("random", "uniform", "downsample", "score")
    wanted = {(name, frames, kept) for name in names for frames in (8, 16) for kept in ("0.2", "64t")}
    assert rows == wanted | {("full", 8, "1"), ("full", 16, "1")}
    fixed = [row["kept"] for row in result["rows"] if row["retention"] == "64t"]
    assert fixed == [64.0] * 8, "the same budget for 8 frames and for 16"
    cli(*made, "--json", str(tmp_path / "again.json"))
    assert json.loads((tmp_path / "again.json").read_text())["rows"] == result["rows"]
    assert "seed: 0 there, 1 now): give another folder" in cli(*made, "--seed", "1", fails=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--model", "testbed", "--protocol", "score:qwen"], "Did you mean 'score:qwen2.5-vl'"),
        (["--model", "testbed", "--protocol", "score:qwen2.5-vl", "--frames", "8"], "leave those options out"),
        ([], "which model? Give --model"),
        (["--model", "testbed", "--frames", "0"], "a whole number from 1 on"),
        (["--model", "testbed", "--share", "3/2"], "--share is the number of a process"),
        (["--model", "testbed", "--tokens-per-frame", "9"], "have a fixed number of tokens"),
        (["--model", "testbed", "--retention", "1.2"], "retention"),
        (["--model", "testbed", "--methods", "scor"], "Did you mean 'score'"),
        (["--model", "testbed", "--answer", "guess"], "unknown way to answer 'guess'"),
    ],
)
def test_mistakes_are_told(cli, scenes, tmp_path, given, said):
    assert said in cli("eval", "questions", str(scenes), "--out", str(tmp_path), *given, fails=True)
    assert not list(tmp_path.glob("units*"))


def test_missing_videos_stop_a_run_or_count_as_failures(cli, scenes, tmp_path):
    row = {"video": "gone.mp4", "question": "Which?", "options": ["red", "blue"], "answer": "red"}
    asked = json.loads(scenes.read_text().splitlines()[0])
    asked["video"] = str(scenes.parent / asked["video"])
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(asked) + "\n")
    given = ["eval", "questions", str(path), "--model", "testbed"]
    assert "1 of 2 videos are missing" in cli(*given, "--out", str(tmp_path / "run"), fails=True)
    out = cli(*given, "--out", str(tmp_path / "run"), "--allow-missing")
    assert "1 question could not be asked and count as answered wrongly" in out
    path.write_text(json.dumps(row) + "\n")
    none = cli(*given, "--out", str(tmp_path / "none"), "--allow-missing", fails=True)
    assert "none of the 1 questions could be asked" in none and "gone.mp4 does not exist" in none


def test_the_command_is_told_without_the_share(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "eval", "mlvu", "a b", "--share", "2/4", "--share=1/4", "--seed", "3"])
    assert command_line() == "vidsieve eval mlvu 'a b' --seed 3"
    monkeypatch.setattr("sys.argv", ["/a checkout/workbench/__main__.py", "ablate", "runs/a"])
    assert command_line() == "python -m workbench ablate runs/a"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("testbed", "--fps", "2"), "--fps means nothing for testbed: leave it out"),
        (("questions", "x.jsonl", "--model", "testbed", "--probes"), "--probes means nothing for questions"),
        (("testbed", "here"), "testbed makes its own scenes: leave here out"),
        (("mlvu", "--model", "testbed"), "DATA is missing: give the folder of mlvu"),
        (("mvlu", "x"), "Did you mean 'mlvu'"),
    ],
)
def test_options_that_mean_nothing_for_a_task_are_refused(cli, given, said):
    assert said in cli("eval", *given, fails=True)
