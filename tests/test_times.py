"""Every time that a model is told is the time at which a frame appears, however the frames were chosen."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from vidsieve.answering import chat, timed
from vidsieve.errors import PromptError
from vidsieve.evaluation.blueprints import random_model
from vidsieve.testing.tiny_models import processor_for
from vidsieve.video.reading import Video, read_video, write_video

ASKED = [
    {"frames": 8},
    {"frames": 7},
    {"frames": 1},
    {"fps": 1},
    {"fps": 1, "max_frames": 6},
    {"times": [0.0, 0.5, 9.5, 10.0, 28.5, 29.0]},
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "half-minute.mp4"
    write_video(path, np.random.default_rng(0).integers(0, 256, (60, 64, 64, 3), dtype=np.uint8), 2)
    return path


def pair_means(video):
    """Return the mean time of each two frames (a grid of Qwen's), the last frame repeated where one is missing."""
    times = video.timestamps.tolist() + video.timestamps.tolist()[-1:] * (len(video.timestamps) % 2)
    return [(first + second) / 2 for first, second in zip(times[::2], times[1::2], strict=True)]


@pytest.mark.parametrize("ask", [ask for ask in ASKED if ask != {"frames": 1}], ids=str)
def test_qwen3_vl_is_told_when_its_frames_appear(clip, ask):
    video, processor = read_video(clip, **ask), processor_for("qwen3_vl")
    heard = []
    processor.tokenizer = Listener(processor.tokenizer, heard)
    chat(processor, video, "what is red ?")
    told = [float(second) for second in re.findall(r"<([\d.]+) seconds>", heard[-1])]
    assert told == pytest.approx(pair_means(video), abs=0.051)


def test_what_a_processor_refuses_is_an_error_of_the_prompt(clip):
    with pytest.raises(PromptError, match="Qwen3VLProcessor refuses the prompt: t:1 must be larger"):
        chat(processor_for("qwen3_vl"), read_video(clip, frames=1), "what is red ?")


@pytest.mark.parametrize("ask", ASKED, ids=str)
def test_qwen2_5_vl_is_told_the_mean_rate_of_its_frames(clip, ask):
    video = read_video(clip, **ask)
    times = video.timestamps
    spacing = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else video.duration
    seconds = chat(processor_for("qwen2_5_vl"), video, "what is red ?")["second_per_grid_ts"]
    assert float(torch.as_tensor(seconds)[0]) == pytest.approx(2 * spacing, rel=1e-3)


def test_random_models_are_told_the_same_rate(clip):
    video = read_video(clip, frames=8)
    told = random_model("qwen2.5-vl-0.1b").inputs(video, 4)["second_per_grid_ts"]
    assert float(told[0]) == pytest.approx(2 * float(np.diff(video.timestamps).mean()), rel=1e-3)


@pytest.mark.parametrize("times", [[0.25, 3.5, 100.125], [0.0], [5.0, 5.0], [7.0, 2.0]])
def test_metadata_of_any_times(times):
    video = Video(np.zeros((len(times), 4, 4, 3), np.uint8), np.array(times), (), 120.0, 25.0, 3000, (4, 4))
    made = timed(video)
    assert made.timestamps == pytest.approx(times) and made.duration == 120 and made.sampled_fps > 0


class Listener:
    """A tokenizer that keeps the texts that it is given."""

    def __init__(self, tokenizer, heard):
        self._tokenizer, self._heard = tokenizer, heard

    def __call__(self, text, *args, **options):
        self._heard += [text] if isinstance(text, str) else text
        return self._tokenizer(text, *args, **options)

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)
