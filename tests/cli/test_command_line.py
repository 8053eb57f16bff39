"""What all commands share: errors in one line, exit codes, ``--json -``, ``--quiet``, completion."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import vidsieve.testbed
from vidsieve.errors import ModelError
from vidsieve.training.settings import CONFIGS
from vidsieve.video.reading import read_video, write_video

MISTAKES = {
    ("ask", "clip.mp4"): "error: Missing argument 'question'; see `vidsieve ask --help`",
    ("ask", "clip.mp4", "hi", "--threds", "3"): "--threads, --tokens); see `vidsieve ask --help`",
    ("--threads", "3", "ask", "clip.mp4", "hi"): "stand after it, as in `vidsieve ask --threads …`",
    ("ask", "clip.mp4", "hi", "--quiet"): "it stands before the command, as in `vidsieve --quiet ask …`",
    ("data", "chekc"): "Did you mean 'check'? see `vidsieve data --help`",
}


@pytest.mark.parametrize("given", MISTAKES, ids=" ".join)
def test_a_mistake_in_a_command_is_one_line_with_exit_code_2(monkeypatch, capsys, given):
    from vidsieve.cli.main import main

    monkeypatch.setattr("sys.argv", ["vidsieve", *given])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out and err.count("\n") == 1 and err.startswith("error: ")
    assert MISTAKES[given] in err


def test_h_is_help(run):
    assert "--retention" in run("ask", "-h")[0]


def test_json_goes_to_stdout_alone(monkeypatch, capsys):
    from vidsieve.cli.main import main

    for first, said in (([], "methods"), (["--quiet"], "")):
        monkeypatch.setattr("sys.argv", ["vidsieve", *first, "list", "--json", "-"])
        with pytest.raises(SystemExit):
            main()
        out, err = capsys.readouterr()
        assert "divprune" in {row["name"] for row in json.loads(out)["methods"]}
        assert (said in err) if said else not err
    monkeypatch.setattr("sys.argv", ["vidsieve", "list"])  # the next command prints to stdout again
    with pytest.raises(SystemExit):
        main()
    out, err = capsys.readouterr()
    assert "divprune" in out and not err


def test_methods_that_do_not_exist_are_refused_before_torch_is_imported():
    code = (
        "import sys\nfrom vidsieve.cli.main import main\n"
        "sys.argv = ['vidsieve', 'ask', sys.argv[1], 'hi', '--methods', 'divprun']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 2\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, __file__], capture_output=True, text=True)
    assert done.returncode == 0 and "Did you mean 'divprune'?" in done.stderr, done.stderr


def test_a_shell_completes_commands_and_options():
    line = {"_VIDSIEVE_COMPLETE": "complete_bash", "COMP_WORDS": "vidsieve ask clip.mp4 hi --ret", "COMP_CWORD": "4"}
    done = subprocess.run(
        [sys.executable, "-m", "vidsieve"], capture_output=True, text=True, env={**os.environ, **line}
    )
    assert done.stdout.split() == ["--retention"]


# -- the toy model ----------------------------------------------------------------------------------------------------


@pytest.fixture
def clip(tmp_path):
    """A video that is no scene of the testbed."""
    path = tmp_path / "clip.mp4"
    write_video(path, np.full((8, 64, 96, 3), 128, np.uint8), 8.0)
    return path


def test_a_video_of_one_s_own_has_no_default_model(run, clip, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"video": "clip.mp4", "question": "what ?"}\n')
    for command in (
        ("ask", clip, "what ?"),
        ("batch", rows, tmp_path / "out.jsonl"),
        ("calibrate", "evs", rows),
        ("data", "filter", rows, tmp_path / "out.jsonl"),
        ("train", "cacovid", tmp_path / "run", "--data", rows),
        ("eval", "questions", rows),
    ):
        _, err = run(*command, code=2)
        assert "which model?" in err and "a toy" in err, command
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "rows.jsonl"]


def test_the_toy_model_says_what_it_does_not_know(run, clip, tmp_path, testbed):
    from vidsieve.testbed.files import is_scene, toy_warning, write_scene

    write_scene(tmp_path / "scene.mp4", world="sparse", seed=3, index=1)
    scene, other = read_video(tmp_path / "scene.mp4", frames=4), read_video(clip, frames=4)
    assert is_scene(scene) and not is_scene(other)
    assert toy_warning(scene, "what colour is the old mark ?", testbed[1]) == ""
    assert "does not know 'What', 'happens?'" in toy_warning(scene, "What happens?", testbed[1])
    out, err = run("ask", clip, "what ?", "--model", "testbed", "--json", "-", "--report", tmp_path / "page.html")
    note = json.loads(out)["notes"][-1]
    assert "is a toy" in note and "no scene of `vidsieve testbed render`" in note and note in err
    assert "its answer means nothing" in (tmp_path / "page.html").read_text()


# -- models that are not there ----------------------------------------------------------------------------------------


def test_a_model_that_is_not_there_is_named_before_the_hub_is_asked(tmp_path, monkeypatch):
    from huggingface_hub import HfApi, constants

    from vidsieve.loading import load_model

    asked = []

    def unreachable(self, name, timeout):
        asked.append((name, timeout))
        raise ConnectionError("no route to host")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name, said in (("./none", "no folder ./none"), ("a/b/c", "no folder a/b/c"), (str(tmp_path), "config.json is")):
        with pytest.raises(ModelError, match=said):
            load_model(name)
    policy = Path(vidsieve.testbed.__file__).parent / "assets" / "score"
    with pytest.raises(ModelError, match="holds a score policy, not a model: name it as the method"):
        load_model(str(policy))
    assert not asked
    with pytest.raises(ModelError, match=r"neither a folder nor in the cache .* does not answer \(ConnectionError\)"):
        load_model("owner/none")
    assert asked == [("owner/none", 10.0)]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE forbids"):
        load_model("owner/none")


def test_a_dtype_is_checked_by_every_command_and_reaches_the_model(run, clip, testbed):
    from vidsieve.loading import load_model

    assert "Did you mean 'bfloat16'" in run("ask", clip, "hi", "--dtype", "bfloat", code=2)[1]
    assert load_model("testbed", dtype="bfloat16")[0].dtype is torch.bfloat16


# -- the page of commands ---------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"
QUICK = {
    "list": (),
    "plan": (),
    "testbed render": ("{}/new", "--scenes", "1"),
    "data check": ("{}/scenes/questions.jsonl", "--quick"),
    "data merge": ("{}/scenes/questions.jsonl", "{}/merged.jsonl"),
    "ask, one method": ("{}/scenes/scene-0000.mp4", "what colour is the old mark ?", "--max-new-tokens", "2"),
}


@pytest.mark.parametrize("command", QUICK)
def test_the_keys_of_the_json_are_those_of_the_page(monkeypatch, capsys, tmp_path, command):
    from vidsieve.cli.main import main
    from vidsieve.testbed.files import write_scenes

    write_scenes(tmp_path / "scenes", world="dense", seed=5, scenes=1)
    name, comma, which = command.partition(",")
    (said,) = re.findall(rf"^\| `{name}`{comma}{which} \| `([^`]*)` \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    words = [word.format(tmp_path) for word in (*name.split(), *QUICK[command], "--json", "-")]
    monkeypatch.setattr("sys.argv", ["vidsieve", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0 and set(json.loads(capsys.readouterr().out)) == set(said.split(", "))


def test_help_texts_are_short_and_options_for_models_are_everywhere():
    import typer

    from vidsieve.cli.main import app
    from vidsieve.training.settings import TrainConfig

    def leaves(command, name=""):
        if not hasattr(command, "commands"):
            yield name.strip(), command
        for part, inner in getattr(command, "commands", {}).items():
            if not inner.hidden:
                yield from leaves(inner, f"{name} {part}")

    settings = {f.name for config in (TrainConfig, *CONFIGS.values()) for f in dataclasses.fields(config)}
    for name, command in leaves(typer.main.get_command(app)):
        options = {p.name: p for p in command.params}
        for option in options.values():
            assert option.name in settings or len(option.help or "") <= 95, (name, option.name, option.help)
        if "model" in options and name not in ("plan", "serve", "data annotate"):  # which run none here
            assert "device" in options and ("dtype" in options or name.startswith("train ")), name
