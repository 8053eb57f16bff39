"""One method's unexpected error is its own: a line and a row say so, the others keep theirs, the exit code is 1."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from vidsieve import registry
from vidsieve.compressors.uniform import Uniform
from vidsieve.testbed.files import write_scenes


@dataclass(frozen=True)
class Broken(Uniform):
    """A method with an error that nobody raises on purpose."""

    name = "broken"

    def _select(self, video, budget, generator):
        raise IndexError("index 9 is out of bounds")


@pytest.fixture(autouse=True)
def broken(monkeypatch):
    registry.compressors.names()
    monkeypatch.setitem(registry.compressors._table, "broken", f"{__name__}:Broken")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, world="dense", seed=7, scenes=1)
    return folder


METHODS = ("--methods", "broken,uniform", "--retention", "0.5")
VIDEO, QUESTIONS = Path("scene-0000.mp4"), Path("questions.jsonl")
COMMANDS = {
    "ask": ("ask", VIDEO, "what colour is the old mark ?", "--repeats", "1"),
    "eval testbed": ("eval", "testbed", "--questions", "6"),
    "eval questions": ("eval", "questions", QUESTIONS, "--model", "testbed", "--subset", "6"),
    "eval open": ("workbench", "open", "--scenes", "2"),
    "bench": ("bench", VIDEO, "--lengths", "4", "--repeats", "1", "--new-tokens", "1"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_others_keep_their_rows(run, scenes, tmp_path, name):
    given = [scenes / part if isinstance(part, Path) else part for part in COMMANDS[name]] + [*METHODS]
    path, out = tmp_path / "r.json", ["--out", tmp_path / "run"] if name == "eval questions" else []
    text, err = run(*given, *out, "--json", path, code=1)
    assert "Traceback" not in err
    assert "broken: unexpected IndexError: index 9 is out of bounds (vidsieve" in text
    assert "transformers" in text and "--debug" in text
    names = [row.get("method") or row["name"] for row in json.loads(path.read_text())["rows"]]
    assert "uniform" in names and "broken" not in names
    with pytest.raises(IndexError, match="index 9"):
        run("--debug", *given, *(["--out", tmp_path / "again"] if out else []))


def test_errors_on_purpose_still_end_with_2(run, scenes):
    _, err = run("ask", scenes / "nosuch.mp4", "what ?", "--methods", "uniform", code=2)
    assert "error:" in err
