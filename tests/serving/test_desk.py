"""Questions about videos that stay decoded and prompts that stay encoded: the same answers as one by one."""

from __future__ import annotations

import copy
import socket
import subprocess
import sys

import pytest

import vidsieve
from vidsieve.answering import answer
from vidsieve.errors import NeedError, PromptError, RetentionError, UnknownNameError, VideoError
from vidsieve.evaluation.conditions import method_for
from vidsieve.serving import page as module
from vidsieve.serving.page import Desk
from vidsieve.testbed.files import write_scene
from vidsieve.video.reading import read_video


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for index in range(6):
        write_scene(folder / f"{index}.mp4", world="dense", seed=9, index=index)
    return folder


def made(testbed, *names):
    methods = {name: method_for(name, "testbed") for name in names}
    return Desk(*testbed, methods | {"full": None})


@pytest.fixture
def work(monkeypatch, testbed):
    """What is decoded, and how often the vision tower runs."""
    done = []
    real = module.read_video
    monkeypatch.setattr(module, "read_video", lambda path, **more: done.append(path.name) or real(path, **more))
    handle = testbed[0].model.vision_tower.register_forward_hook(lambda *call: done.append("tower"))
    yield done
    handle.remove()


def test_another_retention_or_method_encodes_nothing_and_another_question_decodes_nothing(testbed, clips, work):
    asked = made(testbed, "cacovid", "divprune", "visionzip")
    first, _ = asked.ask(clips / "0.mp4", "what colour is the old mark ?", "cacovid", 0.25)
    assert work == ["0.mp4", "tower"] and {"read video", "encode"} <= first.ms.keys()
    for question, method, retention, reused in [
        ("what colour is the old mark ?", "cacovid", 0.1, True),
        ("where is the chime ?", "cacovid", 0.25, False),
        ("where is the chime ?", "divprune", 0.05, True),
        ("where is the chime ?", "full", 0.3, True),
        ("where is the chime ?", "visionzip", 0.2, True),
    ]:
        del work[:]
        found, _ = asked.ask(clips / "0.mp4", question, method, retention)
        assert (
            ("encode" in found.ms) != reused and work == ([] if reused else ["tower"]) and "read video" not in found.ms
        )
        chosen = None if method == "full" else method_for(method, "testbed", retention=retention)
        alone = answer(*testbed, read_video(clips / "0.mp4", frames=16), question, chosen)
        assert found.text == alone.text and found.prompt_tokens == alone.prompt_tokens
        assert [trace.indices for trace in found.traces] == [trace.indices for trace in alone.traces]


def test_a_changed_file_is_another_video_and_old_ones_go(testbed, clips, tmp_path, work):
    asked = made(testbed, "uniform")
    path = tmp_path / "clip.mp4"
    path.write_bytes((clips / "0.mp4").read_bytes())
    question = "what colour is the old mark ?"
    asked.ask(path, question, "uniform", 0.25)
    path.write_bytes((clips / "1.mp4").read_bytes())
    assert "read video" in asked.ask(path, question, "uniform", 0.25)[0].ms
    for index in range(1, 5):
        asked.ask(clips / f"{index}.mp4", question, "uniform", 0.25)
    assert "read video" in asked.ask(path, question, "uniform", 0.25)[0].ms


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"question": " "}, PromptError, "the question is empty"),
        ({"retention": 0}, RetentionError, "retention"),
        ({"method": "unifrm"}, UnknownNameError, "Did you mean 'uniform'"),
        ({"path": "gone.mp4"}, VideoError, "gone.mp4"),
        ({"path": "text.mp4"}, VideoError, "is not a video"),
    ],
)
def test_what_cannot_be_asked(testbed, clips, tmp_path, change, error, said):
    (tmp_path / "text.mp4").write_text("no video")
    path = tmp_path / change.pop("path") if "path" in change else clips / "0.mp4"
    call = {"question": "what ?", "method": "uniform", "retention": 0.25} | change
    with pytest.raises(error, match=said):
        made(testbed, "uniform").ask(path, **call)


def test_methods_that_do_not_fit_are_told_at_once(testbed):
    model, processor = copy.copy(testbed[0]), copy.copy(testbed[1])
    del model.vidsieve_template
    methods = {"cacovid": vidsieve.load("cacovid", "testbed")}
    Desk(model, processor, methods)  # the processor tells the chat template
    processor.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(NeedError, match=r"renders no user text: .* became 'user'"):
        Desk(model, processor, methods)


PAGE = """
import sys
from pathlib import Path

import gradio as gr

from vidsieve.evaluation.conditions import method_for
from vidsieve.loading import load_model
from vidsieve.serving.page import Desk, build

clip, folder = Path(sys.argv[1]), Path(sys.argv[2])
methods = {name: method_for(name, "testbed") for name in ("uniform", "divprune")}
desk = Desk(*load_model("testbed"), methods | {"full": None})
page = build(desk, "testbed")
(ask,) = (fn.fn for fn in page.fns.values() if fn.api_name == "ask")
text, figure, spent = ask(str(clip), "where is the chime ?", "divprune", 0.1)
assert text and "57 of 576 video tokens kept (9.9 %)" in spent and len(figure.axes) == 12, spent
assert "| read video |" in spent and "toy" not in spent
assert "is a toy" in ask(str(clip), "What happens?", "uniform", 0.1)[2]
_, figure, spent = ask(str(clip), "where is the chime ?", "full", 0.5)
assert figure is None and "encoded before" in spent, spent
for call, said in [
    ((None, "what ?", "uniform", 0.1), "Choose a video"), ((str(clip), "", "uniform", 0.1), "is empty"),
    ((str(folder / "gone.mp4"), "what ?", "uniform", 0.1), "gone.mp4"),
]:
    try:
        ask(*call)
    except gr.Error as error:
        assert said in str(error), error
    else:
        raise AssertionError(said)
print("all right")
"""


@pytest.mark.slow
def test_the_page(clips, tmp_path):
    """In a process of its own: gradio leaves event loops behind."""
    pytest.importorskip("gradio")
    done = subprocess.run(
        [sys.executable, "-c", PAGE, str(clips / "0.mp4"), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert "all right" in done.stdout, done.stdout + done.stderr


def test_an_address_that_is_taken_is_told_before_a_model_is_loaded(cli):
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = cli("ui", "--model", "nowhere/nothing", "--port", taken.getsockname()[1], fails=True)
    assert "Address already in use; choose another --port" in said
    assert "cannot listen on 203.0.113.7:7860" in cli(
        "ui", "--model", "nowhere/nothing", "--host", "203.0.113.7", fails=True
    )
