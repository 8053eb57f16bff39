"""`vidsieve bench`: its tables, its report, and mistakes with their advice."""

from __future__ import annotations

import json

import pytest


def test_the_pipeline_of_a_made_clip(cli, tmp_path):
    out = cli(
        "bench",
        "pipeline",
        "--repeats",
        "1",
        "--warm-up",
        "0",
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
    assert [row["method"] for row in result["refused"]] == ["fastv"] and "0.33" in out
    assert all(len(row["by_length"]) == 2 for row in result["rows"]) and result["attention"] == "sdpa"
    assert "Where the time goes" in (tmp_path / "r.html").read_text()


def test_selecting_alone(cli, tmp_path):
    out = cli("bench", "select", "--grid", "4x4x4", "--width", "32", "--json", tmp_path / "s.json", "--repeats", "2")
    result = json.loads((tmp_path / "s.json").read_text())
    kept = {row["name"]: row["kept"] for row in result["rows"]}
    assert kept["divprune"] == kept["random"] == 6 and all(row["ms"]["runs"] == 2 for row in result["rows"])
    assert "fastv acts inside LLM layers: time it with `vidsieve bench pipeline`" in out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["pipeline", "--lengths", "a"], "--lengths takes whole numbers"),
        (["pipeline", "--clip", "3x3"], "640x360x10"),
        (["pipeline", "--dtype", "float"], "unknown dtype 'float'"),
        (["pipeline", "--random-weights", "qwen2.5-vl-7"], "Did you mean 'qwen2.5-vl-7b'"),
        (["select", "--grid", "3x3"], "frames x height x width"),
        (["select", "--methods", "evz"], "Did you mean 'evs'"),
    ],
)
def test_mistakes_are_told(cli, given, said):
    assert said in cli("bench", *given, fails=True)
