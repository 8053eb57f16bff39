"""Both papers' recipes, whole, on the testbed's files in the published layouts."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SETTINGS = os.environ | {
    "VIDSIEVE": f"{sys.executable} -m vidsieve",
    "TORCHRUN": f"{sys.executable} -m torch.distributed.run",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(RECIPES.parent / "src"), os.environ.get("PYTHONPATH")])),
    "OMP_NUM_THREADS": "1",
}


def recipe(name, *arguments, code=0, **changed):
    done = subprocess.run(
        ["bash", str(RECIPES / name), *map(str, arguments)],
        env=SETTINGS | changed,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def teacher(tmp_path_factory):
    """The address of a server that writes captions."""
    script = Path(__file__).parent / "data" / "teacher_server.py"
    log = tmp_path_factory.mktemp("teacher") / "log.jsonl"
    command = [sys.executable, str(script), "0", "--log", str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.kill()


def commands(said):
    """Return the commands that a recipe prints, each without its beginning."""
    return [line[2:] for line in said.splitlines() if line.startswith("+ ")]


def in_this_process(run, command):
    """Run one of a recipe's commands here: one that is not started anew takes a third of the time."""
    return " ".join(run(*shlex.split(command.partition(" -m vidsieve ")[2])))


@pytest.mark.slow
def test_cacovid_from_the_file_to_the_table(run, tmp_path):
    """Broken videos are in a list, leaked questions gone, two processes train; the second call goes on with the run."""
    render, check, blind, train, evaluate = commands(recipe("cacovid.sh", "--testbed", "--out", tmp_path, "--print"))
    for command in (render, check, blind):
        in_this_process(run, command)
    truth = json.loads((tmp_path / "data" / "truth.json").read_text())
    listed = [json.loads(line)["where"] for line in (tmp_path / "unusable.jsonl").read_text().splitlines()]
    assert {Path(name).stem for name in listed} == {Path(name).stem for name in truth["broken"]} and len(listed) == 1
    left = [json.loads(line) for line in (tmp_path / "filtered.jsonl").read_text().splitlines()]
    leaked = {(Path(leak["video"]).name, leak["question"]) for leak in truth["leaked"]}
    kept = {(Path(row["video"]).name, row["question"]) for row in left if row["problem_type"] == "multiple choice"}
    assert leaked and not leaked & kept and len(kept) > 0.6 * truth["questions"]
    subprocess.run(shlex.split(train), env=SETTINGS, check=True, capture_output=True)
    config = json.loads((tmp_path / "run" / "policy" / "config.json").read_text())
    assert config["training"]["steps"] == 8 and config["training"]["processes"] == 2
    assert "cacovid:paper" in in_this_process(run, evaluate)
    *done, train, _ = commands(recipe("cacovid.sh", "--testbed", "--out", tmp_path, "--print"))
    assert done == [check, blind] and "--resume" in train  # what is rendered stays


@pytest.mark.slow
def test_score_through_both_stages_and_a_teacher(run, tmp_path, teacher):
    told = ["--testbed", "--gpus", 1, "--out", tmp_path, "--teacher", teacher, "--teacher-model", "tiny"]
    printed = commands(recipe("score.sh", *told, "--print"))
    assert len(printed) == 11 and sum("torch.distributed.run" in line for line in printed) == 1
    said = "".join(in_this_process(run, command) for command in printed)
    real = [json.loads(line) for line in (tmp_path / "real-annotated.jsonl").read_text().splitlines()]
    assert len(real) + said.count("aside") >= 29 and all(row["caption"] != row["original_caption"] for row in real)
    pseudo = [json.loads(line) for line in (tmp_path / "pseudo-annotated.jsonl").read_text().splitlines()]
    assert len(pseudo) == 12 and all("frames" in row for row in pseudo)
    config = json.loads((tmp_path / "run" / "policy" / "config.json").read_text())
    assert config["training"]["steps"] == 8 and "score:paper" in said
    assert (tmp_path / "pseudo.png").exists()


def test_what_would_run_at_full_size(tmp_path):
    said = recipe("cacovid.sh", "--data", "/data", "--out", tmp_path, "--print")
    assert "--nproc-per-node 8 -m vidsieve train cacovid" in said and "reproduce cacovid:table1" in said
    said = recipe("score.sh", "--data", "/data", "--out", tmp_path, "--print", "--teacher", "http://teacher/v1")
    assert said.count("data annotate") == 2 and "--pseudo-steps 1250 --steps 8375" in said
    assert not list(tmp_path.iterdir())
    assert "--out is needed" in recipe("score.sh", "--testbed", code=2)
    assert "unknown option --gpu" in recipe("score.sh", "--gpu", 3, code=2)
    assert "Options:" in recipe("score.sh", "--help")


@pytest.mark.parametrize(
    ("name", "sets"),
    [
        ("cacovid.sh", ["longvideobench", "mlvu", "mlvu-test", "videomme"]),
        ("score.sh", ["lvbench", "mlvu", "videomme"]),
    ],
)
def test_another_model_gets_the_papers_settings_and_its_benchmarks(tmp_path, name, sets):
    model = "Qwen/Qwen3-VL-8B-Instruct"
    papers, said = (
        recipe(name, "--data", tmp_path, "--out", tmp_path / "o", "--print", *more) for more in ([], ["--model", model])
    )

    def training(text):
        return next(line for line in text.splitlines() if " -m vidsieve train " in line)

    own = training(papers).partition("--model ")[2].split()[0]
    assert training(said) == training(papers).replace(own, model) != training(papers)
    assert [line.split(" eval ")[1].split()[0] for line in said.splitlines() if " eval " in line] == sets
    assert "reproduce" in papers and "reproduce" not in said
