"""What checksums, limits and locks cost `eval testbed` and `train`.

Each part is a process that loads the model and times the work alone: a testbed evaluation into a folder, and training
that saves a checkpoint after every tenth step. ``share`` is the part of its time spent inside the functions in
`WATCHED`, whoever calls them, older code too. With ``--against`` the same work is done by an older tree in turn with
this one; the ratio is that of the smallest times of all rounds, uncertain by about 3 % on a shared machine.
"""

from __future__ import annotations

import argparse
import importlib
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


WATCHED = (
    ("os", "fsync"),
    ("zlib", "crc32"),
    ("filelock", "FileLock.acquire"),
    ("vidsieve.io.tensors", "checksum"),
    ("vidsieve.io.files", "sync_folder"),
    ("vidsieve.io.bounded", "parsed"),
    ("vidsieve.io.bounded", "check_value"),
)


def watch(spent: dict[str, float]) -> None:
    """Count the seconds inside the watched functions; one inside another counts once."""
    depth = 0

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal depth
            depth, begun = depth + 1, time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                depth -= 1
                if not depth:
                    spent[name] = spent.get(name, 0.0) + time.perf_counter() - begun

        return call

    for module, path in WATCHED:
        *inside, name = path.split(".")
        owner = importlib.import_module(module)
        for part in inside:
            owner = getattr(owner, part)
        function = getattr(owner, name)
        wrapped = counted(f"{module}.{path}", function)
        for other in (owner, *sys.modules.values()):  # also where it was imported by name
            if getattr(other, "__dict__", {}).get(name) is function:
                setattr(other, name, wrapped)


def evaluation(folder: Path) -> Callable[[], object]:
    from vidsieve.adapters.pruning import adapter_for
    from vidsieve.evaluation.conditions import named_methods
    from vidsieve.evaluation.experiment import run
    from vidsieve.evaluation.tasks.testbed import ScenesTask, scene_conditions
    from vidsieve.loading import load_model

    model, processor = load_model("testbed")
    task = ScenesTask(adapter_for(model), processor, "dense", 9001, 480, "testbed")
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


def timed(part: str, folder: Path, watching: bool) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    work, spent = evaluation(folder) if part == "eval" else training(part, folder), dict[str, float]()
    if watching:
        watch(spent)
    begun, busy = time.perf_counter(), time.process_time()
    work()
    wall = time.perf_counter() - begun
    return {"wall": wall, "cpu": time.process_time() - busy, "share": sum(spent.values()) / wall, "inside": spent}


def measured(source: Path, part: str, *options: str) -> dict[str, Any]:
    """Return what a process with the package of a source folder measures."""
    environment = os.environ | {"PYTHONPATH": str(source.resolve()), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-W", "ignore", __file__, "--part", part, *options]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=environment)
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="src folder of the older tree")
    parser.add_argument("--part")
    parser.add_argument("--watch", action="store_true")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/hardening_cost.json"))
    options = parser.parse_args()
    if options.part:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(timed(options.part, Path(folder, "run"), options.watch)))
        return
    source = Path(__file__).parents[1] / "src"
    result: dict[str, Any] = {"machine": machine(), "parts": {}}
    for part in ("eval", *SETTINGS):
        result["parts"][part] = watched = measured(source, part, "--watch")
        write_result(options.json, result)
        print(part, f"{watched['share']:.4%} of {watched['wall']:.1f} s", watched["inside"], flush=True)
    if options.against is None:
        return
    trees = {"now": source, "before": options.against}
    for part in ("eval", *SETTINGS):
        times: dict[str, list[dict[str, Any]]] = {tree: [] for tree in trees}
        for number in range(options.rounds):
            for tree in sorted(trees, reverse=bool(number % 2)):
                times[tree].append(measured(trees[tree], part))
        best = {tree: {key: min(one[key] for one in some) for key in ("wall", "cpu")} for tree, some in times.items()}
        ratio = {key: best["now"][key] / best["before"][key] for key in ("wall", "cpu")}
        result["parts"][part] |= {"seconds": best, "now_over_before": ratio, "all": times}
        write_result(options.json, result)
        print(part, ratio, best, flush=True)


if __name__ == "__main__":
    main()
