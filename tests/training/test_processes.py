"""Several processes: they share prompts, agree, and end where one process ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vidsieve.adapters.transformers_api import module_weights
from vidsieve.cli.train import refuse_sharding
from vidsieve.errors import OutputError, TrainingError
from vidsieve.io.checkpoints import read_header
from vidsieve.policies import read_config
from vidsieve.training.processes import Processes, joined
from vidsieve.training.recipes import train_policy
from vidsieve.training.run_folder import CHECKPOINT, read_metrics
from vidsieve.training.trainer import Events

SETTINGS = (
    "--steps 4 --prompts-per-step 4 --log-every 1 --save-every 50 --threads 1 --eval-every 2 --set eval_prompts=5"
)


def command(method, folder, *options, processes=1):
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    start = [sys.executable, "-m", *(launcher if processes > 1 else []), "vidsieve"]
    few = ["--rollouts", "4"] if method == "score" else ["--token-rollouts", "6", "--frame-rollouts", "2"]
    return [*start, "train", method, str(folder), *SETTINGS.split(), *few, *options]


def test_alone_nothing_is_shared_and_no_group_is_made():
    with joined() as processes:
        assert processes == Processes(0, 1) and not torch.distributed.is_initialized()
    assert processes.share(range(4, 8)) == range(4, 8)
    assert processes.gather([1, 2]) == [1, 2] and processes.any(True, False) == (True, False)
    with pytest.raises(OutputError, match="full"), processes.agreeing():
        raise OutputError("full")


def test_prompts_are_dealt_out_and_figures_come_back_in_their_order(monkeypatch):
    shares = [[Processes(rank, 3).share(range(10, 16))] for rank in range(3)]
    assert shares[1] == [range(11, 16, 3)]
    monkeypatch.setattr(Processes, "gather", lambda self, items: [list(share) for (share,) in shares])
    assert Processes(1, 3).in_order(list(range(11, 16, 3))) == list(range(10, 16))


def test_prompts_that_cannot_be_shared_out_are_refused():
    Processes(0, 2).check_share(8)
    with pytest.raises(TrainingError, match="7, which 2 processes cannot share evenly: choose a multiple of 2"):
        Processes(0, 2).check_share(7)


def test_gradients_of_all_are_added_and_missing_ones_stay_missing(monkeypatch):
    """This process has a gradient of the first weight, another one of the second, nobody of the third."""
    import accelerate.utils

    first, second, third = (torch.nn.Parameter(torch.ones(size)) for size in (2, 3, 1))
    first.grad = torch.tensor([1.0, 2.0])
    other = torch.tensor([0.0, 0.0, 5.0, 6.0, 7.0, 0.0, 0.0, 1.0, 0.0])
    monkeypatch.setattr(accelerate.utils, "reduce", lambda mine, reduction: mine + other)
    Processes(0, 2).sum_gradients([first, second, third])
    assert first.grad.tolist() == [1, 2] and second.grad.tolist() == [5, 6, 7] and third.grad is None


def one_process(testbed, folder, method, steps, upto):
    """Train in this process, left after `upto` steps; return the metrics."""

    def leave(step, *_):
        if step == upto:
            raise KeyboardInterrupt

    settings = {
        "steps": steps,
        "prompts_per_step": 4,
        "log_every": 1,
        "save_every": 50,
        "eval_every": 2,
        "eval_prompts": 5,
        **({"rollouts": 4} if method == "score" else {"token_rollouts": 6, "frame_rollouts": 2}),
    }
    with pytest.raises(KeyboardInterrupt):
        train_policy(method, *testbed, folder, settings, model_name="testbed", events=Events(report=leave))
    return read_metrics(folder)


def assert_same(one, two):
    """Losses to 1e-5, line by line."""
    for a, b in zip(one, two, strict=True):
        assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        evals = [{k: v for k, v in line.items() if k.startswith("eval_")} for line in (a, b)]
        assert evals[0] == pytest.approx(evals[1], abs=1e-4) and bool(evals[0]) == (a["step"] % 2 == 0)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharding_that_would_not_happen_is_refused(monkeypatch, kind):
    refuse_sharding()
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(TrainingError, match=f"asks for {kind}, which `vidsieve train` does not do"):
        refuse_sharding()


def test_a_layer_that_is_shared_out_is_handed_over_whole():
    class Shared(torch.Tensor):
        def full_tensor(self):
            return torch.ones(4, 1)

    module = torch.nn.Linear(1, 2, bias=False)
    module.weight = torch.nn.Parameter(torch.zeros(2, 1).as_subclass(Shared), requires_grad=False)
    assert module_weights(module)["weight"].tolist() == [[1], [1], [1], [1]]
    assert module_weights(torch.nn.Linear(1, 2))["weight"].shape == (2, 1)


@pytest.mark.slow
def test_two_processes_train_as_one(testbed, tmp_path):
    """The same prompts shared by two: the same losses and log lines, one writer."""
    done = subprocess.run(command("cacovid", tmp_path / "two", processes=2), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("policy in") == 1
    two = read_metrics(tmp_path / "two")
    assert_same(one_process(testbed, tmp_path / "one", "cacovid", 4, 4), two)
    assert read_config(tmp_path / "two" / "policy").training["processes"] == 2
    with pytest.raises(TrainingError, match="processes was 2, is 1"):
        train_policy("cacovid", *testbed, tmp_path / "two", {"prompts_per_step": 4}, resume=True)


@pytest.mark.slow
def test_a_stop_of_one_process_stops_both_after_one_step_with_a_checkpoint(testbed, tmp_path):
    folder = tmp_path / "run"
    started = subprocess.Popen(
        command("score", folder, "--steps", "1000", processes=2),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        wait_for(lambda: (folder / CHECKPOINT).exists() and len(read_metrics(folder)) >= 2)
        os.kill(last_child(started.pid), signal.SIGTERM)
        _, said = started.communicate(timeout=120)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    lines = read_metrics(folder)
    steps = lines[-1]["step"]
    assert f"interrupted after step {steps} of 1000".encode() in said, said[-2000:]
    assert read_header(folder / CHECKPOINT)["step"] == steps
    assert_same(one_process(testbed, tmp_path / "one", "score", 1000, 2), lines[:2])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["score", "cacovid"])
def test_a_frozen_model_shared_out_by_fsdp_trains_the_same(testbed, tmp_path, method):
    """The script of docs/training.md, in two processes that hold half of each decoder layer."""
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (script,) = (part for part in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "fully_shard" in part)
    settings = {
        "steps": 4,
        "prompts_per_step": 4,
        "log_every": 1,
        "save_every": 50,
        "eval_every": 2,
        "eval_prompts": 6,
        "rollout_tokens": 1_000_000,
    }
    for documented, ours in (
        ('"score"', repr(method)),
        ('Path("runs/shared")', f"Path({str(tmp_path / 'two')!r})"),
        ('{"steps": 100, "rollout_tokens": 1_000_000}', repr(settings)),
    ):
        assert documented in script
        script = script.replace(documented, ours)
    look = (
        "from torch.distributed.tensor import DTensor\n"
        "shared = [w for w in model.model.language_model.layers.parameters() if isinstance(w, DTensor)]\n"
        "halves = all(2 * w.to_local().numel() == w.numel() for w in shared)\n"
        "import os; os.write(1, f'shared out {len(shared)} {halves}\\n'.encode())  # whole, beside the other process\n"
    )
    before, end = script.split("del model")
    script = f"{before}{look}del shared\ndel model{end}"
    (tmp_path / "share.py").write_text(script)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(tmp_path / "share.py")], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    weights = len(list(testbed[0].model.language_model.layers.parameters()))
    assert done.stdout.count(f"shared out {weights} True") == 2
    train_policy(method, *testbed, tmp_path / "one", settings, model_name="testbed")
    assert_same(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"))


def wait_for(condition, seconds=150):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "nothing happened"
        time.sleep(0.2)


def last_child(parent):
    """Return the id of the youngest process that `parent` started."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True)
    return max(map(int, children.stdout.split()))
