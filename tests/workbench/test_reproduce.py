"""`python -m workbench reproduce`: tables on the testbed and on files, bundles, and what is missing."""

from __future__ import annotations

import json

import pytest

from vidsieve.loading import shipped_model
from vidsieve.testbed.files import write_scenes


def test_a_table_on_the_testbed_twice_gives_the_same_figures(cli, tmp_path):
    asked = ["--only", "divprune,cacovid,fastv", "--subset", "8"]
    made = ["workbench", "reproduce", "cacovid:table1", "--testbed", *asked]
    report = tmp_path / "r.html"
    out = cli(*made, "--out", str(tmp_path / "one"), "--report", str(report))
    cli(*made, "--out", str(tmp_path / "two"))
    one, two = (json.loads((tmp_path / n / "bundle.json").read_text()) for n in ("one", "two"))
    assert one["cells"] == two["cells"] and "published | measured on the testbed" in out
    cells = {(c["model"], c["row"], c["retention"], c["column"]): c for c in one["cells"]}
    cell = cells["llava-onevision", "divprune", "0.25", "relative"]
    full = cells["llava-onevision", "full", "1", "testbed dense"]["measured"]
    own = cells["llava-onevision", "divprune", "0.25", "testbed dense"]["measured"]
    assert cell["published"] == "97.5" and cell["measured"] == pytest.approx(100 * own / full)
    assert cells["llava-onevision", "visionzip", "0.25", "relative"]["measured"] is None, "not asked for"
    assert ("llava-onevision", "random", "0.25", "testbed dense-b") in cells
    assert "cacovid:table1, published and measured" in report.read_text()
    assert "cacovid:table1" in cli("workbench", "reproduce", "--check", str(tmp_path / "one" / "bundle.json"))


def test_a_table_on_files_is_run_as_far_as_there_are_any(cli, tmp_path):
    folder = tmp_path / "data" / "lvbench"
    write_scenes(folder / "all_videos", world="dense", seed=5, scenes=2)
    videos = sorted((folder / "all_videos").glob("*.mp4"))
    asked = [
        {
            "uid": str(n),
            "question": "what colour is the mug ?\n(A) red\n(B) blue\n(C) green\n(D) white",
            "answer": "A",
            "question_type": ["entity recognition"],
            "time_reference": "",
        }
        for n in range(len(videos))
    ]
    lines = [{"key": v.stem, "type": "tv", "qa": [q]} for v, q in zip(videos, asked, strict=True)]
    (folder / "video_info.meta.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["workbench", "reproduce", "score:table1", "--data", str(tmp_path / "data"), "--only", "vidcom2,score"]
    out = cli(*given, "--plan")
    assert "qwen2.5-vl: 1 benchmarks, 7 conditions" in out and "a policy for 'score' of qwen2.5-vl" in out
    out = cli(*given, "--model", f"qwen2.5-vl={shipped_model()}", "--out", str(tmp_path / "run"))
    assert "missing: MLVU" in out and "missing: a policy for 'score'" in out
    bundle = json.loads((tmp_path / "run/bundle.json").read_text())
    told = {(c["row"], c["retention"], c["column"]) for c in bundle["cells"] if c["measured"] is not None}
    kept = ("0.4", "0.25", "0.1")
    assert told == {(row, at, "lvbench") for row in ("vidcom2", "random") for at in kept} | {("full", "1", "lvbench")}
    assert bundle["settings"]["qwen2.5-vl"]["lvbench"]["questions"] == 2 and len(bundle["missing"]) == 3


def test_a_training_table_takes_the_testbeds_own_ablations(cli):
    out = cli("workbench", "reproduce", "cacovid:table3", "--testbed", "--plan", "--seeds", "3")
    assert "12 trainings on the testbed" in out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "which table? There are cacovid:table1"),
        (["score:tabel1"], "Did you mean 'score:table1'"),
        (["score:table1", "--only", "divprun"], "unknown row 'divprun'"),
        (["score:table1", "--model", "here"], "as NAME=FOLDER; got 'here'"),
        (["score:table1", "--model", "qwen=here"], "Did you mean 'qwen2.5-vl'"),
        (["score:table1"], "nothing of score:table1 can be measured here"),
        (["--check", "nothing.json"], "is no result bundle"),
        (["cacovid:table2", "--dtype", "float8"], "unknown dtype"),
    ],
)
def test_mistakes_are_told(cli, tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    assert said in cli("workbench", "reproduce", *given, fails=True)
