"""Trackers get the metrics of the main process; a missing one is refused before a run begins."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from vidsieve.errors import TrainingError, UnknownNameError
from vidsieve.training import recipes
from vidsieve.training.recipes import check_trackers, tracking, train_policy
from vidsieve.training.run_folder import read_metrics


def test_a_missing_tracker_is_refused_before_a_run_begins(testbed, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match=r"wandb is not installed: pip install 'vidsieve\[wandb\]'"):
        train_policy("score", *testbed, tmp_path / "run", {"steps": 1}, log_to=["wandb"])
    assert not (tmp_path / "run").exists()
    with pytest.raises(UnknownNameError, match="Did you mean 'tensorboard'"):
        check_trackers(["tensorbord"])


def test_tensorboard_reads_back_every_figure(testbed, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"steps": 2, "prompts_per_step": 1, "log_every": 1, "eval_prompts": 0}
    train_policy("cacovid", *testbed, tmp_path, settings, log_to=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("loss", "reward", "entropy", "rollouts_per_second"):
        wanted = [(line["step"], line[name]) for line in read_metrics(tmp_path)]
        assert [(e.step, pytest.approx(e.value, rel=1e-6, abs=1e-5)) for e in events.Scalars(name)] == wanted


def test_wandb_gets_one_resumed_run_a_folder(tmp_path, monkeypatch):
    """A stand-in for the service, which this test cannot reach."""
    started, sent, closed, reported = [], [], [], []
    run = SimpleNamespace(log=lambda metrics, step: sent.append((step, metrics)), finish=lambda: closed.append(1))
    fake = SimpleNamespace(init=lambda **given: started.append(given) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with tracking(["wandb"], tmp_path, {}, lambda *line: reported.append(line)):
        pass
    assert not started and not list(tmp_path.iterdir()), "nothing is opened before there is something to send"
    for step in (1, 2):
        with tracking(["wandb", "wandb"], tmp_path / "run", {"steps": 2}, lambda *line: reported.append(line)) as send:
            send(step, 2, {"loss": 0.5})
    assert sent == [(1, {"loss": 0.5}), (2, {"loss": 0.5})] and len(closed) == 2
    assert reported == [(step, 2, {"loss": 0.5}) for step in (1, 2)]
    assert started[0] == started[1] and started[0]["resume"] == "allow" and started[0]["name"] == "run"
    assert started[0]["project"] == "vidsieve" and started[0]["config"] == {"steps": 2}
