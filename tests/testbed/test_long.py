"""Long videos: where a scene's frames appear, what the others show, and what questions point at."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from vidsieve.errors import VideoError
from vidsieve.testbed.long import LongScene
from vidsieve.testbed.questions import make_questions
from vidsieve.testbed.world import make_cast, render


def test_a_scene_appears_in_clips_of_four_frames_and_nothing_else_repeats():
    scene, shown = LongScene("dense", 5, 3, 70), render(make_cast("dense", 5, 3), 5, 3)
    times, pixels = scene.times, scene.pixels()
    assert pixels.shape == (70, 144, 144, 3)
    assert (np.diff(times) > 0).all() and times[-1] < 70
    assert all((np.diff(clip) == 1).all() for clip in times.reshape(4, 4))
    assert np.array_equal(pixels[times], shown)
    assert len({frame.tobytes() for frame in pixels}) == 70
    assert np.array_equal(LongScene("dense", 5, 3, 16).pixels(), shown)


def test_other_frames_show_nothing_that_is_asked_about():
    for index in range(3):
        scene = LongScene("dense", 6, index, 64)
        wanted = {o.colour for o in scene.cast.objects if o.kind == "flash"}
        glyphs = {o.colour for o in scene.cast.objects if o.kind == "glyph"}
        assert wanted - glyphs  # colours that identify an object
        for block in range(2):
            assert {(o.kind, o.colour in glyphs) for o in scene.others(block).objects} == {("glyph", True)}
            assert scene.others(block).decoys


def test_questions_point_at_the_same_pictures_of_the_long_video():
    scene = LongScene("dense", 7, 1, 90)
    pixels, shown = scene.pixels(), render(make_cast("dense", 7, 1), 7, 1)
    short = make_questions(make_cast("dense", 7, 1), 7, 1)
    for moved, question in zip(scene.questions(), short, strict=True):
        assert (moved.text, moved.options, moved.answer) == (question.text, question.options, question.answer)
        for there, here in zip(moved.targets, question.targets, strict=True):
            assert there % 36 == here % 36
            assert np.array_equal(pixels[there // 36], shown[here // 36])


def test_hours_are_read_frame_by_frame():
    first = list(islice(LongScene("dense", 8, 0, 21_600).read(), 18))
    assert len(first) == 18
    assert np.array_equal(first[17], next(islice(LongScene("dense", 8, 0, 21_600).read(), 17, None)))
    with pytest.raises(VideoError, match="at least the 16 frames"):
        LongScene("dense", 8, 0, 15)
