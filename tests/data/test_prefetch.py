"""Samples computed ahead: the same values in any order, errors in their place, nothing left running."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import pytest
import torch

from vidsieve import load
from vidsieve.errors import TrainingError, VideoError
from vidsieve.testbed.files import write_scenes
from vidsieve.testbed.world import render
from vidsieve.training.data.prefetch import Prefetch
from vidsieve.training.recipes import train_policy
from vidsieve.training.sources import Files, spare_cores
from vidsieve.training.trainer import Events


def alive():
    return [thread for thread in threading.enumerate() if thread.name.startswith("vidsieve-prefetch")]


def settled(check):
    """Return whether `check` becomes true within two seconds."""
    end = time.monotonic() + 2
    while not check() and time.monotonic() < end:
        time.sleep(0.005)
    return check()


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert not alive()


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(
    "numbers",
    [
        range(20),
        range(7, 30, 3),
        range(30, 0, -4),
        [5, 5, 6, 7, 3, 4, 100, 102, 104, 104, 2],
    ],
)
def test_values_are_those_of_load(workers, numbers):
    def load(number):
        time.sleep(random.random() / 500)
        return number**2

    with Prefetch(load, workers) as data:
        assert [data(number) for number in numbers] == [number**2 for number in numbers]


@pytest.mark.parametrize("numbers", [[0, 1, 2], [4, 9, 14], [30, 28, 26]])
def test_the_next_ones_are_ready_before_they_are_asked_for(numbers):
    """At the distance of the last two."""
    done = []
    with Prefetch(lambda number: done.append(number) or number, workers=2) as data:
        for number in numbers:
            data(number)
        step = numbers[-1] - numbers[-2]
        following = {numbers[-1] + step * count for count in (1, 2, 3, 4)}
        assert settled(lambda: following <= set(done))
        count = len(done)
        assert data(numbers[-1] + step) in following
        assert settled(lambda: len(done) == count + 1)
        assert len(set(done)) == len(done), "nothing twice"


def test_the_caller_works_while_samples_are_made():
    """Two threads make samples beside the caller: the whole takes clearly less than one after the other."""

    def load(number):
        time.sleep(0.05)
        return number

    start = time.perf_counter()
    with Prefetch(load, workers=2) as data:
        for number in range(12):
            data(number)
            time.sleep(0.05)
    assert time.perf_counter() - start < 0.85 * 12 * 0.1


def test_a_sample_that_no_thread_has_begun_is_made_by_the_caller():
    where, go = {}, threading.Event()

    def load(number):
        where[number] = threading.current_thread()
        if number == 1:
            go.wait(2)

    with Prefetch(load, workers=1) as data:
        data(0)
        data(2)  # the only thread is at 1 still
        go.set()
    assert where[2] is threading.main_thread() is not where[1]


def test_an_error_is_raised_where_its_sample_is_asked_for():
    def load(number):
        if number == 2:
            raise VideoError("number 2 is broken")
        return number

    with Prefetch(load, workers=2) as data:
        assert [data(0), data(1)] == [0, 1]
        for _ in range(2):
            with pytest.raises(VideoError, match="number 2 is broken"):
                data(2)
        assert data(3) == 3
    with Prefetch(load, workers=2) as data:
        data(1)  # the next is broken, and nobody asks for it


def test_no_more_than_two_a_worker_are_held():
    begun = set()
    with Prefetch(lambda number: begun.add(number), workers=2) as data:
        for number in (0, 1, 2, 3):
            data(number)
            time.sleep(0.02)
            assert max(begun) <= number + 4
        assert settled(lambda: max(begun) == 7) and len(data._coming) == 4
        data(50)  # elsewhere: samples of the old sequence go
        assert len(data._coming) <= 4 and min(data._coming) > 50


def test_what_waits_is_not_begun_once_it_is_closed():
    begun, go = [], threading.Event()

    def load(number):
        begun.append(number)
        if number:
            go.wait(2)
        return number

    data = Prefetch(load, workers=1)
    data(0)
    assert settled(lambda: begun == [0, 1])
    threading.Timer(0.05, go.set).start()
    data.close()
    assert begun == [0, 1] and not alive()
    assert data(3) == 3, "a closed one computes when asked"
    data.close()


def test_ctrl_c_while_waiting_ends_the_threads(ctrl_c):
    def load(number):
        if number == 1:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            time.sleep(0.5)
        return number

    with pytest.raises(KeyboardInterrupt), Prefetch(load, workers=1) as data:
        data(0)
        assert settled(lambda: not data._coming[1].cancel() and data._coming[1].running())
        data(1)
    assert not alive()


def test_a_negative_number_of_workers_is_refused():
    with pytest.raises(TrainingError, match="workers must be at least 0"):
        Prefetch(abs, -1)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cacovid", "score"])
def test_a_policy_does_not_depend_on_who_reads_the_videos(testbed, tmp_path, method, monkeypatch, ctrl_c):
    """Trained weights are equal to the bit with and without threads, and over a resumption with other threads."""
    write_scenes(tmp_path, world="dense", seed=2, scenes=3)
    model, processor = testbed
    used = []
    monkeypatch.setattr(
        "vidsieve.training.sources.Prefetch", lambda take, workers: used.append(workers) or Prefetch(take, workers)
    )

    few = {"rollouts": 4} if method == "score" else {"token_rollouts": 4, "frame_rollouts": 0}

    def train(name, workers, *, stop=0, data=tmp_path / "questions.jsonl"):
        settings = few | {"steps": 4, "prompts_per_step": 1, "workers": workers, "log_every": 1, "eval_prompts": 0}
        train_policy(
            method,
            model,
            processor,
            tmp_path / name,
            settings,
            files=Files(data),
            model_name="testbed",
            resume=name == "cut",
            events=Events(report=lambda step, *_: os.kill(os.getpid(), signal.SIGINT) if step == stop else None),
        )
        return load(tmp_path / name).policy.state_dict()

    monkeypatch.setattr("vidsieve.training.sources.spare_cores", lambda device: 0)
    inline, ahead = train("inline", 0), train("ahead", 2)
    with pytest.raises(KeyboardInterrupt, match="after step 3 of 4"):
        train("begun", 2, stop=2)
    assert not alive()
    (tmp_path / "begun").rename(tmp_path / "cut")
    resumed = train("cut", 1)
    assert all(torch.equal(inline[key], ahead[key]) and torch.equal(inline[key], resumed[key]) for key in inline)
    train("scenes", 2, data=None)
    assert used == [2, 2, 1], "no core is idle: scenes are rendered where they are used"
    with pytest.raises(TrainingError, match="workers must be from 0 to 64"):
        train("wrong", 65)


@pytest.mark.parametrize("method", ["cacovid", "score"])
def test_a_policy_does_not_depend_on_who_renders_the_scenes(testbed, tmp_path, method, monkeypatch, ctrl_c):
    """Trained weights are equal to the bit with and without a thread, over a resumption, and on pseudo-videos."""
    model, processor = testbed
    rendered = []
    for module in ("vidsieve.training.data.scenes", "vidsieve.testbed.pseudo"):
        monkeypatch.setattr(
            f"{module}.render", lambda *a: rendered.append(threading.current_thread().name) or render(*a)
        )

    few = {"rollouts": 4, "pseudo_steps": 2} if method == "score" else {"token_rollouts": 4, "frame_rollouts": 0}

    def train(name, cores, *, stop=0):
        monkeypatch.setattr("vidsieve.training.sources.spare_cores", lambda device: cores)
        rendered.clear()
        settings = few | {"steps": 4, "prompts_per_step": 1, "eval_prompts": 0, "log_every": 1}
        train_policy(
            method,
            model,
            processor,
            tmp_path / name,
            settings,
            model_name="testbed",
            resume=name == "cut",
            events=Events(report=lambda step, *_: os.kill(os.getpid(), signal.SIGINT) if step == stop else None),
        )
        return load(tmp_path / name).policy.state_dict()

    inline = train("inline", 0)
    assert set(rendered) == {"MainThread"}
    ahead = train("ahead", 3)
    assert {name.startswith("vidsieve-prefetch") for name in rendered[1:]} == {True}, "all but the first"
    assert not alive()
    with pytest.raises(KeyboardInterrupt, match="after step 3 of 4"):
        train("begun", 1, stop=2)
    assert not alive()
    (tmp_path / "begun").rename(tmp_path / "cut")
    resumed = train("cut", 1)
    assert all(torch.equal(inline[key], ahead[key]) and torch.equal(inline[key], resumed[key]) for key in inline)


def test_an_error_of_training_ends_the_thread_that_renders(testbed, tmp_path, monkeypatch):
    monkeypatch.setattr("vidsieve.training.sources.spare_cores", lambda device: 1)
    monkeypatch.setattr("vidsieve.training.trainer.Trainer._optimise", lambda self: self.data(self.step) and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_policy("score", *testbed, tmp_path / "run", {"steps": 2, "eval_prompts": 0}, model_name="testbed")
    assert not alive()


def test_cores_that_torch_does_not_use_are_spare(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert spare_cores(torch.device("cpu")) == 5 and spare_cores(torch.device("cuda")) == 7
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert spare_cores(torch.device("cpu")) == 0
