"""What is left of a run that was killed, ran out of disk, or goes on elsewhere."""

from __future__ import annotations

import errno
import os
import resource

import pytest
import torch
from safetensors import SafetensorError

from vidsieve.errors import OutputError, TrainingError
from vidsieve.io import tensors
from vidsieve.io.checkpoints import read_header, save_state
from vidsieve.policies import read_config, read_weights
from vidsieve.training.recipes import train_policy
from vidsieve.training.run_folder import CHECKPOINT, METRICS, RunFolder, read_metrics
from vidsieve.training.settings import ScoreConfig
from vidsieve.training.trainer import Trainer

QUICK = {"steps": 4, "prompts_per_step": 2, "log_every": 1, "save_every": 2, "seed": 5, "eval_prompts": 0}


def train(testbed, folder, resume=False, force=False, method="cacovid", **settings):
    return train_policy(method, *testbed, folder, QUICK | settings, model_name="testbed", resume=resume, force=force)


def same_weights(a, b):
    a, b = read_weights(a / "policy"), read_weights(b / "policy")
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def without_clock(folder):
    clock = {"minutes", "prompts_per_second", "rollouts_per_second"}
    return [{k: v for k, v in line.items() if k not in clock} for line in read_metrics(folder)]


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_killed_before_its_first_checkpoint_begins_anew(testbed, tmp_path, resume):
    (tmp_path / METRICS).touch()
    half = tmp_path / f".{CHECKPOINT}.x1y2.part"
    half.write_bytes(b"half")
    assert train(testbed, tmp_path, resume=resume)["steps"] == 4
    assert not half.exists()


def test_going_on_clears_half_written_files_and_lines(testbed, tmp_path):
    train(testbed, tmp_path, steps=2)
    halves = [tmp_path / ".metrics.jsonl.a.part", tmp_path / "policy" / ".model.safetensors.b.part"]
    for half in halves:
        half.write_bytes(b"half")
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 3, "lo')
    train(testbed, tmp_path, resume=True)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert not any(half.exists() for half in halves)


def test_a_log_line_over_a_pause_is_that_of_a_straight_run(testbed, tmp_path, monkeypatch):
    """Stopped after the checkpoint of step 2; the line of step 3 is the mean of steps 1 to 3."""
    settings = {"steps": 6, "log_every": 3, "save_every": 2, "eval_prompts": 2, "eval_every": 4}
    straight = train(testbed, tmp_path / "straight", **settings)
    original = Trainer._optimise

    def breaks(self):
        if self.step == 2:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(Trainer, "_optimise", breaks)
    with pytest.raises(KeyboardInterrupt):
        train(testbed, tmp_path / "broken", **settings)
    monkeypatch.undo()
    broken = train(testbed, tmp_path / "broken", resume=True, **settings)
    assert [line["step"] for line in read_metrics(tmp_path / "broken")] == [3, 4, 6]
    assert straight["best"] == broken["best"]
    assert without_clock(tmp_path / "straight") == without_clock(tmp_path / "broken")
    assert same_weights(tmp_path / "straight", tmp_path / "broken")


def test_other_threads_are_refused_and_forced_ones_recorded(testbed, tmp_path):
    before = torch.get_num_threads()
    train(testbed, tmp_path, steps=2)
    torch.set_num_threads(before + 1)
    try:
        with pytest.raises(TrainingError, match=rf"threads was {before}, is {before + 1}\. Use those .* or .*--force"):
            train(testbed, tmp_path, resume=True)
        record = train(testbed, tmp_path, resume=True, force=True, head_lr=0.003)
    finally:
        torch.set_num_threads(before)
    changed = ["steps was 2, is 4", "head_lr was 0.004, is 0.003", f"threads was {before}, is {before + 1}"]
    assert record["changes"] == [{"step": 2, "changed": changed}], "also what may change without --force"
    assert read_config(tmp_path / "policy").training["changes"] == record["changes"]


def test_a_former_setting_that_had_another_value_is_named(tmp_path):
    folder, policy, ours = RunFolder(tmp_path), torch.nn.Linear(2, 2), ScoreConfig().removed()
    folder.save(policy, None, {"step": 0, "minutes": 0.0, "config": ours | {"slack": 0.1}})
    with pytest.raises(TrainingError, match=r"slack was 0\.1, is 0\.0\. Use"):
        folder.load(policy, None, ours, {})
    assert folder.load(policy, None, ours, {}, force=True)[1] == ["slack was 0.1, is 0.0"]


def test_a_full_disk_stops_and_the_last_checkpoint_goes_on(testbed, tmp_path, monkeypatch):
    train(testbed, tmp_path / "straight")
    original, calls = tensors.save_file, []

    def full(values, path, metadata):
        calls.append(1)
        original(values, path, metadata)
        if len(calls) == 3:  # the checkpoints of steps 0, 2, 4
            os.truncate(path, 1000)
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(
        OutputError, match=r"No space left.*the last good checkpoint is .*: free disk space and continue with --re"
    ):
        train(testbed, tmp_path / "full")
    monkeypatch.undo()
    assert read_header(tmp_path / "full" / CHECKPOINT)["step"] == 2
    assert not list((tmp_path / "full").glob(".*.part"))
    train(testbed, tmp_path / "full", resume=True)
    assert same_weights(tmp_path / "straight", tmp_path / "full")


def test_a_full_disk_under_the_metrics_stops_too(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / CHECKPOINT).touch()
    monkeypatch.setattr(type(tmp_path), "open", full)
    with pytest.raises(OutputError, match=r"cannot write .*metrics.jsonl: No space left on device; the last good"):
        RunFolder(tmp_path).append({"step": 1})


def test_a_file_that_the_system_cuts_off_is_refused_and_the_one_before_stays(tmp_path):
    """No stand-in: the system itself lets no file of this process grow past 4 kB."""
    path = tmp_path / CHECKPOINT
    save_state(path, {"net": torch.nn.Linear(4, 4)}, None, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OutputError, match=r"cannot write .*checkpoint.safetensors: .*File too large"):
            save_state(path, {"net": torch.nn.Linear(400, 400)}, None, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_header(path)["step"] == 1 and not list(tmp_path.glob(".*.part"))
