"""What a SIGKILL costs a training run: nothing but the steps since the last checkpoint.

Both trainers run on the testbed in a process of their own, are killed at seeded moments (when the folder appears, at a
random moment, while a file is being written), resumed until they are done, and compared with a run that nobody
disturbed: weights bit by bit, metrics but for the clock. In between every file left behind must be whole. The same
file has two processes with half of each step's prompts against one process: the largest difference of a loss.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from vidsieve.io.checkpoints import read_header
from vidsieve.io.machine import machine, write_result
from vidsieve.policies import CONFIG, read_config, read_weights
from vidsieve.training.run_folder import CHECKPOINT, METRICS, POLICY, read_metrics

METHODS = ("score", "cacovid")
CLOCK = frozenset({"minutes", "prompts_per_second", "rollouts_per_second"})
SETTINGS = {
    "score": ["--steps", "10", "--prompts-per-step", "2"],
    "cacovid": ["--steps", "20", "--prompts-per-step", "2"],
}
OFTEN = ["--save-every", "1", "--log-every", "3", "--threads", "1"]


def command(method: str, folder: Path, *options: str, processes: int = 1) -> list[str]:
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    start = [sys.executable, "-m", *(launcher if processes > 1 else []), "vidsieve", "train", method, str(folder)]
    return [*start, *SETTINGS[method], *OFTEN, *options]


def halves(folder: Path) -> list[Path]:
    """Return the files in a run's folder that are being written."""
    return list(folder.glob("**/.*.part"))


def faults(folder: Path) -> list[str]:
    """Return what is corrupt in a run's folder; a last line of metrics that breaks off, and halves, are not."""
    found = []
    try:
        if (folder / CHECKPOINT).exists():
            read_header(folder / CHECKPOINT)
        if (folder / METRICS).exists():
            for line in (folder / METRICS).read_text().split("\n")[:-1]:
                json.loads(line)
        for policy in folder.glob(f"*/{CONFIG}"):
            read_config(policy.parent)
            read_weights(policy.parent)
    except (RuntimeError, ValueError) as error:
        found.append(str(error))
    return found


def kill_once(method: str, folder: Path, moment: str, draw: random.Random) -> dict[str, Any] | None:
    """Start or resume a run and kill it at a moment; return what it left, or None if it was done before."""
    resume = ["--resume"] if (folder / CHECKPOINT).exists() else []
    before, left = folder.exists(), set(halves(folder))
    run = subprocess.Popen(command(method, folder, *resume), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    begun = time.perf_counter()
    old = (folder / CHECKPOINT).stat().st_mtime_ns if resume else 0
    wait = draw.uniform(0.0, 2.0)
    skip = draw.randrange(4)  # saves to let pass
    seen: set[Path] = set()
    alive = None
    while run.poll() is None:
        now = time.perf_counter()
        writing = [path for path in halves(folder) if path not in left]
        seen.update(writing)
        if alive is None and folder.exists() and (not before or mtime(folder / CHECKPOINT) > old):
            alive = now
        if (
            (moment == "start" and (alive or writing))
            or (moment == "random" and alive and now - alive > wait)
            or (moment == "while writing" and writing and len(seen) > skip)
        ):
            break
    if run.poll() is not None:
        return None
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    return {
        "method": method,
        "moment": moment,
        "seconds": round(time.perf_counter() - begun, 2),
        "step": read_header(folder / CHECKPOINT)["step"] if (folder / CHECKPOINT).exists() else None,
        "half_written": len(halves(folder)),
        "faults": faults(folder),
    }


def mtime(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def finish(method: str, folder: Path, *options: str, processes: int = 1) -> None:
    """Run to the end."""
    done = subprocess.run(command(method, folder, *options, processes=processes), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{method} in {folder} failed:\n{done.stderr[-3000:]}")


def without_clock(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in read_metrics(folder)]


def killed(method: str, folder: Path, kills: int, draw: random.Random) -> dict[str, Any]:
    """Kill a run `kills` times, resume it to its end, and compare it with a straight one."""
    finish(method, folder / "straight")
    broken = folder / "broken"
    events = []
    for number in range(kills):
        event = kill_once(method, broken, ("start", "random", "while writing")[number % 3], draw)
        if event is None:
            break
        print(event, flush=True)
        events.append(event)
    finish(method, broken, *(["--resume"] if (broken / CHECKPOINT).exists() else []))
    a, b = (read_weights(folder / name / POLICY) for name in ("straight", "broken"))
    return {
        "kills": events,
        "weights_equal": a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a),
        "metrics_equal": without_clock(folder / "straight") == without_clock(broken),
        "left_half_written": len(halves(broken)),
        "faults": [f for event in events for f in event["faults"]],
    }


def two_against_one(method: str, folder: Path) -> float:
    """Return the largest difference between losses of one process and of two with half of each step's prompts."""
    options = ["--steps", "6", "--prompts-per-step", "4", "--log-every", "1", "--save-every", "50"]
    for processes in (1, 2):
        finish(method, folder / str(processes), *options, processes=processes)
    pairs = zip(read_metrics(folder / "1"), read_metrics(folder / "2"), strict=True)
    return max(abs(a["loss"] - b["loss"]) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=5, help="of each method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/kill_resume.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    begun = time.perf_counter()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        runs = {method: killed(method, Path(folder) / method, options.kills, draw) for method in METHODS}
        apart = {method: two_against_one(method, Path(folder) / f"{method}-processes") for method in METHODS}
    result = {
        "machine": machine(),
        "seed": options.seed,
        "runs": runs,
        "two_processes_largest_loss_difference": apart,
        "minutes": round((time.perf_counter() - begun) / 60, 1),
    }
    write_result(options.json, result)
    print(Counter(event["moment"] for run in runs.values() for event in run["kills"]))
    print({m: {k: v for k, v in run.items() if k != "kills"} for m, run in runs.items()}, apart, result["minutes"])


if __name__ == "__main__":
    main()
