"""One method's unexpected error is its own: a line and a row say so, the others keep theirs, the exit code is 1."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from vidsieve.testbed.files import write_scenes

PLUGIN = """
import sys
from dataclasses import dataclass
from vidsieve import registry
from vidsieve.compressors.uniform import Uniform

@dataclass(frozen=True)
class Broken(Uniform):
    name = "broken"
    def _select(self, video, budget, generator):
        raise IndexError("index 9 is out of bounds")

sys.modules["broken_plugin"] = sys.modules["__main__"]
registry.compressors.register("broken", "broken_plugin:Broken")
from vidsieve.cli import main
main()
"""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, world="A", seed=7, scenes=1)
    return folder


def run(*arguments):
    done = subprocess.run([sys.executable, "-c", PLUGIN, *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def commands(scenes, out):
    methods, file = ("--methods", "broken,uniform", "--retention", "0.5"), scenes / "questions.jsonl"
    return {
        "compare": ("compare", scenes / "scene-0000.mp4", "what colour is the old mark ?", *methods, "--repeats", "1"),
        "eval testbed": ("eval", "testbed", *methods, "--questions", "6"),
        "eval questions": ("eval", "questions", file, "--model", "testbed", *methods, "--out", out),
        "eval open": ("eval", "open", *methods, "--scenes", "2"),
        "bench select": ("bench", "select", "--grid", "2x4x4", "--width", "16", *methods, "--repeats", "1"),
        "bench pipeline": ("bench", "pipeline", scenes / "scene-0000.mp4", *methods, "--lengths", "4",
                           "--repeats", "1", "--new-tokens", "1"),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(commands(None or __import__("pathlib").Path("x"), None)))
def test_the_others_keep_their_rows(scenes, tmp_path, name):
    given = commands(scenes, tmp_path / "run")[name]
    code, out, err = run(*given, "--json", tmp_path / "r.json") if name != "eval questions" else run(*given)
    text = " ".join(out.split())
    assert code == 1, out + err
    assert "Traceback" not in err
    assert "broken: unexpected IndexError: index 9 is out of bounds (vidsieve" in text
    assert "transformers" in text and "--debug" in text
    result = json.loads((tmp_path / ("run/result.json" if name == "eval questions" else "r.json")).read_text())
    names = [row.get("method") or row["name"] for row in result["rows"]]
    assert "uniform" in names and "broken" not in names
    code, out, err = run(
        "--debug", *given[:-2], *((given[-2], tmp_path / "again") if given[-2] == "--out" else given[-2:])
    )
    assert code == 1 and "Traceback" in err and "IndexError: index 9" in err


def test_errors_on_purpose_still_end_with_2(scenes):
    code, _, err = run("compare", scenes / "nosuch.mp4", "what ?", "--methods", "uniform")
    assert code == 2 and "error:" in err
