"""`vidsieve report`: pages of finished runs, and why there is none of others."""

from __future__ import annotations

import json
import re

import pytest

from vidsieve.testbed.files import write_scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, world="dense", seed=5, scenes=2)
    return folder / "questions.jsonl"


def _run(cli, scenes, folder, *more):
    cli(
        "eval",
        "questions",
        str(scenes),
        "--model",
        "testbed",
        "--methods",
        "divprune",
        "--retention",
        "64t",
        "--frames",
        "16",
        "--subset",
        "4",
        "--max-new-tokens",
        "2",
        "--out",
        str(folder),
        *more,
    )


def test_a_runs_page_shows_what_was_kept_on_its_videos(cli, scenes, tmp_path):
    _run(cli, scenes, tmp_path / "run", "--indices")
    cli("report", str(tmp_path / "run"), str(tmp_path / "p.html"), "--videos", "5", "--figures", str(tmp_path / "f"))
    text = (tmp_path / "p.html").read_text()
    data = [json.loads(found) for found in re.findall(r'application/json" id="data\d+">(.*?)</script>', text)]
    assert len(data) == 2 and data[0]["grid"] == [16, 6, 6], "one a video"
    methods = {method["name"]: method["kept"] for method in data[0]["methods"]}
    assert set(methods) == {f"{name}, 64t" for name in ("random", "uniform", "downsample", "divprune")}
    assert next(iter(methods)) == "divprune, 64t", "shown first, before the baselines"
    line = next(
        s
        for s in map(json.loads, (tmp_path / "run/samples.jsonl").read_text().splitlines())
        if s["condition"].startswith("divprune") and s["indices"][0] == methods["divprune, 64t"]
    )
    assert len(line["indices"][0]) == 64 and f"{line['question']}" in text
    rows = re.findall(r"<tr>.*?</tr>", text, re.DOTALL)
    asked = [row for row in rows if line["question"] in row and ("✓" in row or "✗" in row)]
    assert asked and line["said"] in asked[0] and ("✓" in asked[0]) >= (line["score"] == 1)


def test_pages_of_other_runs(cli, tmp_path):
    cli(
        "eval", "testbed", "--methods", "random", "--retention", "0.5", "--questions", "4", "--out", str(tmp_path / "t")
    )
    cli("report", str(tmp_path / "t"), str(tmp_path / "t.html"))
    assert "Testbed, world dense, seed 9001: 4 questions" in (tmp_path / "t.html").read_text()
    (tmp_path / "train").mkdir()
    (tmp_path / "train/metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.6}\n')
    cli("report", str(tmp_path / "train"), str(tmp_path / "train.html"))
    assert "mean reward" in (tmp_path / "train.html").read_text().lower()
    assert "which keeps no indices" in cli(
        "report", str(tmp_path / "t"), str(tmp_path / "x.html"), "--videos", "1", fails=True
    )


def test_what_is_missing_is_told(cli, scenes, tmp_path):
    _run(cli, scenes, tmp_path / "run")
    said = cli("report", str(tmp_path / "run"), str(tmp_path / "p.html"), "--videos", "1", fails=True)
    assert "has no kept indices: run its command again with --indices" in said and not (tmp_path / "p.html").exists()
    assert "has no finished run" in cli("report", str(tmp_path), str(tmp_path / "p.html"), fails=True)
    (tmp_path / "run/result.json").write_text("{")
    assert "is damaged" in cli("report", str(tmp_path / "run"), str(tmp_path / "p.html"), fails=True)
