"""The lmms-eval bridge, with stand-ins for the parts of lmms-eval that it calls."""

from __future__ import annotations

import abc
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

from vidsieve._version import __version__
from vidsieve.adapters import adapter_for
from vidsieve.answering import answer
from vidsieve.errors import (
    BudgetError,
    EvaluationError,
    ModelError,
    PolicyError,
    PromptError,
    RetentionError,
    UnknownNameError,
    UnsupportedCallError,
    VideoError,
)
from vidsieve.evaluation.benchmarks.questions import QUESTIONS
from vidsieve.evaluation.conditions import Condition, method_for
from vidsieve.evaluation.lmms_bridge import AnswerSettings, Arguments, converted
from vidsieve.evaluation.tasks.questions import QuestionsTask
from vidsieve.testbed.files import write_scenes
from vidsieve.types import Tokens
from vidsieve.video.reading import read_video

ROOT = Path(__file__).parents[2]
TASK, SPLIT = "vidsieve_testbed", "test"


@dataclass(frozen=True)
class Manifest:
    model_id: str
    simple_class_path: str


@dataclass
class Result:
    text: str
    token_counts: object = None


class Base(abc.ABC):
    """What lmms-eval demands of a model."""

    def __init__(self):
        self._rank, self.task_dict = 0, {}

    @property
    def rank(self):
        return self._rank

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    def clean(self):
        self.cleaned = True


@pytest.fixture
def logged(monkeypatch):
    """Stand-ins for modules of lmms-eval; what is logged through them."""
    lines = []

    def module(name, **contents):
        made = ModuleType(name)
        vars(made).update(contents)
        monkeypatch.setitem(sys.modules, name, made)

    for parent in ("", ".api", ".models", ".models.model_utils"):
        module(f"lmms_eval{parent}")
    module("lmms_eval.api.model", lmms=Base)
    module("lmms_eval.api.instance", GenerationResult=Result)
    module("lmms_eval.models.registry_v2", ModelManifest=Manifest)
    module("lmms_eval.models.model_utils.gen_metrics", log_metrics=lambda *values: lines.append(values))
    return lines


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Three questions about each of two scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, world="dense", seed=77, scenes=2)
    items = QUESTIONS.read(folder / "questions.jsonl")
    videos = sorted({item.video for item in items})
    return [item for video in videos for item in [i for i in items if i.video == video][:3]]


@pytest.fixture(scope="module")
def task():
    """The functions of the task that `make test-lmms` gives lmms-eval."""
    spec = spec_from_file_location("lmms_task", ROOT / "tests/lmms/utils.py")
    made = module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def loaded(**arguments):
    """Make the model as lmms-eval does: from the entry point in pyproject.toml to an instance."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    module, _, function = points["vidsieve"].partition(":")
    manifest = getattr(import_module(module), function)()
    path, _, name = manifest.simple_class_path.rpartition(".")
    made = getattr(import_module(path), name)
    assert issubclass(made, Base) and made.is_simple and manifest.model_id == "vidsieve"
    given = {"pretrained": "testbed", "device": "cpu", "frames": 16, **arguments}
    return made(batch_size="1", **{name: value for name, value in given.items() if value is not None})


def asked(model, items, task, settings=None, order=None, show=None):
    """Return what the model says to requests about the items."""
    docs = [{"video": str(item.video), "question": item.question, "answer": item.answer} for item in items]
    model.task_dict[TASK] = {SPLIT: docs}
    requests = [
        SimpleNamespace(args=(docs[n]["question"], dict(settings or {}), show or task.doc_to_visual, n, TASK, SPLIT))
        for n in (order or range(len(docs)))
    ]
    return model.generate_until(requests)


METHODS = (("full", None), ("cacovid", 0.1), ("score:paper", 0.25), ("divprune", "100t"), ("fastv", 0.5))


@pytest.mark.parametrize(("method", "retention"), METHODS)
def test_answers_are_those_of_the_pipeline_and_of_eval_in_the_order_of_the_requests(
    logged, scenes, task, testbed, method, retention
):
    arguments = {} if retention is None else {"retention": retention}
    order = [3, 0, 5, 1, 4, 2, 0]
    said = asked(loaded(method=method, **arguments), scenes, task, {"max_new_tokens": 3, "until": ["\n\n"]}, order)
    amount = Tokens(100) if retention == "100t" else retention
    compressor = None if retention is None else method_for(method, "testbed", retention=amount)
    model, processor = testbed
    asked_of = QuestionsTask(QUESTIONS, scenes, adapter_for(model), processor, "testbed", max_new_tokens=3)
    records = [record for unit in asked_of.units() for record in asked_of.measure(unit, [Condition(compressor, 16)])]
    samples = [record.values for record in records]
    for place, result in zip(order, said, strict=True):
        video = read_video(scenes[place].video, frames=16)
        one = answer(model, processor, video, scenes[place].question, compressor, max_new_tokens=3)
        counts = result.token_counts.to_dict()
        assert result.text == one.text == samples[place]["said"]
        assert (counts["prompt_tokens_before"], counts["input_tokens"]) == one.prompt_tokens
        assert counts["video_tokens"] == 576 and counts["vidsieve"] == __version__
        assert counts["video_tokens_kept"] == (one.traces[0].kept if one.traces else 576)
        assert counts["method"] == one.method
        assert (
            task.process_results({"answer": scenes[place].answer}, [result.text])["accuracy"]
            == (samples[place]["score"])
        )
    ((_, new, _, means),) = logged
    kept = [result.token_counts.video_tokens_kept / 576 for result in said]
    assert means["retention"] == pytest.approx(sum(kept) / len(kept))
    assert means["layer_retention"] == pytest.approx(
        {"full": 1, "divprune": 100 / 576}.get(method, retention), abs=2e-3
    )
    assert new == sum(result.token_counts.output_tokens for result in said) > 0


def test_a_task_ends_answers_by_length_and_by_text(logged, scenes, task):
    model = loaded(method="full")
    whole = [result.text for result in asked(model, scenes, task, {"max_new_tokens": 4})]
    first = [result.text for result in asked(model, scenes, task, {"max_new_tokens": 1})]
    assert all(text.startswith(start) for text, start in zip(whole, first, strict=True)) and all(first)
    middle = whole[0][1:3]
    cut = [result.text for result in asked(model, scenes, task, {"max_new_tokens": 4, "until": ["$", middle]})]
    assert cut == [text.partition(middle)[0].rstrip() for text in whole] and cut[0] == whole[0][0]
    assert [result.text for result in asked(model, scenes, task, {"max_new_tokens": 4, "until": ""})] == whole


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0, "do_sample": True, "top_p": 0.5}, {"temperature": 50.0, "do_sample": False}, {"num_beams": 1}],
)
def test_settings_that_leave_answers_greedy_change_nothing(logged, scenes, task, settings):
    model = loaded(method="divprune", retention=0.2)
    greedy, same = (asked(model, scenes[:2], task, {"max_new_tokens": 2, **more}) for more in ({}, settings))
    assert [result.text for result in same] == [result.text for result in greedy]


@pytest.mark.parametrize("settings", [{"temperature": 0.7}, {"do_sample": True}, {"num_beams": 2}])
def test_sampling_and_beams_are_refused(settings):
    with pytest.raises(EvaluationError, match="of a task: vidsieve answers greedily: pass --gen_kwargs temperature=0"):
        converted(settings, AnswerSettings, "generation settings of a task")


def test_settings_without_effect_are_named(logged, scenes, task):
    with pytest.warns(UserWarning, match="without effect here: image_aspect_ratio"):
        asked(loaded(method="full"), scenes[:1], task, {"max_new_tokens": 1, "image_aspect_ratio": "original"})
    assert AnswerSettings() == converted({}, AnswerSettings, "") == AnswerSettings(1024)
    with pytest.raises(EvaluationError, match="Expected `str`, got `int` for `until"):
        converted({"until": [7]}, AnswerSettings, "")
    with pytest.raises(EvaluationError, match="Expected `int` >= 1 for `max_new_tokens`"):
        converted({"max_new_tokens": 0}, AnswerSettings, "")


def test_frames_by_rate(logged, scenes, task, testbed):
    model = loaded(method="uniform", frames=None, fps=2, max_frames=6)
    (result,) = asked(model, scenes[:1], task, {"max_new_tokens": 2})
    video = read_video(scenes[0].video, fps=2.0, max_frames=6)
    one = answer(
        *testbed, video, scenes[0].question, method_for("uniform", "testbed", retention=0.25), max_new_tokens=2
    )
    assert result.text == one.text and result.token_counts.video_tokens == one.traces[0].total == 6 * 36


WRONG = [
    ({"metod": "random"}, UnknownNameError, "unknown model argument 'metod'. Did you mean 'method'"),
    ({"method": "divprun"}, UnknownNameError, "unknown method 'divprun'. Did you mean 'divprune'"),
    ({"method": "runs/none/policy"}, PolicyError, "no policy in runs/none/policy"),
    ({"method": "divprune:offical"}, UnknownNameError, "Did you mean 'official'"),
    ({"method": ""}, EvaluationError, "Expected `str` of length >= 1 for `method`"),
    ({"method": "all"}, EvaluationError, "one run of lmms-eval measures one method"),
    ({"pretrained": ""}, EvaluationError, "length >= 1 for `pretrained`"),
    ({"pretrained": "no/such/folder"}, ModelError, "no/such/folder"),
    ({"retention": "half"}, RetentionError, "a number in \\(0, 1\\], a token count such as 512t, calibrated"),
    ({"retention": 1.5}, RetentionError, "1.5"),
    ({"retention": True}, EvaluationError, "got `bool` for `retention`"),
    ({"method": "full", "retention": 0.5}, EvaluationError, "keeps all tokens: leave retention out"),
    ({"policy": "somewhere"}, PolicyError, "not trained and takes no policy"),
    ({"frames": "many"}, EvaluationError, "Expected `int . null`, got `str` for `frames`"),
    ({"fps": 2}, EvaluationError, "frames alone, or fps"),
    ({"max_frames": 9}, EvaluationError, "frames alone, or fps"),
    ({"fps": 0, "frames": 1}, EvaluationError, "Expected `float` > 0.0 for `fps`"),
    ({"dtype": "float64"}, EvaluationError, "must be one of float32, bfloat16, float16, got 'float64'"),
    ({"earliest": "yes"}, EvaluationError, "Expected `bool`, got `str` for `earliest`"),
    ({"earliest": True}, UnknownNameError, "earliest"),
    ({"layout": "gird"}, UnknownNameError, "unknown token layout 'gird'. Did you mean 'grid'"),
    ({"method": "fastv", "retention": 0.01}, BudgetError, "0.01"),
    ({"tokens_per_frame": 9}, UnsupportedCallError, "fixed number of tokens"),
]


@pytest.mark.parametrize(
    ("arguments", "error", "text"), WRONG, ids=lambda value: None if callable(value) else str(value)
)
def test_arguments_that_cannot_be_right_are_refused(logged, arguments, error, text):
    with pytest.raises(error, match=text):
        loaded(**{"method": "random", **arguments})


def test_a_batch_is_one_question():
    with pytest.raises(EvaluationError, match="leave batch_size out"):
        converted({"pretrained": "testbed", "method": "full", "batch_size": "8"}, Arguments, "")


def test_a_missing_argument_is_named(logged):
    with pytest.raises(EvaluationError, match="missing required field `method`"):
        loaded()


def test_documents_that_show_anything_but_one_video_are_refused(logged, scenes, task, tmp_path):
    model = loaded(method="random")
    path = str(scenes[0].video)
    assert asked(model, scenes[:1], task, {"max_new_tokens": 1}, show=lambda doc: path)[0].text
    picture = Image.new("RGB", (8, 8))
    for shown, what in ((None, "a NoneType"), ([], "0 visuals"), ([path, path], "2 visuals"), ([picture], "a Image")):
        with pytest.raises(UnsupportedCallError, match=f"document 0 of {TASK} \\({SPLIT}\\) shows {what}"):
            asked(model, scenes[:1], task, show=lambda doc, shown=shown: shown)
    (tmp_path / "cut.mp4").write_bytes(b"no video")
    with pytest.raises(VideoError, match=r"cut\.mp4"):
        asked(model, scenes[:1], task, show=lambda doc: [tmp_path / "cut.mp4"])
    with pytest.raises(PromptError, match="stands for pixels"):
        asked(model, [SimpleNamespace(video=path, question="what is <video> ?", answer="")], task)


def test_a_budget_out_of_reach_is_an_error_and_earlier_layers_reach_it(logged, scenes, task):
    with pytest.raises(BudgetError, match=r"0\.3334"):
        asked(loaded(pretrained="testbed:shallow", method="fastv", retention=0.1), scenes[:1], task)
    model = loaded(pretrained="testbed:shallow", method="fastv", retention=0.2, earliest=True)
    (result,) = asked(model, scenes[:1], task, {"max_new_tokens": 1})
    assert result.token_counts.layer_retention == pytest.approx(0.2, abs=2e-3)


def test_other_kinds_of_request_say_why_not(logged):
    model = loaded(method="random")
    with pytest.raises(NotImplementedError, match="output_type generate_until"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="output_type generate_until"):
        model.generate_until_multi_round([])
    assert model.generate_until([]) == [] and not logged
    assert model.device == torch.device("cpu")
    model.clean()
    assert model.cleaned and not any("xaminer" in name for name in vars(model))


def test_nothing_in_vidsieve_imports_lmms_eval():
    code = """
import pkgutil, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name.partition('.')[0] != 'lmms_eval', 'lmms_eval is imported'
sys.meta_path.insert(0, Refuse())
import vidsieve
for module in pkgutil.walk_packages(vidsieve.__path__, 'vidsieve.'):
    if not module.name.startswith('vidsieve.serving.vllm.'):
        __import__(module.name)
assert 'vidsieve.evaluation.lmms_bridge' in sys.modules
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
