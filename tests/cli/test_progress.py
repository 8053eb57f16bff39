"""The progress of a training run: a table in a terminal, lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from vidsieve.cli.progress import Bar, Progress, clock, seconds_left

FIGURES = {"reward": 0.5, "dead_groups": 0.25, "kept": 0.1, "entropy": 0.9, "rollouts_per_second": 120.0}


def shown(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100 if terminal else 30)
    with Progress(console) as progress:
        for step in (1, 2, 3):
            progress.tick(step, 10, {"loss": 0.125})
        progress.report(3, 10, FIGURES | {"minutes": 0.5})
    return console.file.getvalue()


def test_a_pipe_gets_one_plain_line_a_log():
    text = shown(False)
    assert text.startswith("3/10  0.5 min  reward 0.5  dead_groups 0.25") and text.count("\n") == 1
    assert "\x1b" not in text


def test_a_terminal_gets_a_table_with_the_time_left():
    text = shown(True)
    for label in ("3/10", "reward", "dead groups", "kept", "entropy, bits", "rollouts a second", "loss", "time left"):
        assert label in text
    assert "min  reward" not in text


def test_time_left_follows_the_pace_and_ends_with_the_limit():
    assert seconds_left(10.0, 5, 20) == pytest.approx(40.0)
    assert seconds_left(10.0, 5, 20, limit=7.0) == 7.0
    assert clock(3725.4) == "1:02:05" and clock(0) == "0:00:00"


def test_a_log_gets_a_line_a_minute(monkeypatch, capsys):
    now = iter([0.0, 1.0, 30.0, 62.0, 70.0, 123.0])  # at the start, then at each update
    monkeypatch.setattr("vidsieve.cli.progress.time.monotonic", lambda: next(now))
    with Bar("videos", 1200) as advance:
        for done in (100, 200, 300, 400, 500):
            advance(done)
    assert capsys.readouterr().err == "videos: 300 of 1,200, 0:04:34 left\nvideos: 500 of 1,200, 0:03:34 left\n"
