"""The command line as a user meets it: results, help, and mistakes."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import re
import shutil
import threading
from pathlib import Path

import pytest

from vidsieve.answering import answer
from vidsieve.cli.main import main, method_markdown
from vidsieve.cli.output import write_json
from vidsieve.cli.train import parsed, shown_default
from vidsieve.errors import VidsieveError
from vidsieve.policies import PolicyConfig
from vidsieve.testbed.files import write_scene, write_scenes
from vidsieve.training.settings import SETTINGS, CaCoVIDConfig
from vidsieve.video.reading import read_video

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("scenes") / "scene.mp4"
    write_scene(path, world="dense", seed=7, index=0)
    return path


COMMANDS = [
    [],
    ["demo"],
    ["ask"],
    ["stream"],
    ["list"],
    ["train", "cacovid"],
    ["train", "score"],
    ["eval", "testbed"],
    ["eval", "mlvu"],
    ["bench"],
    ["testbed", "render"],
    ["workbench", "build"],
    ["workbench", "separation"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(run, command):
    out, _ = run(*command, "--help")
    assert "--json" in out or not command


def test_the_method_table_of_the_documents_is_the_real_one():
    index = (ROOT / "docs" / "methods" / "README.md").read_text(encoding="utf-8")
    plain = re.sub(r"^\| \[(`(\w+)`)\]\(\2\.md\)", r"| \1", index, flags=re.MULTILINE)
    assert method_markdown() in plain, "run `vidsieve list --markdown` and put its output there, each name a link"


def test_list(run, tmp_path):
    out, _ = run("list", "--json", tmp_path / "methods.json")
    rows = json.loads((tmp_path / "methods.json").read_text())["methods"]
    assert {row["name"] for row in rows} >= {"random", "uniform", "downsample", "divprune", "cacovid", "score"}
    assert "divprune" in out


def test_training_options_are_the_settings_with_their_texts(run):
    shown = {f.name: shown_default("cacovid", f) for f in dataclasses.fields(CaCoVIDConfig)}
    assert shown["steps"] == "official: 100, ours: 450, paper: 1200" and shown["seed"] == "42", (
        "the values that variants really use"
    )
    out, _ = run("train", "cacovid", "--help")
    assert "--ratio" in out and "--token-rollouts" in out and "--steps" in out and "--sampler" not in out


def test_any_setting_can_be_set_by_its_name():
    texts = ["sampler=random", "balanced=True", "width=3", "depth = 2"]
    assert parsed(CaCoVIDConfig, texts) == {"sampler": "random", "balanced": True, "width": 3.0, "depth": 2}
    for text, error in (
        ("widht=3", "unknown setting 'widht'. Did you mean 'width'"),
        ("lr=1", "Did you mean 'body_lr' or 'head_lr'"),
        ("learning_rate=1", "Did you mean 'body_lr' or 'head_lr'"),
        ("depth=2.5", "depth takes a value of type int, got '2.5'"),
        ("width=wide", "width takes a value of type float"),
        ("balanced=maybe", "balanced takes a value of type bool"),
        ("depth", "takes NAME=VALUE"),
    ):
        with pytest.raises(VidsieveError, match=error):
            parsed(CaCoVIDConfig, [text])
    with pytest.raises(VidsieveError, match="each name once"):
        parsed(CaCoVIDConfig, ["depth=1", "depth=2"])


def test_a_policy_s_settings_train_the_next_one(run, tmp_path, monkeypatch):
    given = ("--steps", 7, "--set", "depth=2", "--set", "replay=false", "--world", "sparse")
    asked: list[dict] = []
    record = {"steps": 1, "minutes": 0.0, "best": {}, "settings": {"steps": 7}}
    monkeypatch.setattr(
        "vidsieve.training.recipes.train_policy", lambda *a, **options: asked.append(a[4] | options) or record
    )
    assert "1 of 7 steps in" in run("train", "cacovid", tmp_path / "a", *given)[0]
    effective = dataclasses.asdict(CaCoVIDConfig(**SETTINGS["cacovid", "ours"] | wanted(asked[0])))
    path = tmp_path / "config.json"

    def write(variant="ours", **changed):
        training = {"settings": effective | changed}
        path.write_text(PolicyConfig("cacovid", variant, 64, "qwen2_vl", training=training).to_json())

    write()
    run("train", "cacovid", tmp_path / "b", "--config", path, "--seed", 5, "--set", "depth=1")
    assert wanted(asked[1]) == {**wanted(asked[0]), "seed": 5, "depth": 1}

    del effective["prompts_per_step"]  # a setting that came after the file has the value that it stands for
    write()
    run("train", "cacovid", tmp_path / "old", "--config", path)
    assert wanted(asked[2])["prompts_per_step"] == CaCoVIDConfig.prompts_per_step == 8

    for change, command, said in (
        ({}, ("score",), "settings of cacovid, variant ours, and not of score"),
        ({"variant": "paper"}, ("cacovid",), "--variant paper`"),
        ({"widht": 3}, ("cacovid",), "Did you mean 'width'"),
        ({"steps": "7"}, ("cacovid",), "steps must be of type int, got '7'"),
    ):
        write(**change)
        _, err = run("train", *command, tmp_path / "c", "--config", path, "--dry-run", "H100", code=2)
        assert re.search(said, err) and "\n" not in err.strip(), err
    assert run("train", "cacovid", tmp_path / "c", "--config", tmp_path, code=2)[1].count("cannot read") == 1
    path.write_text(PolicyConfig("cacovid", "ours", 64, "qwen2_vl").to_json())
    assert "no record of a training" in run("train", "cacovid", tmp_path / "c", "--config", path, code=2)[1]


def wanted(asked):
    """The settings among what `train_policy` is asked."""
    return {name: asked[name] for name in {f.name for f in dataclasses.fields(CaCoVIDConfig)} & asked.keys()}


@pytest.mark.slow
def test_ask(run, scene, tmp_path):
    out, _ = run(
        "ask",
        scene,
        "what colour is the home ?",
        "--method",
        "cacovid",
        "--retention",
        "0.1",
        "--json",
        tmp_path / "a.json",
        "--picture",
        tmp_path / "a.png",
        "--threads",
        1,
    )
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["videos"][0]["kept"] == 57 and len(result["videos"][0]["indices"]) == 57
    assert result["answer"] and result["answer"] in out and "57 of 576" in out
    total = result["ms"].pop("total")
    assert set(result["ms"]) == {"read video", "preprocess", "encode", "select", "prefill", "generate"}
    assert total == pytest.approx(sum(result["ms"].values()))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_ask_sets_the_answer_from_all_tokens_against_it(run, scene, tmp_path, testbed):
    asked = ("ask", scene, "what colour is the home ?", "--method", "evs")
    assert "against" not in run(*asked)[0]
    out, _ = run(*asked, "--against", "--json", tmp_path / "a.json")
    result = json.loads((tmp_path / "a.json").read_text())
    whole = result["against"]
    video = read_video(scene, frames=16)
    assert whole["answer"] == answer(*testbed, video, "what colour is the home ?").text
    assert whole["prompt_tokens_after"] == result["prompt_tokens_before"] > result["prompt_tokens_after"]
    assert whole["ms"]["read video"] == result["ms"]["read video"] and whole["ms"]["prefill"] > 0
    assert f"against all tokens: {whole['answer']}; ms: read video " in out
    for methods in ("full", "evs,divprune"):
        assert "--against" in run("ask", scene, "what ?", "--methods", methods, "--against", code=2)[1]


@pytest.mark.slow
def test_several_methods_are_compared(run, topv, scene, tmp_path):
    out, _ = run(
        "ask",
        scene,
        "what colour is the home ?",
        "--methods",
        "divprune,fastv,holitom,topv",
        "--model",
        "testbed:shallow",
        "--threads",
        1,
        "--earliest",
        "--repeats",
        2,
        "--picture",
        tmp_path / "k.png",
        "--json",
        tmp_path / "r.json",
    )
    result = json.loads((tmp_path / "r.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["full", "divprune", "fastv", "holitom"] and result["tokens"] == 576
    assert [refused["name"] for refused in result["refused"]] == ["topv"]
    assert "topv (variant ours, retention 0.25): 3 of 6 layers see every token" in out
    assert rows["divprune"]["real_retention"] == 0.25 and rows["holitom"]["part"] == "both parts"
    for name in ("fastv", "holitom"):  # their budget is the mean over layers
        assert rows[name]["layer_retention"] == pytest.approx(0.25, abs=0.002) and rows[name]["real_retention"] < 0.2
    assert len(rows["holitom"]["indices"]) == round(576 * rows["holitom"]["real_retention"])
    for row in rows.values():
        assert row["same"] is (row["answer"] == rows["full"]["answer"])
        parts = [spent["p50"] for part, spent in row["ms"].items() if part != "total"]
        assert result["repeats"] == 2 and row["ms"]["total"]["max"] >= max(parts) > 0
    assert (tmp_path / "k.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_eval_testbed_writes_the_agreed_json(run, tmp_path):
    run(
        "eval",
        "testbed",
        "--methods",
        "uniform,score",
        "--retention",
        "0.1",
        "--seed",
        3,
        "--questions",
        60,
        "--world",
        "dense-b",
        "--json",
        tmp_path / "e.json",
        "--threads",
        1,
    )
    result = json.loads((tmp_path / "e.json").read_text())
    assert {"world", "seed", "n_questions", "n_scenes", "versions", "rows"} <= result.keys()
    assert (result["world"], result["seed"], result["n_questions"]) == ("dense-b", 3, 60)
    rows = {row["method"]: row for row in result["rows"]}
    assert set(rows) == {"full", "random", "uniform", "score"}
    for name, row in rows.items():
        assert {
            "method",
            "variant",
            "retention",
            "real_retention",
            "layer_retention",
            "accuracy",
            "stderr",
            "vs_random",
            "select_ms",
        } <= row.keys()
        assert row["real_retention"] == (1.0 if name == "full" else 57 / 576)
        assert set(row["select_ms"]) == {"min", "median", "max", "runs"}
    same = {"diff": 0.0, "stderr": 0.0, "interval": [0.0, 0.0], "mcnemar": 1.0}
    assert rows["random"]["vs_random"] == same
    again = tmp_path / "again.json"
    run(
        "eval",
        "testbed",
        "--methods",
        "uniform,score",
        "--retention",
        "0.1",
        "--seed",
        3,
        "--questions",
        60,
        "--world",
        "dense-b",
        "--json",
        again,
        "--threads",
        1,
    )
    first, second = (
        [{k: v for k, v in row.items() if k != "select_ms"} for row in json.loads(path.read_text())["rows"]]
        for path in (tmp_path / "e.json", again)
    )
    assert first == second, "the same command twice gives the same numbers"


def test_a_retention_out_of_reach_is_a_dash_with_its_reason(run, tmp_path):
    out, _ = run(
        "eval",
        "testbed",
        "--methods",
        "evs,fastv",
        "--retention",
        "0.4,0.05",
        "--questions",
        24,
        "--json",
        tmp_path / "e.json",
        "--threads",
        1,
    )
    result = json.loads((tmp_path / "e.json").read_text())
    assert [(row["method"], row["retention"]) for row in result["refused"]] == [("evs", 0.05), ("fastv", 0.05)]
    assert [row["method"] for row in result["rows"]] == ["full", "random", "evs", "fastv", "random"]
    assert re.search(r"evs +│ +0.05 │ +– │ +– │", out) and "the first frame stays whole, 36 of 576 tokens" in out


def test_an_evaluation_in_which_no_method_could_run_ends_with_an_error(run):
    out, err = run("eval", "testbed", "--methods", "evs", "--retention", "0.01", "--questions", 24, code=2)
    assert "the first frame stays whole" in out and "no method could run: the reasons are below the table" in err


def test_random_beside_it_does_not_hide_that_no_method_could_run(run):
    asked = ("--methods", "evs,random", "--retention", "0.01,0.02", "--questions", 24)
    out, err = run("eval", "testbed", *asked, code=2)
    assert "random" in out and "no method could run" in err


def test_a_count_without_its_letter_is_recognised(run):
    _, err = run("eval", "testbed", "--methods", "evs", "--retention", "64", code=2)
    assert "got '64'; did you mean 0.64 or 64t?" in err


def test_policies_of_one_method_are_rows_of_their_own(run, tmp_path):
    from vidsieve.loading import shipped_policy

    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        shutil.copytree(shipped_policy("score"), folder / "policy")
    out, _ = run(
        "eval",
        "testbed",
        "--methods",
        ",".join(["score", *map(str, folders)]),
        "--retention",
        "0.1",
        "--questions",
        20,
        "--json",
        tmp_path / "e.json",
        "--threads",
        1,
    )
    text = (tmp_path / "e.json").read_text()
    result = json.loads(text)
    assert [row["policy"] for row in result["rows"]] == ["", "", "", *map(str, folders)]
    assert "NaN" not in text and result["rows"][0]["stderr"] is None and "1 video is too few" in out


@pytest.mark.slow
def test_demo(run, tmp_path):
    out, _ = run("demo", "--out", tmp_path / "d", "--questions", 40, "--json", tmp_path / "d.json", "--threads", 1)
    result = json.loads((tmp_path / "d.json").read_text())
    assert (tmp_path / "d" / "scene.mp4").stat().st_size > 1000
    assert (tmp_path / "d" / "kept.png").read_bytes().startswith(b"\x89PNG")
    methods = {row["method"] for row in result["accuracy"]["rows"]}
    assert methods == {"full", "random", "uniform", "downsample", "divprune", "score", "cacovid", "sieve"}
    assert "full against compressed" in out


@pytest.mark.slow
def test_render_and_ask_about_a_rendered_scene(run, tmp_path):
    run("testbed", "render", tmp_path / "r", "--scenes", 2, "--json", tmp_path / "r.json")
    lines = [json.loads(line) for line in (tmp_path / "r" / "questions.jsonl").read_text().splitlines()]
    assert {line["video"] for line in lines} == {"scene-0000.mp4", "scene-0001.mp4"}
    assert sum("caption" in line for line in lines) == 2
    assert json.loads((tmp_path / "r.json").read_text())["questions"] == len(lines) - 2


def bad_videos(folder, scene):
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is not a video\n" * 50)
    (folder / "cut.mp4").write_bytes(scene.read_bytes()[:200])
    return [
        (folder / "missing.mp4", "does not exist"),
        (folder / "empty.mp4", "empty"),
        (folder / "text.mp4", "text.mp4"),
        (folder / "cut.mp4", "cut.mp4"),
        (folder, "is not a file"),
    ]


def test_bad_videos_exit_2_with_a_sentence(run, tmp_path, scene):
    for path, message in bad_videos(tmp_path, scene):
        _, err = run("ask", path, "what ?", code=2)
        assert err.startswith("error:") and message in err, err


def test_ask_with_a_method_inside_the_llm(run, scene):
    out, _ = run("ask", scene, "what colour is the home ?", "--method", "fastv", "--retention", "0.5", "--threads", 1)
    assert "fastv (variant ours, retention 0.5): 192 of 576 video tokens (33.3 %)" in out
    _, err = run("ask", scene, "what ?", "--method", "fastv", "--retention", "0.1", code=2)
    assert "cannot go below 0.2501" in err


@pytest.mark.slow
def test_ask_with_a_method_that_acts_while_decoding(run, scene, tmp_path):
    out, _ = run(
        "ask",
        scene,
        "what colour is the home ?",
        "--method",
        "dycoke",
        "--retention",
        "0.5",
        "--threads",
        1,
        "--json",
        tmp_path / "a.json",
    )
    assert "dycoke (variant ours, retention 0.5): 288 of 576 video tokens (50 %)" in out
    (video,) = json.loads((tmp_path / "a.json").read_text())["videos"]
    assert 0 < video["decode_share"] < 0.5
    _, err = run("ask", scene, "what ?", "--method", "dycoke", "--retention", "0.1", code=2)
    assert "ask for a retention from 0.25 to 1" in err


@pytest.mark.slow
def test_more_frames_than_exist_are_all_used_with_a_note(run, scene):
    _, err = run("ask", scene, "what colour is the home ?", "--frames", 64, "--method", "uniform", "--threads", 1)
    assert "note:" in err and "all are used" in err


MISTAKES = [
    (["--retention", "0"], r"retention.*\(0, 1\].*0"),
    (["--retention", "1.5"], "1.5"),
    (["--retention", "nan"], "nan"),
    (["--retention", "abc"], "'abc'"),
    (["--method", "divprunee"], "Did you mean 'divprune'"),
    (["--method", "divprune:theirs"], "variant of divprune"),
    (["--method", "nowhere/policy"], "there is no folder nowhere/policy"),
    (["--method", "full", "--picture", "x.png"], "leave --picture out"),
    (["--model", "/nowhere/at/all"], "no folder /nowhere/at/all"),
    (["--method", "score", "--policy", "/nowhere"], "no policy in /nowhere"),
    (["--json", "/proc/nowhere/x.json"], "cannot write /proc/nowhere/x.json"),
    (["--frames", "0"], "frames"),
    (["--retention", "999t"], "999 tokens are more than the video's 576; ask for 1 to 576"),
    (["--fps", "nan"], "--fps must be a finite number above 0, got nan"),
    (["--fps", "-1"], "got -1"),
    (["--layout", "gird"], "Did you mean 'grid'"),
    (["--layout", "grid"], "odd number of patches"),
]


def test_a_placeholder_in_the_question_is_refused(run, scene):
    _, err = run("ask", scene, "what is in <video> ?", "--method", "divprune:official", code=2)
    assert err.startswith("error:") and "'<video>'" in err


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_mistakes_exit_2_with_a_sentence(run, scene, options, message):
    _, err = run("ask", scene, "what ?", *options, code=2)
    assert err.startswith("error:") and re.search(message, err), err


def test_a_question_before_the_video_is_told(run, scene):
    _, err = run("ask", "what ?", scene, code=2)
    assert "'what ?' does not exist" in err and "the video comes first" in err


def test_mistakes_of_other_commands(run, tmp_path):
    for command, message in [
        (["eval", "testbed", "--methods", "unifrom"], "Did you mean 'uniform'"),
        (["eval", "testbed", "--world", "C"], "world"),
        (["eval", "testbed", "--methods", "dycoke"], "read off the prefill"),
        (["eval", "testbed", "--retention", ","], "retention ratios"),
        (["workbench", "separation", "--world", "C"], "world"),
        (["train", "score", tmp_path / "run", "--steps", "0"], "steps must be at least 1"),
        (["train", "score", tmp_path / "run", "--resume"], "holds no run"),
        (["train", "score", tmp_path / "run", "--force"], "give --resume too"),
        (["testbed", "render", "/proc/nowhere"], "cannot write"),
        (["train", "score", tmp_path / "run", "--variant", "theirs"], "variant of score"),
        (["train", "cacovid", tmp_path / "run", "--set", "sampler=ocs"], "Did you mean 'ocss'"),
        (["train", "cacovid", tmp_path / "run", "--model", "testbed", "--data", tmp_path / "no.jsonl"], "cannot read"),
        (["demo", "--retention", "2"], "2"),
    ]:
        _, err = run(*command, code=2)
        assert err.startswith("error:") and message in err, (command, err)
    assert not (tmp_path / "run").exists()


def test_pickled_and_foreign_policies(run, tmp_path, scene):
    from vidsieve.compressors.score import ScorePolicy

    ScorePolicy.start(64, "qwen2_5_vl", hidden=8).save_pretrained(tmp_path / "other")
    _, err = run("ask", scene, "what ?", "--method", tmp_path / "other", code=2)
    assert "trained for width 64, this model has 128" in err
    (tmp_path / "other" / "model.safetensors").write_bytes(pickle.dumps([1]))
    _, err = run("ask", scene, "what ?", "--method", tmp_path / "other", code=2)
    assert "no readable safetensors file" in err


def test_usage_errors_exit_2(run):
    _, err = run("ask", code=2)
    assert "Missing argument" in err or "Usage" in err
    run("no-such-command", code=2)


@pytest.mark.slow
def test_data_filter(run, tmp_path):
    run("testbed", "render", tmp_path / "scenes", "--scenes", 2)
    source, target = tmp_path / "scenes" / "questions.jsonl", tmp_path / "left.jsonl"
    out, _ = run("data", "filter", source, target, "--model", "testbed", "--json", tmp_path / "f.json", "--threads", 1)
    found = json.loads((tmp_path / "f.json").read_text())
    assert f"{found['kept']} of {found['questions']} questions are kept" in out.replace("\n", " ")
    assert 0 < found["kept"] < found["questions"] and target.is_file()
    _, err = run("data", "filter", source, source, "--model", "testbed", code=2)
    assert "would overwrite" in err
    _, err = run("data", "filter", source, target, "--model", "testbed", "--rule", "some", code=2)
    assert "any" in err and "all" in err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["ask", "{v}", "hi", "--overlay", "{v}"], "scene-0000.mp4 would overwrite the file that is read"),
        (["ask", "{v}", "hi", "--methods", "a,b", "--overlay", "{v}"], "would overwrite the file that is read"),
        (["ask", "{v}", "hi", "--json", "{v}"], "would overwrite the file that is read"),
        (["ask", "{v}", "hi", "--report", "page.txt"], "its name must end in .html or .htm"),
        (["ask", "{v}", "hi", "--picture", "k.xyz"], "its name must end in .png or .svg"),
        (["ask", "{v}", "hi", "--overlay", "o.gif"], "its name must end in .mp4"),
        (["eval", "questions", "{q}", "--model", "testbed", "--json", "{q}"], "would overwrite the file that is read"),
        (["eval", "testbed", "--share", "1/2"], "give --out FOLDER too"),
        (["eval", "testbed", "--share", "3/2", "--out", "x"], "--share is the number of a process"),
        (["ask", "{v}", "hi", "--model", "nomodel"], "no folder nomodel: give a model's folder"),
    ],
)
def test_outputs_never_replace_what_is_read_and_mistakes_come_early(cli, tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    write_scenes(tmp_path, world="dense", seed=5, scenes=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    names = {"v": "scene-0000.mp4", "q": "questions.jsonl"}
    assert said in cli(*(word.format(**names) for word in given), fails=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_stopped_evaluation_says_what_is_kept(monkeypatch, tmp_path, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("vidsieve.evaluation.experiment.run", stop)
    for more, said in (([], "nothing is kept without --out"), (["--out", str(tmp_path)], "the same command resumes")):
        monkeypatch.setattr(
            "sys.argv", ["vidsieve", "eval", "testbed", "--methods", "random", "--questions", "4", *more]
        )
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 130 and said in " ".join(capsys.readouterr().err.split())


def test_few_videos_are_said_to_be_too_few(cli):
    out = cli("eval", "testbed", "--methods", "random", "--retention", "0.5", "--questions", "30")
    assert "2 videos are too few for these errors" in out


def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path):
    file, link, pipe = (tmp_path / name for name in ("file.json", "link.json", "pipe"))
    file.write_text("old")
    link.symlink_to(file)
    write_json(link, {"a": 1})
    assert link.is_symlink() and json.loads(file.read_text()) == {"a": 1}
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_json(pipe, {"a": 2})
    reader.join(10)
    assert json.loads(read[0]) == {"a": 2} and pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.json", "link.json", "pipe"]


def test_plan_takes_names_in_any_case_and_numbers_that_are_some(cli):
    assert "qwen2.5-vl-7b" in cli("plan", "--model", "Qwen2.5-VL-7B", "--gpu", "h100").lower()
    assert "got inf" in cli("plan", "--model", "qwen2.5-vl-7b", "--gpu", "h100", "--price", "inf", fails=True)


def test_stream_asks_at_a_time_and_at_the_end(run, scene, tmp_path):
    asked = ["--question", "what shape is it ?", "--question", "1=what colour is it ?"]
    kept = ["--method", "score", "--memory", "150", "--fps", "4", "--reader", "sieve", "--retention", "100t"]
    out, _ = run("stream", scene, *asked, *kept, "--json", tmp_path / "out.json")
    first, last = json.loads((tmp_path / "out.json").read_text())["answers"]
    assert (first["question"], first["second"], last["question"]) == ("what colour is it ?", 1.0, "what shape is it ?")
    assert first["memory"]["frames_seen"] == 5 and last["memory"]["frames_seen"] == 16
    assert last["memory"]["tokens"] == 150 and last["memory"]["read"] == 100
    assert f"1 s: {first['answer']} " in out and last["answer"] in out


def test_stream_asks_the_lines_that_are_typed_while_the_video_plays(run, scene, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("what colour is it ?\n\nwhat shape is it ?\n"))
    monkeypatch.setattr("time.sleep", lambda _: None)
    out, _ = run("stream", scene, "--method", "recent", "--memory", "40", "--fps", "4")
    assert out.count("read by the LLM") == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--method", "sieve"], "variant 'blind'"),
        (["--method", "divprune"], "no score that a frame alone tells"),
        (["--memory", "5000"], "from 1 to 4095"),
        (["--question", " "], "the question is empty"),
        (["--question=-1=what ?"], "at 0 seconds or later"),
        (["--question=1:30=what ?"], "a number of seconds"),
        (["--retention", "calibrated", "--reader", "score"], "no calibrated one"),
        (["--positions", "dense"], "compact"),
    ],
)
def test_stream_refuses_what_cannot_be_served(cli, scene, given, said):
    assert said in cli("stream", scene, *given, fails=True)
