"""A flipped bit or a zeroed block anywhere in a file that a run wrote is noticed, and the last good state is used."""

from __future__ import annotations

import json
import os
import random
import time

import pytest
import torch
from safetensors.torch import save_file

from vidsieve.compressors.score import ScorePolicy
from vidsieve.errors import OutputError, PolicyError, TrainingError
from vidsieve.io.checkpoints import load_state, read_header, save_state
from vidsieve.io.files import METRICS, locked
from vidsieve.io.tensors import load_tensors, save_tensors
from vidsieve.policies import read_config
from vidsieve.training.recipes import train_policy
from vidsieve.training.run_folder import CHECKPOINT, PREVIOUS, read_metrics
from vidsieve.training.trainer import Events, Trainer

QUICK = {"steps": 2, "prompts_per_step": 2, "log_every": 1, "save_every": 2, "seed": 5, "eval_prompts": 0}


def damaged(data, seed=0):
    """Yield copies of a file: a bit of each byte at its beginning flipped, of random bytes, and blocks made zero."""
    chance = random.Random(seed)
    for place in (*range(min(500, len(data))), *(chance.randrange(len(data)) for _ in range(200))):
        copy = bytearray(data)
        copy[place] ^= 1 << chance.randrange(8)
        yield bytes(copy)
    for start in range(0, len(data), 4096):
        yield data[:start] + bytes(len(data[start : start + 4096])) + data[start + 4096 :]


def test_tensors_and_header_come_back_or_an_error(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {
        "a": torch.randn(50, 40),
        "b.half": torch.randn(999).to(torch.bfloat16),
        "count": torch.tensor(7),
        "none": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
    }
    header = {"step": 12, "rate": 0.1, "name": "ü", "best": {"value": float("nan")}}
    save_tensors(path, tensors, header)
    data = path.read_bytes()
    for copy in damaged(data):
        path.write_bytes(copy)
        try:
            found, values, _ = load_tensors(path)
        except ValueError:
            continue
        if found:  # else the header's name was hit, and what needs a header refuses the file
            assert json.dumps({k: found[k] for k in header}) == json.dumps(header)  # the name of the checksum was hit
        assert values.keys() == tensors.keys() and all(torch.equal(values[name], tensors[name]) for name in tensors)
    save_tensors(path, tensors, header)
    assert path.read_bytes() == data


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_policy_comes_back_or_an_error_names_the_file(tmp_path, name):
    policy = ScorePolicy.start(64, "llava_onevision", hidden=16, seed=3)
    policy.config.training.update(steps=10, curve=[0.1] * 300)
    policy.save_pretrained(tmp_path)
    written = read_config(tmp_path)
    data = (tmp_path / name).read_bytes()
    for copy in damaged(data):
        (tmp_path / name).write_bytes(copy)
        try:
            found = ScorePolicy.from_pretrained(tmp_path)
        except PolicyError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error)
            continue
        assert found.config == written
        assert all(torch.equal(value, policy.state_dict()[key]) for key, value in found.state_dict().items())


def test_a_save_that_is_cut_off_between_its_files_is_noticed(tmp_path):
    ScorePolicy.start(64, "llava_onevision", hidden=16, seed=3).save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    ScorePolicy.start(64, "llava_onevision", hidden=16, seed=4).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(before)
    with pytest.raises(PolicyError, match=r"model\.safetensors and its config\.json are of different saves: fetch"):
        ScorePolicy.from_pretrained(tmp_path)


def test_files_of_older_versions_are_read(tmp_path):
    policy = ScorePolicy.start(64, "llava_onevision", hidden=16, seed=3)
    policy.save_pretrained(tmp_path)
    save_file(dict(policy.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((tmp_path / "config.json").read_text())
    del values["checksum"], values["weights"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert ScorePolicy.from_pretrained(tmp_path).config.weights == ""
    state, path = torch.nn.Linear(2, 2), tmp_path / CHECKPOINT
    tensors = {f"net.{name}": value for name, value in state.state_dict().items()}
    save_file(tensors, path, metadata={"vidsieve": json.dumps({"step": 3})})
    assert load_state(path, {"net": torch.nn.Linear(2, 2)}) == {"step": 3}


def train(testbed, folder, resume=False, warn=None, **settings):
    events = Events(warn=warn or (lambda text: None))
    return train_policy("score", *testbed, folder, QUICK | settings, model_name="testbed", resume=resume, events=events)


@pytest.fixture(scope="module")
def straight(testbed, tmp_path_factory):
    """A run of three steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("straight")
    train(testbed, folder, steps=3, save_every=1)
    return folder


@pytest.mark.parametrize("harm", ["flip", "zeros", "gone"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(testbed, straight, tmp_path, monkeypatch, harm):
    original = Trainer._optimise

    def breaks(self):
        if self.step == 2:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_optimise", breaks)
        train(testbed, tmp_path, steps=3, save_every=1)
    path, notes = tmp_path / CHECKPOINT, []
    data = bytearray(path.read_bytes())
    if harm == "flip":
        data[-100] ^= 4
    else:
        data[-4096:] = bytes(4096)
    path.write_bytes(data)
    if harm == "gone":
        path.unlink()
    train(testbed, tmp_path, resume=True, warn=notes.append, steps=3, save_every=1)
    assert notes == [f"{path} was damaged: the checkpoint before it, of step 1, has taken its place"]
    assert (tmp_path / "policy/model.safetensors").read_bytes() == (straight / "policy/model.safetensors").read_bytes()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert [read_header(tmp_path / name)["step"] for name in (PREVIOUS, CHECKPOINT)] == [2, 3]


@pytest.mark.parametrize("header", ["[" * 100_000, "[1]", '{"step": 1, "checksum": [1]}', "{}", "{"])
def test_a_header_that_is_none_is_refused(tmp_path, header):
    path = tmp_path / CHECKPOINT
    save_file({"net.weight": torch.ones(3)}, path, metadata={"vidsieve": header})
    with pytest.raises(TrainingError, match=r"is no readable checkpoint \("):
        read_header(path)


def test_a_pipe_in_the_place_of_a_checkpoint_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / CHECKPOINT)
    with pytest.raises(TrainingError, match="no such file"):
        read_header(tmp_path / CHECKPOINT)
    with pytest.raises(OutputError, match="it is not a file; remove it"):
        save_state(tmp_path / CHECKPOINT, {}, None, {"step": 1})


def test_without_a_good_checkpoint_the_run_ends(testbed, tmp_path):
    train(testbed, tmp_path, steps=2)
    for name in (CHECKPOINT, PREVIOUS):
        data = bytearray((tmp_path / name).read_bytes())
        data[-1] ^= 1
        (tmp_path / name).write_bytes(data)
    with pytest.raises(TrainingError, match=rf"{CHECKPOINT} is no readable checkpoint \(it was damaged .* start again"):
        train(testbed, tmp_path, resume=True)


def test_damaged_metrics_are_named(testbed, tmp_path):
    train(testbed, tmp_path, steps=2)
    lines = (tmp_path / METRICS).read_bytes().splitlines(keepends=True)
    (tmp_path / METRICS).write_bytes(bytes(len(lines[0]) - 1) + b"\n" + lines[1])
    with pytest.raises(TrainingError, match=r"line 1 of .*metrics\.jsonl is damaged: remove that line"):
        train(testbed, tmp_path, resume=True)


def test_two_trainings_in_one_folder_and_one_in_that_of_an_evaluation_are_refused(testbed, tmp_path, cli):
    with locked(tmp_path / METRICS):
        (tmp_path / METRICS).touch()
        half = tmp_path / ".checkpoint.safetensors.abc.part"
        half.touch()
        with pytest.raises(OutputError, match=r"another process is writing .*metrics\.jsonl \(process \d+ on "):
            train(testbed, tmp_path)
        began = time.perf_counter()
        assert "another process is writing" in cli("train", "score", tmp_path, fails=True)
        assert time.perf_counter() - began < 1, "before the model is loaded"
        assert half.exists(), "it is being written by the other process"
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "run.json").touch()
    with pytest.raises(OutputError, match="eval holds results of `eval`, `bench` or `data filter`: name another"):
        train(testbed, tmp_path / "eval")
    with pytest.raises(OutputError, match="holds no run to resume"):
        train(testbed, tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_is_never_missing_while_it_is_replaced(tmp_path):
    """Killed at each call of the system: one of the two checkpoints is whole."""

    def save_and_die(folder, calls):
        left = [calls]

        def counted(real):
            def call(*arguments):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return real(*arguments)

            return call

        for name in ("replace", "fsync", "chmod"):
            setattr(os, name, counted(getattr(os, name)))
        save_state(folder / CHECKPOINT, {"net": net}, None, {"step": 2}, keep=folder / PREVIOUS)
        os._exit(0)

    net = torch.nn.Linear(9, 9)
    for calls in range(6):
        folder = tmp_path / str(calls)
        save_state(folder / CHECKPOINT, {"net": net}, None, {"step": 1})
        child = os.fork()
        if not child:
            save_and_die(folder, calls)
        _, status = os.waitpid(child, 0)
        steps = [read_header(folder / name)["step"] for name in (CHECKPOINT, PREVIOUS) if (folder / name).exists()]
        assert steps in ([1], [2, 1]) and os.waitstatus_to_exitcode(status) == (0 if calls == 5 else 9)
