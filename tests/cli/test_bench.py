"""`vidsieve bench`: its tables, its report, and mistakes with their advice."""

from __future__ import annotations

import json

import pytest


def test_the_pipeline_of_a_made_clip(cli, tmp_path):
    out = cli(
        "bench",
        "--repeats",
        "1",
        "--methods",
        "score,fastv",
        "--retention",
        "0.1",
        "--lengths",
        "4,8",
        "--clip",
        "64x48x1",
        "--new-tokens",
        "1",
        "--report",
        tmp_path / "r.html",
        "--json",
        tmp_path / "r.json",
    )
    result = json.loads((tmp_path / "r.json").read_text())
    assert [row["method"] for row in result["rows"]] == ["full", "random", "downsample", "score"]
    assert [row["method"] for row in result["refused"]] == ["fastv"] and "0.2501" in out
    assert all(len(row["by_length"]) == 2 for row in result["rows"]) and result["attention"] == "sdpa"
    assert "Where the time goes" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--lengths", "a"], "--lengths takes whole numbers"),
        (["--clip", "3x3"], "640x360x10"),
        (["--dtype", "float"], "unknown dtype 'float'"),
        (["--random-weights", "qwen2.5-vl-7"], "Did you mean 'qwen2.5-vl-7b'"),
        (["--methods", "evz"], "Did you mean 'evs'"),
        (["a.mp4", "b.mp4"], "unexpected extra argument(s) (b.mp4)"),
    ],
)
def test_mistakes_are_told(cli, given, said):
    assert said in cli("bench", *given, fails=True)
