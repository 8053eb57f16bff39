"""What checksums, limits and locks cost `eval testbed` and `train`: this tree against an older one, in one run.

Each round starts a process for either tree in turn, loads the model, and times the work alone: a testbed evaluation
into a folder, and training that saves a checkpoint after every tenth step. The ratio is that of the smallest times of
all rounds, which others on the machine disturb least; `cpu` is the processor time of the process, `wall` the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vidsieve.io.machine import machine, write_result

SETTINGS: dict[str, dict[str, Any]] = {
    "cacovid": {"steps": 20, "prompts_per_step": 2, "save_every": 10},
    "score": {"steps": 10, "prompts_per_step": 1, "save_every": 10, "eval_items": 2},
}


def evaluation(folder: Path) -> Callable[[], object]:
    from vidsieve.adapters.pruning import adapter_for
    from vidsieve.evaluation.conditions import named_methods
    from vidsieve.evaluation.experiment import run
    from vidsieve.evaluation.tasks.testbed import ScenesTask, scene_conditions
    from vidsieve.loading import load_model

    model, processor = load_model("testbed")
    task = ScenesTask(adapter_for(model), processor, "A", 9001, 480, "testbed")
    conditions = scene_conditions(named_methods(["random", "divprune", "uniform"], prefill=True), [0.25, 0.1], False)
    return lambda: run(task, conditions, folder)


def training(method: str, folder: Path) -> Callable[[], object]:
    from vidsieve.loading import load_model
    from vidsieve.training.recipes import train_policy
    from vidsieve.training.settings import CONFIGS

    model, processor = load_model("testbed")
    known = CONFIGS[method].__dataclass_fields__
    settings = {name: value for name, value in SETTINGS[method].items() if name in known}
    return lambda: train_policy(method, model, processor, folder, settings)


def timed(part: str, folder: Path) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    work = evaluation(folder) if part == "eval" else training(part, folder)
    begun, busy = time.perf_counter(), time.process_time()
    work()
    return {"wall": time.perf_counter() - begun, "cpu": time.process_time() - busy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="src folder of the older tree")
    parser.add_argument("--part")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/hardening_cost.json"))
    options = parser.parse_args()
    if options.part:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(timed(options.part, Path(folder, "run"))))
        return
    trees = {"now": Path(__file__).parents[1] / "src", "before": options.against}
    result: dict[str, Any] = {"machine": machine(), "rounds": options.rounds, "parts": {}}
    for part in ("eval", *SETTINGS):
        times: dict[str, list[dict[str, float]]] = {tree: [] for tree in trees}
        for number in range(options.rounds):
            for tree in sorted(trees, reverse=bool(number % 2)):
                environment = os.environ | {"PYTHONPATH": str(trees[tree].resolve()), "OMP_NUM_THREADS": "1"}
                run = [sys.executable, "-W", "ignore", __file__, "--part", part]
                done = subprocess.run(run, capture_output=True, text=True, check=True, env=environment)
                times[tree].append(json.loads(done.stdout.splitlines()[-1]))
        best = {tree: {key: min(one[key] for one in some) for key in ("wall", "cpu")} for tree, some in times.items()}
        ratio = {key: best["now"][key] / best["before"][key] for key in ("wall", "cpu")}
        result["parts"][part] = {"seconds": best, "now_over_before": ratio, "all": times}
        write_result(options.json, result)
        print(part, ratio, best, flush=True)


if __name__ == "__main__":
    main()
